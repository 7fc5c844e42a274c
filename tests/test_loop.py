"""``train`` is ``make_step`` called step after step, with records and checkpoints around it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whole_runs import documented_metrics, repeatable, small

from basis_jax import command_line
from basis_jax.config import CheckpointSection
from basis_jax.runs import checkpoint
from basis_jax.runs.metrics import read_metrics
from basis_jax.runs.stopping import StopRequested
from basis_jax.training import loop
from basis_jax.training.loop import evaluate_now, make_step, train
from basis_jax.training.session import open_session
from basis_jax.training.start import first_state, state_shapes
from basis_jax.types import TrainState

STEPS = 2


@pytest.fixture(scope="module")
def config(tiny_folder, dapo_file, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("loop") / "run"
    changes = {"train.steps": STEPS, "checkpoint.every": 5, "train.minibatch-rollouts": 4}
    changes |= {"eval.every": 1, "train.microbatch-rollouts": "auto"}
    arguments = small(tiny_folder, dapo_file, run_dir, **changes)
    return command_line.parse("", argv=["--config", "quickstart", *arguments])[0]


@pytest.fixture(scope="module")
def run(config):
    """What the callbacks of a whole run were given: (step, parameters, metrics)."""
    seen = []

    def remember(step, state, metrics):
        seen.append((step, jax.device_get(state.params), dict(metrics)))

    assert train(config, callbacks=[remember], report=lambda _: None) == Path(config.run_dir)
    return seen


@pytest.mark.slow
def test_callbacks_see_every_step_with_the_metrics_that_were_logged(config, run):
    logged = read_metrics(config.run_dir)
    assert [step for step, _, _ in run] == [1, 2]
    assert all(np.isfinite(metrics["policy/grad_norm"]) for _, _, metrics in run)
    for step, _, metrics in run:
        assert metrics.items() <= logged[step].items()


def test_every_metric_is_explained_in_the_documentation(config, run):
    keys = {key for line in read_metrics(config.run_dir) for key in line}
    assert keys - documented_metrics() == {"step"}


def test_a_size_that_is_chosen_stands_in_the_run_folder(config, run):
    assert config.train.microbatch_rollouts == 0
    record = json.loads((Path(config.run_dir) / "config.json").read_text())
    assert record["config"]["train"]["microbatch_rollouts"] == 1  # 4 an update, 4 devices


@pytest.mark.slow
def test_steps_taken_by_hand_give_the_same_policy(config, run, tmp_path):
    with open_session(config, lambda _: None, training=True) as session:
        with jax.set_mesh(session.setup.mesh):
            step = make_step(session)
            state = first_state(session, tmp_path, lambda _: None)
            for number in range(STEPS):
                state, metrics, graded, estimate = step(state, number)
                assert int(state.step) == number + 1
                same = (metrics["reward/mean"], metrics["policy/grad_norm"])
                logged = run[number][2]
                assert same == (logged["reward/mean"], logged["policy/grad_norm"])
                assert graded.rewards.mean() == np.float32(metrics["reward/mean"])
                assert estimate.advantages.shape == graded.rewards.shape
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), run[-1][1])
            shapes = state_shapes(session)
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, shapes)


def test_a_finished_run_takes_no_further_step(config, run):
    before = (Path(config.run_dir) / "metrics.jsonl").read_bytes()
    train(config, callbacks=[lambda *_: pytest.fail("a step was taken")], report=lambda _: None)
    assert (Path(config.run_dir) / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("evaluation", range(STEPS + 1))
def test_a_stop_during_an_evaluation_loses_no_step(config, run, tmp_path, monkeypatch, evaluation):
    """The step is saved, the sentence names it, and the evaluation is made when the run goes on."""
    own = dataclasses.replace(config, run_dir=str(tmp_path / "run"))
    evaluations = iter(range(STEPS + 1))

    def stopped_in(*arguments):
        if next(evaluations) == evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_now(*arguments)

    monkeypatch.setattr(loop, "evaluate_now", stopped_in)
    with pytest.raises(StopRequested) as stopped:
        train(own, report=lambda _: None)
    monkeypatch.undo()
    said = f"up to step {evaluation} saved" if evaluation else "before a step was saved"
    assert said in str(stopped.value) and stopped.value.exit_code == 128 + signal.SIGTERM
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.splitlines()[-1].endswith(str(stopped.value)) and "Traceback" not in log
    train(own, report=lambda _: None)
    rows, expected = (repeatable(read_metrics(c.run_dir)) for c in (own, config))
    assert rows == expected and all("eval/accuracy" in row for row in rows)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_a_checkpoint_with_numbers_that_are_not_finite_is_refused_by_their_name(
    tmp_path, value, part
):
    bad = jnp.ones((4, 3)).at[1, 2].set(value)
    large = jnp.full(9, 3e38)  # whose sum overflows
    state = TrainState(
        step=jnp.int32(3),
        params={"embed": large, "layers": {"up": bad if part == "params" else large}},
        opt_state=({"mu": bad if part == "opt_state" else large, "count": jnp.int32(2)},),
        estimator_state=jnp.float32([np.nan]),  # as a table of rewards has it
    )
    with checkpoint.open_checkpoints(tmp_path, CheckpointSection()) as checkpoints:
        checkpoint.save(checkpoints, state, {})
        with pytest.raises(ValueError) as refused:
            checkpoint.restore(checkpoints, state)
        name = "params.layers.up" if part == "params" else "opt_state.0.mu"
        assert str(refused.value) == (
            f"checkpoint {tmp_path / 'checkpoints' / '3'} holds NaN or infinity in {name}; remove "
            "that folder to resume from the one before, or give another --run-dir"
        )
        whole = dataclasses.replace(state, params={}, opt_state=(large,), step=jnp.int32(4))
        checkpoint.save(checkpoints, whole, {})
        assert int(checkpoint.restore(checkpoints, whole).step) == 4


def many_numbers(step):
    params = {"weights": jnp.arange(4_000_000, dtype=jnp.float32)}
    return TrainState(step=jnp.int32(step), params=params, opt_state=(), estimator_state=())


def test_a_state_may_be_donated_while_it_is_saved(tmp_path):
    state = many_numbers(1)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    with checkpoint.open_checkpoints(tmp_path, CheckpointSection()) as checkpoints:
        checkpoint.save(checkpoints, state, {})
        state = overwrite(state)
        assert checkpoint.finish(checkpoints) == 1
        restored = checkpoint.restore(checkpoints, many_numbers(1))
    np.testing.assert_array_equal(restored.params["weights"], np.arange(4_000_000))


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_loop import CheckpointSection, checkpoint, many_numbers
with checkpoint.open_checkpoints(Path(sys.argv[1]), CheckpointSection()) as checkpoints:
    checkpoint.save(checkpoints, many_numbers(1), {})
    checkpoint.save(checkpoints, many_numbers(2), {})
    os._exit(9)
"""


