"""One more token a row: the model of ``decoder.py`` for a single position, laid out for speed.

The mathematics is that of ``decoder.Block``; only the order of axes differs. Features come before
rows, and weights are [out, in], so that every product is weight @ x. Each layer has arrays of its
own, and keys have the positions as their last axis. XLA's CPU backend copies a stacked layer before
using it, repacks a right-hand weight for every product and transposes keys at every step; the order
makes no difference to other backends. ``decode_weights`` is called once for many steps.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from basis_jax.model.decoder import KeyValues, ModelConfig, rms_norm, rotate
from basis_jax.model.sharding import constrain, split_over
from basis_jax.pytree import pytree

KEY_AXES = ("batch", "kv_heads", "head_dim", "time")
VALUE_AXES = ("batch", "kv_heads", "time", "head_dim")
VOCAB_BLOCK = 128
CACHE_AXES = {"keys": KEY_AXES, "values": VALUE_AXES}
OUT_FIRST = {  # logical axes of the weights here; "embed" of a parameter is split, here it is not
    "q_proj": ("heads", "activation_embed"),
    "k_proj": ("kv_heads", "activation_embed"),
    "v_proj": ("kv_heads", "activation_embed"),
    "o_proj": ("activation_embed", "heads"),
    "gate_proj": ("mlp", "activation_embed"),
    "up_proj": ("mlp", "activation_embed"),
    "down_proj": ("activation_embed", "mlp"),
}


@pytree
class DecodeWeights:
    """The model's weights in the compute dtype, layer by layer; split over ``tensor`` alone."""

    embedding: Float[Array, "V D"]
    output: Float[Array, "V D"]  # the same array where it is tied; see ``whole_blocks``
    norm: Float[Array, " D"]
    layers: tuple[dict[str, Array], ...]  # projections [out, in], biases [out]


@pytree
class Cache:
    """Keys and values, one array a layer. Slot s of a row holds its token at position s."""

    keys: tuple[Float[Array, "N K Dh S"], ...]
    values: tuple[Float[Array, "N K S Dh"], ...]

    @property
    def length(self) -> int:
        return self.keys[0].shape[-1]


def decode_weights(params: PyTree, model_config: ModelConfig) -> DecodeWeights:
    """The parameters as ``decode_step`` takes them: a copy in the compute dtype, gathered over
    ``fsdp`` once instead of at every token. Memory a device: parameters / ``tensor``."""
    embedding = table_weights(params["embedding"], model_config, as_output=model_config.tied)
    output = embedding
    if not model_config.tied:
        output = table_weights(params["output"], model_config, as_output=True)
    layers = [
        layer_weights(params["layers"], np.int32(i), model_config)
        for i in range(model_config.layers)
    ]
    return DecodeWeights(
        embedding=embedding,
        output=output,
        norm=params["norm"],
        layers=tuple(layers),
    )


@functools.partial(jax.jit, static_argnames=("model_config", "as_output"))
def table_weights(table, model_config, *, as_output):
    table = table.astype(model_config.compute_dtype)
    if as_output:
        table = jnp.pad(table, ((0, whole_blocks(table.shape[0]) - table.shape[0]), (0, 0)))
    return constrain(table, ("vocab", "activation_embed"))


