"""Losses: worked numbers, and denominators that no split can change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from basis_jax.corrections import sampler_weights
from basis_jax.losses import kl_loss, loss_weights, policy_loss
from basis_jax.types import Batch

MASK = np.array([[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)


def batch(advantages, old, mask=MASK, aggregation="token_mean", ref=None):
    return Batch(
        tokens=np.zeros(mask.shape, np.int32),
        completion_mask=jnp.asarray(mask),
        loss_weights=loss_weights(jnp.asarray(mask), aggregation, max_length=10),
        advantages=jnp.asarray(advantages, jnp.float32),
        old_logprobs=None if old is None else jnp.asarray(old, jnp.float32),
        sampler_logprobs=np.zeros(mask.shape, np.float32),
        ref_logprobs=None if ref is None else jnp.asarray(ref, jnp.float32),
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


def test_unknown_words_are_refused_with_the_list():
    b = batch([0.0, 0.0, 0.0], None, ref=np.zeros(MASK.shape))
    with pytest.raises(ValueError, match="token_mean, sequence_mean, constant_length"):
        loss_weights(jnp.asarray(MASK), "mean", max_length=4)
    with pytest.raises(ValueError, match="ppo_clip, gspo, cispo, gpg"):
        policy_loss(jnp.zeros(MASK.shape), b, "ppo", clip_low=0.2, clip_high=0.2)
    with pytest.raises(ValueError, match="k1, k2, k3, k3\\+"):
        kl_loss(jnp.zeros(MASK.shape), b, "k4")


def test_a_kl_term_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="no ref_logprobs"):
        kl_loss(jnp.zeros(MASK.shape), batch([0.0, 0.0, 0.0], None), "k2")


def oracle(logprobs, b, objective, low, high, dual=0.0):
    """Loss, gradient and clipped tokens by loops in float64, derivatives written by hand."""
    mask = np.asarray(b.completion_mask)
    gradient, loss, count = np.zeros(mask.shape), 0.0, 0
    log_ratio = np.float64(logprobs) - np.float64(b.old_logprobs)
    for i, t in zip(*np.nonzero(mask), strict=True):
        a, w = float(b.advantages[i]), float(b.loss_weights[i, t])
        mean = log_ratio[i][mask[i]].mean()
        ratio = np.exp(mean if objective == "gspo" else log_ratio[i, t])
        bounded = min(max(ratio, 1 - low), 1 + high)
        if objective == "gpg":
            value, slope, clipped = -a * float(logprobs[i, t]), -a, False
        elif objective == "cispo":
            value, slope = -bounded * a * float(logprobs[i, t]), -bounded * a
            clipped = bounded != ratio
        else:
            clipped = -a * bounded > -a * ratio
            value, slope = (-a * bounded, 0.0) if clipped else (-a * ratio, -a * ratio)
            if dual and a < 0 and value > -dual * a:
                value, slope, clipped = -dual * a, 0.0, True
        loss, count = loss + w * value, count + clipped
        gradient[i, t] = w * slope
    return loss, gradient, count


CASES = [
    ("ppo_clip", 0.2, 0.3, 0.0),
    ("ppo_clip", 0.2, 0.3, 1.5),
    ("gspo", 0.05, 0.08, 0.0),
    ("cispo", 0.2, 0.28, 0.0),
    ("cispo", 1.0, 0.3, 0.0),
    ("gpg", 0.2, 0.2, 0.0),
]


@pytest.mark.parametrize(("objective", "low", "high", "dual"), CASES)
def test_objectives_and_their_gradients_equal_loops(objective, low, high, dual):
    rng = np.random.default_rng(0)
    mask = rng.random((6, 7)) < 0.6
    b = batch(rng.normal(size=6), rng.normal(size=(6, 7)), mask, "sequence_mean")
    logprobs = jnp.asarray(np.asarray(b.old_logprobs) + rng.normal(size=(6, 7)) * 0.5, jnp.float32)

    def loss(x):
        return policy_loss(x, b, objective, clip_low=low, clip_high=high, dual_clip=dual)

    (value, clipped), gradient = jax.value_and_grad(loss, has_aux=True)(logprobs)
    expected, slope, count = oracle(logprobs, b, objective, low, high, dual)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-7)
    assert int(clipped.sum()) == count and (count > 0 or objective == "gpg")


def test_gspo_by_token_has_the_gradient_of_the_ratio_of_sequences():
    """Against -A s_i of whole rows, differentiated through the mean of the log ratios."""
    rng = np.random.default_rng(3)
    b = batch(rng.normal(size=3), rng.normal(size=MASK.shape), aggregation="sequence_mean")
    logprobs = jnp.asarray(b.old_logprobs + 0.01 * rng.normal(size=MASK.shape), jnp.float32)

    def of_rows(x):
        lengths = np.maximum(MASK.sum(1), 1).astype(np.float32)
        s = jnp.exp(jnp.sum(jnp.where(MASK, x - b.old_logprobs, 0), 1) / lengths)
        return jnp.sum((-b.advantages * s)[:2]) / 2  # two live rows

    def by_token(x):
        return policy_loss(x, b, "gspo", clip_low=0.5, clip_high=0.5)[0]

    np.testing.assert_allclose(by_token(logprobs), of_rows(logprobs), rtol=1e-5)
    np.testing.assert_allclose(
        jax.grad(by_token)(logprobs), jax.grad(of_rows)(logprobs), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize(("objective", "low", "high", "dual"), CASES)
def test_sampler_weights_multiply_every_token_of_every_objective_once(objective, low, high, dual):
    """Of two updates in a step, so that policy / old is counted in the ratio and old / sampler in
    the weight: the loop's loss and gradient with each token's weight by hand, some at the cap."""
    rng = np.random.default_rng(2)
    mask = rng.random((6, 7)) < 0.6
    b = batch(rng.normal(size=6), rng.normal(size=(6, 7)), mask, "sequence_mean")
    sampler = np.asarray(b.old_logprobs) + 0.5 * rng.normal(size=(6, 7))
    sampler = np.where(mask, sampler, np.nan).astype(np.float32)
    b = dataclasses.replace(b, sampler_logprobs=sampler)
    logprobs = jnp.asarray(np.asarray(b.old_logprobs) + rng.normal(size=(6, 7)) * 0.5, jnp.float32)
    weights = np.ones(mask.shape)
    for i, t in zip(*np.nonzero(mask), strict=True):
        weights[i, t] = min(np.exp(float(b.old_logprobs[i, t]) - float(sampler[i, t])), 1.3)
    assert 3 < np.sum(weights == 1.3) < mask.sum() - 3
    np.testing.assert_allclose(sampler_weights(logprobs, b, "tis", cap=1.3), weights, rtol=1e-5)
    weighted = dataclasses.replace(b, loss_weights=np.float32(b.loss_weights * weights))
    expected, slope, count = oracle(logprobs, weighted, objective, low, high, dual)

    def loss(x):
        bounds = {"clip_low": low, "clip_high": high, "dual_clip": dual}
        return policy_loss(x, b, objective, **bounds, factors=sampler_weights(x, b, "tis", cap=1.3))

    (value, clipped), gradient = jax.value_and_grad(loss, has_aux=True)(logprobs)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-7)
    assert int(clipped.sum()) == count


@pytest.mark.parametrize("objective", ["ppo_clip", "gspo", "cispo", "gpg"])
def test_strictly_on_policy_the_weight_is_that_of_the_present_policy_without_its_gradient(
    objective,
):
    """Worked: A = .5, -2; p = 2 q, q / 2, 4 q, q of the sampler's q with a cap of 3."""
    mask = np.array([[1, 1, 1], [0, 1, 0]], bool)
    b = batch([0.5, -2.0], None, mask)
    b = dataclasses.replace(b, sampler_logprobs=np.full(mask.shape, -2, np.float32))
    logprobs = jnp.asarray(-2 + np.log([[2, 0.5, 4], [7, 1, 7]]), jnp.float32)

    def loss(x):
        factors = sampler_weights(x, b, "tis", cap=3.0)
        return policy_loss(x, b, objective, clip_low=0.2, clip_high=0.2, factors=factors)[0]

    gradient = jax.grad(loss)(logprobs)
    np.testing.assert_allclose(gradient, [[-0.25, -0.0625, -0.375], [0, 0.5, 0]], rtol=1e-5)


