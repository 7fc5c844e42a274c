"""Scores of completions against enumeration and counts by hand."""

import math
from itertools import combinations

import numpy as np
import pytest

from basis_jax.evaluation import scores


@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(size):
    """Every subset of k completions is looked at, for every number of right ones and every k."""
    for right in range(size + 1):
        outcomes = [1] * right + [0] * (size - right)
        for k in range(1, size + 1):
            subsets = list(combinations(outcomes, k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            (found,) = scores.pass_at_k(np.array([right]), np.array([size]), k)
            assert found == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_exact_where_binomials_are_huge():
    n, c, k = 1024, 3, 256
    (found,) = scores.pass_at_k(np.array([c]), np.array([n]), k)
    assert found == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), rel=1e-12)


def test_pass_at_k_needs_k_graded_completions():
    found = scores.pass_at_k(np.array([2, 2, 0]), np.array([4, 3, 0]), 4)
    assert found[0] == 1 and np.isnan(found[1:]).all()
    with pytest.raises(ValueError, match="k of 1 or more, not 0"):
        scores.pass_at_k(np.array([1]), np.array([1]), 0)


MAJORITIES = [  # votes, rewards, valid, score by hand
    ([0, 0, 1, 2], [1, 1, 0, 0], [1, 1, 1, 1], 1),  # two of four
    ([0, 1, 1, 2], [1, 0, 0, 0], [1, 1, 1, 1], 0),  # the wrong answer has two
    ([0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], 1 / 2),  # tie of two answers
    ([0, 1, 2, -1], [0, 0, 1, 0], [1, 1, 1, 1], 1 / 3),  # tie of three
    ([0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1], 0),  # a failed verdict has no vote
    ([-1, -1, -1, 0], [0, 0, 0, 1], [1, 1, 1, 1], 1),  # who gives no answer abstains
    ([-1, -1, -1, -1], [0, 0, 0, 0], [1, 1, 1, 1], 0),  # nobody votes
    ([0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], math.nan),  # nothing could be graded
    ([0, 0, 0, 1], [1, 0, 1, 0], [1, 1, 1, 1], 2 / 3),  # one answer, graded both ways
]


def test_the_majority_is_that_counted_by_hand():
    votes, rewards, valid, expected = (np.array(column) for column in zip(*MAJORITIES, strict=True))
    found = scores.majority(rewards.astype(float), valid.astype(bool), votes)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_majority_of_one_and_pass_at_one_are_the_average():
    rng = np.random.default_rng(0)
    rewards, valid = (rng.random((50, 4)) < 0.4).astype(float), rng.random((50, 4)) < 0.8
    found = scores.all_scores(rewards, valid, np.zeros((50, 4), int))
    assert list(found) == ["avg@4", "pass@1", "pass@2", "pass@4", "maj@4"]
    np.testing.assert_allclose(found["pass@1"], found["avg@4"], rtol=1e-12)
    single = scores.all_scores(rewards[:, :1], valid[:, :1], np.zeros((50, 1), int))
    assert list(single) == ["avg@1", "pass@1", "maj@1"]
    for metric in single.values():
        np.testing.assert_array_equal(metric, single["avg@1"])


def test_what_was_not_graded_is_in_no_mean_and_no_count():
    valid = np.array([[True, False], [False, False], [True, True]])
    rewards = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    found = scores.all_scores(rewards, valid, np.zeros((3, 2), int))
    sets, average = scores.summary({"one": found})
    assert sets["one"]["avg@2"]["value"] == 0.75 and sets["one"]["avg@2"]["problems"] == 2
    assert sets["one"]["pass@2"]["value"] == 1 and sets["one"]["pass@2"]["problems"] == 1
    assert average == sets["one"]


def test_a_set_without_a_verdict_makes_no_number():
    dead = scores.all_scores(np.zeros((2, 1)), np.zeros((2, 1), bool), np.zeros((2, 1), int))
    good = scores.all_scores(np.ones((2, 1)), np.ones((2, 1), bool), np.zeros((2, 1), int))
    sets, average = scores.summary({"dead": dead, "good": good})
    nothing = {"value": None, "low": None, "high": None, "problems": 0}
    assert sets["dead"]["avg@1"] == nothing and sets["good"]["avg@1"]["value"] == 1
    assert average["avg@1"] == nothing | {"problems": 2}


def test_sets_weigh_equally_in_the_average_and_intervals_hold_the_value():
    rng = np.random.default_rng(1)
    sets = {}
    for name, size, rate in (("small", 10, 0.9), ("large", 1000, 0.1)):
        rewards = (rng.random((size, 2)) < rate).astype(float)
        shape = (size, 2)
        sets[name] = scores.all_scores(rewards, np.ones(shape, bool), np.zeros(shape, int))
    found, average = scores.summary(sets)
    middle = (found["small"]["avg@2"]["value"] + found["large"]["avg@2"]["value"]) / 2
    assert average["avg@2"]["value"] == pytest.approx(middle)
    for metric in [*found["small"].values(), *found["large"].values(), *average.values()]:
        assert metric["low"] <= metric["value"] <= metric["high"]
    widths = {n: m["avg@2"]["high"] - m["avg@2"]["low"] for n, m in found.items()}
    assert widths["small"] > widths["large"]
