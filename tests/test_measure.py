"""measured_mean and training/measure.py: the baseline that the optimizer's own metric wants."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.flatten_util import ravel_pytree

from basis_jax import estimators
from basis_jax.config import LossSection, OptimSection
from basis_jax.model.logprobs import token_logprobs
from basis_jax.training.measure import inner_products, signed
from basis_jax.training.update import make_optimizer, make_update
from basis_jax.types import Batch, TrainState

OPTIM = OptimSection(lr=1e-3, b2=0.9, max_grad_norm=0.5)
REWARDS = np.float32([1, 0, 0, 1])


def batch(rng, advantages, weights):
    tokens = rng.integers(0, tiny.TINY.vocab_size, (4, 12)).astype(np.int32)
    mask = np.arange(12)[None] >= np.array([4, 6, 3, 8])[:, None]
    return Batch(
        tokens=tokens,
        completion_mask=mask,
        loss_weights=np.where(mask, weights, 0).astype(np.float32),
        advantages=np.float32(advantages),
        old_logprobs=None,
        sampler_logprobs=np.zeros(tokens.shape, np.float32),
        rows=np.arange(4, dtype=np.int32),
    )


def sums_of_gradients(params, micro):
    """A row's gradient of its weighted log-probability, by plain differentiation: [4, D]."""

    def row(p, i):
        found, _ = token_logprobs(p, tiny.TINY, jnp.asarray(micro.tokens))
        return jnp.sum(found[i] * micro.loss_weights[i])

    return np.stack([ravel_pytree(jax.grad(row)(params, i))[0] for i in range(4)], dtype=np.float64)


@pytest.mark.slow
def test_a_measurement_is_what_single_gradients_say_in_the_metric_of_adamw():
    """Two updates, so that the moments are not those of the measured batch alone; the baseline of
    the second is .3. Oracle: all row gradients and all sums by hand, in float64; the signs are
    those of ``signed``."""
    rng, params = np.random.default_rng(0), tiny.params()
    optimizer = make_optimizer(OPTIM, updates=9)
    update = make_update(
        tiny.TINY, optimizer, optim=OPTIM, loss=LossSection(), temperature=1.0, microbatch=4
    )
    state = TrainState(
        step=jnp.int32(0),
        params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        estimator_state=(),
    )
    state, _ = update(state, [batch(rng, REWARDS, 0.1)])
    before = jax.tree.map(jnp.copy, state.params)
    micro = batch(rng, REWARDS - 0.3, 0.1)
    nu = np.asarray(ravel_pytree(state.opt_state[1][0].nu)[0], np.float64)
    _, found = update(state, [micro], measured=True)

    rows = sums_of_gradients(before, micro)
    used, signs = (np.float64(x) for x in signed(micro.advantages, micro.rows, jnp.int32(1)))
    g, b = used @ rows, signs @ rows
    assert g @ g > OPTIM.max_grad_norm**2  # it is clipped
    v = OPTIM.b2 * nu + (1 - OPTIM.b2) * OPTIM.max_grad_norm**2 / (b @ b) * b**2
    scale = 1 / (np.sqrt(v / (1 - OPTIM.b2**2)) + OPTIM.eps) ** 2
    measurement = found["measurement"]
    size = np.sqrt(np.sum(scale * g**2) * np.sum(scale * b**2))
    np.testing.assert_allclose(measurement.product, np.sum(scale * g * b), atol=2e-3 * size)
    np.testing.assert_allclose(measurement.square, np.sum(scale * b**2), rtol=2e-3)


def test_signs_are_fair_independent_and_belong_to_the_row_wherever_it_stands():
    """4,000 products of pairs of signs have the mean 0 up to 5 / sqrt(4,000): a false alarm has a
    probability below 1e-6. The first result is the signs times the advantages."""
    advantages = jnp.arange(4000, dtype=jnp.float32)
    rows = np.arange(4000, dtype=np.int32)
    used, signs = signed(advantages, rows, jnp.int32(3))
    np.testing.assert_array_equal(used, signs * advantages)
    other = signed(advantages, rows, jnp.int32(4))[1]
    np.testing.assert_array_equal(
        signed(advantages, rows[::-1].copy(), jnp.int32(3))[1], signs[::-1]
    )
    for pair in (signs, signs * jnp.roll(signs, 1), signs * other):
        assert set(np.unique(pair)) == {-1, 1} and abs(np.mean(pair)) < 5 / np.sqrt(4000)


def test_rollouts_with_a_common_gradient_do_not_add_up():
    """All 64 gradients are nearly equal, of length 1. Without signs <D, D> would be 64^2; with them
    it is 64 times the square of a standard normal, and the mean of 800 of them is off by more than
    25 %, five standard errors, with a probability below 1e-4."""
    section = dataclasses.replace(OPTIM, b2=0.0, eps=1.0, max_grad_norm=0.0)
    rows = np.random.default_rng(0).normal(0, 0.1, (64, 8)).astype(np.float32)
    rows[:, 0] = 1
    rows *= 1e-4  # far below eps: the metric is plain
    found = []
    for n in range(800):
        _, signs = signed(jnp.ones(64), np.arange(64, dtype=np.int32), jnp.int32(n))
        noise = {"w": jnp.asarray(signs @ rows)}
        nu = {"w": jnp.zeros(8)}
        found.append(float(inner_products(noise, noise, nu, jnp.int32(0), section).square))
    assert np.mean(found) == pytest.approx(np.sum(rows**2), rel=0.25)


