"""Cost of a decode step, a prefill and an update: FLOPs, memory traffic and memory in bytes.

Costs are computed from shapes. Nothing is compiled and no device is needed. One multiply-add is 2
FLOPs; norms, rotations and softmax are left out. Memory is in bytes on one device, with every array
divided as in ``sharding.RULES``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from basis_jax.model import decoder, lora
from basis_jax.model.attention import holds_scores
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.sharding import regrouped, shards


@dataclass(frozen=True)
class Work:
    flops: int
    bytes: int  # read and written, each array once


def layer_products(model_config: ModelConfig) -> int:
    """Number of weights in one layer's matrix products: attention and feed-forward."""
    c = model_config
    attention = 2 * c.embed * (c.heads + c.kv_heads) * c.head_dim
    return attention + 3 * c.embed * c.mlp


def output_products(model_config: ModelConfig) -> int:
    return model_config.vocab_size * model_config.embed


def parameters(model_config: ModelConfig) -> int:
    """Number of parameters, including biases and norms but not adapters."""
    c = model_config
    heads = c.heads + 2 * c.kv_heads
    layer = layer_products(model_config) + 2 * c.embed
    layer += c.qkv_bias * heads * c.head_dim + c.output_bias * c.embed
    layer += c.mlp_bias * (2 * c.mlp + c.embed) + c.qk_norm * 2 * c.head_dim
    tables = output_products(model_config) * (1 if c.tied else 2)
    return c.layers * layer + tables + c.embed


def adapter_parameters(model_config: ModelConfig) -> int:
    """Number of parameters of the adapters."""
    if model_config.lora is None:
        return 0
    adapters = lora.trained(decoder.param_shapes(model_config))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(adapters))


def compute_bytes(model_config: ModelConfig) -> int:
    """Bytes per number in the compute dtype."""
    return jnp.dtype(model_config.compute_dtype).itemsize


def recomputes(model_config: ModelConfig) -> bool:
    """Whether the backward pass recomputes activations of a layer."""
    return model_config.remat != "none"


def cache_numbers(model_config: ModelConfig, *, slots: int, length: int) -> int:
    c = model_config
    return 2 * c.layers * slots * length * c.kv_heads * c.head_dim


def _attention(model_config: ModelConfig, pairs: int) -> int:
    """FLOPs of attention (scores and weighted values) in all layers, for ``pairs`` of (query, key)
    positions."""
    c = model_config
    return 4 * c.layers * c.heads * c.head_dim * pairs


def decode_step(model_config: ModelConfig, *, rows: int, context: int) -> Work:
    """One token for each of ``rows`` rows that attend to ``context`` positions.

    Bytes are those of the weights, read once in the compute dtype, of the cache, which is read and
    gets one new position, and of the logits in float32.
    """
    weights = model_config.layers * layer_products(model_config) + output_products(model_config)
    cache = cache_numbers(model_config, slots=rows, length=context + 1)
    return Work(
        flops=2 * weights * rows + _attention(model_config, rows * context),
        bytes=(weights + cache) * compute_bytes(model_config) + rows * model_config.vocab_size * 4,
    )


def prefill(model_config: ModelConfig, *, rows: int, width: int, outputs: int = 1) -> Work:
    """A forward pass over ``rows`` rows of ``width`` tokens, and the logits of ``outputs`` of them:
    the last one of a prompt, all of a completion, none for a critic.

    Only the positions up to the query's own are counted for attention.
    """
    weights = model_config.layers * layer_products(model_config)
    output = output_products(model_config)
    pairs = rows * width * (width + 1) // 2
    cache = cache_numbers(model_config, slots=rows, length=width)
    return Work(
        flops=2 * (weights * width + output * outputs) * rows + _attention(model_config, pairs),
        bytes=(weights + output + cache) * compute_bytes(model_config)
        + rows * outputs * model_config.vocab_size * 4,
    )


