"""``--fork-from``: a new run that begins with a checkpoint of another one."""

import json
from pathlib import Path

import numpy as np
import pytest
from whole_runs import final_arrays, lines, repeatable, small

from basis_jax import command_line, files
from basis_jax.config import Config, TrainSection
from basis_jax.training import fork
from basis_jax.training.loop import train


@pytest.fixture(scope="module")
def base(tiny_folder, dapo_file, tmp_path_factory):
    """A function that makes a config, and the folder of a whole run of four steps."""
    folder = tmp_path_factory.mktemp("fork")

    def config(name, **changes):
        changes = {
            "checkpoint.keep": 5,
            "checkpoint.every": 1,
            "train.minibatch-rollouts": 4,
        } | changes
        arguments = small(tiny_folder, dapo_file, folder / name, **changes)
        return command_line.parse("", argv=["--config", "quickstart", *arguments])[0]

    return config, train(config("base"), report=lambda _: None)


def forked(config, origin):
    said = []
    return train(config, fork_from=str(origin), report=said.append), said


@pytest.mark.slow
def test_a_fork_with_the_same_settings_is_the_same_run_bit_for_bit(base):
    """Metrics, samples, parameters, moments and estimator state, and nothing is lost by the way."""
    config, origin = base
    run_dir, said = forked(config("same"), f"{origin}@2")
    assert f"forked from {origin} at step 2; changed: nothing" in said
    assert repeatable(lines(run_dir / "metrics.jsonl")) == repeatable(
        lines(origin / "metrics.jsonl")
    )
    assert lines(run_dir / "samples.jsonl") == lines(origin / "samples.jsonl")
    (step, found), (_, wanted) = final_arrays(run_dir), final_arrays(origin)
    assert step == 4 and found.keys() == wanted.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)


@pytest.mark.slow
def test_a_fork_names_what_changed_and_is_resumed_as_any_run(base):
    config, origin = base
    changed = config("lr", **{"optim.lr": 5e-3, "checkpoint.every": 3})
    run_dir, said = forked(changed, f"{origin}@2")
    assert any("changed: checkpoint.every is 1 there and 3 here; optim.lr is" in x for x in said)
    assert not any("afresh" in x for x in said)
    rows, before = (lines(d / "metrics.jsonl") for d in (run_dir, origin))
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[:3] == before[:3]
    assert rows[3]["optim/learning_rate"] != before[3]["optim/learning_rate"]
    assert json.loads((run_dir / "config.json").read_text())["forked_from"] == f"{origin}@2"
    assert forked(changed, f"{origin}@2")[0] == run_dir  # finished: nothing is done again
    with pytest.raises(ValueError, match=r"that was forked from .*@2, and --fork-from is .*@1"):
        forked(changed, f"{origin}@1")


@pytest.mark.slow
def test_another_estimator_starts_afresh_and_that_is_said(base):
    config, origin = base
    run_dir, said = forked(config("other", **{"estimator.name": "reinforce_pp"}), f"{origin}@2")
    [sentence] = [x for x in said if "afresh" in x]
    assert "the estimator's state starts afresh, because estimator.name is" in sentence
    start = {k: v for k, v in final_arrays_of(run_dir, 2).items() if "estimator_state" not in k}
    wanted = {plain(k): v for k, v in final_arrays_of(origin, 2).items()}
    assert any("opt_state" in name for name in start)
    for name, leaf in start.items():
        np.testing.assert_array_equal(leaf, wanted[plain(name)], err_msg=name)


@pytest.mark.slow
def test_a_critic_goes_on_if_the_old_run_had_one_and_starts_afresh_otherwise(base):
    config, origin = base
    first, said = forked(config("critic", **{"estimator.name": "gae"}), f"{origin}@2")
    assert any("warning: the critic starts afresh, because critic" in x for x in said)
    again, said = forked(config("critic_again", **{"estimator.name": "gae"}), f"{first}@3")
    assert not any("afresh" in x for x in said)
    found, wanted = (final_arrays_of(folder, 4) for folder in (again, first))
    assert any("critic" in name for name in wanted)
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def plain(name):
    return name.lstrip("0123456789")


def final_arrays_of(run_dir, step):
    import orbax.checkpoint as ocp

    folder = run_dir / "checkpoints" / str(step) / "state"
    return {k: np.asarray(v) for k, v in ocp.StandardCheckpointer().restore(folder).items()}


@pytest.fixture
def two_steps(tmp_path):
    """A run folder that looks as if it had checkpoints of two steps; the second is damaged."""
    for step in ("2", "4"):
        (tmp_path / "run" / "checkpoints" / step).mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / step / "data").write_text("x")
        files.seal(tmp_path / "run" / "checkpoints" / step)
    (tmp_path / "run" / "checkpoints" / "4" / "data").write_text("y")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("origin", "steps", "sentence"),
    [
        ("nowhere", 9, "--fork-from is nowhere, which holds no checkpoint; give RUN or RUN@STEP"),
        ("RUN@3", 9, "checkpoints of RUN are of the steps 2, 4"),
        ("RUN@x", 9, "checkpoints of RUN are of the steps 2, 4"),
        ("RUN", 9, "checkpoint RUN/checkpoints/4 is damaged (data is not as it was written)"),
        ("RUN@2", 2, "begins after step 2 and train.steps is 2"),
    ],
    ids=["nowhere", "no-such-step", "no-number", "damaged", "no-steps-left"],
)
def test_what_cannot_be_forked_is_refused_before_anything_is_read(
    two_steps, tmp_path, origin, steps, sentence
):
    config = Config(run_dir=str(tmp_path / "new"), train=TrainSection(steps=steps))
    with pytest.raises(ValueError) as refused:
        train(config, fork_from=origin.replace("RUN", str(two_steps)))
    assert sentence.replace("RUN/", f"{two_steps}/").replace("of RUN", f"of {two_steps}") in str(
        refused.value
    )
    assert not (tmp_path / "new").exists()


def test_a_fork_that_has_begun_needs_the_other_run_no_more(tmp_path):
    (tmp_path / "new" / "checkpoints" / "3").mkdir(parents=True)
    assert fork.find(str(tmp_path / "gone"), Config(run_dir=str(tmp_path / "new"))) is None


def test_a_run_is_not_forked_into_its_own_folder(two_steps):
    config = Config(run_dir=str(two_steps), train=TrainSection(steps=9))
    with pytest.raises(ValueError, match="the run folder itself; give another --run-dir"):
        fork.find(f"{two_steps}@2", config)
    assert fork.find(f"{two_steps}@2", Config(run_dir="", train=config.train)) == Path(
        two_steps / "checkpoints" / "2"
    )