@pytest.mark.parametrize("objective", ["ppo_clip", "gspo", "cispo", "gpg"])
def test_strictly_on_policy_every_objective_has_the_score_function_gradient(objective):
    b = batch([0.5, -2.0, 3.0], None)
    logprobs = jnp.asarray(np.random.default_rng(1).normal(size=MASK.shape), jnp.float32)
    gradient = jax.grad(
        lambda x: policy_loss(x, b, objective, clip_low=0.2, clip_high=0.2, dual_clip=3.0)[0]
    )(logprobs)
    expected = -np.asarray(b.advantages)[:, None] * np.asarray(b.loss_weights)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("form", "values", "slopes"),
    [
        ("k1", [-1, -0.1, 0, 0.1, 1], [1, 1, 1, 1, 1]),
        ("k2", [0.5, 0.005, 0, 0.005, 0.5], [-1, -0.1, 0, 0.1, 1]),
        (
            "k3",
            [0.718282, 0.005171, 0, 0.004837, 0.367879],
            [-1.718282, -0.105171, 0, 0.095163, 0.632121],
        ),
        ("k3+", [0.718282, 0.005171, 0, 0.004837, 0.367879], [-1, -0.1, 0, 0.1, 1]),
    ],
)
def test_kl_worked_vectors(form, values, slopes):
    mask = np.ones((1, 5), bool)
    ref = np.float32([[-2, -1, -3, -1, -2]])
    b = batch([0.0], None, mask, ref=ref)
    logprobs = jnp.asarray(ref + np.float32([[-1, -0.1, 0, 0.1, 1]]))
    (loss, terms), gradient = jax.value_and_grad(lambda x: kl_loss(x, b, form), has_aux=True)(
        logprobs
    )
    np.testing.assert_allclose(terms[0], values, atol=1e-6)
    np.testing.assert_allclose(gradient[0] * 5, slopes, atol=1e-5)
    np.testing.assert_allclose(loss, np.mean(values), atol=1e-6)


