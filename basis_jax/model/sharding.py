"""The device mesh, and the one table that maps what an axis means to where it lives.

``data`` splits the batch, ``fsdp`` splits batch and parameters, ``tensor`` splits heads,
feed-forward and vocabulary. Only this module knows mesh axes; the model names meanings.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "time": None,
    "embed": "fsdp",  # of a parameter
    "activation_embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    None: None,
}


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over all devices; one size may be -1: what the others leave.

    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1 and math.prod(sizes) < 0:
        sizes[sizes.index(-1)] = max(1, len(devices) // -math.prod(sizes))
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh.data={data} x mesh.fsdp={fsdp} x mesh.tensor={tensor} does not make the "
            f"{len(devices)} devices present; choose sizes whose product is that number (one may "
            "be -1: the rest)"
        )
    grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axis names -> PartitionSpec."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def named(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """Logical axis names -> sharding on this mesh."""
    return NamedSharding(mesh, spec(axes))


def named_tree(mesh: Mesh, axes: Any) -> Any:
    """A tree of logical axis tuples (``decoder.param_axes``) -> the same tree of shardings."""
    return jax.tree.map(lambda a: named(mesh, a), axes, is_leaf=lambda a: isinstance(a, tuple))


def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
    """Pin x's layout inside jit under ``jax.set_mesh``; without a mesh, x unchanged."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """Host arrays [N ...] -> device arrays with N split over the batch axes. Every process gives
    all rows and puts those of its own devices."""
    sharding = named(mesh, ("batch",))

    def put(x: np.ndarray) -> Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

    return jax.tree.map(put, tree)


def shards(mesh: Mesh | AbstractMesh, axis: str | None) -> int:
    """Devices that an axis of this meaning is split over."""
    return math.prod(mesh.shape[name] for name in mesh_axes(axis))


def mesh_axes(axis: str | None) -> tuple[str, ...]:
    """The mesh axes that an axis of this meaning lies on."""
    found = RULES[axis]
    return (found,) if isinstance(found, str) else found or ()


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Devices that the batch is split over."""
    return shards(mesh, "batch")


def check_divides(mesh: Mesh, sizes: dict[str, tuple[int, str]]) -> None:
    """Raise a ValueError for the first of ``{name: (size, axis)}`` that does not divide."""
    for name, (size, axis) in sizes.items():
        count = shards(mesh, axis)
        if size % count:
            raise ValueError(
                f"{name} = {size} does not divide over {count} devices "
                f"({' x '.join(f'mesh.{name}' for name in mesh_axes(axis))}); give a multiple of "
                f"{count} or a smaller mesh"
            )
