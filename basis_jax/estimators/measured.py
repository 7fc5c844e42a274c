"""A baseline measured with the gradients themselves, in the metric of the optimizer.

With one baseline b for all prompts the noise of the gradient is E[w (r - b)^2], w = |g|^2, with g
the gradient of the completion's loss at advantage 1. It is least at b* = E[w r] / E[w] (module
``weighted``). The norm is the one that the optimizer sees: AdamW divides every coordinate by
sqrt(v), so |g|^2 = sum g^2 / v. Proxies such as ``score_norms`` ignore v, and in AdamW's metric b*
is far from their estimate.

A training step can measure it without the gradients of single rollouts. Take random signs e_i and

    G = sum e_i (r_i - b) g_i,    D = sum e_i g_i.

The expectations over the signs are E <G, D> = sum (r_i - b) w_i and E <D, D> = sum w_i, because
products of different rollouts have random signs. So two backward passes measure b* = b + <G, D> /
<D, D>. Measurements are averaged with weights <D, D>, so the mean is a ratio of two sums. The plain
mean of b* over batches would be too large where most completions are right: a batch without a wrong
completion measures b* = 1, although its <D, D> is small. In theory one pass without signs would be
enough, since E g = 0. In practice the wrong completions that bring this mean to 0 are so rare that
most batches have none, and the measured b* is again too large where most completions are right.

b* of a batch is close to that of the next batches, because the policy changes slowly. The baseline
of a step comes from earlier steps alone, so no bit of it depends on a completion of the step. The
method is our own; ``docs/baselines.md`` has figures.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from basis_jax.estimators.ranges import FINITE, Options, Rewards
from basis_jax.estimators.rows import (
    divide,
    estimate,
    from_unit,
    nan_reported,
    others_sum,
    read,
    to_unit,
)
from basis_jax.estimators.weighted import MEMORY
from basis_jax.pytree import pytree
from basis_jax.types import Estimate, Measurement, Signals


@pytree
class MeasuredMean:
    """The baseline from earlier measurements, their total weight and their number.

    >>> made = {"baseline": jnp.float32(.25), "square": jnp.float32(8)}
    >>> state = estimators.MeasuredMean(**made, measurements=jnp.float32(3))
    >>> float(state.measurements)
    3.0
    """

    baseline: Float[Array, ""]  # 0 stands for ``low``, 1 for ``high``
    square: Float[Array, ""]  # discounted sum of <D, D>
    measurements: Float[Array, ""]  # discounted


def measured_mean_init(
    successes: Num[ArrayLike, " M"], trials: Num[ArrayLike, " M"]
) -> MeasuredMean:
    """Nothing measured yet. The counts are not used: they say nothing about this baseline.

    >>> float(estimators.measured_mean_init(np.full(9, 4), np.full(9, 8)).baseline)
    0.0
    """
    return MeasuredMean(baseline=jnp.float32(0), square=jnp.float32(0), measurements=jnp.float32(0))


@nan_reported
@Options(memory=MEMORY, low=FINITE, high=FINITE)
def measured_mean_update(
    state: MeasuredMean,
    signals: Signals,
    *,
    memory: float = 0.8,
    low: float = 0.0,
    high: float = 1.0,
) -> tuple[MeasuredMean, Estimate]:
    """A = r - b with the b that earlier steps measured (``measured_mean_learn``), inside
    [``low``, ``high``]; before the first measurement b is ``low``.

    ``values`` are the plain means of the other rows. ``memory`` is used by ``measured_mean_learn``
    only. Info: ``baseline`` and ``measurements``, their discounted number. ValueError for rewards
    outside the range.

    >>> made = {"baseline": jnp.float32(.25), "square": jnp.float32(8)}
    >>> state = estimators.MeasuredMean(**made, measurements=jnp.float32(3))
    >>> signals = estimators.Signals(rewards=jnp.float32([1, 0]), valid=jnp.ones(2, bool),
    ...                              problem_ids=jnp.array([3, 7]), lengths=jnp.array([5, 6]))
    >>> state, estimate = estimators.measured_mean_update(state, signals)
    >>> print(estimate.baselines, estimate.advantages)
    [0.25 0.25] [ 0.75 -0.25]
    """
    Rewards(low, high).check("measured_mean", signals.rewards, signals.valid)
    rewards, valid = read(signals.rewards, signals.valid)
    y = jnp.where(valid, to_unit(rewards, low, high), 0)
    mean = divide(others_sum(y), others_sum(valid.astype(jnp.float32)))
    values = from_unit(mean, low, high)
    baseline = from_unit(used_baseline(state), low, high)
    baselines = jnp.full_like(rewards, baseline)
    info = {"baseline": baseline, "measurements": state.measurements}
    return state, estimate(rewards - baselines, values, valid, baselines=baselines, **info)


def measured_mean_learn(
    state: MeasuredMean,
    measurement: Measurement,
    *,
    memory: float = 0.8,
    low: float = 0.0,
    high: float = 1.0,
) -> MeasuredMean:
    """The state after a measurement in an update whose baseline came from ``state``.

    The measured b* is b + product / square. The new baseline is the mean of all measured ones with
    their squares as weights; the weight of a measurement is multiplied by ``memory`` at every later
    one. A measurement that is not finite, or without noise (square 0), changes nothing.

    >>> state = estimators.measured_mean_init(np.zeros(9), np.zeros(9))
    >>> found = estimators.Measurement(product=jnp.float32(2), square=jnp.float32(8))
    >>> print(estimators.measured_mean_learn(state, found).baseline)
    0.25
    """
    moved = divide(measurement.product, measurement.square) / (high - low)
    found = used_baseline(state) + moved
    square = measurement.square
    older = memory * state.square
    share = divide(square, older + square)
    counts = jnp.isfinite(found) & jnp.isfinite(square) & (square > 0)
    new = MeasuredMean(
        baseline=state.baseline + share * (found - state.baseline),
        square=older + square,
        measurements=memory * state.measurements + 1,
    )
    return jax.tree.map(lambda new, old: jnp.where(counts, new, old), new, state)


def used_baseline(state: MeasuredMean) -> Float[Array, ""]:
    """What is subtracted: the measured baseline, clipped into [0, 1] (``low`` to ``high``)."""
    return jnp.clip(state.baseline, 0, 1)
