"""Decode one more token per row: the model of ``decoder.py`` for one position, laid out for speed.

The mathematics is that of ``decoder.Block``; only the order of axes differs. Features come before
rows, and every product is weight @ x with weights [out, in]. ``decode_weights`` is called once for
many steps and makes one of two layouts.

Unrolled, for CPUs: each layer has arrays of its own, weights are stored [out, in], and positions
are the last axis of keys. Other layouts are slower: XLA's CPU backend copies a stacked layer before
using it, repacks a right-hand weight for every product, and transposes keys at every step.

Scanned (``ModelConfig.scan_decode``), for TPUs: the layers are a loop over stacked arrays, so
compile time does not grow with their number. The cache is written after the loop. Weights have the
shapes of the parameters, and prefills read them too, so prefills gather no parameters.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int, PyTree

from basis_jax.model import lora
from basis_jax.model.decoder import KeyValues, ModelConfig, param_axes, rms_norm, rotate
from basis_jax.model.sharding import by_shard, constrain, split_over
from basis_jax.pytree import pytree

KEY_AXES = ("batch", "kv_heads", "head_dim", "time")
VALUE_AXES = ("batch", "kv_heads", "time", "head_dim")
VOCAB_BLOCK = 128
CACHE_AXES = {"keys": KEY_AXES, "values": VALUE_AXES}
STACKED_AXES = ("layers", *VALUE_AXES)
UNSPLIT = {"embed": "activation_embed"}  # weights are gathered over this axis of the parameters
OUT_FIRST = {
    "q_proj": ("heads", "activation_embed"),
    "k_proj": ("kv_heads", "activation_embed"),
    "v_proj": ("kv_heads", "activation_embed"),
    "o_proj": ("activation_embed", "heads"),
    "gate_proj": ("mlp", "activation_embed"),
    "up_proj": ("mlp", "activation_embed"),
    "down_proj": ("activation_embed", "mlp"),
}


Layers = tuple[dict[str, Array], ...] | dict[str, Array]
"""Unrolled: projections [out, in] and biases [out]. Scanned: shaped like the stacked parameters."""


@pytree
class DecodeWeights:
    """The model's weights in the compute dtype, split over ``tensor`` only. Embedding and output
    layer are padded to ``whole_blocks`` rows."""

    embedding: Float[Array, "V D"]
    output: Float[Array, "V D"]  # the same array if tied
    norm: Float[Array, " D"]
    layers: Layers


@pytree
class Cache:
    """Keys and values, one array per layer, or stacked. Entry s of a row belongs to its token at
    position s."""

    keys: tuple[Float[Array, "N K Dh S"], ...] | Float[Array, "L N K S Dh"]
    values: tuple[Float[Array, "N K S Dh"], ...] | Float[Array, "L N K S Dh"]

    @property
    def length(self) -> int:
        return jax.tree.leaves(self.values)[0].shape[-2]


def decode_weights(params: PyTree, model_config: ModelConfig) -> DecodeWeights:
    """A copy of the parameters for ``decode_step``, in the compute dtype.

    It is gathered over ``fsdp`` once instead of at every token. Memory per device: parameters /
    ``tensor``.
    """
    embedding = table_weights(params["embedding"], model_config)
    layers: Layers
    if model_config.scan_decode:
        layers = stacked_weights(params["layers"], model_config)
    else:
        layers = tuple(
            layer_weights(params["layers"], np.int32(i), model_config)
            for i in range(model_config.layers)
        )
    return DecodeWeights(
        embedding=embedding,
        output=embedding if model_config.tied else table_weights(params["output"], model_config),
        norm=params["norm"],
        layers=layers,
    )


@functools.partial(jax.jit, static_argnames="model_config")
def table_weights(table, model_config):
    missing = whole_blocks(table.shape[0]) - table.shape[0]
    table = jnp.pad(table.astype(model_config.compute_dtype), ((0, missing), (0, 0)))
    return constrain(table, ("vocab", "activation_embed"))


@functools.partial(jax.jit, static_argnames="model_config")
def layer_weights(stacked, index, model_config):
    """The weights of one layer of the stacked parameters. All layers use the same program."""
    layer = {name: value[index] for name, value in stacked.items()}
    return out_first(without_adapters(layer, model_config))


@functools.partial(jax.jit, static_argnames="model_config")
def stacked_weights(stacked, model_config):
    """The stacked parameters, gathered over ``fsdp``."""
    axes = param_axes(model_config)["layers"]
    if model_config.lora is None:
        layers = in_compute_dtype(stacked, model_config)
    else:
        merge = functools.partial(without_adapters, model_config=model_config)
        layers = jax.lax.map(merge, stacked)  # only one layer at a time in float32
    return {
        name: constrain(value, tuple(UNSPLIT.get(axis, axis) for axis in axes[name]))
        for name, value in layers.items()
    }


def without_adapters(layer: dict[str, Array], model_config: ModelConfig) -> dict[str, Array]:
    """One layer's parameters in the compute dtype, adapters merged into the weights."""
    if model_config.lora is not None:
        layer = lora.merged(layer, model_config.lora.scale)
    return in_compute_dtype(layer, model_config)


