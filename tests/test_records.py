"""Run records: what is written, what is cut on resume, which restarts are refused."""

import dataclasses
import io
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from basis_jax.config import (
    Config,
    DataSection,
    EstimatorSection,
    MeshSection,
    ModelSection,
    OptimSection,
    SamplingSection,
    TrainSection,
)
from basis_jax.runs import identity, provenance
from basis_jax.runs.identity import lock_run, open_run
from basis_jax.runs.log import errors_logged
from basis_jax.runs.metrics import Records, read_metrics
from basis_jax.runs.terminal import Pace, announcement, duration

ROOT = Path(__file__).parent.parent

RUN = """
import sys
from pathlib import Path
from basis_jax.runs.identity import lock_run
from basis_jax.runs.metrics import Records
folder, total = Path(sys.argv[1]), int(sys.argv[2])
saved = folder / "checkpoint"
start = int(saved.read_text()) if saved.exists() else -1
with lock_run(folder), Records(folder, total, resume_step=start) as run:
    for step in range(start + 1, total + 1):
        run.samples(step, [{"row": row} for row in range(3)])
        run.log(step, {"reward/mean": step / 7})
        if step % 5 == 0:
            saved.with_suffix(".new").write_text(str(step))
            saved.with_suffix(".new").replace(saved)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def write(folder, steps, **options):
    with Records(folder, 10, stream=io.StringIO(), **options) as run:
        for step in steps:
            run.samples(step, [{"completion": f"{step} a"}, {"completion": f"{step} b"}])
            run.log(step, {"reward/mean": step / 3})


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_resuming_keeps_each_step_once(folder):
    """Lines beyond the checkpoint are cut and the others stay, byte for byte."""
    write(folder, range(6))
    before = (folder / "metrics.jsonl").read_bytes()
    write(folder, range(4, 8), resume_step=3)
    assert steps_of(folder / "metrics.jsonl") == list(range(8))
    assert steps_of(folder / "samples.jsonl") == [step for step in range(8) for _ in "ab"]
    assert (folder / "metrics.jsonl").read_bytes().startswith(before)


def test_starting_without_a_checkpoint_starts_the_files_afresh(folder):
    write(folder, range(6))
    write(folder, [0])
    assert steps_of(folder / "metrics.jsonl") == [0]
    assert steps_of(folder / "samples.jsonl") == [0, 0]


@pytest.mark.parametrize("torn", [b'{"step": 4, "rew', b'{"step": 3}', b"\0\0\0\n"])
def test_a_torn_last_line_is_dropped(folder, torn):
    write(folder, range(4))
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(folder)] == [0, 1, 2, 3]
    write(folder, [4], resume_step=3)
    assert steps_of(folder / "metrics.jsonl") == [0, 1, 2, 3, 4]


def test_a_damaged_line_inside_is_an_error_that_names_it(folder):
    write(folder, range(4))
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 2', '{"step 2', 1))
    with pytest.raises(ValueError, match=r"line 3 of .*metrics\.jsonl is no JSON object"):
        write(folder, [4], resume_step=3)


def test_missing_lines_before_the_checkpoint_are_told(folder):
    write(folder, range(3))
    terminal = io.StringIO()
    with Records(folder, 10, resume_step=5, stream=terminal):
        pass
    assert "ends at step 2, the checkpoint is of step 5" in terminal.getvalue()


def test_steps_must_rise(folder):
    with Records(folder, 10, stream=io.StringIO()) as run:
        run.log(2, {})
        with pytest.raises(ValueError, match="step 2 is logged after step 2"):
            run.log(2, {})
    assert steps_of(folder / "metrics.jsonl") == [2]


def test_what_is_not_finite_becomes_null(folder):
    """Every line is JSON for every reader, and the terminal still shows the nan."""
    terminal = io.StringIO()
    with Records(folder, 10, stream=terminal) as run:
        run.log(1, {"reward/mean": math.nan, "policy/loss": -math.inf})
    line = (folder / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "reward/mean": null, "policy/loss": null}\n'
    assert "reward nan" in terminal.getvalue()


def start(folder, total):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, folder, str(total)], cwd=ROOT, stdout=subprocess.DEVNULL
    )


def test_killed_at_any_moment_every_step_is_there_once(folder):
    """kill -9 at ten moments; the files end as those of a run that was never killed."""
    for moment in range(10):
        run = start(folder, 10**6)
        steps = folder / "metrics.jsonl"
        size = steps.stat().st_size if steps.exists() else 0
        deadline = time.monotonic() + 30
        while not (steps.exists() and steps.stat().st_size > size + 100 * moment):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
        run.wait()
    total = int((folder / "checkpoint").read_text()) + 3
    assert start(folder, total).wait() == 0
    rows = [{"step": step, "reward/mean": step / 7} for step in range(total + 1)]
    assert read_metrics(folder) == rows
    assert steps_of(folder / "samples.jsonl") == [s for s in range(total + 1) for _ in range(3)]


def test_a_folder_in_use_is_refused(folder):
    run = start(folder, 10**6)
    while not (folder / "checkpoint").exists():
        assert run.poll() is None
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another process is writing to the run folder"):
        with lock_run(folder):
            pass
    run.kill()
    run.wait()
    with lock_run(folder) as held:
        assert held == folder


def test_off_a_terminal_one_plain_line_a_step(folder):
    terminal = io.StringIO()
    with Records(folder, 3, stream=terminal) as run:
        run.message("evaluating")
        run.log(0, {"eval/accuracy": 0.25})
        for step in (1, 2, 3):
            times = {"time/sample_s": 2, "time/verify_s": 0.01, "time/update_s": 1.25}
            run.log(step, {"reward/mean": 0.5, "estimate/value_error": 0.125} | times)
    lines = terminal.getvalue().splitlines()
    assert lines[:2] == ["evaluating", "step 0/3  held-out 25.0%"]
    step = "reward 0.500  value error 0.125  3.2 s (sample 2.0, update 1.2)"
    assert lines[2] == f"step 1/3  {step}  about 0 s left"
    assert lines[4] == f"step 3/3  {step}"


def test_accuracy_is_shown_where_it_is_not_the_mean_reward(folder):
    terminal = io.StringIO()
    with Records(folder, 2, stream=terminal) as run:
        run.log(1, {"reward/mean": 0.5, "reward/accuracy": 0.5})
        run.log(2, {"reward/mean": 0.5, "reward/accuracy": 0.25})
    first, second = terminal.getvalue().splitlines()
    assert "accuracy" not in first and second == "step 2/2  reward 0.500  accuracy 25.0%"


def test_the_time_left_is_the_remaining_steps_at_the_usual_pace(folder, monkeypatch):
    """Ten seconds a step after one that took a hundred, ninety of them to compile."""
    clock = iter([0.0, 100.0, 110.0])
    clock_module = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr("basis_jax.runs.terminal.time", clock_module)
    terminal = io.StringIO()
    with Records(folder, 10, stream=terminal) as run:
        run.log(1, {"compile/seconds": 90.0})
        run.log(2, {})
    assert terminal.getvalue().splitlines() == [
        "step  1/10  about 1 min 30 s left",
        "step  2/10  about 1 min 20 s left",
    ]


def test_a_time_is_said_in_its_two_largest_units():
    said = {0.4: "0 s", 59.7: "1 min", 125.0: "2 min 5 s", 3600.0: "1 h"}
    said[12010.0] = "3 h 20 min"
    said[4 * 86400 + 3600 + 59.0] = "4 d 1 h"
    assert {seconds: duration(seconds) for seconds in said} == said


def test_the_time_to_compile_is_part_of_the_steps_time(folder):
    terminal = io.StringIO()
    with Records(folder, 1, stream=terminal) as run:
        run.log(1, {"time/update_s": 12.0, "compile/seconds": 9.0})
    assert terminal.getvalue() == "step 1/1  12.0 s (update 12.0; 9.0 of it to compile)\n"


def test_the_pace_of_this_process_alone_says_what_is_left(monkeypatch):
    """Forty of a hundred were done by an earlier one; twenty took ten seconds."""
    clock = iter([0.0, 10.0])
    clock_module = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr("basis_jax.runs.terminal.time", clock_module)
    pace = Pace(40, 100)
    assert pace.left(60) == ", about 20 s left"
    assert pace.left(40) == pace.left(100) == ""


@pytest.mark.parametrize(
    ("saved", "state"),
    [([], "new"), (["2", "4"], "resumed at step 4"), (["10"], "all steps are done")],
    ids=["new", "resumed", "done"],
)
def test_a_run_is_announced_in_one_line(tmp_path, saved, state):
    for name in [*saved, "7.tmp"]:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    config = Config(
        run_dir=str(tmp_path),
        model=ModelSection(path="M"),
        data=DataSection(path="a.csv", more_sets={"b.csv": 1.0}),
        sampling=SamplingSection(group_size=8),
        train=TrainSection(steps=10, prompts_per_step=16),
    )
    assert announcement(config) == (
        "training M on a.csv, b.csv: 10 steps of 16 prompts with 8 completions each; run folder "
        f"{tmp_path} ({state})"
    )


def test_on_a_terminal_a_bar_stands_below_the_same_lines(folder):
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal, Records(folder, 4, stream=terminal) as run:
        run.message("loading [red]x")
        run.log(1, {"reward/mean": 0.5})
        run.log(2, {"reward/mean": 0.75})
    shown = os.read(reader, 100_000).decode()
    os.close(reader)
    assert "loading [red]x" in shown and "━" in shown
    for line in ("step 1/4  reward 0.500", "step 2/4  reward 0.750"):
        assert shown.count(line) == 1  # written once, and not over one another


def test_tensorboard_gets_every_scalar_and_hides_what_was_cut(folder):
    from tensorboardX.proto.event_pb2 import Event

    write(folder, range(4))
    time.sleep(1.1)  # event files are named by the second
    write(folder, [3], resume_step=2)
    events = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # length (8), crc (4), event, crc (4)
            size = int.from_bytes(data[at : at + 8], "little")
            events.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += size + 16
    scalars = [(e.step, v.tag) for e in events for v in e.summary.value]
    assert scalars == [(step, "reward/mean") for step in (0, 1, 2, 3, 3)]
    starts = [e.step for e in events if e.HasField("session_log")]
    assert starts == [0, 3]  # TensorBoard drops earlier events from this step on


def test_without_tensorboardx_one_sentence_says_so(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    terminal = io.StringIO()
    with Records(folder, 10, stream=terminal) as run:
        run.log(1, {})
    assert "tensorboardX is not installed" in terminal.getvalue().splitlines()[0]
    assert not (folder / "tensorboard").exists()


def config(folder, **sections):
    return dataclasses.replace(Config(run_dir=str(folder)), **sections)


def begun(folder, **sections):
    """A run folder with a checkpoint in it."""
    (folder / "checkpoints" / "10").mkdir(parents=True)
    open_run(config(folder, **sections), devices=[], identity={"data.path": "abc"})
    return folder


def test_the_run_folder_says_what_ran(tmp_path):
    folder = begun(tmp_path)
    record = json.loads((folder / "config.json").read_text())
    assert record["config"]["optim"]["lr"] == 1e-6 and record["identity"] == {"data.path": "abc"}
    (first,) = record["starts"]
    assert first["devices"] == [] and first["versions"]["jax"] == jax.__version__
    assert first.keys() == {"commit", "uncommitted_changes", "versions", "devices"}
    assert provenance.provenance("no-such-package")["versions"]["no-such-package"] is None
    for devices in (["cpu:0"], ["cpu:0"], ["gpu:0"]):
        open_run(config(folder), devices=devices, identity={"data.path": "abc"})
    starts = json.loads((folder / "config.json").read_text())["starts"]
    assert [start["devices"] for start in starts] == [[], ["cpu:0"], ["gpu:0"]]


def test_another_configuration_is_refused_with_the_fields_that_differ(tmp_path):
    folder = begun(tmp_path)
    before = (folder / "config.json").read_text()
    estimator = EstimatorSection(name="rloo", options={"group_size": 4})
    with pytest.raises(ValueError) as error:
        open_run(config(folder, seed=3, estimator=estimator), devices=[])
    assert str(error.value) == (
        f"run folder {folder} holds a run of another configuration: "
        "the training problems of data.path have changed since the run began; "
        'estimator.name is "basis" there and "rloo" here; '
        "estimator.options.group_size is absent there and 4 here; seed is 0 there and 3 here; "
        "take the values that are there, or give another --run-dir"
    )
    assert (folder / "config.json").read_text() == before


def test_other_problems_behind_the_same_path_are_refused(tmp_path):
    folder = begun(tmp_path)
    with pytest.raises(ValueError, match="the training problems of data.path have changed since"):
        open_run(config(folder), devices=[], identity={"data.path": "abd"})


def test_another_verifier_behind_the_same_name_is_refused(tmp_path):
    identity = {"data.path": "abc", "eval.set_verifiers held_out.jsonl": "1"}
    folder = begun(tmp_path)
    with pytest.raises(ValueError, match="the file of the verifier of held_out.jsonl has changed"):
        open_run(config(folder), devices=[], identity=identity)


def test_a_run_without_a_checkpoint_may_start_with_another_configuration(tmp_path):
    """It starts anew: after a crash in the first steps the mended command needs no new folder."""
    open_run(config(tmp_path), devices=[])
    open_run(config(tmp_path, seed=3), devices=[])
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["config"]["seed"] == 3 and len(record["starts"]) == 1


def test_fields_that_change_no_number_may_differ(tmp_path):
    train = TrainSection(steps=12, log_samples=0, sample_rollouts=2, microbatch_rollouts=2)
    folder = begun(tmp_path)
    now = config(folder, train=train, mesh=MeshSection(fsdp=2))
    open_run(now, devices=[], identity={"data.path": "abc"})
    record = json.loads((folder / "config.json").read_text())
    assert record["config"]["train"]["steps"] == 12


def test_a_run_folder_may_be_moved(tmp_path):
    moved = begun(tmp_path / "here").rename(tmp_path / "there")
    open_run(config(moved), devices=[], identity={"data.path": "abc"})


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_decaying_schedule_fixes_the_number_of_steps(tmp_path, schedule):
    optim = OptimSection(schedule=schedule)
    begun(tmp_path, optim=optim)
    with pytest.raises(ValueError, match="train.steps is 100 there and 7 here"):
        open_run(config(tmp_path, optim=optim, train=TrainSection(steps=7)), devices=[])


def test_fewer_steps_than_are_done_are_refused_and_nothing_is_written(tmp_path):
    before = (begun(tmp_path) / "config.json").read_text()
    with pytest.raises(ValueError, match="has done 10 steps and train.steps is 9; give 10 or more"):
        open_run(
            config(tmp_path, train=TrainSection(steps=9)), devices=[], identity={"data.path": "abc"}
        )
    assert (tmp_path / "config.json").read_text() == before


def test_a_run_of_an_older_version_lacks_fields_that_are_at_their_defaults(tmp_path):
    folder = begun(tmp_path)
    path = folder / "config.json"
    record = json.loads(path.read_text())
    del record["config"]["watch"], record["config"]["train"]["patience"]
    path.write_text(json.dumps(record))
    open_run(config(folder), devices=[], identity={"data.path": "abc"})
    del record["config"]["optim"]["b1"]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="optim.b1 is 0.9 there and 0.8 here"):
        open_run(config(folder, optim=OptimSection(b1=0.8)), devices=[], identity={})


def test_a_second_start_without_a_checkpoint_keeps_the_records_of_the_first(folder):
    for start in range(3):
        terminal = io.StringIO()
        with Records(folder, 10, stream=terminal) as run:
            run.samples(0, [{"completion": f"start {start}"}])
            run.log(0, {"reward/mean": float(start)})
        kept = "kept as metrics.1.jsonl, samples.1.jsonl" in terminal.getvalue()
        assert kept == (start == 1)
    for start, name in enumerate(("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")):
        assert json.loads((folder / name).read_text())["reward/mean"] == start
    assert "start 0" in (folder / "samples.1.jsonl").read_text()


def test_the_log_has_every_line_with_its_time(folder):
    with Records(folder, 10, stream=io.StringIO()) as run:
        run.message("evaluating \ud800")
        run.log(0, {"eval/accuracy": 0.25})
        run.log(1, {"reward/mean": 0.5})
    with pytest.raises(ValueError), errors_logged(folder):
        raise ValueError("a sentence")
    lines = (folder / "log.txt").read_text().splitlines()
    assert all(re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    assert [line[21:] for line in lines][:2] == ["evaluating \\ud800", "step  0/10  held-out 25.0%"]
    assert lines[2][21:].startswith("step  1/10  reward 0.500") and lines[3].endswith(
        "error: a sentence"
    )


def test_samples_are_written_as_utf8(folder):
    with Records(folder, 10, stream=io.StringIO()) as run:
        run.samples(0, [{"completion": "é 数 \ud800"}])
    written = (folder / "samples.jsonl").read_bytes()
    assert "é 数 ".encode() in written and b"\\ud800" in written
    assert json.loads(written)["completion"] == "é 数 \ud800"


def test_several_held_out_sets_are_shown_by_name(folder):
    terminal = io.StringIO()
    values = {"eval/AIME24/accuracy": 0.1, "eval/AIME24/greedy_accuracy": 0.2}
    with Records(folder, 1, stream=terminal) as run:
        run.log(1, values | {"eval/MATH-500/accuracy": 0.5, "eval/accuracy": 0.3})
    line = terminal.getvalue()
    assert "held-out 30.0%  AIME24 10.0%  MATH-500 50.0%" in line and "20.0%" not in line


def test_every_field_that_may_differ_exists():
    names = [name for name, _ in identity._leaves(dataclasses.asdict(Config(run_dir="")))]
    for field in identity.MAY_DIFFER:
        assert any(n == field or field[-1] == "." and n.startswith(field) for n in names), field


def test_what_is_no_run_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made .File exists.; give another --run-dir"):
        with lock_run(tmp_path / "file"):
            pass
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is not a run's config.json"):
        open_run(config(tmp_path), devices=[])
    with pytest.raises(ValueError, match="no metrics.jsonl in"):
        read_metrics(tmp_path)


def git(folder, *command):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", folder, *identity, *command]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "first")
    return tmp_path


def commit_of(package, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(package / "runs" / "provenance.py"))
    return tuple(provenance._commit().values())


def test_the_commit_and_uncommitted_changes_are_recorded(repository, monkeypatch):
    head = git(repository, "rev-parse", "HEAD")
    assert commit_of(repository / "basis_jax", monkeypatch) == (head, False)
    (repository / "new.py").write_text("")
    assert commit_of(repository / "basis_jax", monkeypatch) == (head, True)


def test_without_a_repository_of_our_own_or_without_git_the_commit_is_null(repository, monkeypatch):
    """Installed inside another repository's folder, that one's commit is not ours."""
    installed = repository / "site-packages" / "basis_jax"
    installed.mkdir(parents=True)
    assert commit_of(installed, monkeypatch) == (None, None)
    monkeypatch.setenv("PATH", str(repository))
    assert commit_of(repository / "basis_jax", monkeypatch) == (None, None)
