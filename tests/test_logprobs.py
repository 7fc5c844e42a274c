"""Log-probabilities by chunks: the plain softmax's numbers and gradients, in a chunk's memory."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import EVERYTHING, assert_same_gradient, gradient, random_params, score_sum, tokens_of

from basis_jax.model import decoder, logprobs
from basis_jax.model.logprobs import score_targets, token_logprobs


@pytest.mark.parametrize(
    ("chunk", "temperature"), [(1, 1.0), (4, 0.6), (5, 1.0), (11, 0.6), (512, 1.0)]
)
def test_token_logprobs_score_each_token_by_the_logits_before_it(chunk, temperature):
    """Entry t is log softmax(logits at t - 1)[token t]; so is the entropy; chunks do not matter."""
    tokens = tokens_of((3, 12))
    logits = (
        np.float64(tiny.next_token_logits(random_params(tiny.TINY), tiny.TINY, tokens))
        / temperature
    )
    logits -= logits.max(axis=-1, keepdims=True)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    logprobs, entropy = tiny.token_logprobs(
        random_params(tiny.TINY), tiny.TINY, tokens, temperature=temperature, chunk=chunk
    )
    assert logprobs.shape == entropy.shape == tokens.shape
    assert not np.any(logprobs[:, 0]) and not np.any(entropy[:, 0])
    for row, t in np.ndindex(3, 11):
        before = expected[row, t]
        assert abs(logprobs[row, t + 1] - before[tokens[row, t + 1]]) < 1e-5
        assert abs(entropy[row, t + 1] + np.sum(np.exp(before) * before)) < 1e-5


def test_one_token_has_no_logprob():
    logprobs, entropy = tiny.token_logprobs(random_params(tiny.TINY), tiny.TINY, tokens_of((3, 1)))
    np.testing.assert_array_equal(logprobs, np.zeros((3, 1)))
    np.testing.assert_array_equal(entropy, np.zeros((3, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_chunks_and_remat_do_not_change_the_gradient(remat):
    tokens = tokens_of((3, 12))
    whole, _ = gradient(random_params(tiny.TINY), tiny.TINY, tokens, 512)
    assert_same_gradient(gradient(random_params(tiny.TINY), tiny.TINY, tokens, 4)[0], whole)
    model_config = dataclasses.replace(tiny.TINY, remat=remat)
    assert_same_gradient(gradient(random_params(tiny.TINY), model_config, tokens, 512)[0], whole)


def sizes_in(jaxpr):
    """(size, shape) of every intermediate of a jaxpr and the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield from ((v.aval.size, v.aval.shape) for v in equation.outvars if v.aval.shape)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from sizes_in(inner)


def compiled_bytes(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_logits_exist_for_one_chunk_at_a_time(monkeypatch):
    """Forward and backward: no array with N x T x V numbers is written down, none is allocated."""
    rows, steps, vocab, chunk = 2, 129, 16384, 8
    model_config = dataclasses.replace(tiny.TINY, vocab_size=vocab, embed=8, layers=1)
    params, tokens = (
        decoder.param_shapes(model_config),
        jax.ShapeDtypeStruct((rows, steps), jnp.int32),
    )
    whole = rows * (steps - 1) * vocab

    for function in (score_sum, jax.grad(score_sum, has_aux=True)):

        def run(params, tokens, chunk=chunk, function=function):
            return function(params, model_config, tokens, chunk)

        sizes = list(sizes_in(jax.make_jaxpr(run)(params, tokens).jaxpr))
        largest, shape = max(s for s in sizes if vocab in s[1])
        assert largest == rows * chunk * vocab, shape
        assert compiled_bytes(run, params, tokens) < 0.5 * 4 * whole
        unchunked = lambda params, tokens, run=run: run(params, tokens, chunk=steps)  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(logprobs, "PIECES", 1)
            assert compiled_bytes(unchunked, params, tokens) > 4 * whole  # the measure can tell


def plain(temperature, hidden, weight, targets):
    """Log-probabilities and entropies by jax.nn.log_softmax, all logits at once."""
    logits = jnp.einsum("ntd,vd->ntv", hidden, weight) / temperature
    logp = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    return picked, -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def operands(rows=3, steps=12, size=8, vocab=20):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(rows, steps, size)).astype(np.float32)
    weight = rng.normal(size=(vocab, size)).astype(np.float32)
    slopes = rng.normal(size=(2, rows, steps)).astype(np.float32)
    return hidden, weight, rng.integers(0, vocab, (rows, steps)).astype(np.int32), slopes


def pulled(function, slopes, *primals):
    """Gradient of sum(slopes * outputs); outputs without slopes are not used at all."""

    def loss(*primals):
        return sum(jnp.sum(s * out) for s, out in zip(slopes, function(*primals), strict=False))

    return jax.grad(loss, argnums=(0, 1))(*primals)


