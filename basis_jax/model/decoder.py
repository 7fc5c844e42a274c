"""The decoder of Qwen2, Qwen3 and Llama, defined once in Flax Linen and used as pure functions.

The sampler and the trainer run the same ``forward``. The shift between tokens and their
log-probabilities is only in ``logprobs.token_logprobs``. Sequences start at position 0 and are
padded on the right, so the causal mask is enough: no token attends to the padding after it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key, PyTree

from basis_jax.model.attention import attend, fits_cudnn
from basis_jax.model.lora import Lora, low_rank
from basis_jax.model.rope import LinearScaling, RopeScaling, YarnScaling
from basis_jax.model.sharding import constrain
from basis_jax.pytree import pytree


@dataclass(frozen=True)
class ModelConfig:
    """Static description of a decoder; ``huggingface.read_model_config`` reads it."""

    architecture: str  # "qwen2", "qwen3" or "llama"
    vocab_size: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    max_positions: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | LinearScaling | YarnScaling | None = None
    norm_eps: float = 1e-6
    tied: bool = False  # output layer = embedding
    qkv_bias: bool = False  # Qwen2
    output_bias: bool = False  # Llama with attention_bias
    mlp_bias: bool = False  # Llama with mlp_bias
    qk_norm: bool = False  # Qwen3
    compute_dtype: str = "float32"
    remat: str = "none"  # recomputation of a layer, a key of REMAT
    attention: str = "plain"  # one of attention.KINDS
    scan_decode: bool = False  # layers of a decode step as one loop: see decoding.py
    lora: Lora | None = None  # adapters; the other weights are then frozen

    @property
    def weight_dtype(self) -> str:
        """The dtype of the weights: float32 if they are trained."""
        return "float32" if self.lora is None else self.lora.base_dtype


def as_described(model_config: ModelConfig) -> ModelConfig:
    """The model as ``config.json`` describes it, with default settings for how it is computed."""
    return replace(
        model_config, compute_dtype="float32", remat="none", attention="plain", scan_decode=False
    )


REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What is saved of a layer for the backward pass: everything it needs, the products with weights,
or only the layer's input."""


def remat_policy(model_config: ModelConfig) -> Callable[..., bool] | None:
    """The model's policy in ``REMAT``. With adapters a projection is the sum of two products, and
    ``dots`` saves the sum instead of both."""
    if model_config.lora is not None and model_config.remat == "dots":
        return jax.checkpoint_policies.save_only_these_names("projection")
    return REMAT[model_config.remat]


def computed_in(model_config: ModelConfig, dtype: str) -> ModelConfig:
    """The model with another compute dtype (empty: its own). Attention becomes plain if NVIDIA's
    kernel does not support the dtype."""
    dtype, kind = dtype or model_config.compute_dtype, model_config.attention
    if kind == "cudnn" and not fits_cudnn(dtype, model_config.head_dim):
        kind = "plain"
    return replace(model_config, compute_dtype=dtype, attention=kind)


@pytree
class KeyValues:
    """Keys (after the rotary embedding) and values, by layer and position."""

    keys: Float[Array, "*L N T K Dh"]
    values: Float[Array, "*L N T K Dh"]


def rope_frequencies(model_config: ModelConfig) -> Float[Array, " half"]:
    """Rotation per position, in radians: theta^(-2i/d), scaled if the model asks for it."""
    exponent = jnp.arange(0, model_config.head_dim, 2, dtype=jnp.float32) / model_config.head_dim
    frequency = 1.0 / (model_config.rope_theta**exponent)
    scaling = model_config.rope_scaling
    return frequency if scaling is None else scaling.scale(frequency, model_config.rope_theta)


def rotate(
    x: Float[Array, "N T heads Dh"], positions: Int[Array, "N T"], model_config: ModelConfig
) -> Float[Array, "N T heads Dh"]:
    """Rotary embedding of the pairs (i, i + Dh/2), the order of Hugging Face's weights."""
    angle = positions[..., None].astype(jnp.float32) * rope_frequencies(model_config)[None, None]
    sin, cos = jnp.sin(angle)[:, :, None], jnp.cos(angle)[:, :, None]
    if model_config.rope_scaling is not None and model_config.rope_scaling.amplitude != 1:
        sin, cos = (x * model_config.rope_scaling.amplitude for x in (sin, cos))
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return rotated.astype(x.dtype)


