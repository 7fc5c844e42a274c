"""The decoder: causal, and exact with caches, chunks, recomputation and meshes."""

import dataclasses
import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from basis_jax import decoding, model
from basis_jax.sharding import RULES, make_mesh, named_tree, put_rows

EVERYTHING = dataclasses.replace(  # every optional part at once
    tiny.TINY,
    tied=False,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    rope_theta=500.0,
    rope_scaling=model.RopeScaling(8.0, 1.0, 4.0, 64),
)
CONFIGS = pytest.mark.parametrize("config", [tiny.TINY, EVERYTHING], ids=["plain", "everything"])
forward = jax.jit(model.forward, static_argnums=1, static_argnames="keep")
decode_step = jax.jit(decoding.decode_step, static_argnums=1)


def tokens_of(shape, vocab=tiny.TINY.vocab_size):
    return np.random.default_rng(1).integers(0, vocab, shape).astype(np.int32)


@functools.cache
def random_params(config):
    """Parameters in which biases and norms too differ from what they are initialised to."""
    random = np.random.default_rng(0)

    def make(path, leaf):
        centre = 1.0 if "norm" in path[-1].key else 0.0
        return jnp.asarray(random.normal(centre, 0.15, leaf.shape).astype(np.float32))

    return jax.tree_util.tree_map_with_path(make, model.param_shapes(config))


@CONFIGS
def test_prefill_and_decode_equal_the_full_pass(config):
    """Right-padded prompts of different lengths, every row extended at its own position."""
    params, tokens = random_params(config), tokens_of((4, 12))
    lengths = np.array([5, 1, 3, 2], np.int32)
    full = np.asarray(forward(params, config, tokens)[0])
    rows = np.arange(4)
    prompts = np.where(np.arange(5) < lengths[:, None], tokens[:, :5], 9)
    hidden, kept = forward(params, config, prompts, keep=True)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(np.asarray(hidden)[row, :length], full[row, :length], atol=1e-5)
    weights, cache = decoding.decode_weights(params, config), decoding.filled_cache(kept, 12)
    expected = np.asarray(model.logits(params, config, jnp.asarray(full)))
    for step in range(7):
        at = lengths + step
        logits, cache = decode_step(weights, config, tokens[rows, at], at, cache)
        np.testing.assert_allclose(np.asarray(logits).T, expected[rows, at], atol=1e-5)


def test_a_token_changes_itself_and_what_follows_and_nothing_before():
    params, tokens = random_params(EVERYTHING), tokens_of((2, 12))
    hidden, _ = forward(params, EVERYTHING, tokens)
    changed = (tokens + (np.arange(12) == 6)).astype(np.int32) % EVERYTHING.vocab_size
    other, _ = forward(params, EVERYTHING, changed)
    np.testing.assert_array_equal(hidden[:, :6], other[:, :6])
    assert np.abs(hidden[:, 6:] - other[:, 6:]).max(axis=-1).min() > 1e-3


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


def score_sum(params, config, tokens, chunk):
    """Something that both outputs of token_logprobs flow into, and the log-probabilities."""
    logprobs, entropy = model.token_logprobs(params, config, tokens, chunk=chunk)
    return jnp.sum(logprobs * jnp.cos(logprobs)) + 0.3 * jnp.sum(entropy), logprobs


gradient = jax.jit(jax.grad(score_sum, has_aux=True), static_argnums=(1, 3))


def assert_same_gradient(found, expected, *, scale=1e-5):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=scale * float(jnp.abs(y).max()))


def test_chunks_and_remat_do_not_change_the_gradient():
    tokens = tokens_of((3, 12))
    whole, _ = gradient(random_params(tiny.TINY), tiny.TINY, tokens, 512)
    assert_same_gradient(gradient(random_params(tiny.TINY), tiny.TINY, tokens, 4)[0], whole)
    remat = dataclasses.replace(tiny.TINY, remat=True)
    assert_same_gradient(gradient(random_params(tiny.TINY), remat, tokens, 512)[0], whole)


