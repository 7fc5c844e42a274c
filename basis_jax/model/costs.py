"""What a decode step, a prefill and an update cost: multiplications, traffic and memory in bytes,
as plain numbers out of shapes. Nothing is compiled and no device is asked.

One multiply-add is 2 FLOPs; norms, rotations and softmax are left out. Memory is bytes on one
device, every array divided as ``sharding.RULES`` divides it.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from basis_jax.model import decoder
from basis_jax.model.attention import holds_scores
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.sharding import regrouped, shards


@dataclass(frozen=True)
class Work:
    flops: int
    bytes: int  # read and written, each array once


def layer_products(model_config: ModelConfig) -> int:
    """Weights of one layer's matrix products: queries and output, keys and values, feed-forward."""
    c = model_config
    attention = 2 * c.embed * (c.heads + c.kv_heads) * c.head_dim
    return attention + 3 * c.embed * c.mlp


def output_products(model_config: ModelConfig) -> int:
    return model_config.vocab_size * model_config.embed


def parameters(model_config: ModelConfig) -> int:
    """Number of parameters, biases and norms included."""
    c = model_config
    heads = c.heads + 2 * c.kv_heads
    layer = layer_products(model_config) + 2 * c.embed
    layer += c.qkv_bias * heads * c.head_dim + c.output_bias * c.embed
    layer += c.mlp_bias * (2 * c.mlp + c.embed) + c.qk_norm * 2 * c.head_dim
    tables = output_products(model_config) * (1 if c.tied else 2)
    return c.layers * layer + tables + c.embed


def compute_bytes(model_config: ModelConfig) -> int:
    """Bytes of a number in the compute dtype."""
    return jnp.dtype(model_config.compute_dtype).itemsize


def recomputes(model_config: ModelConfig) -> bool:
    """Whether the backward pass makes activations of a layer again."""
    return model_config.remat != "none"


def cache_numbers(model_config: ModelConfig, *, slots: int, length: int) -> int:
    c = model_config
    return 2 * c.layers * slots * length * c.kv_heads * c.head_dim


def _attention(model_config: ModelConfig, pairs: int) -> int:
    """Scores and mixing of all layers for so many (query, key) positions."""
    c = model_config
    return 4 * c.layers * c.heads * c.head_dim * pairs


def decode_step(model_config: ModelConfig, *, rows: int, context: int) -> Work:
    """One token for each of ``rows`` rows that attend to ``context`` positions.

    Bytes: the weights once and in the compute dtype, the cache read and a position of it written,
    the logits in float32.
    """
    weights = model_config.layers * layer_products(model_config) + output_products(model_config)
    cache = cache_numbers(model_config, slots=rows, length=context + 1)
    return Work(
        flops=2 * weights * rows + _attention(model_config, rows * context),
        bytes=(weights + cache) * compute_bytes(model_config) + rows * model_config.vocab_size * 4,
    )


def prefill(model_config: ModelConfig, *, rows: int, width: int) -> Work:
    """``rows`` prompts of ``width`` tokens and the logits of their last; a query attends to the
    positions up to its own, the others are not counted."""
    weights = model_config.layers * layer_products(model_config)
    output = output_products(model_config)
    pairs = rows * width * (width + 1) // 2
    cache = cache_numbers(model_config, slots=rows, length=width)
    return Work(
        flops=2 * weights * rows * width + 2 * output * rows + _attention(model_config, pairs),
        bytes=(weights + output + cache) * compute_bytes(model_config)
        + rows * model_config.vocab_size * 4,
    )