def update(model_config: ModelConfig, *, rows: int, width: int) -> Work:
    """Gradient over ``rows`` x ``width`` tokens, and AdamW.

    The backward pass costs twice the forward pass, plus what ``remat`` recomputes of the layers.
    Frozen weights have no gradient of their own, which saves one pass. Attention is counted as in
    ``prefill``. The output layer is counted at every position, also in prompts, most of which
    ``logprobs`` skips.

    Bytes are a lower bound: each pass reads the weights once. The optimizer reads weights,
    gradients and both moments, and writes all but the gradients, in float32.
    """
    weights = model_config.layers * layer_products(model_config)
    output, adapters = output_products(model_config), adapter_parameters(model_config)
    attention = _attention(model_config, rows * width * (width + 1) // 2)
    recomputed, own = int(model_config.remat == "full"), 0 if adapters else 1
    passes = 2 + recomputed + own
    products = passes * weights + (2 + own) * output + (3 + recomputed) * adapters
    return Work(
        flops=2 * products * rows * width + (4 if recomputes(model_config) else 3) * attention,
        bytes=passes * (weights + output) * compute_bytes(model_config)
        + 7 * 4 * (adapters or parameters(model_config)),
    )


def parameter_bytes(
    model_config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    *,
    itemsize: int = 0,
    gathered: bool = False,
    part: Callable[[Any], Any] = lambda params: params,
) -> int:
    """Bytes on one device of a ``part`` of the parameters.

    ``itemsize``: bytes per number; 0 means as they are stored. ``gathered``: whether they are
    gathered over ``fsdp``, as in decoding.
    """

    def local_size(size, axis):
        return size if gathered and axis == "embed" else -(-size // shards(mesh, axis))

    shapes = jax.tree.leaves(part(decoder.param_shapes(model_config)))
    axes = part(decoder.param_axes(model_config))
    axes = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    return sum(
        (itemsize or x.dtype.itemsize)
        * math.prod(local_size(n, a) for n, a in zip(x.shape, of, strict=True))
        for x, of in zip(shapes, axes, strict=True)
    )


def copy_bytes(model_config: ModelConfig, mesh: Mesh | AbstractMesh) -> int:
    """Bytes of the copy, in the compute dtype, of all parameters that are stored in another dtype.
    Trained parameters are stored in float32."""
    size = compute_bytes(model_config)
    if model_config.weight_dtype != model_config.compute_dtype:
        return parameter_bytes(model_config, mesh, itemsize=size)
    return parameter_bytes(model_config, mesh, itemsize=size, part=lora.trained) if size < 4 else 0


def activation_bytes(
    model_config: ModelConfig, mesh: Mesh | AbstractMesh, *, rows: int, width: int
) -> int:
    """Bytes of the layers' activations that the backward pass of ``rows`` x ``width`` tokens needs.

    Without recomputation, each token needs in each layer: six vectors of the residual stream (for
    each of two norms the input and the normalised input in float32, and the scaled one in the
    compute dtype); six vectors of the feed-forward (gate, up and their products); queries, weighted
    values, keys and values, and these four once more with query and key norms; and for each head a
    row of attention weights in float32 and one in the compute dtype, unless a kernel avoids them.

    With recomputation it needs the layer's input, and all of the above for one layer at a time.
    ``dots`` also keeps the matrix products that the backward pass needs: queries, keys, values,
    attention's output, gate and up.
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
    return int(tokens * (kept + c.embed * (8 + size)))  # the last term is the final norm


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

    Prompts have ``width`` tokens and share no prefix. A quarter of the slots is prefilled at once
    (``places.prefill_groups``). Everything but the trainer's weights has the layout of the mesh
    ``sharding.regrouped`` by ``sample_tensor``. If prefills do not read the decode weights, there
    is another copy of the parameters in this layout.
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
            model_config, mesh, itemsize=size, gathered=True, part=lora.base
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
    part. ``moment``: bytes per number of the optimizer's moments.

    There is one gradient, the sum so far: each layer's gradient is added to it as soon as it is
    known. The output layer's gradient is known only after all chunks, and its weight is gathered
    over ``fsdp`` for them. A frozen output layer has no gradient. All weights are converted to the
    compute dtype before the loop over the layers.
    """
    c, size, tensor = model_config, compute_bytes(model_config), shards(mesh, "vocab")
    trained = parameter_bytes(c, mesh, part=lora.trained)
    layers = parameter_bytes(c, mesh, gathered=True, part=lambda x: lora.trained(x)["layers"])
    copied = c.weight_dtype != c.compute_dtype or shards(mesh, "embed") > 1
    output = size * copied + 4 * (c.lora is None)
    logits = rows * min(chunk, width) * c.vocab_size * 4 * 2
    return {
        "weights": parameter_bytes(c, mesh),
        f"weights in {c.compute_dtype}": copy_bytes(c, mesh),
        "moments": trained * moment // 2,
        "gradients": trained + layers // c.layers,
        "output layer and its gradient": output_products(c) * output // tensor,
        "activations": activation_bytes(c, mesh, rows=rows, width=width),
        "logits": int(logits / shards(mesh, "batch") / tensor),
    }