def in_compute_dtype(layer: dict[str, Array], model_config: ModelConfig) -> dict[str, Array]:
    """Cast everything but the scales of norms."""
    dtype = model_config.compute_dtype
    return {name: x if "norm" in name else x.astype(dtype) for name, x in layer.items()}


def out_first(layer: dict[str, Array]) -> dict[str, Array]:
    """A layer's parameters as matrices [out, in] and vectors [out]."""

    def lay_out(name, value):
        if "norm" in name:
            return value
        if name.endswith("_bias"):
            return value.reshape(-1)
        if name == "o_proj":  # [heads, Dh, D]; the others [D, heads, Dh] or [in, out]
            value = value.reshape(-1, value.shape[-1])
        return constrain(value.reshape(value.shape[0], -1).T, OUT_FIRST[name])

    return {name: lay_out(name, value) for name, value in layer.items()}


def prompt_params(
    params: PyTree, weights: DecodeWeights, model_config: ModelConfig
) -> tuple[PyTree, ModelConfig]:
    """Parameters and model with which ``decoder.forward`` reads prompts.

    Scanned decode weights are used themselves, and ``params`` is not needed. Otherwise it is
    ``params``.
    """
    if not model_config.scan_decode:
        return params, model_config
    same = {"embedding": weights.embedding, "norm": weights.norm, "layers": weights.layers}
    if not model_config.tied:
        same["output"] = weights.output
    rows = weights.embedding.shape[0]
    return same, dataclasses.replace(model_config, vocab_size=rows, lora=None)


