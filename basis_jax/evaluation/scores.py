"""Scores of graded completions, and intervals clustered by problem. NumPy only.

Axes: M problems, C completions of each. Every completion counts. One that could not be graded has
reward 0, like a wrong one.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from basis_jax.verify.verdicts import RIGHT_ABOVE

RESAMPLES = 2000


def bootstrap_interval(
    sets: Sequence[np.ndarray],
    *,
    resamples: int = RESAMPLES,
    coverage: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the average over sets of the mean of their per-problem scores.

    Problems are drawn with replacement within each set. A problem's samples are drawn together, so
    the interval is clustered by problem.
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for scores in sets:
        draws = rng.integers(0, len(scores), (resamples, len(scores)))
        means += scores[draws].mean(axis=1) / len(sets)
    tail = (1 - coverage) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def check_graded(valid: np.ndarray, name: str) -> None:
    """Raise ValueError if no completion of the set ``name`` could be graded."""
    if not valid.any():
        raise ValueError(
            f"none of the {valid.size} completions of {name} could be graded (the verifier failed "
            "on every one); check data.verifier and the answers"
        )


def counted_rewards(
    rewards: Float[np.ndarray, "M C"], valid: Bool[np.ndarray, "M C"]
) -> Float[np.ndarray, "M C"]:
    """Rewards as counted in every metric: 0 if a completion could not be graded."""
    return np.where(valid, rewards, 0).astype(np.float64)


def average(rewards: Float[np.ndarray, "M C"]) -> Float[np.ndarray, " M"]:
    """avg@C: mean reward of a problem's completions."""
    return rewards.mean(axis=1)


def pass_at_k(solved: Int[np.ndarray, " M"], size: int, k: int) -> Float[np.ndarray, " M"]:
    """Unbiased estimate of pass@k: 1 - binom(n - c, k) / binom(n, k).

    Of n = ``size`` independent completions c = ``solved`` are right. The estimate is the
    probability that k of them, drawn without replacement, include a right one (Chen et al. 2021,
    arXiv 2107.03374, eq. 1). Raises ValueError for k < 1 and k > n.
    """
    if not 1 <= k <= size:
        raise ValueError(f"pass@k needs k of 1 to {size}, the completions of a problem, not {k}")
    drawn = np.arange(k)
    wrong_left = (size - solved)[:, None] - drawn  # reaches 0 if fewer than k are wrong
    return 1 - (wrong_left / (size - drawn)).prod(axis=1)


def majority(
    rewards: Float[np.ndarray, "M C"], votes: Int[np.ndarray, "M C"]
) -> Float[np.ndarray, " M"]:
    """maj@C: the reward of the answer that most of a problem's completions give.

    ``votes`` number the different answers of a problem from 0. A negative number means that the
    completion has no answer and no vote. Completions that could not be graded vote, too. The reward
    of an answer is the mean over the completions that give it. If several answers have the most
    votes, the score is the mean over these answers. Without any vote it is 0.
    """
    problems, size = votes.shape
    row, column = np.nonzero(votes >= 0)
    number = np.zeros((problems, size))
    total = np.zeros((problems, size))
    np.add.at(number, (row, votes[row, column]), 1)
    np.add.at(total, (row, votes[row, column]), rewards[row, column])
    first = (number == number.max(axis=1, keepdims=True)) & (number > 0)
    reward = np.where(first, total / np.maximum(number, 1), 0).sum(axis=1)
    return reward / np.maximum(first.sum(axis=1), 1)


def all_scores(
    rewards: Float[np.ndarray, "M C"],
    valid: Bool[np.ndarray, "M C"],
    votes: Int[np.ndarray, "M C"],
) -> dict[str, np.ndarray]:
    """Per-problem scores of every metric: ``avg@C``, ``pass@k`` for powers of two up to C, and
    ``maj@C``.

    In ``pass@k`` a completion is right if its reward is above 1/2. A completion that is not
    ``valid`` counts as wrong.
    """
    rewards, size = counted_rewards(rewards, valid), rewards.shape[1]
    solved = (rewards > RIGHT_ABOVE).sum(axis=1)
    powers = [2**i for i in range(size.bit_length())]
    passed = {f"pass@{k}": pass_at_k(solved, size, k) for k in powers}
    return {f"avg@{size}": average(rewards), **passed, f"maj@{size}": majority(rewards, votes)}


def mean_with_interval(sets: Sequence[np.ndarray]) -> dict[str, float | int]:
    """The average over sets of the mean score of their problems, its 95 % interval, and the number
    of problems."""
    low, high = bootstrap_interval(sets)
    value = float(np.mean([scores.mean() for scores in sets]))
    return {"value": value, "low": low, "high": high, "problems": sum(map(len, sets))}


def summary(scores_by_set: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[dict, dict]:
    """``mean_with_interval`` of every metric, for each set and for all sets together.

    ``scores_by_set`` has the ``all_scores`` of each set. Together, all sets have the same weight,
    and only metrics of all sets are given. If sets differ in C, there is also ``accuracy``, the
    average of their avg@C.
    """
    sets = {
        name: {metric: mean_with_interval([values]) for metric, values in metrics.items()}
        for name, metrics in scores_by_set.items()
    }
    every = list(scores_by_set.values())
    shared = [metric for metric in every[0] if all(metric in of_set for of_set in every)]
    average = {m: mean_with_interval([of_set[m] for of_set in every]) for m in shared}
    if next(iter(every[0])) not in shared:
        own = [next(iter(of_set.values())) for of_set in every]  # avg@C
        average = {"accuracy": mean_with_interval(own), **average}
    return sets, average
