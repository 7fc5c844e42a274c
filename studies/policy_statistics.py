"""Means with Student intervals over seeds, areas under curves."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Num
from scipy.special import stdtrit


def half_width(values: Sequence[float | int] | Num[np.ndarray, " S"]) -> float:
    """Of the 95 % Student t interval of the mean of two values or more."""
    x = np.asarray(values, float)
    return float(stdtrit(x.size - 1, 0.975) * x.std(ddof=1) / np.sqrt(x.size))


def summary(values: Sequence[float | int] | Num[np.ndarray, " S"]) -> dict[str, float | None]:
    """Mean with its 95 % Student t interval; a single value has none."""
    x = np.asarray(values, float)
    if x.size < 2:
        return {"mean": float(x.mean()), "low": None, "high": None}
    half = half_width(x)
    return {"mean": float(x.mean()), "low": float(x.mean() - half), "high": float(x.mean() + half)}


def area(x: Num[np.ndarray, " E"], y: Float[np.ndarray, " E"], end: float | int) -> float:
    """Mean height from 0 to ``end``; the curve is linear between its points and flat before."""
    inside = np.concatenate([[0], x[(x > 0) & (x < end)], [end]])
    return float(np.trapezoid(np.interp(inside, x, y), inside) / end)
