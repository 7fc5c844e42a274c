"""Scores of graded completions, and intervals clustered by problem. NumPy only.

Axes: M problems, C completions of each. A completion whose verdict is not valid is in no sum and no
count; a problem without enough valid ones scores NaN and leaves the metric's mean.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

RESAMPLES = 2000


def bootstrap_interval(
    sets: Sequence[np.ndarray],
    *,
    resamples: int = RESAMPLES,
    coverage: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the average over sets of the mean of their per-problem scores.

    Problems are drawn with replacement within each set. A problem's samples move together: the
    interval is clustered by problem.
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for scores in sets:
        draws = rng.integers(0, len(scores), (resamples, len(scores)))
        means += scores[draws].mean(axis=1) / len(sets)
    tail = (1 - coverage) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def average(
    rewards: Float[np.ndarray, "M C"], valid: Bool[np.ndarray, "M C"]
) -> Float[np.ndarray, " M"]:
    """avg@C: mean reward of a problem's valid completions; NaN where there is none."""
    counted = valid.sum(axis=1)
    total = np.where(valid, rewards, 0).sum(axis=1)
    return np.where(counted > 0, total / np.maximum(counted, 1), np.nan)


def pass_at_k(
    solved: Int[np.ndarray, " M"], counted: Int[np.ndarray, " M"], k: int
) -> Float[np.ndarray, " M"]:
    """1 - binom(n - c, k) / binom(n, k): the probability that k of the n = ``counted`` completions,
    drawn without replacement, hold one of the c = ``solved``. Unbiased for pass@k under n
    independent completions (Chen et al. 2021, arXiv 2107.03374, eq. 1). NaN where n < k.

    Raises ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"pass@k needs k of 1 or more, not {k}")
    drawn = np.arange(k)
    wrong_left = (counted - solved)[:, None] - drawn  # 0 at some draw where there are too few
    all_wrong = (wrong_left / np.maximum(counted[:, None] - drawn, 1)).prod(axis=1)
    return np.where(counted >= k, 1 - all_wrong, np.nan)


def majority(
    rewards: Float[np.ndarray, "M C"],
    valid: Bool[np.ndarray, "M C"],
    votes: Int[np.ndarray, "M C"],
) -> Float[np.ndarray, " M"]:
    """maj@C: the reward of the answer that most of a problem's valid completions give.

    ``votes`` number the different answers of a problem from 0; below 0 a completion gives none
    and abstains. The reward of an answer is the mean over the completions that give it; where
    several answers have most votes, the mean over these answers. Without a vote the score is 0,
    without a valid completion NaN.
    """
    problems, size = votes.shape
    row, column = np.nonzero(valid & (votes >= 0))
    number = np.zeros((problems, size))
    total = np.zeros((problems, size))
    np.add.at(number, (row, votes[row, column]), 1)
    np.add.at(total, (row, votes[row, column]), rewards[row, column])
    first = (number == number.max(axis=1, keepdims=True)) & (number > 0)
    reward = np.where(first, total / np.maximum(number, 1), 0).sum(axis=1)
    score = reward / np.maximum(first.sum(axis=1), 1)
    return np.where(valid.any(axis=1), score, np.nan)


def all_scores(
    rewards: Float[np.ndarray, "M C"],
    valid: Bool[np.ndarray, "M C"],
    votes: Int[np.ndarray, "M C"],
) -> dict[str, np.ndarray]:
    """Every metric's per-problem scores: ``avg@C``, ``pass@k`` for powers of two up to C (right:
    a reward above 1/2), ``maj@C``."""
    size = rewards.shape[1]
    solved, counted = (valid & (rewards > 0.5)).sum(axis=1), valid.sum(axis=1)
    powers = [2**i for i in range(size.bit_length())]
    passed = {f"pass@{k}": pass_at_k(solved, counted, k) for k in powers}
    return {
        f"avg@{size}": average(rewards, valid),
        **passed,
        f"maj@{size}": majority(rewards, valid, votes),
    }


def mean_with_interval(sets: Sequence[np.ndarray]) -> dict[str, float | int | None]:
    """The average over sets of their problems' mean score, its 95 % interval and the number of
    problems counted; None where a set has no problem that counts."""
    kept = [scores[~np.isnan(scores)] for scores in sets]
    problems = sum(map(len, kept))
    if not all(map(len, kept)):
        return {"value": None, "low": None, "high": None, "problems": problems}
    low, high = bootstrap_interval(kept)
    value = float(np.mean([scores.mean() for scores in kept]))
    return {"value": value, "low": low, "high": high, "problems": problems}


def summary(scores_by_set: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[dict, dict]:
    """``mean_with_interval`` of every metric: of each set, given its ``all_scores``, and of the
    sets together, where every set weighs the same."""
    sets = {
        name: {metric: mean_with_interval([values]) for metric, values in metrics.items()}
        for name, metrics in scores_by_set.items()
    }
    names = next(iter(scores_by_set.values()))
    return sets, {m: mean_with_interval([of[m] for of in scores_by_set.values()]) for m in names}
