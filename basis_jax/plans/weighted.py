"""Draw problems with probabilities that follow the expected variance of their rewards."""

import numpy as np

from basis_jax.data.order import prompts_by_set
from basis_jax.plans.options import number, switch, word
from basis_jax.plans.plan import Belief, Plan, Requests, Setting, of_problems

SPREADS = {
    "deviation": lambda p: np.sqrt(p * (1 - p)),
    "variance": lambda p: p * (1 - p),
}
STREAM = 2  # last number of the seed: data.order does not use it, so random numbers differ


def weighted(
    setting: Setting, *, by: str = "deviation", floor: float = 0.05, importance: bool = True
) -> Plan:
    """Draw each step's problems without replacement, with chances that grow with
    sqrt(p (1 - p)) + ``floor`` (SPO, arXiv 2509.13232) or, with ``by="variance"``, p (1 - p) +
    ``floor``. p is the estimator's value of the problem before the step, on the scale 0..1.

    The chance that problem i is in the step is min(1, c w_i) exactly (``inclusion``), with c such
    that they add up to the number of problems of the step. ``importance``: a rollout counts
    (average chance) / (its problem's chance) times in the loss. The expected sum over the step is
    then that of ``uniform``. With False, as in SPO, the run trains on another mixture of problems:
    easy and impossible ones count less. Of several training sets, each has its own draw.
    """
    word("by", by, tuple(SPREADS))
    number("floor", floor, above=0.0)
    switch("importance", importance)
    counts = prompts_by_set(setting.set_weights, setting.prompts)
    starts = np.cumsum([0, *setting.sizes[:-1]])

    def ask(step: int, belief: Belief) -> Requests:
        assert belief.values is not None  # needs_values
        spread = SPREADS[by](np.clip(belief.values.astype(np.float64), 0, 1)) + floor
        random = np.random.default_rng([setting.seed, step, len(setting.sizes), STREAM])
        problems, weights = [], []
        for start, size, count in zip(starts, setting.sizes, counts, strict=True):
            chances = inclusion(spread[start : start + size], count)
            drawn = systematic(chances, random)
            problems.append(start + drawn)
            weights.append(count / size / chances[drawn])
        mixed = random.permutation(setting.prompts)
        return of_problems(
            np.concatenate(problems)[mixed],
            setting.group_size,
            np.concatenate(weights)[mixed] if importance else None,
        )

    return Plan(ask, needs_values=True)


def inclusion(weights: np.ndarray, count: int) -> np.ndarray:
    """Chances in proportion to the weights, none above 1, that add up to ``count``."""
    certain = np.zeros(weights.shape, bool)
    while True:
        rest = weights * ~certain
        scaled = rest * ((count - certain.sum()) / max(rest.sum(), 1e-300))
        if not np.any(scaled >= 1):
            return np.where(certain, 1.0, scaled)
        certain |= scaled >= 1


def systematic(chances: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Different indices, each with its chance; as many as the chances, which add up to a whole
    number. Systematic sampling over a random order (Madow 1949)."""
    certain = np.flatnonzero(chances >= 1)
    order = random.permutation(np.flatnonzero(chances < 1))
    count = round(float(chances[order].sum()))
    ends = np.cumsum(chances[order])
    ends *= count / max(ends[-1], 1e-300) if count else 1
    marks = random.random() + np.arange(count)
    drawn = order[np.searchsorted(ends[:-1], marks, side="right")] if count else order[:0]
    return np.concatenate([certain, drawn])