@pytest.mark.parametrize("outputs", [1, 2], ids=["logprobs", "with entropies"])
@pytest.mark.parametrize(("chunk", "temperature"), [(1, 1.0), (5, 0.6), (12, 1.7), (99, 1.0)])
def test_the_gradient_is_that_of_the_plain_log_softmax(outputs, chunk, temperature):
    hidden, weight, targets, slopes = operands()
    slopes, counts = slopes[:outputs], np.ones(targets.shape, bool)
    expected = pulled(lambda h, w: plain(temperature, h, w, targets), slopes, hidden, weight)
    found = pulled(
        lambda h, w: score_targets(temperature, chunk, h, w, targets, counts),
        slopes,
        hidden,
        weight,
    )
    assert_same_gradient(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("model_config", [tiny.TINY, EVERYTHING], ids=["tied", "untied"])
def test_the_gradient_reaches_every_parameter_as_through_the_plain_log_softmax(model_config):
    params, tokens = random_params(model_config), jnp.asarray(tokens_of((3, 12)))

    def loss(params):
        hidden, _ = decoder.forward(params, model_config, tokens)
        weight = params["embedding" if model_config.tied else "output"]
        logprobs, entropy = plain(1.0, hidden[:, :-1], weight, tokens[:, 1:])
        return jnp.sum(logprobs * jnp.cos(logprobs)) + 0.3 * jnp.sum(entropy)

    assert_same_gradient(
        gradient(params, model_config, tokens, 5)[0], jax.jit(jax.grad(loss))(params)
    )


@pytest.mark.slow
def test_bfloat16_products_have_the_gradient_of_float32_up_to_their_rounding():
    """d weight is summed in float32: its error is that of the operands, 2^-8 of their size."""
    hidden, weight, targets, slopes = operands(steps=64, size=16)
    hidden, counts = hidden.astype(jnp.bfloat16), np.ones(targets.shape, bool)
    exact = pulled(
        lambda h, w: plain(1.0, h, w, targets), slopes, np.float32(hidden),
        np.float32(weight.astype(jnp.bfloat16)),
    )  # fmt: skip
    found = pulled(
        lambda h, w: score_targets(1.0, 4, h, w, targets, counts), slopes, hidden, weight
    )
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32]
    assert_same_gradient([np.float32(x) for x in found], exact, scale=0.01)


@pytest.mark.parametrize("chunk", [3, 12])
def test_chunks_without_a_counting_token_are_skipped_and_the_masked_gradient_is_the_same(chunk):
    """Of four chunks, or pieces of one, two count; where none does, NaN states reach nothing."""
    hidden, weight, targets, slopes = operands()
    counts = np.zeros(targets.shape, bool)
    counts[0, 4], counts[1, 3], counts[2, 9:11] = True, True, True
    counts = jnp.asarray(counts)
    masked = np.where(counts, slopes, 0)

    def score(hidden, weight):
        return score_targets(0.8, chunk, hidden, weight, jnp.asarray(targets), counts)

    expected = pulled(lambda h, w: plain(0.8, h, w, targets), masked, hidden, weight)
    spoilt = np.where((np.arange(12) // 3 % 2 == 0)[:, None], np.float32(np.nan), hidden)
    spoilt = jnp.asarray(spoilt)
    for out in score(spoilt, jnp.asarray(weight)):
        assert not np.any(out[:, :3]) and not np.any(out[:, 6:9])
    found = pulled(score, masked, spoilt, weight)
    assert_same_gradient(found, expected)


@pytest.mark.slow
def test_the_tokens_in_the_mask_come_first_so_that_chunks_behind_them_are_skipped(monkeypatch):
    mask, seen = np.zeros((2, 12), bool), []
    mask[0, 7:9], mask[1, [2, 11]] = True, True

    def score(temperature, chunk, hidden, weight, targets, counts):
        seen.append(np.asarray(counts))
        return score_targets(temperature, chunk, hidden, weight, targets, counts)

    monkeypatch.setattr(logprobs, "score_targets", score)
    tokens = jnp.asarray(tokens_of((2, 12)))
    token_logprobs(random_params(tiny.TINY), tiny.TINY, tokens, mask=jnp.asarray(mask))
    assert seen[0].tolist() == [[True] * 2 + [False] * 10] * 2


def test_one_chunk_is_cut():
    assert logprobs.chunk_count(512, 512) == logprobs.PIECES == 4
    assert logprobs.chunk_count(513, 512) == 2


@pytest.mark.slow
def test_nothing_outside_the_mask_has_a_logprob_or_a_gradient():
    params, tokens = random_params(tiny.TINY), jnp.asarray(tokens_of((3, 12)))
    mask = np.zeros(tokens.shape, bool)
    mask[0, 3:6], mask[2, 11] = True, True
    mask = jnp.asarray(mask)
    everywhere = tiny.token_logprobs(params, tiny.TINY, tokens)
    found = tiny.token_logprobs(params, tiny.TINY, tokens, mask=mask, chunk=2)
    for x, y in zip(found, everywhere, strict=True):
        np.testing.assert_allclose(x, np.where(mask, y, 0), atol=1e-5)

    def loss(params, given):
        out = token_logprobs(params, tiny.TINY, tokens, mask=given, chunk=2)[0]
        return jnp.sum(out if given is not None else jnp.where(mask, out, 0.0))

    assert_same_gradient(jax.jit(jax.grad(loss))(params, mask), jax.grad(loss)(params, None))


def test_an_unused_entropy_costs_nothing_in_the_backward_pass():
    hidden, weight, targets, slopes = operands()
    counts = np.ones(targets.shape, bool)

    def arrays(slopes):
        run = lambda h, w: pulled(  # noqa: E731
            lambda h, w: score_targets(1.0, 4, h, w, targets, counts), slopes, h, w
        )
        sizes = sizes_in(jax.make_jaxpr(run)(hidden, weight).jaxpr)
        return sum(1 for _, shape in sizes if shape == (3, 4, 20))

    assert arrays(slopes[:1]) < arrays(slopes)


@pytest.mark.slow
def test_remat_keeps_less_of_a_layer():
    """Memory of a gradient: all of the layers' intermediates, the products' results, the input."""
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)

    def needed(remat):
        model_config = dataclasses.replace(tiny.TINY, layers=8, remat=remat)

        def run(params, tokens):
            return jax.grad(score_sum, has_aux=True)(params, model_config, tokens, 4)

        return compiled_bytes(run, decoder.param_shapes(model_config), tokens)

    everything, dots, full = needed("none"), needed("dots"), needed("full")
    assert full < 0.7 * dots and dots < 0.7 * everything
