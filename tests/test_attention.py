"""Attention kernels compute what plain attention computes, and are chosen where they run."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from basis_jax.config import ModelSection
from basis_jax.model import attention, costs, decoder
from basis_jax.model.sharding import make_mesh
from basis_jax.opening.rollout_setup import attention_for


def operands(steps, length, *, heads=4, kv_heads=2, size=16):
    random = np.random.default_rng(steps)
    shapes = ((2, steps, heads, size), (2, length, kv_heads, size), (2, length, kv_heads, size))
    return [jnp.asarray(random.normal(0, 2, shape), jnp.float32) for shape in shapes]


def weighted(attend):
    """Gradients of a sum that weighs every number differently, and the mixed values."""

    def total(*operands):
        mixed = attend(*operands)
        return jnp.sum(mixed * jnp.cos(jnp.arange(mixed.size).reshape(mixed.shape))), mixed

    return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "length"), [(130, 130), (40, 200)])
def test_splash_attention_is_that_of_plain_attention(steps, length):
    """Two query heads a key head; rows that do not fill a block; rows after a prefix of 160."""
    arrays = operands(steps, length)
    splash = functools.partial(attention.splash, interpret=True)
    found, mixed = weighted(splash)(*arrays)
    expected, plain = weighted(attention.plain)(*arrays)
    np.testing.assert_allclose(mixed, plain, atol=2e-5)
    tiny.assert_same_gradient(found, expected)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(attention, "splash", functools.partial(attention.splash, interpret=True))


@pytest.mark.slow
def test_a_model_with_splash_attention_scores_as_without(interpreted):
    """Log-probabilities and gradients, with rows and heads split over devices, and recomputed."""
    model_config = dataclasses.replace(tiny.TINY, remat="dots")
    splash = dataclasses.replace(model_config, attention="splash")
    params, tokens = tiny.params(), tiny.tokens_of((4, 150))
    expected = jax.device_get(tiny.gradient(params, model_config, tokens, 512))
    with jax.set_mesh(make_mesh(data=2, tensor=2)):
        gradient = jax.jit(jax.grad(tiny.score_sum, has_aux=True), static_argnums=(1, 3))
        found = jax.device_get(gradient(params, splash, tokens, 512))
        text = gradient.lower(params, splash, tokens, 512).as_text()
    assert "150x150" not in text
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
    tiny.assert_same_gradient(found[0], expected[0])


@pytest.mark.slow
def test_a_prefill_after_a_shared_prefix_is_that_of_the_whole_rows(interpreted):
    splash = dataclasses.replace(tiny.TINY, attention="splash")
    forward = jax.jit(decoder.forward, static_argnums=1, static_argnames="keep")
    tokens = tiny.tokens_of((3, 150))
    tokens[:, :96] = tokens[:1, :96]
    whole, _ = forward(tiny.params(), tiny.TINY, tokens)
    _, prefix = forward(tiny.params(), splash, tokens[:1, :96], keep=True)
    hidden, _ = forward(tiny.params(), splash, tokens[:, 96:], prefix=prefix)
    np.testing.assert_allclose(hidden, whole[:, 96:], atol=1e-4)


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "head_dim", "kind"),
    [
        ("tpu", "", "bfloat16", 128, "splash"),
        ("tpu", "", "float32", 64, "splash"),
        ("gpu", "9.0", "bfloat16", 128, "cudnn"),
        ("gpu", "7.5", "bfloat16", 128, "plain"),
        ("gpu", "gfx942", "bfloat16", 128, "plain"),
        ("gpu", "9.0", "float32", 128, "plain"),
        ("gpu", "9.0", "bfloat16", 256, "plain"),
        ("cpu", "", "bfloat16", 128, "plain"),
    ],
)
def test_auto_takes_a_kernel_where_it_runs(platform, capability, dtype, head_dim, kind):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    assert attention_for(ModelSection(compute_dtype=dtype), device, head_dim) == kind
    plain = ModelSection(compute_dtype=dtype, attention="plain")
    assert attention_for(plain, device, head_dim) == "plain"


@pytest.mark.parametrize("kind", ["cudnn", "splash"])
def test_shapes_are_known_where_the_kernel_does_not_run(kind):
    model_config = dataclasses.replace(tiny.TINY, attention=kind)
    assert decoder.param_shapes(model_config) == decoder.param_shapes(tiny.TINY)
    made = jax.jit(decoder.init, static_argnums=0)(model_config, jax.random.key(0))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, tiny.params())


def test_a_kernel_holds_no_scores_of_long_rows():
    """T x T x heads numbers are gone from the plan of a kernel, but for rows within a block."""
    mesh = make_mesh(devices=jax.devices()[:1])
    for kind, width, saved in (("cudnn", 64, True), ("splash", 1024, True), ("splash", 128, False)):
        kernel = dataclasses.replace(tiny.TINY, attention=kind)
        sizes = {"rows": 4, "width": width}
        plain = costs.activation_bytes(tiny.TINY, mesh, **sizes)
        scores = tiny.TINY.layers * tiny.TINY.heads * 4 * width**2 * 8
        assert plain - costs.activation_bytes(kernel, mesh, **sizes) == scores * saved
        memory = [
            costs.sampling_memory(c, mesh, slots=4, length=2048, width=width)["prefill"]
            for c in (tiny.TINY, kernel)
        ]
        assert memory[0] - memory[1] == tiny.TINY.heads * width**2 * 8 * saved