def whole_blocks(vocab_size: int) -> int:
    """Number of rows of the output layer, padding included.

    If the vocabulary is split, every device has whole blocks of ``VOCAB_BLOCK`` tokens. The last
    ones are padded with rows that belong to no token.
    """
    shards = split_over("vocab")
    unit = VOCAB_BLOCK * shards if shards > 1 else 1
    return -(-vocab_size // unit) * unit


def cache_axes(name: str, x: Array) -> tuple[str | None, ...]:
    """Logical axes of ``x``, the cache's ``keys`` or ``values``, of one layer or stacked."""
    return CACHE_AXES[name] if x.ndim == 4 else STACKED_AXES


def empty_cache(model_config: ModelConfig, rows: int, length: int) -> Cache:
    """An empty cache of ``length`` positions per row, in the compute dtype."""
    c = model_config
    zeros = jnp.zeros((c.layers, rows, length, c.kv_heads, c.head_dim), c.compute_dtype)
    return filled_cache(KeyValues(keys=zeros, values=zeros), length, scanned=c.scan_decode)


def filled_cache(kept: KeyValues, length: int, *, scanned: bool = False) -> Cache:
    """A cache of ``length`` positions with the keys and values that a prefill kept."""
    padding = length - kept.keys.shape[2]

    def lay_out(name, stacked):  # [L N S K Dh]
        padded = jnp.pad(stacked, ((0, 0), (0, 0), (0, padding), (0, 0), (0, 0)))
        if scanned:
            return constrain(padded.transpose(0, 1, 3, 2, 4), STACKED_AXES)
        order = (0, 1, 3, 4, 2) if name == "keys" else (0, 1, 3, 2, 4)
        return tuple(constrain(x, CACHE_AXES[name]) for x in padded.transpose(order))

    return Cache(keys=lay_out("keys", kept.keys), values=lay_out("values", kept.values))


@functools.partial(jax.jit, static_argnames=("name", "length"))
def resized(x: Array, name: str, length: int) -> Array:
    """An array of the cache with ``length`` positions: cut at the end, or padded with zeros."""
    axes = cache_axes(name, x)
    more = length - x.shape[axes.index("time")]
    if more > 0:
        x = jnp.pad(x, [(0, more if axis == "time" else 0) for axis in axes])
    return constrain(jax.lax.slice_in_dim(x, 0, length, axis=axes.index("time")), axes)


def decode_step(
    weights: DecodeWeights,
    model_config: ModelConfig,
    tokens: Int[Array, " N"],
    positions: Int[Array, " N"],
    cache: Cache,
) -> tuple[Float[Array, "V N"], Cache]:
    """Write each row's token at its own position; return the next token's logits and the cache."""
    x = weights.embedding[tokens].T  # [D N]
    places = jnp.arange(cache.length, dtype=jnp.int32)[None]

    def block(x, layer, attend):
        normed = norm(x, layer["attention_norm"], model_config)
        mixed, kept = attend(*projections(layer, model_config, normed, positions))
        x = constrain(x + dense(layer, "o", mixed.T), ("activation_embed", "batch"))
        x = x + feed_forward(layer, norm(x, layer["mlp_norm"], model_config))
        return constrain(x, ("activation_embed", "batch")), kept

    def scanned(x, stores):
        layer, keys, values = stores
        attend = functools.partial(attend_apart, keys, values, places < positions[:, None])
        return block(x, out_first(layer), attend)

    keys: Any = cache.keys
    values: Any = cache.values
    if isinstance(weights.layers, dict):
        x, (new_keys, new_values) = jax.lax.scan(scanned, x, (weights.layers, keys, values))
        keys = write_all(keys, new_keys, positions)
        values = write_all(values, new_values, positions)
    else:
        visible, written = places <= positions[:, None], []
        for layer, old_keys, old_values in zip(weights.layers, keys, values, strict=True):
            attend = functools.partial(attend_written, old_keys, old_values, visible, positions)
            x, stores = block(x, layer, attend)
            written.append(stores)
        keys, values = zip(*written, strict=True)
    cache = Cache(keys=keys, values=values)
    return output_logits(weights, model_config, norm(x, weights.norm, model_config)), cache


def output_logits(
    weights: DecodeWeights, model_config: ModelConfig, x: Float[Array, "D N"]
) -> Float[Array, "V N"]:
    """The output layer in float32; -inf for rows that belong to no token."""
    logits = jnp.matmul(weights.output, x, preferred_element_type=jnp.float32)
    if logits.shape[0] > model_config.vocab_size:
        token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        logits = jnp.where(token < model_config.vocab_size, logits, -jnp.inf)
    return constrain(logits, ("vocab", "batch"))


def projections(
    layer: dict[str, Array], model_config: ModelConfig, x: Float[Array, "D N"], positions: Array
) -> tuple[Float[Array, "N K G Dh"], Float[Array, "N K Dh"], Float[Array, "N K Dh"]]:
    """Queries, grouped by key head, and the new keys and values."""
    c = model_config
    queries = heads_of(layer, c, "q", x, positions)
    grouped = queries.reshape(-1, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
    new_keys = heads_of(layer, c, "k", x, positions)
    return grouped, new_keys, heads_of(layer, c, "v", x, None)


def attend_written(keys, values, visible, positions, queries, new_keys, new_values):
    """Write the new entries into a layer's cache, then attend to the positions in ``visible``
    [N S]. Returns the weighted values [N, H Dh] and the cache."""
    keys = write(keys, new_keys, positions, axis=3)
    values = write(values, new_values, positions, axis=2)
    scores = jnp.einsum("nkgd,nkds->nkgs", queries, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores / math.sqrt(queries.shape[-1]), -jnp.inf)
    shares = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = jnp.einsum("nkgs,nksd->nkgd", shares, values)
    return mixed.reshape(mixed.shape[0], -1), (keys, values)


def attend_apart(keys, values, before, queries, new_keys, new_values):
    """Attend to the positions ``before`` [N S] in a layer's cache and to the new entries, which are
    not written yet. Returns the weighted values [N, H Dh] and the new entries."""
    scale, entries = 1 / math.sqrt(queries.shape[-1]), (new_keys, new_values)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("nkgd,nksd->nkgs", queries, keys) * scale
    scores = jnp.where(before[:, None, None], scores, -jnp.inf)
    own = product("nkgd,nkd->nkg", queries, new_keys)[..., None] * scale
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), own)
    powers, own = jnp.exp(scores - top), jnp.exp(own - top)
    mixed = product("nkgs,nksd->nkgd", powers.astype(values.dtype), values)
    mixed = mixed + own * new_values[:, :, None].astype(jnp.float32)
    mixed = mixed / (jnp.sum(powers, axis=-1, keepdims=True) + own)
    return mixed.astype(values.dtype).reshape(mixed.shape[0], -1), entries