def rms_norm(
    x: Float[Array, "*s D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*s D"]:
    """x / sqrt(mean(x^2) + eps) * scale, in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def logical(initial: Callable[..., Array], axes: tuple[str | None, ...]) -> Callable[..., Array]:
    """An initializer that records the parameter's logical axes. Flax unboxes it in a module."""
    return nn.with_logical_partitioning(initial, axes)  # type: ignore[return-value]  # unboxed later


class Block(nn.Module):
    """One decoder layer: (hidden, keys and values of a prefix) -> hidden, and new keys and values
    if they are kept."""

    model_config: ModelConfig
    keep: bool = False

    def weight(self, name, shape, axes, *, bias=False, dtype=None):
        if bias:
            initial = nn.initializers.zeros
        else:
            initial = nn.initializers.normal(0.02)
        dtype = dtype or self.model_config.weight_dtype
        value = self.param(name, logical(initial, axes), shape, dtype)
        return value.astype(self.model_config.compute_dtype)

    def adapted(self, name, x, y, shape, axes, *, inputs=1):
        """The projection y of x, plus the adapter's part if there is an adapter. x is summed over
        the first ``inputs`` axes of the weight."""
        lora = self.model_config.lora
        if lora is None:
            return y
        if name in lora.targets:
            a, b = (*shape[:inputs], lora.rank), (lora.rank, *shape[inputs:])
            a = self.weight(f"{name}_a", a, (*axes[:inputs], None), dtype="float32")
            b = self.weight(f"{name}_b", b, (None, *axes[inputs:]), dtype="float32")
            y = y + low_rank(x, a, b, lora.scale)
        return checkpoint_name(y, "projection")

    def scale(self, name, size, axis):
        return self.param(name, logical(nn.initializers.ones, (axis,)), (size,), jnp.float32)

    @nn.compact
    def __call__(self, x, prefix, positions):
        c = self.model_config
        normed = rms_norm(x, self.scale("attention_norm", c.embed, "activation_embed"), c.norm_eps)
        attended, keys, values = self.attention(normed, prefix, positions)
        x = constrain(x + attended, ("batch", "time", "activation_embed"))
        normed = rms_norm(x, self.scale("mlp_norm", c.embed, "activation_embed"), c.norm_eps)
        x = constrain(x + self.feed_forward(normed), ("batch", "time", "activation_embed"))
        return x, KeyValues(keys=keys, values=values) if self.keep else None

    def project(self, name, x, heads, axis):
        c = self.model_config
        shape, axes = (c.embed, heads, c.head_dim), ("embed", axis, "head_dim")
        y = jnp.einsum("ntd,dhk->nthk", x, self.weight(f"{name}_proj", shape, axes))
        if c.qkv_bias:
            y = y + self.weight(f"{name}_bias", shape[1:], axes[1:], bias=True)[None, None]
        y = self.adapted(f"{name}_proj", x, y, shape, axes)
        if c.qk_norm and name != "v":
            y = rms_norm(y, self.scale(f"{name}_norm", c.head_dim, "head_dim"), c.norm_eps)
        return y

    def attention(self, x, prefix, positions):
        c = self.model_config
        queries = rotate(self.project("q", x, c.heads, "heads"), positions, c)
        keys = rotate(self.project("k", x, c.kv_heads, "kv_heads"), positions, c)
        values = self.project("v", x, c.kv_heads, "kv_heads")
        all_keys, all_values = keys, values
        if prefix is not None:
            all_keys = prepend_prefix(prefix.keys, keys)
            all_values = prepend_prefix(prefix.values, values)
        mixed = attend(c.attention, queries, all_keys, all_values)
        shape, axes = (c.heads, c.head_dim, c.embed), ("heads", "head_dim", "embed")
        y = jnp.einsum("nthk,hkd->ntd", mixed, self.weight("o_proj", shape, axes))
        if c.output_bias:
            y = y + self.weight("o_bias", (c.embed,), ("activation_embed",), bias=True)[None, None]
        return self.adapted("o_proj", mixed, y, shape, axes, inputs=2), keys, values

    def feed_forward(self, x):
        c = self.model_config
        flat = x.reshape(-1, c.embed)  # [N T, D]: on CPUs 1.2x as fast as [N, T, D]

        def dense(name, x, sizes, axes):
            y = x @ self.weight(f"{name}_proj", sizes, axes)
            if c.mlp_bias:
                y = y + self.weight(f"{name}_bias", sizes[1:], axes[1:], bias=True)[None]
            return self.adapted(f"{name}_proj", x, y, sizes, axes)

        gate = dense("gate", flat, (c.embed, c.mlp), ("embed", "mlp"))
        up = dense("up", flat, (c.embed, c.mlp), ("embed", "mlp"))
        down = dense("down", jax.nn.silu(gate) * up, (c.mlp, c.embed), ("mlp", "embed"))
        return down.reshape(x.shape)


def prepend_prefix(
    prefix: Float[Array, "1 P K Dh"], own: Float[Array, "N T K Dh"]
) -> Float[Array, "N S K Dh"]:
    """Prepend the prefix that all rows share to every row."""
    shape = (own.shape[0], *prefix.shape[1:])
    return jnp.concatenate([jnp.broadcast_to(prefix, shape), own], axis=1)


class Decoder(nn.Module):
    """Embedding, all layers as one scan, and final norm. The output layer is ``logits``."""

    model_config: ModelConfig
    keep: bool = False

    @nn.compact
    def __call__(self, tokens, positions, prefix):
        c = self.model_config
        initial = logical(nn.initializers.normal(0.02), ("vocab", "embed"))
        embedding = self.param("embedding", initial, (c.vocab_size, c.embed), c.weight_dtype)
        if not c.tied:  # declared here, used by `logits`
            self.param("output", initial, (c.vocab_size, c.embed), c.weight_dtype)
        x = jnp.take(embedding, tokens, axis=0).astype(c.compute_dtype)
        x = constrain(x, ("batch", "time", "activation_embed"))
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=remat_policy(c))
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, kept = stack(c, self.keep, name="layers")(x, prefix, positions)
        norm = logical(nn.initializers.ones, ("activation_embed",))
        return rms_norm(x, self.param("norm", norm, (c.embed,), jnp.float32), c.norm_eps), kept


