"""Scores of graded completions, and intervals clustered by problem. NumPy only.

Axes: M problems, C completions of each. Every completion counts: one that could not be graded has
reward 0, as a wrong one.
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


def check_graded(valid: np.ndarray, name: str) -> None:
    """Raise a ValueError where no completion of the set ``name`` could be graded."""
    if not valid.any():
        raise ValueError(
            f"none of the {valid.size} completions of {name} could be graded (the verifier failed "
            "on every one); check data.verifier and the answers"
        )


def counted_rewards(
    rewards: Float[np.ndarray, "M C"], valid: Bool[np.ndarray, "M C"]
) -> Float[np.ndarray, "M C"]:
    """Rewards as every metric counts them: 0 where a completion could not be graded."""
    return np.where(valid, rewards, 0).astype(np.float64)


def average(rewards: Float[np.ndarray, "M C"]) -> Float[np.ndarray, " M"]:
    """avg@C: mean reward of a problem's completions."""
    return rewards.mean(axis=1)


def pass_at_k(solved: Int[np.ndarray, " M"], size: int, k: int) -> Float[np.ndarray, " M"]:
    """1 - binom(n - c, k) / binom(n, k): the probability that k of the n = ``size`` completions,
    drawn without replacement, hold one of the c = ``solved``. Unbiased for pass@k under n
    independent completions (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    Raises ValueError for k < 1 and k > n.
    """
    if not 1 <= k <= size:
        raise ValueError(f"pass@k needs k of 1 to {size}, the completions of a problem, not {k}")
    drawn = np.arange(k)
    wrong_left = (size - solved)[:, None] - drawn  # 0 at some draw where there are too few
    return 1 - (wrong_left / (size - drawn)).prod(axis=1)


def majority(
    rewards: Float[np.ndarray, "M C"], votes: Int[np.ndarray, "M C"]
) -> Float[np.ndarray, " M"]:
    """maj@C: the reward of the answer that most of a problem's completions give.

    ``votes`` number the different answers of a problem from 0; below 0 a completion gives none
    and abstains. One that could not be graded votes as the others do. The reward of an answer is
    the mean over the completions that give it; where several answers have most votes, the mean
    over these answers. Without a vote the score is 0.
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
    """Every metric's per-problem scores: ``avg@C``, ``pass@k`` for powers of two up to C (right:
    a reward above 1/2), ``maj@C``. Where not ``valid``, a completion counts as wrong."""
    rewards, size = counted_rewards(rewards, valid), rewards.shape[1]
    solved = (rewards > RIGHT_ABOVE).sum(axis=1)
    powers = [2**i for i in range(size.bit_length())]
    passed = {f"pass@{k}": pass_at_k(solved, size, k) for k in powers}
    return {f"avg@{size}": average(rewards), **passed, f"maj@{size}": majority(rewards, votes)}


def mean_with_interval(sets: Sequence[np.ndarray]) -> dict[str, float | int]:
    """The average over sets of their problems' mean score, its 95 % interval and the number of
    problems."""
    low, high = bootstrap_interval(sets)
    value = float(np.mean([scores.mean() for scores in sets]))
    return {"value": value, "low": low, "high": high, "problems": sum(map(len, sets))}


def summary(scores_by_set: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[dict, dict]:
    """``mean_with_interval`` of every metric: of each set, given its ``all_scores``, and of the
    sets together, where every set weighs the same. Together they have the metrics that all of them
    have, and where they differ in C also ``accuracy``, the average of their avg@C."""
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
