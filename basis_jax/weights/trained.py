"""Trained parameters out of a run's checkpoint, for evaluation and export.

Only the parameters are read, not the optimizer's moments. Nothing is written, so a run that saves
to the same folder at the same time is not disturbed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jaxtyping import PyTree

from basis_jax import files
from basis_jax.model import decoder, lora
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.sharding import named_tree
from basis_jax.weights.layout import check_finite, list_names


def find_checkpoint(path: str | Path) -> Path:
    """The folder of one checkpoint: ``path`` itself, or the newest of the run ``path``.

    Raises ValueError if there is none.
    """
    path = Path(path)
    if os.path.isdir(path / "state"):  # False where a name cannot be one
        return path
    folder = path / "checkpoints" if os.path.isdir(path / "checkpoints") else path
    inside = folder.iterdir() if os.path.isdir(folder) else ()
    steps = [p for p in inside if files.is_step(p.name) and p.is_dir()]
    if not steps:
        raise ValueError(
            f"{path} holds no checkpoint; give the folder of a run or RUN/checkpoints/STEP"
        )
    return max(steps, key=lambda step: int(step.name))


def saved_config(checkpoint: Path) -> dict:
    """The fields of the config that made the checkpoint, by section. Raises ValueError if it is not
    a config."""
    with reading(checkpoint):
        for file in (checkpoint / "config").iterdir():
            files.check_size(file)
        found = dict(ocp.JsonCheckpointHandler().restore((checkpoint / "config").absolute()))
        sections = [part for name, part in found.items() if name not in ("run_dir", "seed")]
        if not all(isinstance(part, dict) for part in sections):
            raise ValueError("its config has a section that is no object")
        if not isinstance(found["model"]["path"], str):
            raise ValueError("its config has no model.path")
        return found


def model_path(checkpoint: Path) -> str:
    """``model.path`` of the config that made the checkpoint."""
    return saved_config(checkpoint)["model"]["path"]


def load_checkpoint_params(
    checkpoint: Path, model_config: ModelConfig, mesh: Mesh | None = None
) -> PyTree:
    """The trained parameters, all or the adapters, in float32 as the checkpoint has them, laid out
    over the mesh; without a mesh, NumPy arrays.

    Raises ValueError if the checkpoint is damaged or cannot be read, if its parameters are not
    those of ``model_config``, or if they hold NaN or infinity.
    """
    if wrong := files.damage(checkpoint):
        raise ValueError(f"checkpoint {checkpoint} is damaged ({wrong}); give another checkpoint")
    folder = (checkpoint / "state").absolute()
    handler = ocp.PyTreeCheckpointHandler()
    with reading(checkpoint):
        stored = {}
        for name, leaf in handler.metadata(folder).tree.items():  # "01.params['embedding']"
            _, is_param, path = name.partition(".params")
            if is_param:
                stored[path] = (name, tuple(leaf.shape))
    shapes = lora.trained(decoder.param_shapes(model_config))
    expected = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(shapes)}
    _check_same_model(checkpoint, {k: v for k, (_, v) in stored.items()}, expected)
    names = [stored[path][0] for path in expected]
    if mesh is None:
        restore_args = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(names)
    else:
        axes = jax.tree.leaves(named_tree(mesh, lora.trained(decoder.param_axes(model_config))))
        restore_args = [ocp.ArrayRestoreArgs(sharding=s, dtype=jnp.float32) for s in axes]
    item = dict(zip(names, expected.values(), strict=True))
    args = ocp.args.PyTreeRestore(
        item=item, restore_args=dict(zip(names, restore_args, strict=True)), partial_restore=True
    )
    with reading(checkpoint):
        restored = handler.restore(folder, args=args)
    for path, name in zip(expected, names, strict=True):
        for block in _blocks(restored[name]):
            check_finite(block, f"the parameter {path} of checkpoint {checkpoint}")
    return jax.tree.unflatten(jax.tree.structure(shapes), [restored[name] for name in names])


def _blocks(parameter: np.ndarray | jax.Array) -> Iterator[np.ndarray]:
    """The different parts of a parameter that this process holds."""
    if isinstance(parameter, np.ndarray):
        yield parameter
        return
    for shard in parameter.addressable_shards:
        if shard.replica_id == 0:
            yield np.asarray(shard.data)


def _check_same_model(checkpoint: Path, stored: dict, expected: dict) -> None:
    expected_shapes = {path: leaf.shape for path, leaf in expected.items()}
    differing = [
        f"{path} {stored.get(path, 'absent')} there and {expected_shapes.get(path, 'absent')} here"
        for path in stored.keys() | expected_shapes.keys()
        if stored.get(path) != expected_shapes.get(path)
    ]
    if differing:
        raise ValueError(
            f"checkpoint {checkpoint} is of another model: {list_names(differing)}; give the model "
            "folder that its training began from"
        )


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Turn the errors of a damaged checkpoint into one sentence with its name."""
    try:
        with files.quiet():
            yield
    except files.UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            files.one_line(
                f"{checkpoint} cannot be read as a checkpoint ({reason}); give another, or the "
                "folder of a run"
            )
        ) from error