@pytest.mark.slow
def test_a_checkpoint_that_a_kill_interrupts_is_never_the_newest(tmp_path):
    """The one before it is complete; what was begun is complete or gone."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 9
    with checkpoint.open_checkpoints(tmp_path, CheckpointSection()) as checkpoints:
        restored = checkpoint.restore(checkpoints, many_numbers(1))
        assert int(restored.step) == checkpoints.latest_step() in (1, 2)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left in ({"1"}, {"1", "2"})
    np.testing.assert_array_equal(restored.params["weights"], np.arange(4_000_000))


def test_what_fails_in_the_background_is_told_by_the_next_who_waits():
    def failed():
        raise OSError(28, "No space left on device")

    checkpoints = SimpleNamespace(
        latest_step=lambda: 4, wait_until_finished=failed, directory=Path("/x")
    )
    with pytest.raises(ValueError, match="checkpoint /x/4 could not be written .*No space left"):
        checkpoint.save(checkpoints, many_numbers(5), {})
    with pytest.raises(ValueError, match="checkpoint /x/4 could not be written"):
        checkpoint.finish(checkpoints)


def test_a_checkpoint_that_cannot_be_written_is_one_sentence(monkeypatch):
    """What tensorstore says of a full disk, shortened to the system's words, without the tracebacks
    of its threads; those of others are shown."""
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: shown.append(unraisable))
    others = SimpleNamespace(exc_value=RuntimeError("something else"))

    def full(*_, **__):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError("Event loop is closed")))
        sys.unraisablehook(others)
        raise ValueError(
            'RESOURCE_EXHAUSTED: Error writing "05" at local file "/x/": Failed writing: "/x/d": '
            "Failed to write 2641920 bytes to file 23: No space left on device [os_error_code='28']"
        )

    nothing = {"latest_step": lambda: None, "wait_until_finished": lambda: None}
    checkpoints = SimpleNamespace(save=full, directory=Path("/x"), **nothing)
    state = TrainState(step=jnp.int32(3), params={}, opt_state=(), estimator_state=())
    with pytest.raises(ValueError, match=r"checkpoint /x/3 .* \(No space left on device\)"):
        checkpoint.save(checkpoints, state, {})
    assert shown == [others]
    sys.unraisablehook(others)
    assert shown == [others, others]