def test_k3_is_bounded_where_the_reference_is_far_away():
    b = batch([0.0], None, np.ones((1, 2), bool), ref=np.zeros((1, 2)))
    _, terms = kl_loss(jnp.float32([[-25.0, 25.0]]), b, "k3")
    np.testing.assert_allclose(terms, [[10.0, 10.0]])


def test_only_k2_pulls_towards_the_reference_like_the_kl_under_own_samples():
    """E over the policy's own draws of d form, exactly, against d KL(policy || reference)."""
    logits, ref = jnp.array([0.3, -0.5, 1.0]), jax.nn.log_softmax(jnp.array([1.0, 0.2, -0.4]))
    p = jax.nn.softmax(logits)

    def expected(form):
        def of_token(t, x):
            b = batch([0.0], None, np.ones((1, 1), bool), ref=ref[None, t : t + 1])
            return kl_loss(jax.nn.log_softmax(x)[None, t : t + 1], b, form)[0]

        return sum(p[t] * jax.grad(lambda x, t=t: of_token(t, x))(logits) for t in range(3))

    def kl(x):
        return jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - ref))

    np.testing.assert_allclose(expected("k2"), jax.grad(kl)(logits), atol=1e-6)
    np.testing.assert_allclose(expected("k3+"), jax.grad(kl)(logits), atol=1e-6)
    np.testing.assert_allclose(expected("k1"), 0.0, atol=1e-6)
    assert np.abs(expected("k3") - jax.grad(kl)(logits)).max() > 0.05


def test_on_policy_loss_is_minus_the_weighted_advantage_with_the_score_function_gradient():
    b = batch([0.5, -2.0, 3.0], None)
    logprobs = jnp.asarray(np.random.default_rng(1).normal(size=MASK.shape), jnp.float32)
    loss, clipped = policy_loss(logprobs, b, clip_low=0.2, clip_high=0.2)
    per_token = -np.asarray(b.advantages)[:, None] * np.asarray(b.loss_weights)
    np.testing.assert_allclose(loss, per_token.sum(), rtol=1e-6)
    gradient = jax.grad(lambda x: policy_loss(x, b, clip_low=0.2, clip_high=0.2)[0])(logprobs)
    np.testing.assert_allclose(gradient, per_token, rtol=1e-6)
    assert not clipped.any()


def test_nothing_outside_the_mask_reaches_loss_or_gradient():
    b = batch([0.5, -2.0, 3.0], np.where(MASK, 0.1, np.nan))
    logprobs = jnp.asarray(np.where(MASK, 0.3, np.nan), jnp.float32)
    loss, _ = policy_loss(logprobs, b, clip_low=0.2, clip_high=0.2)
    gradient = jax.grad(lambda x: policy_loss(x, b, clip_low=0.2, clip_high=0.2)[0])(logprobs)
    assert np.isfinite(loss) and np.isfinite(gradient).all()
    assert not np.asarray(gradient)[~MASK].any()


def test_a_huge_ratio_stays_finite():
    b = batch([-1.0, -1.0, 0.0], np.full(MASK.shape, -200.0))
    loss, _ = policy_loss(jnp.zeros(MASK.shape), b, clip_low=0.2, clip_high=0.2)
    assert np.isfinite(loss)
