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
            (found,) = scores.pass_at_k(np.array([right]), size, k)
            assert found == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_exact_where_binomials_are_huge():
    n, c, k = 1024, 3, 256
    (found,) = scores.pass_at_k(np.array([c]), n, k)
    assert found == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), rel=1e-12)


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_needs_as_many_completions(k):
    with pytest.raises(ValueError, match=f"k of 1 to 3, the completions of a problem, not {k}"):
        scores.pass_at_k(np.array([1]), 3, k)


MAJORITIES = [  # votes, rewards, valid, score by hand
    ([0, 0, 1, 2], [1, 1, 0, 0], [1, 1, 1, 1], 1),  # two of four
    ([0, 1, 1, 2], [1, 0, 0, 0], [1, 1, 1, 1], 0),  # the wrong answer has two
    ([0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], 1 / 2),  # tie of two answers
    ([0, 1, 2, -1], [0, 0, 1, 0], [1, 1, 1, 1], 1 / 3),  # tie of three
    ([0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1], 1 / 4),  # not graded: votes, and counts as wrong
    ([0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1], 0),  # an answer not graded can win, and is wrong
    ([-1, -1, -1, 0], [0, 0, 0, 1], [1, 1, 1, 1], 1),  # who gives no answer abstains
    ([-1, -1, -1, -1], [0, 0, 0, 0], [1, 1, 1, 1], 0),  # nobody votes
    ([0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], 0),  # nothing could be graded
    ([0, 0, 0, 1], [1, 0, 1, 0], [1, 1, 1, 1], 2 / 3),  # one answer, graded both ways
]


def test_the_majority_is_that_counted_by_hand():
    votes, rewards, valid, expected = (np.array(column) for column in zip(*MAJORITIES, strict=True))
    found = scores.all_scores(rewards.astype(float), valid.astype(bool), votes)["maj@4"]
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


def test_what_was_not_graded_counts_as_wrong_in_every_metric():
    """Two right and two not graded give 1/2, whatever reward stands beside them; a problem that
    nothing was graded of gives 0 and stays in the mean."""
    valid = np.array([[True, True, False, False], [False] * 4])
    found = scores.all_scores(np.ones((2, 4)), valid, np.zeros((2, 4), int))
    assert {metric: values.tolist() for metric, values in found.items()} == {
        "avg@4": [1 / 2, 0],
        "pass@1": [1 / 2, 0],
        "pass@2": [pytest.approx(5 / 6), 0],
        "pass@4": [1, 0],
        "maj@4": [1 / 2, 0],
    }
    sets, average = scores.summary({"one": found})
    assert sets["one"]["avg@4"]["value"] == 1 / 4 and sets["one"]["avg@4"]["problems"] == 2
    assert average == sets["one"]


def test_a_set_without_a_verdict_is_an_error():
    shape = (2, 1)
    with pytest.raises(ValueError, match="none of the 2 completions of AIME24 could be graded"):
        scores.check_graded(np.zeros(shape, bool), "AIME24")
    scores.check_graded(np.array([[False], [True]]), "AIME24")


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