def sizes_in(jaxpr):
    """(size, shape) of every intermediate of a jaxpr and the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield from ((v.aval.size, v.aval.shape) for v in equation.outvars if v.aval.shape)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from sizes_in(inner)


def compiled_bytes(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_logits_exist_for_one_chunk_at_a_time():
    """Forward and backward: no array with N x T x V numbers is written down, none is allocated."""
    rows, steps, vocab, chunk = 2, 129, 16384, 8
    config = dataclasses.replace(tiny.TINY, vocab_size=vocab, embed=8, layers=1)
    params, tokens = model.param_shapes(config), jax.ShapeDtypeStruct((rows, steps), jnp.int32)
    whole = rows * (steps - 1) * vocab

    for function in (score_sum, jax.grad(score_sum, has_aux=True)):

        def run(params, tokens, chunk=chunk, function=function):
            return function(params, config, tokens, chunk)

        sizes = list(sizes_in(jax.make_jaxpr(run)(params, tokens).jaxpr))
        largest, shape = max(s for s in sizes if vocab in s[1])
        assert largest == rows * chunk * vocab, shape
        assert compiled_bytes(run, params, tokens) < 0.5 * 4 * whole
        unchunked = lambda params, tokens, run=run: run(params, tokens, chunk=steps)  # noqa: E731
        assert compiled_bytes(unchunked, params, tokens) > 4 * whole  # the measure can tell


def test_llama3_frequencies_equal_the_published_rule():
    """Frequency by frequency, in float64, from the wavelength: kept, divided or interpolated."""
    theta, factor, low, high, original = 500_000.0, 8.0, 1.0, 4.0, 8192
    config = dataclasses.replace(
        EVERYTHING,
        head_dim=64,
        rope_theta=theta,
        rope_scaling=model.RopeScaling(factor, low, high, original),
    )
    expected, branches = [], set()
    for i in range(32):
        frequency = theta ** (-2 * i / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            branch = "kept"
        elif wavelength > original / low:
            branch, frequency = "divided", frequency / factor
        else:
            smooth = (original / wavelength - low) / (high - low)
            branch = "interpolated"
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        expected.append(frequency)
        branches.add(branch)
    assert len(branches) == 3
    np.testing.assert_allclose(model.rope_frequencies(config), expected, rtol=1e-5)


def test_rotation_multiplies_each_pair_by_a_phase():
    """(x_i, x_{i + d/2}) as a complex number turns by position times frequency i."""
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 20, 3, 0, 50]], np.int32)
    found = jax.jit(model.rotate, static_argnums=2)(x, positions, tiny.TINY)
    phase = positions[..., None] * tiny.TINY.rope_theta ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * phase)[:, :, None]
    np.testing.assert_allclose(
        found, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5
    )


@CONFIGS
def test_every_axis_of_every_parameter_has_a_known_meaning(config):
    shapes, axes = model.param_shapes(config), model.param_axes(config)
    flat = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    assert jax.tree.structure(shapes) == jax.tree.structure(
        axes, is_leaf=lambda x: isinstance(x, tuple)
    )
    for shape, names in zip(jax.tree.leaves(shapes), flat, strict=True):
        assert len(names) == len(shape.shape)
        assert all(name is not None and name in RULES for name in names), names


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2}])
def test_a_mesh_does_not_change_logprobs_and_gradients(sizes):
    params, tokens = random_params(EVERYTHING), tokens_of((4, 12))
    expected = jax.device_get(gradient(params, EVERYTHING, tokens, 4))
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, named_tree(mesh, model.param_axes(EVERYTHING)))
        assert len(sharded["layers"]["q_proj"].sharding.device_set) == 4
        assert not sharded["layers"]["q_proj"].sharding.is_fully_replicated
        found = jax.device_get(gradient(sharded, EVERYTHING, put_rows(mesh, tokens), 4))
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
    assert_same_gradient(found[0], expected[0])


def test_bfloat16_compute_keeps_float32_parameters_logits_and_gradients():
    """bfloat16 has 8 bits: log-probabilities are near float32's, and not equal."""
    half, tokens = dataclasses.replace(EVERYTHING, compute_dtype="bfloat16"), tokens_of((4, 12))
    params = random_params(EVERYTHING)
    hidden, kept = forward(params, half, tokens, keep=True)
    weights, cache = decoding.decode_weights(params, half), decoding.filled_cache(kept, 13)
    logits, cache = decode_step(weights, half, tokens[:, 0], np.full(4, 12, np.int32), cache)
    arrays = [hidden, kept.keys, cache.keys[0], cache.values[1], weights.layers[0]["q_proj"]]
    assert {x.dtype for x in arrays} == {jnp.dtype("bfloat16")} and logits.dtype == jnp.float32
    assert model.logits(params, half, hidden).dtype == jnp.float32
    gradients, logprobs = gradient(params, half, tokens, 4)
    gap = np.abs(logprobs - gradient(params, EVERYTHING, tokens, 4)[1])
    assert 0 < gap.max() < 0.3 and gap.mean() < 0.05
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradients))
