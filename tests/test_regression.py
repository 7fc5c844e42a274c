"""Sequence regressions: worked numbers, float64 oracles, prompts split over microbatches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_train import CONFIG, assert_same, graded, one_update

from basis_jax.config import Config, EstimatorSection, LossSection, SamplingSection
from basis_jax.losses import loss_weights, regression_loss
from basis_jax.model import decoder
from basis_jax.model.logprobs import token_scores
from basis_jax.model.sharding import make_mesh
from basis_jax.opening.checks import check
from basis_jax.types import Batch


def batch_of(x, advantages, *, old=None, ref=None, rows=None, offsets=None):
    """Log-probabilities whose log-ratio to an anchor of 0 is x, in the first of two tokens."""
    x = np.float32(x)
    mask = np.tile([True, True, False], (len(x), 1))
    logprobs = np.stack([x - 1, np.ones_like(x), np.full_like(x, np.nan)], axis=1)
    zeros = np.zeros(mask.shape, np.float32)
    batch = Batch(
        tokens=zeros.astype(np.int32),
        completion_mask=jnp.asarray(mask),
        loss_weights=loss_weights(jnp.asarray(mask), "sequence_mean", max_length=4),
        advantages=jnp.asarray(advantages, jnp.float32),
        old_logprobs=old,
        sampler_logprobs=zeros,
        ref_logprobs=ref,
        rows=np.arange(len(x), dtype=np.int32),
        row_offsets=offsets,
    )
    return jnp.asarray(logprobs), batch


def test_a_star_po_has_the_loss_and_the_residual_gradient_of_its_worked_vector():
    """V* of 0, 1, 4, 8 successes of 8 at beta_1 = 0.5; gradient 2 beta_2 e / rows."""
    values = np.array([0, 0.293513, 0.71689, 1])
    x, rewards = [0.7, -1.3, 12.0, -40.0], np.array([0, 1, 1, 0])
    logprobs, batch = batch_of(x, rewards - values, ref=jnp.zeros((4, 3)))
    loss, gradient = jax.value_and_grad(
        lambda logp: regression_loss(logp, batch, "a_star_po", beta=1e-3)[0]
    )(logprobs)
    assert float(loss) == pytest.approx(0.374016, abs=2e-6)
    expected = np.array([0.00035, -0.353893, -0.135555, 0.48])[:, None] * [1, 1, 0]
    np.testing.assert_allclose(np.asarray(gradient) * 1e3, expected, atol=2e-6)


@pytest.mark.parametrize(("eta", "pairs"), [(1.0, 0.166667), (10.0, 60.166667)])
def test_rebel_is_a_quarter_of_the_authors_loss_over_pairs(eta, pairs):
    """Three prompts of two: log-ratios .5, .5 and 0 apart, rewards 1, 1 and 0 apart."""
    x, rewards = np.array([0.5, 0, 0.5, 0, 0, 0]), np.array([1, 0, 1, 0, 1, 1])
    logprobs, batch = batch_of(x, rewards, old=jnp.zeros((6, 3)))
    _, residuals = regression_loss(logprobs, batch, "rebel", beta=1 / eta)
    means = np.repeat(np.asarray(residuals).reshape(3, 2).mean(axis=1), 2)
    batch = dataclasses.replace(batch, row_offsets=-jnp.asarray(means))
    loss, _ = regression_loss(logprobs, batch, "rebel", beta=1 / eta)
    assert 4 * float(loss) == pytest.approx(pairs, rel=1e-5)


def test_tbrm_has_the_residuals_of_its_worked_vector():
    """x = .3 and -.45, rewards 1 and 0, beta = .5, V = 2.241311 and 1.861995."""
    logprobs, batch = batch_of([0.3, -0.45], [1, 0], ref=jnp.zeros((2, 3)))
    values = jnp.float32([2.241311, 1.861995])
    loss, residuals = regression_loss(logprobs, batch, "tbrm", beta=0.5, start_lse=values)
    np.testing.assert_allclose(residuals, [0.541311, 1.411995], atol=1e-6)
    assert float(loss) == pytest.approx(1.143374, abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        ("a_star_po", "a_star_po needs ref_logprobs"),
        ("tbrm", "tbrm needs ref_logprobs"),
        ("ppo_clip", "allowed are a_star_po, rebel, tbrm"),
    ],
)
def test_a_regression_without_its_reference_is_refused(objective, sentence):
    logprobs, batch = batch_of([0.3], [1])
    with pytest.raises(ValueError, match=sentence):
        regression_loss(logprobs, batch, objective, beta=0.5)
    batch = dataclasses.replace(batch, ref_logprobs=jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="tbrm needs start_lse"):
        regression_loss(logprobs, batch, "tbrm", beta=0.5)


@pytest.mark.parametrize("chunk", [3, 512])
def test_the_start_value_and_its_gradient_are_those_of_the_whole_logits(chunk):
    """Completions that begin at other positions; against all logits at once."""
    tokens, starts = jnp.asarray(tiny.tokens_of((3, 9))), np.array([1, 4, 8])
    mask = jnp.asarray(np.arange(9)[None] >= starts[:, None])
    params = tiny.random_params(tiny.TINY)

    def plain(params):
        hidden, _ = decoder.forward(params, tiny.TINY, tokens)
        logits = decoder.logits(params, tiny.TINY, hidden) / 0.7
        lse = jax.nn.logsumexp(logits, axis=-1)[np.arange(3), starts - 1]
        return jnp.sum(jnp.sin(lse)), lse

    def ours(params):
        lse = token_scores(params, tiny.TINY, tokens, mask=mask, temperature=0.7, chunk=chunk)[2]
        return jnp.sum(jnp.sin(lse)), lse

    expected, values = jax.jit(jax.grad(plain, has_aux=True))(params)
    found, lse = jax.jit(jax.grad(ours, has_aux=True))(params)
    np.testing.assert_allclose(lse, values, rtol=1e-5)
    tiny.assert_same_gradient(found, expected)


def config_of(objective, *, group=1, minibatch=8, beta=0.1):
    loss = LossSection(objective=objective, aggregation="sequence_mean", beta=beta)
    return dataclasses.replace(
        CONFIG,
        loss=loss,
        sampling=SamplingSection(max_new_tokens=6, group_size=group),
        train=dataclasses.replace(
            CONFIG.train, prompts_per_step=8 // group, minibatch_rollouts=minibatch
        ),
    )


def oracle(objective, beta, group=4):
    """params - gradient of the regression over all rows at once, by plain JAX."""
    data = graded()
    r, live = data.rollouts, np.flatnonzero(data.valid)
    tokens, rows = jnp.asarray(r.tokens), np.arange(8)
    mask = np.zeros(r.tokens.shape, bool)
    for i in live:
        mask[i, r.prompt_lengths[i] : r.prompt_lengths[i] + r.completion_lengths[i]] = True
    advantages = jnp.asarray((data.rewards - 0.4) * data.valid, jnp.float32)

    def scores(params):
        logits = tiny.next_token_logits(params, tiny.TINY, tokens)
        lse = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        logp = jnp.pad(picked - lse[:, :-1], ((0, 0), (1, 0)))
        return jnp.sum(jnp.where(mask, logp, 0), axis=1), lse[rows, r.prompt_lengths - 1]

    reference, _ = scores(jax.tree.map(lambda x: x * 0.5, tiny.params()))
    old, _ = scores(tiny.params())

    def loss(params):
        total, lse = scores(params)
        x = total - (old if objective == "rebel" else reference)
        if objective == "a_star_po":
            e = beta * x - advantages
        else:
            e = x - advantages / beta + (lse if objective == "tbrm" else 0)
        if objective == "rebel":
            means = [jnp.mean(e[live[live // group == i // group]]) for i in rows]
            e = e - jnp.stack(means)
        return jnp.mean(e[live] ** 2)

    value, gradient = jax.jit(jax.value_and_grad(loss))(tiny.params())
    return jax.tree.map(jnp.subtract, tiny.params(), gradient), value


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["a_star_po", "tbrm", "rebel"])
def test_an_update_is_the_regression_over_all_rows_however_it_is_split(objective):
    """Rows in the order of their lengths, prompts of four spread over microbatches of two."""
    expected, value = oracle(objective, beta=0.1)
    config = config_of(objective, group=4 if objective == "rebel" else 1)
    params, metrics = one_update(config=config, microbatch=2)
    assert metrics["policy/loss"] == pytest.approx(float(value), rel=1e-4)
    scale = max(1.0, float(value))
    assert_same(params, expected, tolerance=2e-5 * scale)


@pytest.mark.slow
def test_a_second_update_of_rebel_takes_the_means_of_its_own_policy():
    """Two updates a step: offsets follow the policy of each, so that microbatches do not matter."""
    config = config_of("rebel", group=4, minibatch=4)
    train = dataclasses.replace(config.train, microbatch_rollouts=4)
    config = dataclasses.replace(config, train=train)
    whole, metrics = one_update(config=config, microbatch=4, learn=True)
    parts, others = one_update(config=config, microbatch=2, learn=True)
    assert_same(parts, whole)
    assert others["policy/loss"] == pytest.approx(metrics["policy/loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"loss": {"aggregation": "token_mean"}}, "tbrm is a mean over sequences"),
        ({"estimator": {"name": "value_filter"}}, "regresses on the advantages of reinforce and"),
        ({"loss": {"sampler_correction": "tis"}}, "needs no weights, and .* is 'tis'"),
        ({"loss": {"objective": "rebel"}}, "rebel compares .*group_size is 1 and"),
    ],
)
def test_a_regression_that_lacks_something_is_refused(change, sentence):
    config: Config = dataclasses.replace(
        config_of("tbrm"), estimator=EstimatorSection(name="reinforce")
    )
    check(config, tiny.TINY, make_mesh())
    for section, fields in change.items():
        part = dataclasses.replace(getattr(config, section), **fields)
        config = dataclasses.replace(config, **{section: part})
    with pytest.raises(ValueError, match=sentence):
        check(config, tiny.TINY, make_mesh())