def _init_boxed(model_config: ModelConfig, key: Key[Array, ""]) -> PyTree:
    tokens = jnp.zeros((1, 2), jnp.int32)
    plain = replace(model_config, attention="plain")  # available on every platform
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # too small to split
        return Decoder(plain).init(key, tokens, jnp.zeros_like(tokens), None)["params"]


def init(model_config: ModelConfig, key: Key[Array, ""]) -> PyTree:
    """Random parameters: normal(0, 0.02) weights and adapters, zero biases, unit norms.

    Call it under ``jax.jit(init, static_argnums=0)``: eager initialisation takes many seconds.
    """
    return nn.unbox(_init_boxed(model_config, key))


@functools.cache
def _abstract_boxed(model_config: ModelConfig) -> PyTree:
    return jax.eval_shape(lambda: _init_boxed(model_config, jax.random.key(0)))


def param_shapes(model_config: ModelConfig) -> PyTree:
    """ShapeDtypeStruct of every parameter; no array is made."""
    return nn.unbox(_abstract_boxed(model_config))


def param_axes(model_config: ModelConfig) -> PyTree:
    """Tuple of logical axis names of every parameter."""
    specs = nn.get_partition_spec(_abstract_boxed(model_config))
    return jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))


def forward(
    params: PyTree,
    model_config: ModelConfig,
    tokens: Int[Array, "N T"],
    *,
    prefix: KeyValues | None = None,
    keep: bool = False,
) -> tuple[Float[Array, "N T D"], KeyValues | None]:
    """Final hidden states, and with ``keep`` the keys and values of ``tokens``.

    Rows start at position 0, or after ``prefix``: the keys and values kept from one row [1 P] that
    all rows begin with. ``decoding.decode_step`` continues from the keys and values kept here.
    """
    prefix_length = 0 if prefix is None else prefix.keys.shape[2]
    steps = prefix_length + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.broadcast_to(steps[None], tokens.shape)
    module = Decoder(model_config, keep)
    found: Any = module.apply({"params": params}, tokens, positions, prefix)
    return found


def output_weight(params: PyTree, model_config: ModelConfig) -> Float[Array, "V D"]:
    """The output layer's parameter. It is the embedding if they are tied."""
    return params["embedding" if model_config.tied else "output"]


def logits(
    params: PyTree, model_config: ModelConfig, hidden: Float[Array, "*s D"]
) -> Float[Array, "*s V"]:
    """Output layer. Products are in the compute dtype, sums and result in float32."""
    weight = output_weight(params, model_config).astype(model_config.compute_dtype)
    return jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)
