"""Accuracy on held-out problems with a bootstrap interval clustered by problem."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import PyTree

from basis_jax.config import EvalSection, SamplingSection
from basis_jax.data import EncodedProblems
from basis_jax.rollouts import Setting, roll_out


def bootstrap_interval(
    sets: Sequence[np.ndarray], *, resamples: int = 2000, coverage: float = 0.95, seed: int = 0
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


def problem_scores(rewards: np.ndarray, valid: np.ndarray, samples: int) -> np.ndarray:
    """Mean reward per problem (its ``samples`` rows adjacent) over valid ones; problems without a
    valid one are left out.

    Raises ValueError where no completion at all could be graded.
    """
    rewards, counted = rewards.reshape(-1, samples), valid.reshape(-1, samples).sum(axis=1)
    if not counted.any():
        raise ValueError(
            f"none of the {valid.size} held-out completions could be graded (the verifier "
            "failed on every one); check data.verifier and the answers"
        )
    return rewards.sum(axis=1)[counted > 0] / counted[counted > 0]


def evaluate(
    params: PyTree,
    setting: Setting,
    sets: dict[str, EncodedProblems],
    *,
    section: EvalSection,
    sampling: SamplingSection,
) -> dict[str, float]:
    """Accuracy at the evaluation temperature and greedily: the average over sets with its 95 %
    interval (``eval/accuracy``, ``eval/greedy_accuracy``), and each set's own where there are
    several.

    The noise is the same at every call, so that before and after differ by the policy alone.
    """
    metrics = {}
    passes = [("", section.samples, section.temperature), ("greedy_", 1, 0.0)]
    for prefix, samples, temperature in passes:
        scores = {}
        for name, problems in sets.items():
            graded = roll_out(
                params,
                setting,
                problems,
                ids=np.repeat(np.arange(len(problems.problems), dtype=np.int32), samples),
                samples=np.tile(np.arange(samples, dtype=np.int32), len(problems.problems)),
                sampling=dataclasses.replace(sampling, temperature=temperature),
                stream="evaluate",
                step=0,
            )
            scores[name] = problem_scores(graded.rewards, graded.valid, samples)
            if len(sets) > 1:
                metrics[f"eval/{name}/{prefix}accuracy"] = float(scores[name].mean())
        low, high = bootstrap_interval(list(scores.values()))
        metrics[f"eval/{prefix}accuracy"] = float(np.mean([s.mean() for s in scores.values()]))
        metrics[f"eval/{prefix}accuracy_low"] = low
        metrics[f"eval/{prefix}accuracy_high"] = high
    return metrics
