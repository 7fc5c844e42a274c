"""Losses: worked numbers, and denominators that no split can change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from basis_jax.losses import loss_weights, ppo_loss
from basis_jax.types import Batch

MASK = np.array([[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)


def batch(advantages, old, mask=MASK, aggregation="token_mean"):
    return Batch(
        tokens=np.zeros(mask.shape, np.int32),
        completion_mask=jnp.asarray(mask),
        loss_weights=loss_weights(jnp.asarray(mask), aggregation, max_length=10),
        advantages=jnp.asarray(advantages, jnp.float32),
        old_logprobs=None if old is None else jnp.asarray(old, jnp.float32),
        sampler_logprobs=np.zeros(mask.shape, np.float32),
    )


@pytest.mark.parametrize(
    ("aggregation", "row_weights"),
    [
        ("token_mean", [1 / 4, 1 / 4]),  # four live tokens
        ("sequence_mean", [1 / 6, 1 / 2]),  # two live rows of three and one tokens
        ("constant_length", [1 / 20, 1 / 20]),  # two live rows x 10
    ],
)
def test_weights_hold_the_denominators_and_dead_rows_do_not_count(aggregation, row_weights):
    weights = loss_weights(jnp.asarray(MASK), aggregation, max_length=10)
    expected = MASK * np.array([*row_weights, 0.0])[:, None]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant_length"])
def test_an_update_without_a_live_token_weighs_nothing(aggregation):
    weights = loss_weights(jnp.zeros((2, 3), bool), aggregation, max_length=4)
    np.testing.assert_array_equal(weights, np.zeros((2, 3)))


def test_unknown_aggregation_is_refused_with_the_list():
    with pytest.raises(ValueError, match="token_mean, sequence_mean, constant_length"):
        loss_weights(jnp.asarray(MASK), "mean", max_length=4)


def oracle(logprobs, b, low, high):
    """PPO-clip by loops in float64."""
    loss, clipped = 0.0, 0
    for i, t in zip(*np.nonzero(np.asarray(b.completion_mask)), strict=True):
        a = float(b.advantages[i])
        ratio = np.exp(float(logprobs[i, t]) - float(b.old_logprobs[i, t]))
        bounded = min(max(ratio, 1 - low), 1 + high)
        loss += float(b.loss_weights[i, t]) * max(-a * ratio, -a * bounded)
        clipped += -a * bounded > -a * ratio
    return loss, clipped


def test_ppo_equals_loops_and_clips_only_towards_larger_gain():
    rng = np.random.default_rng(0)
    mask = rng.random((5, 7)) < 0.6
    b = batch(rng.normal(size=5), rng.normal(size=(5, 7)), mask)
    logprobs = jnp.asarray(np.asarray(b.old_logprobs) + rng.normal(size=(5, 7)) * 0.5, jnp.float32)
    loss, clipped = ppo_loss(logprobs, b, clip_low=0.2, clip_high=0.3)
    expected, count = oracle(logprobs, b, 0.2, 0.3)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert int(clipped.sum()) == count > 0


def test_on_policy_loss_is_minus_the_weighted_advantage_with_the_score_function_gradient():
    b = batch([0.5, -2.0, 3.0], None)
    logprobs = jnp.asarray(np.random.default_rng(1).normal(size=MASK.shape), jnp.float32)
    loss, clipped = ppo_loss(logprobs, b, clip_low=0.2, clip_high=0.2)
    per_token = -np.asarray(b.advantages)[:, None] * np.asarray(b.loss_weights)
    np.testing.assert_allclose(loss, per_token.sum(), rtol=1e-6)
    gradient = jax.grad(lambda x: ppo_loss(x, b, clip_low=0.2, clip_high=0.2)[0])(logprobs)
    np.testing.assert_allclose(gradient, per_token, rtol=1e-6)
    assert not clipped.any()


def test_nothing_outside_the_mask_reaches_loss_or_gradient():
    b = batch([0.5, -2.0, 3.0], np.where(MASK, 0.1, np.nan))
    logprobs = jnp.asarray(np.where(MASK, 0.3, np.nan), jnp.float32)
    loss, _ = ppo_loss(logprobs, b, clip_low=0.2, clip_high=0.2)
    gradient = jax.grad(lambda x: ppo_loss(x, b, clip_low=0.2, clip_high=0.2)[0])(logprobs)
    assert np.isfinite(loss) and np.isfinite(gradient).all()
    assert not np.asarray(gradient)[~MASK].any()


def test_a_huge_ratio_stays_finite():
    b = batch([-1.0, -1.0, 0.0], np.full(MASK.shape, -200.0))
    loss, _ = ppo_loss(jnp.zeros(MASK.shape), b, clip_low=0.2, clip_high=0.2)
    assert np.isfinite(loss)