@pytest.mark.slow
def test_measuring_changes_nothing_of_the_update():
    rng, params = np.random.default_rng(1), tiny.params()
    optimizer = make_optimizer(OPTIM, updates=9)
    update = make_update(
        tiny.TINY, optimizer, optim=OPTIM, loss=LossSection(), temperature=1.0, microbatch=4
    )
    micro = batch(rng, REWARDS, 0.1)
    after = []
    for measured in (False, True):
        copied = jax.tree.map(jnp.copy, params)
        state = TrainState(
            step=jnp.int32(0),
            params=copied,
            opt_state=optimizer.init(copied),
            estimator_state=(),
        )
        after.append(update(state, [micro], measured=measured)[0].params)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), *after))


def measurement(product, square):
    return estimators.Measurement(product=jnp.float32(product), square=jnp.float32(square))


def measured(baseline, square, measurements):
    return estimators.MeasuredMean(
        baseline=jnp.float32(baseline),
        square=jnp.float32(square),
        measurements=jnp.float32(measurements),
    )


def test_the_baseline_that_was_measured_leaves_no_product():
    """G = A - b B with b* = .4: <G, B> = (.4 - b) <B, B>. From any baseline one measurement finds
    b*, and at b* nothing moves."""
    for b, count in ((0.0, 0.0), (0.9, 1e9), (0.4, 3.0)):
        state = measured(b, 5 * count, count)
        found = estimators.measured_mean_learn(state, measurement((0.4 - b) * 7, 7), memory=0.0)
        np.testing.assert_allclose(found.baseline, 0.4, rtol=1e-6)
        assert found.measurements == 1


def test_measurements_are_averaged_with_discount_and_by_their_squares():
    """Memory .5: weights 5/4, 5/2 and 10 of b* = 0, .2, .6."""
    state = estimators.measured_mean_init(np.zeros(3), np.zeros(3))
    for target, square in ((0.0, 5), (0.2, 5), (0.6, 10)):
        product = (target - state.baseline) * square
        state = estimators.measured_mean_learn(state, measurement(product, square), memory=0.5)
    np.testing.assert_allclose(state.baseline, (0.2 * 2.5 + 0.6 * 10) / 13.75, rtol=1e-6)
    assert (state.square, state.measurements) == (13.75, 1.75)


def test_batches_without_a_slip_do_not_raise_the_baseline():
    """A slip, of weight 100, in every tenth batch of 10 rollouts, whose other weights are 1: b* is
    .497 and the mean of the batches' own b* is .91. After 2,000 batches with little discount the
    error is above .1 with probability below 1e-6 (its standard error is .019)."""
    rng = np.random.default_rng(0)
    state, plain = estimators.measured_mean_init(np.zeros(3), np.zeros(3)), []
    learn = jax.jit(functools.partial(estimators.measured_mean_learn, memory=0.999))
    for _ in range(2000):
        slip = rng.random() < 0.1
        right, wrong = 10.0 - slip, 100.0 * slip
        used = float(jnp.clip(state.baseline, 0, 1))
        found = right * (1 - used) - wrong * used
        state = learn(state, measurement(found, right + wrong))
        plain.append(right / (right + wrong))
    exact = 9.9 / (9.9 + 10)
    assert np.mean(plain) > 0.88 and abs(state.baseline - exact) < 0.1


NOTHING = [(np.nan, 1), (np.inf, 2), (1, np.inf), (0, 0), (1, -1)]


@pytest.mark.parametrize("product, square", NOTHING)
def test_a_measurement_of_nothing_changes_nothing(product, square):
    state = measured(0.3, 7, 2)
    found = estimators.measured_mean_learn(state, measurement(product, square))
    assert jax.tree.leaves(found) == jax.tree.leaves(state)


def test_the_baseline_stays_inside_the_range_of_the_rewards():
    """A measured b* of -.2 and of 1.5 in [0, 1]; the average itself is not cut."""
    estimator = estimators.make("measured_mean")
    state = estimator.init(np.zeros(3), np.zeros(3))
    signals = tiny.signals([1, 0], [0, 2])
    low = estimator.learn(state, measurement(-0.2, 1))
    assert low.baseline == np.float32(-0.2)
    assert estimator.update(low, signals)[1].baselines.tolist() == [0, 0]
    high = estimator.learn(state, measurement(1.5, 1))
    assert estimator.update(high, signals)[1].baselines.tolist() == [1, 1]


def test_rewards_of_another_range_are_measured_on_their_own_scale():
    """In [-1, 3]: first b = -1; then b* = -1 + <G, B> / <B, B>."""
    estimator = estimators.make("measured_mean", low=-1.0, high=3.0)
    state, signals = estimator.init(np.zeros(3), np.zeros(3)), tiny.signals([3, -1], [0, 2])
    assert estimator.update(state, signals)[1].baselines.tolist() == [-1, -1]
    state = estimator.learn(state, measurement(3, 2))
    assert estimator.update(state, signals)[1].baselines.tolist() == [0.5, 0.5]


def test_rare_coordinates_do_not_depend_on_which_completions_were_right():
    """A coordinate that only one row moves, and that was never moved before: its weight is that of
    any such coordinate, whatever the row's advantage."""
    nu, count = {"w": jnp.zeros(2)}, jnp.int32(5)
    noise = {"w": jnp.float32([2, 2])}
    section = dataclasses.replace(OPTIM, eps=0.0)
    gradient = {"w": jnp.float32([0.2, 1.8])}  # advantages .1 and .9
    found = inner_products(gradient, noise, nu, count, section)
    assert found.product / found.square == pytest.approx((0.1 + 0.9) / 2)