def update(model_config: ModelConfig, *, rows: int, width: int) -> Work:
    """Gradient over ``rows`` x ``width`` tokens and AdamW: forward, twice that backward, and once
    more what ``remat`` has recomputed of the layers. Attention as in ``prefill``; the output layer
    at every position, prompts too, which ``logprobs`` mostly passes over.

    Bytes, a lower bound: each pass reads the weights once; the optimizer reads weights, gradients
    and both moments and writes all but the gradients, in float32.
    """
    weights = model_config.layers * layer_products(model_config)
    output = output_products(model_config)
    attention = _attention(model_config, rows * width * (width + 1) // 2)
    passes = 4 if model_config.remat == "full" else 3
    return Work(
        flops=2 * (passes * weights + 3 * output) * rows * width
        + (4 if recomputes(model_config) else 3) * attention,
        bytes=passes * (weights + output) * compute_bytes(model_config)
        + 7 * 4 * parameters(model_config),
    )


def parameter_bytes(
    model_config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    *,
    itemsize: int = 4,
    gathered: bool = False,
) -> int:
    """The parameters' share of one device; ``gathered``: over ``fsdp``, as decoding has them."""

    def local_size(size, axis):
        return size if gathered and axis == "embed" else -(-size // shards(mesh, axis))

    shapes = jax.tree.leaves(decoder.param_shapes(model_config))
    axes = decoder.param_axes(model_config)
    axes = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    return sum(
        itemsize * math.prod(local_size(n, a) for n, a in zip(x.shape, of, strict=True))
        for x, of in zip(shapes, axes, strict=True)
    )


def copy_bytes(model_config: ModelConfig, mesh: Mesh | AbstractMesh) -> int:
    """The weights once more in the compute dtype; in float32 they serve as they are."""
    size = compute_bytes(model_config)
    return 0 if size == 4 else parameter_bytes(model_config, mesh, itemsize=size)


def activation_bytes(
    model_config: ModelConfig, mesh: Mesh | AbstractMesh, *, rows: int, width: int
) -> int:
    """What the backward pass of ``rows`` x ``width`` tokens keeps of the layers.

    A token of a layer, without recomputation: six vectors of the stream (two norms: input and
    normed input in float32, scaled in the compute dtype), six of the feed-forward (gate, up and
    their products), queries, mixed values, keys and values, and a float32 and a rounded row of
    attention weights for each head unless a kernel holds none; with query and key norms these four
    once more. With recomputation: the layer's input, with ``dots`` the products of weights that the
    backward pass needs (queries, keys, values, attention's output, gate and up), and all of the
    above for one layer at a time.
    """
    c, size, tensor = model_config, compute_bytes(model_config), shards(mesh, "heads")
    stream = c.embed * (4 * 4 + 2 * size)
    split = 6 * c.mlp * size + 2 * (c.heads + c.kv_heads) * c.head_dim * size
    if holds_scores(c.attention, width):
        split += c.heads * width * (4 + size)
    split += c.qk_norm * 2 * (c.heads + c.kv_heads) * c.head_dim * 4
    layer = stream + split / tensor
    kept = c.layers * layer
    if recomputes(model_config):
        saved: float = c.embed
        if c.remat == "dots":
            heads = (c.heads + 2 * c.kv_heads) * c.head_dim
            saved += c.embed + (heads + 2 * c.mlp) / tensor
        kept = c.layers * saved * size + layer
    tokens = rows * width / shards(mesh, "batch")
    return int(tokens * (kept + c.embed * (8 + size)))  # the last: the final norm


def sampling_memory(
    model_config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    *,
    slots: int,
    length: int,
    width: int,
    sample_tensor: int = 0,
) -> dict[str, int]:
    """Bytes on one device while ``slots`` rows of ``length`` positions decode, by part.

    Prompts have ``width`` tokens and share no prefix; a quarter of them is prefilled at once
    (``places.prefill_groups``). While the cache grows, the part in use is held twice. All but the
    trainer's weights lie as on the mesh ``sharding.regrouped`` by ``sample_tensor``; the parameters
    are laid out for it once more where prefills do not read the decode weights.
    """
    size, weights = compute_bytes(model_config), parameter_bytes(model_config, mesh)
    trainer, mesh = mesh, regrouped(mesh, sample_tensor)
    moved = mesh is not trainer and not model_config.scan_decode
    rows = slots / shards(mesh, "batch")
    cache = cache_numbers(model_config, slots=slots, length=length) * size
    heads, mlp = model_config.heads / shards(mesh, "heads"), model_config.mlp / shards(mesh, "mlp")
    scores = heads * width * 8 if holds_scores(model_config.attention, width) else 0
    layer = 3 * model_config.embed * 4 + 2 * mlp * size + scores
    return {
        "weights": weights,
        "weights laid out for decoding": parameter_bytes(
            model_config, mesh, itemsize=size, gathered=True
        ),
        "weights for prefills": parameter_bytes(model_config, mesh, gathered=True) if moved else 0,
        "key-value cache": int(cache / shards(mesh, "batch") / shards(mesh, "kv_heads")),
        "logits": int(2 * rows * model_config.vocab_size * 4 / shards(mesh, "vocab")),
        "prefill": int(-(-rows // 4) * width * layer),
    }


def update_memory(
    model_config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    *,
    rows: int,
    width: int,
    chunk: int,
    moment: int = 4,
) -> dict[str, int]:
    """Bytes on one device during an update over microbatches of ``rows`` x ``width`` tokens, by
    part; ``moment``: bytes of a number of the optimizer's moments.

    There is one gradient, the sum so far: each layer's is added to it as soon as it is known. The
    output layer's is known after all chunks, and its weight is gathered over ``fsdp`` for them. The
    backward pass keeps the layers' weights in the compute dtype too, unless it recomputes.
    """
    c, size, tensor = model_config, compute_bytes(model_config), shards(mesh, "vocab")
    weights = parameter_bytes(c, mesh)
    gathered = size if size < 4 or shards(mesh, "embed") > 1 else 0
    logits = rows * min(chunk, width) * c.vocab_size * 4 * 2
    return {
        "weights": weights,
        f"weights in {c.compute_dtype}": 0 if recomputes(c) else copy_bytes(c, mesh),
        "moments": weights * moment // 2,
        "gradients": weights + 4 * layer_products(c) // shards(mesh, "mlp"),
        "output layer and its gradient": output_products(c) * (gathered + 4) // tensor,
        "activations": activation_bytes(c, mesh, rows=rows, width=width),
        "logits": int(logits / shards(mesh, "batch") / tensor),
    }
