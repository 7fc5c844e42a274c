"""The decoder: causal, and exact with caches, chunks, recomputation and meshes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import EVERYTHING, assert_same_gradient, gradient, random_params, tokens_of

from basis_jax.model import decoder, decoding
from basis_jax.model.sharding import RULES, make_mesh, named_tree, put_rows

CONFIGS = pytest.mark.parametrize(
    "model_config", [tiny.TINY, EVERYTHING], ids=["plain", "everything"]
)
forward = jax.jit(decoder.forward, static_argnums=1, static_argnames="keep")
decode_step = jax.jit(decoding.decode_step, static_argnums=1)


@CONFIGS
@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
def test_prefill_and_decode_equal_the_full_pass(model_config, scanned):
    """Right-padded prompts of different lengths, every row extended at its own position."""
    params, tokens = random_params(model_config), tokens_of((4, 12))
    lengths = np.array([5, 1, 3, 2], np.int32)
    full = np.asarray(forward(params, model_config, tokens)[0])
    rows = np.arange(4)
    prompts = np.where(np.arange(5) < lengths[:, None], tokens[:, :5], 9)
    hidden, kept = forward(params, model_config, prompts, keep=True)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(np.asarray(hidden)[row, :length], full[row, :length], atol=1e-5)
    cache = decoding.filled_cache(kept, 12, scanned=scanned)
    sampler = dataclasses.replace(model_config, scan_decode=scanned)
    weights = decoding.decode_weights(params, sampler)
    expected = np.asarray(decoder.logits(params, model_config, jnp.asarray(full)))
    for step in range(7):
        at = lengths + step
        logits, cache = decode_step(weights, sampler, tokens[rows, at], at, cache)
        np.testing.assert_allclose(np.asarray(logits).T, expected[rows, at], atol=1e-5)


def test_a_token_changes_itself_and_what_follows_and_nothing_before():
    params, tokens = random_params(EVERYTHING), tokens_of((2, 12))
    hidden, _ = forward(params, EVERYTHING, tokens)
    changed = (tokens + (np.arange(12) == 6)).astype(np.int32) % EVERYTHING.vocab_size
    other, _ = forward(params, EVERYTHING, changed)
    np.testing.assert_array_equal(hidden[:, :6], other[:, :6])
    assert np.abs(hidden[:, 6:] - other[:, 6:]).max(axis=-1).min() > 1e-3


def test_llama3_frequencies_equal_the_published_rule():
    """Frequency by frequency, in float64, from the wavelength: kept, divided or interpolated."""
    theta, factor, low, high, original = 500_000.0, 8.0, 1.0, 4.0, 8192
    model_config = dataclasses.replace(
        EVERYTHING,
        head_dim=64,
        rope_theta=theta,
        rope_scaling=decoder.RopeScaling(factor, low, high, original),
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
    np.testing.assert_allclose(decoder.rope_frequencies(model_config), expected, rtol=1e-5)


def test_rotation_multiplies_each_pair_by_a_phase():
    """(x_i, x_{i + d/2}) as a complex number turns by position times frequency i."""
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 20, 3, 0, 50]], np.int32)
    found = jax.jit(decoder.rotate, static_argnums=2)(x, positions, tiny.TINY)
    phase = positions[..., None] * tiny.TINY.rope_theta ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * phase)[:, :, None]
    np.testing.assert_allclose(
        found, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5
    )


@CONFIGS
def test_every_axis_of_every_parameter_has_a_known_meaning(model_config):
    shapes, axes = decoder.param_shapes(model_config), decoder.param_axes(model_config)
    flat = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    assert jax.tree.structure(shapes) == jax.tree.structure(
        axes, is_leaf=lambda x: isinstance(x, tuple)
    )
    for shape, names in zip(jax.tree.leaves(shapes), flat, strict=True):
        assert len(names) == len(shape.shape)
        assert all(name is not None and name in RULES for name in names), names


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2}])
def test_a_mesh_does_not_change_logprobs_and_gradients(sizes):
    params, tokens = random_params(EVERYTHING), tokens_of((4, 12))
    expected = jax.device_get(gradient(params, EVERYTHING, tokens, 4))
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, named_tree(mesh, decoder.param_axes(EVERYTHING)))
        assert len(sharded["layers"]["q_proj"].sharding.device_set) == 4
        assert not sharded["layers"]["q_proj"].sharding.is_fully_replicated
        found = jax.device_get(gradient(sharded, EVERYTHING, put_rows(mesh, tokens), 4))
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
    assert_same_gradient(found[0], expected[0])


def test_the_attention_kernel_is_called_for_what_plain_attention_computes(monkeypatch):
    """With XLA's implementation standing in for NVIDIA's, which this machine may lack."""
    params, tokens = random_params(EVERYTHING), tokens_of((4, 12))
    kernel, called = jax.nn.dot_product_attention, []

    def standing_in(*args, implementation, **options):
        called.append(implementation)
        return kernel(*args, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", standing_in)
    model_config = dataclasses.replace(EVERYTHING, attention="cudnn")
    found = forward(params, model_config, tokens)[0]
    assert set(called) == {"cudnn"}
    np.testing.assert_allclose(found, forward(params, EVERYTHING, tokens)[0], atol=1e-5)


@pytest.mark.gpu
def test_nvidias_attention_is_that_of_plain_attention():
    half = dataclasses.replace(EVERYTHING, compute_dtype="bfloat16")
    params, tokens = random_params(half), tokens_of((4, 64))
    kernel = dataclasses.replace(half, attention="cudnn")
    found, expected = (forward(params, c, tokens)[0].astype(np.float32) for c in (kernel, half))
    assert np.abs(found - expected).mean() < 0.02 * np.abs(expected).mean()


@pytest.mark.slow
def test_bfloat16_compute_keeps_float32_parameters_logits_and_gradients():
    """bfloat16 has 8 bits: log-probabilities are near float32's, and not equal."""
    half, tokens = dataclasses.replace(EVERYTHING, compute_dtype="bfloat16"), tokens_of((4, 12))
    params = random_params(EVERYTHING)
    hidden, kept = forward(params, half, tokens, keep=True)
    weights, cache = decoding.decode_weights(params, half), decoding.filled_cache(kept, 13)
    logits, cache = decode_step(weights, half, tokens[:, 0], np.full(4, 12, np.int32), cache)
    arrays = [hidden, kept.keys, cache.keys[0], cache.values[1], weights.layers[0]["q_proj"]]
    assert {x.dtype for x in arrays} == {jnp.dtype("bfloat16")} and logits.dtype == jnp.float32
    assert decoder.logits(params, half, hidden).dtype == jnp.float32
    gradients, logprobs = gradient(params, half, tokens, 4)
    gap = np.abs(logprobs - gradient(params, EVERYTHING, tokens, 4)[1])
    assert 0 < gap.max() < 0.3 and gap.mean() < 0.05
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradients))
