"""A run without signal does not move the policy, and what goes wrong quietly is said aloud."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from whole_runs import small

from basis_jax import command_line
from basis_jax.config import Config, DataSection, TrainSection, WatchSection
from basis_jax.opening import rollout_setup
from basis_jax.opening.checks import check_words
from basis_jax.runs.metrics import read_metrics
from basis_jax.sampling.rollouts import Graded
from basis_jax.training.loop import train
from basis_jax.training.watch import MIN_REWARDS, Watch, findings, has_signal
from basis_jax.types import Rollouts
from basis_jax.verify import Verifier
from basis_jax.verify.verdicts import RIGHT, WRONG, verdict_of

N = 32


def graded(rewards, valid=None):
    rewards = np.asarray(rewards, np.float32)
    rows = np.zeros(rewards.size, np.int32)
    return Graded(
        rollouts=Rollouts(
            tokens=np.zeros((rewards.size, 1), np.int32),
            prompt_lengths=rows,
            completion_lengths=rows,
            sampler_logprobs=np.zeros((rewards.size, 1), np.float32),
            score_norms=np.zeros(rewards.size, np.float32),
            terminated=rows == 0,
            problem_ids=rows,
        ),
        completions=[f"completion {i}" for i in range(rewards.size)],
        rewards=rewards,
        valid=np.ones(rewards.size, bool) if valid is None else np.asarray(valid),
        reasons=["differs"] * rewards.size,
        kinds=["wrong"] * rewards.size,
        sample_seconds=1.0,
        verify_seconds=0.0,
    )


@pytest.mark.parametrize("value", [0.0, 1.0, 0.25])
def test_enough_equal_rewards_are_no_signal(value):
    assert not has_signal(graded([value] * MIN_REWARDS))
    assert has_signal(graded([value] * (MIN_REWARDS - 1)))
    assert has_signal(graded([value] * (MIN_REWARDS - 1) + [value + 1]))


def test_only_valid_rewards_count():
    rewards, valid = [0.0] * MIN_REWARDS + [1.0], [True] * MIN_REWARDS + [False]
    assert not has_signal(graded(rewards, valid))
    assert not has_signal(graded([0.0, 1.0], [False, False]))


class HalfFailing(Verifier):
    """Every second verdict of a call is that the grading process was killed."""

    def grade(self, completions, answers):
        failed = verdict_of("failure", "the grading process died by SIGKILL")
        return [(RIGHT, failed)[i % 2] for i in range(len(completions))]


class EveryAnswer(Verifier):
    def __init__(self, verdict):
        self.verdict = verdict

    def grade(self, completions, answers):
        return [self.verdict] * len(completions)


def run_with(verdict, monkeypatch, tiny_folder, dapo_file, run_dir, **changes):
    """A run in which every completion has this verdict, or that of this verifier; what it says
    ends up on the terminal."""
    verifier = verdict if isinstance(verdict, Verifier) else EveryAnswer(verdict)
    monkeypatch.setattr(rollout_setup, "make_verifier", lambda *_, **__: verifier)
    sizes = {"train.prompts-per-step": N, "train.minibatch-rollouts": N, "train.steps": 6}
    sizes |= {"train.microbatch-rollouts": N, "train.sample-rollouts": N, "train.patience": 4}
    arguments = small(tiny_folder, dapo_file, run_dir, **sizes | {"checkpoint.every": 2} | changes)
    config = command_line.parse("", argv=["--config", "quickstart", *arguments])[0]
    states = []

    def remember(step, state, metrics):
        states.append(jax.device_get((state.params, state.opt_state, state.estimator_state)))

    try:
        train(config, callbacks=[remember], report=lambda _: None)
    finally:
        for state in states[1:]:
            jax.tree.map(np.testing.assert_array_equal, state[:2], states[0][:2])
    return states


@pytest.mark.slow
def test_all_wrong_moves_nothing_and_ends_the_run(
    monkeypatch, capsys, tiny_folder, dapo_file, tmp_path
):
    """Parameters and moments stay bit for bit, with a KL term too; the message shows completions
    with their reasons, and a resumed run ends in the same way."""
    for _ in range(2):
        with pytest.raises(ValueError, match="no completion of the last [45] steps was") as ended:
            run_with(
                WRONG,
                monkeypatch,
                tiny_folder,
                dapo_file,
                tmp_path / "run",
                **{"estimator.name": "value_filter", "loss.kl-coef": 0.1},
            )
        assert str(ended.value).count("(differs; right answer ") == 3
        assert "\n" not in str(ended.value)
    lines = read_metrics(tmp_path / "run")
    assert [line["estimate/no_signal"] for line in lines[1:]] == [1.0] * 5
    assert "policy/grad_norm" not in lines[1]
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["kind"] for line in samples} == {"wrong"}
    shown = capsys.readouterr().out
    assert shown.count("valid rewards of this step are 0: there is nothing to learn") == 1


@pytest.mark.slow
def test_the_first_update_is_that_of_the_start_and_the_estimator_still_learns(
    monkeypatch, tiny_folder, dapo_file, tmp_path
):
    changes = {"estimator.name": "ema", "train.steps": 2}
    states = run_with(RIGHT, monkeypatch, tiny_folder, dapo_file, tmp_path / "run", **changes)
    first, second = (np.asarray(jax.tree.leaves(state[2])[0]) for state in states)
    assert not np.array_equal(first, second)


@pytest.mark.slow
def test_all_right_is_solved(monkeypatch, capsys, tiny_folder, dapo_file, tmp_path):
    for _ in range(2):  # started again, it takes no further step
        run_with(RIGHT, monkeypatch, tiny_folder, dapo_file, tmp_path / "run")
        assert "solved: every completion of the last 4 steps was right" in capsys.readouterr().out
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["step"] == 4 and "eval/accuracy" in lines[-1]
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()


@pytest.mark.slow
def test_every_evaluation_says_what_could_not_be_graded(
    monkeypatch, capsys, tiny_folder, dapo_file, tmp_path
):
    changes = {"train.steps": 1}
    run_with(HalfFailing(), monkeypatch, tiny_folder, dapo_file, tmp_path / "run", **changes)
    before, *_, after = read_metrics(tmp_path / "run")
    assert before["eval/invalid"] == before["eval/verify/failure"] == after["eval/invalid"] == 0.5
    assert before["eval/accuracy"] == after["eval/greedy_accuracy"] == 0.5
    shown = capsys.readouterr().out
    assert shown.count("50.00% of the held-out completions could not be graded and count") == 2


def watch(**train_section):
    section = TrainSection(patience=3, **train_section)
    return Watch(dataclasses.replace(Config(run_dir=""), train=section))


HEALTHY = {
    "policy/entropy": 1.0,
    "policy/grad_norm": 1.0,
    "completion/length_mean": 100.0,
    "completion/truncated": 0.1,
    "estimate/zero_share": 0.1,
    "estimate/no_signal": 0.0,
    "reward/invalid": 0.0,
    "reward/mean": 0.5,
    "sampler/logprob_gap_mean": 0.01,
}
BAD = {
    "zero_share": ("estimate/zero_share", 0.95),
    "invalid": ("reward/invalid", 0.2),
    "truncated": ("completion/truncated", 0.6),
    "entropy": ("policy/entropy", 0.04),
    "length": ("completion/length_mean", 15.0),
    "logprob_gap": ("sampler/logprob_gap_mean", 0.2),
    "grad_norm": ("policy/grad_norm", 0.009),
}


def say(watched, metrics, rewards=(0, 1)):
    watched.count(metrics)
    return list(watched.warnings(metrics, graded(rewards), ["7"] * len(rewards)))


@pytest.mark.parametrize("name", BAD)
def test_each_limit_warns_once_and_says_what_to_do(name):
    assert set(BAD) == {field.name for field in dataclasses.fields(WatchSection)}
    key, value = BAD[name]
    watched = watch()
    assert say(watched, HEALTHY) == []
    (warning,) = say(watched, HEALTHY | {key: value})
    assert warning.startswith("warning: ") and warning.endswith(f"(limit: watch.{name})")
    assert say(watched, HEALTHY | {key: value}) == []


@pytest.mark.parametrize("name", BAD)
def test_a_warning_named_in_abort_on_ends_the_run(name):
    key, value = BAD[name]
    watched = watch(abort_on=(name,))
    say(watched, HEALTHY)
    with pytest.raises(ValueError, match=f"the run ends as train.abort_on has {name}: "):
        say(watched, HEALTHY | {key: value})


def test_a_value_that_is_not_there_or_not_finite_is_beyond_no_limit():
    assert findings({}, {}, WatchSection()) == {}
    assert findings(dict.fromkeys(HEALTHY, float("nan")), HEALTHY, WatchSection()) == {}


def test_a_resumed_run_counts_on_from_its_metrics():
    lines = [HEALTHY | {"step": 1}, *[HEALTHY | {"estimate/no_signal": 1.0}] * 2]
    section = TrainSection(patience=3)
    history = json.loads(json.dumps(lines))
    watched = Watch(dataclasses.replace(Config(run_dir=""), train=section), history)
    with pytest.raises(ValueError, match="no completion of the last 3 steps was right"):
        say(watched, HEALTHY | {"estimate/no_signal": 1.0, "reward/mean": 0.0}, [0] * 40)


def test_a_step_with_signal_starts_the_count_again():
    watched = watch()
    for alike in (1, 1, 0, 1, 1):
        say(watched, HEALTHY | {"estimate/no_signal": float(alike)}, [0.0] * 40)
    assert not watched.solved


@pytest.mark.parametrize(
    ("weight", "right", "ended"),
    [
        (1.0, 0.0, "no completion of the last 3 steps was right"),
        (0.0, 0.0, "all rewards were equal in each of the last 3 steps"),
        (0.0, 1.0, "all rewards were equal in each of the last 3 steps"),
        (1.0, 0.6, "all rewards were equal in each of the last 3 steps"),
        (1.0, 1.0, ""),
    ],
)
def test_right_and_wrong_end_a_run_only_where_they_are_rewarded(weight, right, ended):
    """With a verifier of weight 0, equal rewards say nothing about answers."""
    section = TrainSection(patience=3)
    data = DataSection(verifier_weight=weight, rewards={"format": 1.0})
    watched = Watch(dataclasses.replace(Config(run_dir=""), train=section, data=data))
    alike = HEALTHY | {"estimate/no_signal": 1.0, "reward/accuracy": right}
    for _ in range(2):
        say(watched, alike, [0.0] * 40)
    if ended:
        with pytest.raises(ValueError, match=ended):
            say(watched, alike, [0.0] * 40)
    else:
        say(watched, alike, [0.0] * 40)
    assert watched.solved is not bool(ended)


def test_few_equal_rewards_are_warned_about_and_still_used():
    watched = watch()
    (warning,) = say(watched, HEALTHY, [1.0] * 8)
    assert "the 8 valid rewards of this step are all equal" in warning
    assert say(watched, HEALTHY, [1.0] * 8) == []


def test_an_unknown_warning_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="train.abort_on is 'entropi'; allowed are zero_share"):
        check_words(
            ("train.abort_on", "entropi", [f.name for f in dataclasses.fields(WatchSection)])
        )


def test_the_quickstart_is_within_every_limit():
    """Its metrics of 73 steps, seed 0: no warning of a run that learns."""
    file = Path(__file__).with_name("data") / "quickstart_metrics.jsonl"
    watched = watch()
    for line in map(json.loads, file.read_text().splitlines()):
        assert say(watched, {key: float(value) for key, value in line.items()}) == []
