"""measured_mean on the batches of the gradient study: what it measures comes from sketches."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from basis_jax import estimators
from studies.gradient_methods import Draws, Method, Moments, moments
from studies.gradient_pool import Pool

MEASURED = Method("measured_mean", estimators.make("measured_mean"))


def run_measured(
    draws: Draws,
    pool: Pool,
    norms: Float[np.ndarray, "P S"],
    sketches: Float[np.ndarray, "P S B"],
) -> Moments:
    """Its updates on all batches of one rollout a prompt, with a measurement in each, in the metric
    of these squared norms and of these sketches of unit gradients."""
    ids, chosen = draws.ids, draws.chosen[..., 0]
    rewards = pool.rewards[ids, chosen].astype(np.float64)
    left = np.zeros_like(rewards)
    for replicate in range(len(ids)):
        state = MEASURED.estimator.init(np.zeros(1), np.zeros(1))
        for step, (problems, rollouts) in enumerate(
            zip(ids[replicate], chosen[replicate], strict=True)
        ):
            baseline = float(jnp.clip(state.baseline, 0, 1))
            left[replicate, step] = rewards[replicate, step] - baseline
            lengths = np.sqrt(norms[problems, rollouts])[:, None].astype(np.float32)
            rows = sketches[problems, rollouts].astype(np.float32) * lengths
            along = (rows @ rows.sum(0)).astype(np.float64)  # <g_i, B>
            measurement = estimators.Measurement(
                product=jnp.float32(left[replicate, step] @ along), square=jnp.float32(along.sum())
            )
            state = estimators.measured_mean_learn(state, measurement)
    return moments(draws, left[..., None], left[..., None])
