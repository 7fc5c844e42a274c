"""An estimator of your own: the baseline is the median reward of the step.

    basis-jax train --config quickstart --run-dir runs/own_estimator \
        --estimator.name examples/own_estimator.py:median --estimator.options scale 2.0
"""

import jax.numpy as jnp

from basis_jax import estimators


@estimators.stateless(needs=("rewards", "valid"))
def median(rewards, *, valid=None, scale=1.0):
    """Advantages scale x (reward - median of the valid rewards)."""
    rewards, valid = estimators.rows.read(rewards, valid)
    middle = jnp.nanmedian(jnp.where(valid, rewards, jnp.nan))
    values = jnp.full_like(rewards, middle)
    return estimators.rows.estimate(scale * (rewards - values), values, valid)