def whole_blocks(vocab_size: int) -> int:
    """Rows of the output layer: where the vocabulary is split, every device has whole blocks of
    ``VOCAB_BLOCK`` tokens, the last ones filled with rows that stand for no token."""
    shards = split_over("vocab")
    unit = VOCAB_BLOCK * shards if shards > 1 else 1
    return -(-vocab_size // unit) * unit


@functools.partial(jax.jit, static_argnames="model_config")
def layer_weights(stacked, index, model_config):
    """One layer of the stacked parameters; one program serves all layers."""

    def lay_out(name, value):
        if "norm" in name:
            return value
        value = value.astype(model_config.compute_dtype)
        if name.endswith("_bias"):
            return value.reshape(-1)
        if name == "o_proj":  # [heads, Dh, D]; the others [D, heads, Dh] or [in, out]
            value = value.reshape(-1, value.shape[-1])
        return constrain(value.reshape(value.shape[0], -1).T, OUT_FIRST[name])

    return {name: lay_out(name, value[index]) for name, value in stacked.items()}


def empty_cache(model_config: ModelConfig, rows: int, length: int) -> Cache:
    """A cache of ``length`` positions a row, in the compute dtype."""
    heads = (rows, model_config.kv_heads)
    keys = jnp.zeros((*heads, model_config.head_dim, length), model_config.compute_dtype)
    values = jnp.zeros((*heads, length, model_config.head_dim), model_config.compute_dtype)
    return Cache(
        keys=(constrain(keys, KEY_AXES),) * model_config.layers,
        values=(constrain(values, VALUE_AXES),) * model_config.layers,
    )


def filled_cache(kept: KeyValues, length: int) -> Cache:
    """What a prefill kept, as a cache of ``length`` positions."""
    padding = length - kept.keys.shape[2]

    def lay_out(stacked, order, axes):  # [L N S K Dh]
        padded = jnp.pad(stacked, ((0, 0), (0, 0), (0, padding), (0, 0), (0, 0)))
        return tuple(constrain(x, axes) for x in padded.transpose(order))

    return Cache(
        keys=lay_out(kept.keys, (0, 1, 3, 4, 2), KEY_AXES),
        values=lay_out(kept.values, (0, 1, 3, 2, 4), VALUE_AXES),
    )


def resized(cache: Cache, length: int) -> Cache:
    """The cache with this many positions: cut behind, or zeros added."""

    def fit(x, axis):
        if length <= x.shape[axis]:
            return jax.lax.slice_in_dim(x, 0, length, axis=axis)
        padding = [(0, length - size if i == axis else 0) for i, size in enumerate(x.shape)]
        return jnp.pad(x, padding)

    return Cache(
        keys=tuple(fit(x, 3) for x in cache.keys), values=tuple(fit(x, 2) for x in cache.values)
    )


def decode_step(
    weights: DecodeWeights,
    model_config: ModelConfig,
    tokens: Int[Array, " N"],
    positions: Int[Array, " N"],
    cache: Cache,
) -> tuple[Float[Array, "V N"], Cache]:
    """Write each row's token at its own position; ``output_logits`` of the next token."""
    x = weights.embedding[tokens].T  # [D N]
    visible = jnp.arange(cache.length, dtype=jnp.int32)[None] <= positions[:, None]
    keys, values = [], []
    for layer, old_keys, old_values in zip(weights.layers, cache.keys, cache.values, strict=True):
        mixed, new_keys, new_values = attention(
            layer,
            model_config,
            norm(x, layer["attention_norm"], model_config),
            positions=positions,
            visible=visible,
            keys=old_keys,
            values=old_values,
        )
        x = constrain(x + mixed, ("activation_embed", "batch"))
        x = x + feed_forward(layer, norm(x, layer["mlp_norm"], model_config))
        x = constrain(x, ("activation_embed", "batch"))
        keys.append(new_keys)
        values.append(new_values)
    logits = output_logits(weights, model_config, norm(x, weights.norm, model_config))
    return logits, Cache(keys=tuple(keys), values=tuple(values))


def output_logits(
    weights: DecodeWeights, model_config: ModelConfig, x: Float[Array, "D N"]
) -> Float[Array, "V N"]:
    """The output layer, float32; -inf for its rows that stand for no token."""
    logits = jnp.matmul(weights.output, x, preferred_element_type=jnp.float32)
    if logits.shape[0] > model_config.vocab_size:
        token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        logits = jnp.where(token < model_config.vocab_size, logits, -jnp.inf)
    return constrain(logits, ("vocab", "batch"))


def attention(
    layer: dict[str, Array],
    model_config: ModelConfig,
    x: Float[Array, "D N"],
    *,
    positions: Int[Array, " N"],
    visible: Bool[Array, "N S"],
    keys: Float[Array, "N K Dh S"],
    values: Float[Array, "N K S Dh"],
) -> tuple[Float[Array, "D N"], Float[Array, "N K Dh S"], Float[Array, "N K S Dh"]]:
    """Attend from one position a row to the positions in ``visible`` [N S], the new one among
    them; the mixed values [D N] and the cache of this layer."""
    c = model_config
    queries = heads_of(layer, c, "q", x, positions)
    keys = write(keys, heads_of(layer, c, "k", x, positions), positions, axis=3)
    values = write(values, heads_of(layer, c, "v", x, None), positions, axis=2)
    grouped = queries.reshape(-1, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
    scores = jnp.einsum("nkgd,nkds->nkgs", grouped, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores / math.sqrt(c.head_dim), -jnp.inf)
    shares = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = jnp.einsum("nkgs,nksd->nkgd", shares, values).reshape(-1, c.heads * c.head_dim)
    return dense(layer, "o", mixed.T), keys, values


def heads_of(
    layer: dict[str, Array],
    model_config: ModelConfig,
    name: str,
    x: Float[Array, "D N"],
    positions: Int[Array, " N"] | None,
) -> Float[Array, "N heads Dh"]:
    """Queries, keys or values; rotated where ``positions`` are given."""
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
    """Each row's entry into its own position of ``store``, in place where it is donated. Row by row
    (vmap), so that on a mesh every device writes its own rows and nothing travels."""

    def write_row(row, entry, at):
        return jax.lax.dynamic_update_index_in_dim(row, entry, at, axis - 1)

    return jax.vmap(write_row)(store, new.astype(store.dtype), positions)
