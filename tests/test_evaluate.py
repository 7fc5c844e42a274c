"""Held-out accuracy and its interval."""

import numpy as np
import pytest
import tiny
from test_reference_table import SAMPLING, SIZE, problems, setting  # noqa: F401

from basis_jax.config import EvalSection
from basis_jax.evaluate import bootstrap_interval, evaluate, problem_scores


def test_the_interval_covers_the_mean_as_often_as_it_says():
    """300 data sets of 80 problems: a 95 % interval misses in 15 on average; more than 40 (or fewer
    than 2) has probability below 1e-6, the interval's own small error included."""
    rng = np.random.default_rng(0)
    missed = 0
    for trial in range(300):
        low, high = bootstrap_interval([rng.random(80) < 0.3], resamples=400, seed=trial)
        missed += not low <= 0.3 <= high
    assert 2 <= missed <= 40


def test_samples_of_a_problem_do_not_narrow_the_interval():
    """Copies of every score are the same information: clustered by problem, nothing changes."""
    scores = np.array([0.0, 1.0, 0.0, 0.0, 1.0] * 8)
    copied = problem_scores(np.repeat(scores, 16), np.ones(640, bool), 16)
    assert bootstrap_interval([copied]) == bootstrap_interval([scores])


def test_sets_weigh_equally_whatever_their_size():
    low, high = bootstrap_interval([np.ones(1000), np.zeros(3)])
    assert low == high == 0.5


def test_a_failed_verdict_is_no_zero():
    rewards = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    scores = problem_scores(rewards, rewards > 0, 2)
    assert scores.tolist() == [1.0, 1.0]  # the second problem has no verdict at all
    with pytest.raises(ValueError, match="none of the 2 held-out completions"):
        problem_scores(np.zeros(2), np.zeros(2, bool), 2)


def test_before_and_after_use_the_same_noise_and_greedy_uses_none(setting, problems):  # noqa: F811
    def accuracy(temperature):
        return evaluate(
            tiny.params(),
            setting,
            {"one": problems, "two": problems},
            section=EvalSection(samples=4, temperature=temperature),
            sampling=SAMPLING,
        )

    first = accuracy(1.0)
    assert first == accuracy(1.0)
    assert first["eval/accuracy"] == pytest.approx(
        (first["eval/one/accuracy"] + first["eval/two/accuracy"]) / 2
    )
    assert first["eval/accuracy_low"] <= first["eval/accuracy"] <= first["eval/accuracy_high"]
    greedy = accuracy(0.0)
    assert (
        greedy["eval/accuracy"] == greedy["eval/greedy_accuracy"] == first["eval/greedy_accuracy"]
    )
    assert len(problems.problems) == SIZE
