"""measured_mean on the batches of the gradient study, with measurements made from sketches."""

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
    """The moments of its updates on all batches with one rollout per prompt, with a measurement in
    each. ``norms`` (squared) and ``sketches`` (of unit gradients) are those of one metric."""
    ids, chosen = draws.ids, draws.chosen[..., 0]
    rewards = pool.rewards[ids, chosen].astype(np.float64)
    left, random = np.zeros_like(rewards), np.random.default_rng(11)
    for replicate in range(len(ids)):
        state = MEASURED.estimator.init(np.zeros(1), np.zeros(1))
        for step, (problems, rollouts) in enumerate(
            zip(ids[replicate], chosen[replicate], strict=True)
        ):
            baseline = float(jnp.clip(state.baseline, 0, 1))
            left[replicate, step] = rewards[replicate, step] - baseline
            lengths = np.sqrt(norms[problems, rollouts])[:, None].astype(np.float32)
            rows = sketches[problems, rollouts].astype(np.float32) * lengths
            signs = random.choice([-1.0, 1.0], len(rows)).astype(np.float32)
            along = (signs * (rows @ (signs @ rows))).astype(np.float64)  # e_i <g_i, D>
            measurement = estimators.Measurement(
                product=jnp.float32(left[replicate, step] @ along), square=jnp.float32(along.sum())
            )
            state = estimators.measured_mean_learn(state, measurement)
    return moments(draws, left[..., None], left[..., None])