def heads_of(
    layer: dict[str, Array],
    model_config: ModelConfig,
    name: str,
    x: Float[Array, "D N"],
    positions: Int[Array, " N"] | None,
) -> Float[Array, "N heads Dh"]:
    """Queries, keys or values. They are rotated if ``positions`` are given."""
    c = model_config
    y = dense(layer, name, x).T.reshape(x.shape[1], -1, c.head_dim)
    if c.qk_norm and name != "v":
        y = rms_norm(y, layer[f"{name}_norm"], c.norm_eps)
    return y if positions is None else rotate(y[:, None], positions[:, None], c)[:, 0]


def feed_forward(layer: dict[str, Array], x: Float[Array, "D N"]) -> Float[Array, "D N"]:
    return dense(layer, "down", jax.nn.silu(dense(layer, "gate", x)) * dense(layer, "up", x))


def dense(layer: dict[str, Array], name: str, x: Float[Array, "I N"]) -> Float[Array, "O N"]:
    y = layer[f"{name}_proj"] @ x
    bias = layer.get(f"{name}_bias")
    return y if bias is None else y + bias[:, None]


def norm(
    x: Float[Array, "D N"], scale: Float[Array, " D"], model_config: ModelConfig
) -> Float[Array, "D N"]:
    """``rms_norm`` of every column."""
    return jax.vmap(lambda row: rms_norm(row, scale, model_config.norm_eps), 1, 1)(x)


def write(
    store: Float[Array, "N K _ _"],
    new: Float[Array, "N K Dh"],
    positions: Int[Array, " N"],
    *,
    axis: int,
) -> Float[Array, "N K _ _"]:
    """Write each row's entry at its own position of ``store``, in place if it is donated.

    It maps over rows (vmap), so on a mesh every device writes its own rows and nothing is sent.
    """

    def write_row(row, entry, at):
        return jax.lax.dynamic_update_index_in_dim(row, entry, at, axis - 1)

    return jax.vmap(write_row)(store, new.astype(store.dtype), positions)


def write_all(
    store: Float[Array, "L N K S Dh"], new: Float[Array, "L N K Dh"], positions: Int[Array, " N"]
) -> Float[Array, "L N K S Dh"]:
    """Write the entries of all layers at once.

    On TPUs rows are written one after another. Doing this in every layer would take about as long
    as attention.
    """

    def one_by_one(store, new, positions):
        def write_row(row, store):
            entry = jax.lax.dynamic_slice_in_dim(new, row, 1, axis=1)[:, :, :, None]
            store = jax.lax.dynamic_update_slice(store, entry, (0, row, 0, positions[row], 0))
            # Keep the layout: XLA would choose another one for the write and copy the cache to it.
            return with_layout_constraint(store, Layout(major_to_minor=tuple(range(store.ndim))))

        return jax.lax.fori_loop(0, positions.size, write_row, store)

    def at_once(store, new, positions):
        write_row = lambda row, entry, at: row.at[:, :, at].set(entry)  # noqa: E731
        return jax.vmap(write_row, (1, 1, 0), 1)(store, new, positions)

    def on_device(*operands):
        return jax.lax.platform_dependent(*operands, tpu=one_by_one, default=at_once)

    inputs = STACKED_AXES, ("layers", "batch", "kv_heads", "head_dim"), ("batch",)
    return by_shard(on_device, inputs, STACKED_AXES)(store, new.astype(store.dtype), positions)
