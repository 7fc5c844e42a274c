"""How noisy the gradient is under several baselines, so that a run shows which one it needs."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from basis_jax.estimators.rows import divide, others_sum, read
from basis_jax.estimators.weighted import effective, usable
from basis_jax.types import Estimate, Signals


def noise_report(signals: Signals, estimate: Estimate) -> dict[str, Float[Array, ""]]:
    """sum w (r - b)^2 / sum w over the valid rows, with score norms w, for several baselines b.

    This is a measure of the gradient's noise (see the module ``weighted``). Only ratios within one
    batch mean something.

    - ``noise_none``: b = 0; ``noise_mean``: the plain mean of the other rows; ``noise_values``: the
      estimator's values; ``noise_baselines``: what it subtracted;
    - ``score_ratio``: m0 / m1, the mean w of wrong completions divided by that of right ones. The
      smallest reward of the batch counts as wrong, the largest as right; 0 if all are equal. At 1
      the best baseline is the value, far above 1 it is near the smallest reward;
    - ``effective_rows``: (sum w)^2 / sum w^2.

    All are 0 if no score norm is positive. Raises ValueError if the signals have no score norms.

    >>> signals = estimators.Signals(rewards=jnp.float32([1, 0, 1]), valid=jnp.ones(3, bool),
    ...                              problem_ids=jnp.arange(3), lengths=jnp.array([5, 6, 4]),
    ...                              score_norms=jnp.float32([1, 4, 1]))
    >>> told = estimators.noise_report(signals, estimators.batch_mean(signals.rewards))
    >>> {name: round(float(x), 3) for name, x in told.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'effective_rows': 2.0, 'noise_baselines': 0.75, 'noise_mean': 0.75, 'noise_none': 0.333,
     'noise_values': 0.75, 'score_ratio': 4.0}
    """
    rewards, valid = read(signals.rewards, signals.valid)
    w = usable(signals.score_norms, valid)
    live = valid.astype(jnp.float32)

    def noise(b: Float[Array, " N"]) -> Float[Array, ""]:
        return divide(jnp.sum(w * jnp.where(w > 0, rewards - b, 0) ** 2), jnp.sum(w))

    low = jnp.min(jnp.where(valid, rewards, jnp.inf), initial=jnp.inf)
    high = jnp.max(jnp.where(valid, rewards, -jnp.inf), initial=-jnp.inf)
    differ = (high > low) & jnp.isfinite(high - low)
    right = jnp.where(valid & differ, (rewards - low) / jnp.where(differ, high - low, 1), 0)
    wrong = live - right
    of_wrong = divide(jnp.sum(w * wrong), jnp.sum(wrong))
    of_right = divide(jnp.sum(w * right), jnp.sum(right))
    return {
        "effective_rows": effective(jnp.sum(w), jnp.sum(w**2)),
        "noise_baselines": noise(estimate.baselines),
        "noise_mean": noise(divide(others_sum(rewards), others_sum(live))),
        "noise_none": noise(jnp.zeros_like(rewards)),
        "noise_values": noise(estimate.values),
        "score_ratio": jnp.where(jnp.any(right > 0), divide(of_wrong, of_right), 0),
    }
