"""Accuracy on held-out problems with a bootstrap interval clustered by problem."""

import dataclasses

import numpy as np
from jaxtyping import PyTree

from basis_jax.config import EvalSection, SamplingSection
from basis_jax.data import EncodedProblems
from basis_jax.rollouts import Graded, Setting, roll_out


def bootstrap_interval(
    scores: np.ndarray, *, resamples: int = 2000, coverage: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of per-problem scores [M], problems drawn with replacement.

    A problem's samples move together, so the interval is clustered by problem.
    """
    rng = np.random.default_rng(seed)
    means = [scores[rng.integers(0, len(scores), len(scores))].mean() for _ in range(resamples)]
    tail = (1 - coverage) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def problem_scores(graded: Graded, problems: int, samples: int) -> np.ndarray:
    """Mean reward per problem over its valid samples; problems without one are left out."""
    rewards = graded.rewards.reshape(problems, samples)
    valid = graded.valid.reshape(problems, samples)
    counted = valid.sum(axis=1)
    return rewards.sum(axis=1)[counted > 0] / counted[counted > 0]


def evaluate(
    params: PyTree,
    setting: Setting,
    problems: EncodedProblems,
    *,
    section: EvalSection,
    sampling: SamplingSection,
) -> dict[str, float]:
    """``eval/accuracy`` at the evaluation temperature with its 95 % interval, and greedy accuracy.

    The noise is the same at every call, so that before and after differ by the policy alone.
    """
    metrics = {}
    passes = [("", section.samples, section.temperature), ("greedy_", 1, 0.0)]
    for prefix, samples, temperature in passes:
        size = len(problems.problems)
        graded = roll_out(
            params,
            setting,
            problems,
            ids=np.repeat(np.arange(size, dtype=np.int32), samples),
            samples=np.tile(np.arange(samples, dtype=np.int32), size),
            sampling=dataclasses.replace(sampling, temperature=temperature),
            stream="evaluate",
            step=0,
        )
        scores = problem_scores(graded, size, samples)
        low, high = bootstrap_interval(scores)
        metrics[f"eval/{prefix}accuracy"] = float(scores.mean())
        metrics[f"eval/{prefix}accuracy_low"] = low
        metrics[f"eval/{prefix}accuracy_high"] = high
        metrics[f"eval/{prefix}invalid"] = float(1 - graded.valid.mean())
        metrics[f"eval/{prefix}length_mean"] = graded.tokens / len(graded.valid)
    return metrics
