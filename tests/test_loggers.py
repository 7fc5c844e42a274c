"""Loggers beside metrics.jsonl: by name, several at once, the user's own; a resumed run goes on in
the same remote run. wandb, trackio and mlflow are tested where they are installed."""

import importlib.util
import io
import json
import posixpath
import re
import sys
import types

import pytest

from basis_jax.runs import loggers
from basis_jax.runs.metrics import Records, read_metrics

OWN = """
class Logger:
    def __init__(self, run):
        self.remote_id = run.remote_id or f"made at step {run.next_step}"
        self.file = open(run.folder / "own.txt", "a")
        self.file.write(f"open {run.next_step} {run.config['seed']} {self.remote_id}\\n")
    def log(self, step, metrics):
        self.file.write(f"{step} {sorted(metrics)}\\n")
    def close(self):
        self.file.write("close\\n")
        self.file.close()

class Broken(Logger):
    def log(self, step, metrics):
        raise OSError("the network\\nis gone")

def without_close(run):
    class Half:
        def log(self, step, metrics): pass
    return Half()

def raises(run):
    raise ConnectionError("no such host")

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    run = tmp_path / "run"
    run.mkdir()
    return run


def records(folder, names, resume_step=-1):
    stream = io.StringIO()
    made = Records(
        folder, 9, resume_step, stream=stream, loggers=names, config={"seed": 5, "data": {"a": 1}}
    )
    made.stream = stream
    return made


def two_steps_then_three(folder, names):
    """Steps 0 to 3, of which step 3 is behind the checkpoint, then 3 and 4 after a resume."""
    with records(folder, names) as run:
        for step in range(4):
            run.log(step, {"reward/mean": 0.5 + step, "eval/task:x/accuracy": 1.0})
    with records(folder, names, resume_step=2) as run:
        for step in (3, 4):
            run.log(step, {"reward/mean": 0.5 + step})
        run.complete({"eval/accuracy": 0.25})


def test_an_own_logger_gets_every_step_and_its_run_again(folder):
    two_steps_then_three(folder, ["own.py:Logger"])
    both = "['eval/task:x/accuracy', 'reward/mean']"
    assert (folder / "own.txt").read_text().splitlines() == [
        "open 0 5 made at step 0",
        *(f"{step} {both}" for step in range(4)),
        "close",
        "open 3 5 made at step 0",
        "3 ['reward/mean']",
        "4 ['reward/mean']",
        "4 ['eval/accuracy']",
        "close",
    ]


def test_a_run_that_starts_anew_has_a_new_remote_run(folder):
    """Without a checkpoint nothing of the earlier start is gone on with."""
    for _ in range(2):
        with records(folder, ["own.py:Logger"]) as run:
            run.log(0, {"a": 1.0})
            (folder / loggers.REMEMBERED).write_text('{"own.py:Logger": "old"}')
    assert (folder / "own.txt").read_text().count("open 0 5 made at step 0") == 2


def test_a_logger_that_fails_is_reported_once_and_the_others_go_on(folder):
    with records(folder, ["own.py:Broken", "own.py:Logger"]) as run:
        run.log(0, {"a": 1.0})
        run.log(1, {"a": 1.0})
    warning = "warning: the logger own.py:Broken failed at step 0 (OSError: the network is gone)"
    assert run.stream.getvalue().count(warning) == 1
    assert "1 ['a']" in (folder / "own.txt").read_text()
    assert [row["step"] for row in read_metrics(folder)] == [0, 1]


@pytest.mark.parametrize(
    "name, message",
    [
        ("tensorbord", "train.loggers names 'tensorbord'; allowed are tensorboard, wandb, trackio"),
        ("own.py:number", "own.py:number is of the type int; give a class or a function"),
        ("own.py:Loger", r"has no logger 'Loger'; did you mean Logger\?"),
        ("none.py:Logger", "there is no file .*none.py"),
    ],
)
def test_what_is_no_logger_is_refused_before_anything_is_opened(folder, name, message):
    with pytest.raises(ValueError, match=message):
        loggers.check_loggers(["tensorboard", name])


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb, which is not installed; .*basis-jax\[wandb\]"):
        loggers.check_loggers(["wandb"])
    loggers.check_loggers(["tensorboard"])


@pytest.mark.parametrize(
    "name, message",
    [
        ("own.py:without_close", r"made a Half without close\(\); give it log\(step, metrics\)"),
        ("own.py:raises", r"could not be opened \(ConnectionError: no such host\); fix it or"),
    ],
)
def test_what_cannot_be_opened_ends_the_run_with_a_sentence(folder, name, message):
    with pytest.raises(ValueError, match=message):
        records(folder, [name])


def fake_wandb(seen):
    """wandb's part that is used; runs by id."""

    class Run:
        def __init__(self, **options):
            self.id = options["id"] or f"id{len(seen)}"
            seen.append((self.id, options))

        def define_metric(self, name, step_metric=None):
            pass

        def log(self, values):
            seen.append((self.id, values))

        def finish(self):
            seen.append((self.id, "finished"))

    return types.SimpleNamespace(init=lambda **options: Run(**options))


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(folder, monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(seen))
    two_steps_then_three(folder, ["wandb"])
    assert {run for run, _ in seen} == {"id0"}
    opened = [options for _, options in seen if isinstance(options, dict) and "project" in options]
    assert [options["resume"] for options in opened] == [None, "allow"]
    assert opened[0]["config"] == {"seed": 5, "data": {"a": 1}} and opened[0]["name"] == "run"
    steps = [values["step"] for _, values in seen if isinstance(values, dict) and "step" in values]
    assert steps == [0, 1, 2, 3, 3, 4, 4]


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed")
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(folder, monkeypatch):
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    two_steps_then_three(folder, ["wandb"])
    (remote_id,) = json.loads((folder / loggers.REMEMBERED).read_text()).values()
    written = sorted(p.name for p in (folder / "wandb").glob("offline-run-*"))
    assert len(written) == 2 and all(name.endswith(remote_id) for name in written)


@pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="mlflow is not installed")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_in_a_folder(folder, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{folder}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    two_steps_then_three(folder, ["mlflow"])
    client = MlflowClient()
    experiment = client.get_experiment_by_name("basis_jax")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.metrics["eval/accuracy"] == 0.25
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert {(m.step, m.value) for m in history} == {(i, 0.5 + i) for i in range(5)}


def test_mlflow_names_are_allowed_ones_and_stay_different():
    """The rules are those of ``mlflow.utils.validation``, checked with MLflow where it is there."""
    kept = ["reward/mean", "eval/task:number_words/accuracy", "time/sample_s"]
    changed = [
        *("eval/org/set?split=test/accuracy", "eval/org/set_split_test/accuracy"),
        *("eval/org/set?split=test/accuracy", "eval/org/set=split?test/accuracy"),
        *("eval//data/a.csv/accuracy", "eval/./a.csv/accuracy", "eval/../a.csv/accuracy"),
        *("eval/" + "x" * 300 + "/accuracy", "eval/" + "x" * 300 + "/greedy_accuracy"),
        *("/a", "../a", "é%"),
    ]
    assert [loggers.mlflow_name(name) for name in kept] == kept
    made = {loggers.mlflow_name(name) for name in changed}
    assert len(made) == len({*changed})
    for name in made:
        assert re.fullmatch(r"[\w.:/ -]{1,250}", name)
        assert posixpath.normpath(name) == name and name[0] not in "./"
    if importlib.util.find_spec("mlflow"):
        from mlflow.utils.validation import _validate_metric_name

        for name in made:
            _validate_metric_name(name)


@pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="trackio is not installed")
@pytest.mark.filterwarnings("ignore")
def test_trackio_in_a_folder(folder, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))
    two_steps_then_three(folder, ["trackio"])
    (remote_id,) = json.loads((folder / loggers.REMEMBERED).read_text()).values()
    assert remote_id.startswith("run-") and any((folder / "trackio").rglob("*.db"))
