"""The device mesh, and the table that maps logical axes to mesh axes.

``data`` splits the batch, ``fsdp`` splits batch and parameters, ``tensor`` splits heads,
feed-forward and vocabulary. Only this module uses mesh axes; the model names logical axes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

AXES = ("data", "fsdp", "tensor")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "group": "data",  # partial sums, one of each group of devices: see by_data
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
    """A mesh over all devices, with near devices as neighbours, or over ``devices`` in their order.

    One size may be -1: it is computed from the others. Raises ValueError if the product of the
    sizes is not the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    sizes = mesh_sizes(count, data=data, fsdp=fsdp, tensor=tensor)
    if devices is None:
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_sizes(count: int, *, data: int = -1, fsdp: int = 1, tensor: int = 1) -> tuple[int, ...]:
    """The sizes of the axes over ``count`` devices, -1 replaced. Raises ValueError as above."""
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1 and math.prod(sizes) < 0:
        sizes[sizes.index(-1)] = max(1, count // -math.prod(sizes))
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise ValueError(
            f"mesh.data={data} x mesh.fsdp={fsdp} x mesh.tensor={tensor} does not make the "
            f"{count} devices present; choose sizes whose product is that number (one may "
            "be -1: the rest)"
        )
    return tuple(sizes)


def abstract_mesh(count: int, *, data: int = -1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """``make_mesh`` over ``count`` devices that need not be present."""
    sizes = mesh_sizes(count, data=data, fsdp=fsdp, tensor=tensor)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def regrouped(mesh: Mesh | AbstractMesh, tensor: int) -> Any:
    """The mesh of the same devices in the same order with another size of the axis ``tensor``.

    The other devices split the batch. 0 leaves the mesh as it is. Arrays of one mesh can be used on
    the other.
    """
    if tensor in (0, mesh.shape["tensor"]):
        return mesh
    sizes = (mesh.size // tensor, 1, tensor)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    return Mesh(mesh.devices.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axis names -> PartitionSpec. Inside ``by_data`` nothing is split over ``data``."""
    names = [mesh_axes(axis) for axis in axes]
    return PartitionSpec(*(name[0] if len(name) == 1 else name or None for name in names))


def named(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """Logical axis names -> sharding on this mesh."""
    return NamedSharding(mesh, spec(axes))


def named_tree(mesh: Mesh, axes: Any) -> Any:
    """A tree of logical axis tuples (``decoder.param_axes``) -> the same tree of shardings."""
    return jax.tree.map(lambda a: named(mesh, a), axes, is_leaf=lambda a: isinstance(a, tuple))


def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
    """Fix x's layout inside jit under ``jax.set_mesh``. Without a mesh x is unchanged."""
    if _unsplit():
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def by_shard(
    function: Callable[..., Any],
    inputs: Sequence[tuple[str | None, ...]],
    outputs: Any,
) -> Callable[..., Any]:
    """``function`` applied on each device to its part of the operands.

    ``inputs`` are the operands' logical axes; ``outputs`` is a tree of logical axes, one leaf per
    result. Without a mesh it is ``function`` itself.
    """
    if _unsplit():
        return function
    out_specs = jax.tree.map(spec, outputs, is_leaf=is_axes)
    in_specs = tuple(spec(axes) for axes in inputs)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def highest(x: Array, axis: str) -> Array:
    """Inside ``by_shard``: the maximum over the devices that ``axis`` is split over."""
    return x if _unsplit() else jax.lax.pmax(x, axes_of(axis))


def summed(x: Array, axis: str) -> Array:
    """Inside ``by_shard``: the sum over the devices that ``axis`` is split over."""
    return x if _unsplit() else jax.lax.psum(x, axes_of(axis))


def gathered(x: Array, axis: str) -> Array:
    """Inside ``by_shard``: all parts of x along its first axis, which is split like ``axis``."""
    return x if _unsplit() else jax.lax.all_gather(x, axes_of(axis), tiled=True)


def first_index(size: int, axis: str) -> Array | int:
    """Inside ``by_shard``: first index of this device's part of ``axis``, which has ``size``."""
    return 0 if _unsplit() else size * jax.lax.axis_index(axes_of(axis))


def _unsplit() -> bool:
    return jax.sharding.get_abstract_mesh().empty


def split_over(axis: str) -> int:
    """Number of devices of the mesh in use that this logical axis is split over."""
    return 1 if _unsplit() else shards(jax.sharding.get_abstract_mesh(), axis)


def is_axes(x: Any) -> bool:
    return type(x) is tuple and all(name is None or isinstance(name, str) for name in x)


def over_batch(
    function: Callable[..., Any], arguments: Any, axes: tuple[int | None, ...], results: Any
) -> Any:
    """``function(*arguments)``, run by each group of the batch's devices on its own rows.

    ``axes`` has the index of the batch axis of every argument, and ``results`` (a tuple, or trees
    of them) that of every result. An argument without a batch axis (None) is whole in every group:
    parameters are gathered. Groups exchange nothing inside ``function``. So a result that has no
    rows, such as a group's sum, needs a first axis over the groups. Axes that are split over
    ``tensor`` stay split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or batch_shards(mesh) == 1:
        return function(*arguments)

    def layout(axis):
        return (
            PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, mesh_axes("batch"))
        )

    return jax.shard_map(
        function,
        mesh=mesh,
        axis_names=set(mesh_axes("batch")),
        in_specs=tuple(map(layout, axes)),
        out_specs=jax.tree.map(layout, results),
        check_vma=False,
    )(*arguments)


def by_data(function: Callable[..., Any], split: tuple[bool, ...]) -> Callable[..., Any]:
    """``function`` run by each group of devices of ``data`` on its own part of the operands.

    ``split`` says which operands are split over ``data`` along the first axes of their arrays;
    numbers and the other operands are the same in every group. Every result has such a first axis.
    Groups exchange nothing inside ``function``, where arrays are still split over ``fsdp`` and
    ``tensor`` as the table says.
    """
    if groups() == 1:
        return function
    each, whole = PartitionSpec("data"), PartitionSpec()

    def run(*operands):
        specs = tuple(
            jax.tree.map(lambda x, divided=divided: each if divided and x.ndim else whole, operand)
            for operand, divided in zip(operands, split, strict=True)
        )
        return jax.shard_map(
            function, in_specs=specs, out_specs=each, axis_names={"data"}, check_vma=False
        )(*operands)

    return run


def groups(mesh: Mesh | AbstractMesh | None = None) -> int:
    """Number of groups in ``by_data``, on the mesh in use or another one.

    It is 1 if ``fsdp`` and ``tensor`` are both above 1: XLA's partitioner aborts the process (jax
    0.10.2) on a lookup in a table that is split over both, beside an axis that it does not split.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    sizes = mesh.shape
    return 1 if mesh.empty or min(sizes["fsdp"], sizes["tensor"]) > 1 else sizes["data"]


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """Host arrays [N ...] -> device arrays with N split over the batch axes. Every process passes
    all rows, and transfers those of its own devices."""
    sharding = named(mesh, ("batch",))

    def put(x: np.ndarray) -> Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

    return jax.tree.map(put, tree)


def shards(mesh: Mesh | AbstractMesh, axis: str | None) -> int:
    """Number of devices that this logical axis is split over."""
    return math.prod(mesh.shape[name] for name in mesh_axes(axis))


def mesh_axes(axis: str | None) -> tuple[str, ...]:
    """The mesh axes that this logical axis is split over. Not ``data`` inside ``by_data``, where a
    program sees the rows of its own group only, and none inside ``by_shard``."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(name for name in axes_of(axis) if name not in manual)


def axes_of(axis: str | None) -> tuple[str, ...]:
    """The mesh axes of this logical axis in the table."""
    found = RULES[axis]
    return (found,) if isinstance(found, str) else found or ()


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of devices that the batch is split over."""
    return shards(mesh, "batch")


def check_divides(
    mesh: Mesh | AbstractMesh, sizes: dict[str, tuple[int, str]], *, tensor: str = "tensor"
) -> None:
    """Raise ValueError for the first of ``{name: (size, axis)}`` that does not divide.

    ``tensor`` is the name of the mesh axis ``tensor`` in the message: the config field that gave
    its size.
    """
    fields = {name: f"mesh.{tensor if name == 'tensor' else name}" for name in AXES}
    for name, (size, axis) in sizes.items():
        count = shards(mesh, axis)
        if size % count:
            raise ValueError(
                f"{name} = {size} does not divide over {count} devices "
                f"({' x '.join(fields[name] for name in mesh_axes(axis))}); give a multiple of "
                f"{count} or a smaller mesh"
            )
