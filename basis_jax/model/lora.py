"""Low-rank adapters beside frozen weights: W x + (alpha / rank) B A x. Hu et al. 2022, eq. 3.

The adapters of a layer are entries beside its weights: ``q_proj_a`` and ``q_proj_b`` beside
``q_proj``. So every function of the model takes one tree. ``trained`` and ``frozen`` are its two
parts, and ``whole`` joins them. Without adapters everything is trained.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Projections that can have an adapter."""
ENDS = ("_proj_a", "_proj_b")
STREAM = 1000  # stream of random numbers; rollouts use the first few


@dataclass(frozen=True)
class Lora:
    """Which projections have adapters, and their rank."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS
    base_dtype: str = "float32"
    """The dtype of the frozen weights; norms stay float32."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def trained(params: dict[str, Any]) -> dict[str, Any]:
    """The trained part: the adapters if there are any, otherwise everything."""
    layers = {k: v for k, v in params["layers"].items() if k.endswith(ENDS)}
    return {"layers": layers} if layers else params


def base(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters without adapters."""
    layers = {k: v for k, v in params["layers"].items() if not k.endswith(ENDS)}
    return {**params, "layers": layers}


def frozen(params: dict[str, Any]) -> dict[str, Any] | None:
    """The part that is not trained: the parameters without adapters, or None."""
    return None if trained(params) is params else base(params)


def whole(frozen: dict[str, Any] | None, trained: dict[str, Any]) -> dict[str, Any]:
    """The model's parameters: the trained part, joined with the frozen part if there is one."""
    if frozen is None:
        return trained
    return {**frozen, "layers": {**frozen["layers"], **trained["layers"]}}


def low_rank(
    x: Float[Array, "..."], a: Float[Array, "..."], b: Float[Array, "..."], scale: float
) -> Float[Array, "..."]:
    """scale (x A) B for x [... in], A [in R] and B [R out]. in and out may be several axes."""
    inner = jnp.tensordot(x, a, axes=a.ndim - 1)
    return jnp.tensordot(inner, b, axes=1) * jnp.asarray(scale, x.dtype)


def merged(layer: dict[str, Array], scale: float) -> dict[str, Array]:
    """The weights of one layer with their adapters added: W + scale A B, in float32."""
    found = {}
    for name, value in base({"layers": layer})["layers"].items():
        if f"{name}_a" in layer:
            a, b = layer[f"{name}_a"], layer[f"{name}_b"]
            change = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
            value = value.astype(jnp.float32) + scale * change
        found[name] = value
    return found


def merged_params(base: dict[str, Any], adapters: dict[str, Any], scale: float) -> dict[str, Any]:
    """Parameters without adapters that give the same results, up to rounding."""
    layers = whole(base, adapters)["layers"]
    return {**base, "layers": jax.lax.map(functools.partial(merged, scale=scale), layers)}


def start(shapes: dict[str, Any], key: Key[Array, ""]) -> dict[str, Any]:
    """Adapters of these shapes that change nothing yet: B is 0.

    A is uniform within 1 / sqrt(inputs), and a function of (key, target, layer) only.
    """
    key = jax.random.fold_in(key, STREAM)

    def draw(name, shape):
        target = jax.random.fold_in(key, TARGETS.index(name.removesuffix("_a")))
        keys = jax.vmap(lambda i: jax.random.fold_in(target, i))(jnp.arange(shape[0]))
        bound = 1 / math.sqrt(math.prod(shape[1:-1]))
        uniform = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
        return jax.vmap(lambda key: uniform(key, shape[1:]))(keys)

    layers = {
        name: jnp.zeros(leaf.shape) if name.endswith("_b") else draw(name, leaf.shape)
        for name, leaf in shapes["layers"].items()
    }
    return {"layers": layers}
