"""Checkpoints with orbax: the part of the train state that steps change, and the run's config.

A checkpoint is written in the background and renamed when it is complete, so a run that was killed
while saving resumes from the checkpoint before. Arrays are restored onto the current mesh, which
may differ from the one that they were saved on.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from basis_jax import processes
from basis_jax.config import CheckpointSection
from basis_jax.types import TrainState


@contextmanager
def open_checkpoints(run_dir: Path, section: CheckpointSection) -> Iterator[ocp.CheckpointManager]:
    """The manager of ``run_dir/checkpoints``. Leaving the block waits until saving has ended."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=section.keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
    )
    folder = (run_dir / "checkpoints").absolute()
    names = ("state", "config")
    with _quiet(), ocp.CheckpointManager(folder, options=options, item_names=names) as checkpoints:
        yield checkpoints


def save(checkpoints: Any, state: TrainState, config: dict) -> None:
    """Begin to write the state as checkpoint ``state.step``.

    Returns when the state is copied from the devices, so that it may be donated. The checkpoint
    before is complete then. Raises ValueError if either of the two cannot be written; earlier
    checkpoints are kept.
    """
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(_as_dict(state)), config=ocp.args.JsonSave(config)
    )
    finish(checkpoints)
    with _failure_named(checkpoints, int(state.step)):
        checkpoints.save(int(state.step), args=items)


def finish(checkpoints: Any) -> int | None:
    """Wait for the checkpoint that is being written. Returns the newest checkpoint's step, or None
    if there is none. Raises ValueError if it could not be written."""
    newest = checkpoints.latest_step()
    with _failure_named(checkpoints, newest):
        checkpoints.wait_until_finished()
    return newest


@contextmanager
def _failure_named(checkpoints: Any, step: int | None) -> Iterator[None]:
    with _quiet():
        try:
            yield
        except Exception as error:  # classes of orbax, tensorstore and the system
            raise ValueError(
                f"checkpoint {checkpoints.directory / str(step)} could not be written "
                f"({_reason(error)}); mend that and give the same command again: it goes on from "
                "the checkpoint before"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the tracebacks of failures that are already raised as an error.

    Orbax logs the traceback of each of its threads. Those of tensorstore fail because the first
    failure has closed the event loop.
    """
    log, hook = logging.getLogger("absl"), sys.unraisablehook
    level = log.level

    def ignore_closed_loop(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    log.setLevel(logging.CRITICAL)
    sys.unraisablehook = ignore_closed_loop
    try:
        yield
    finally:
        log.setLevel(level)
        sys.unraisablehook = hook


def _reason(error: Exception) -> str:
    """The system's reason at the end of tensorstore's long message; of others the first line."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    if "os_error_code" not in first:
        return first
    return first.rpartition(": ")[2].partition(" [os_error_code")[0]


def restore(checkpoints: ocp.CheckpointManager, like: TrainState) -> TrainState | None:
    """The newest complete checkpoint, laid out like ``like`` (arrays or shapes), or None.

    It has no frozen parameters. Raises ValueError if it cannot be read, or if parameters or moments
    are not finite.
    """
    finish(checkpoints)
    step = processes.by_first(checkpoints.latest_step)
    if step is None:
        return None
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(like))
    items = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    try:
        restored = checkpoints.restore(step, args=items)["state"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint {checkpoints.directory / str(step)} cannot be read ({error}); remove that "
            "folder to resume from the one before"
        ) from error
    stored = (like.step, like.params, like.opt_state, like.estimator_state, like.critic)
    number, params, opt_state, estimator_state, critic = jax.tree.unflatten(
        jax.tree.structure(stored), jax.tree.leaves(restored)
    )
    learned = {"params": params, "opt_state": opt_state, "critic": critic}
    check_finite(learned, str(checkpoints.directory / str(step)))
    return TrainState(
        step=number,
        params=params,
        opt_state=opt_state,
        estimator_state=estimator_state,
        critic=critic,
    )


def check_finite(tree: PyTree, folder: str) -> None:
    """Raise ValueError naming the first leaf with NaN or infinity.

    A leaf with NaN or infinity has a sum that is not finite. Single numbers are checked only if the
    sum is not finite, because a sum of finite numbers may overflow.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not jnp.isfinite(jnp.sum(leaf)):
            if not jnp.all(jnp.isfinite(leaf)):
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise ValueError(
                    f"checkpoint {folder} holds NaN or infinity in {name}; remove that folder to "
                    "resume from the one before, or give another --run-dir"
                )


def _as_dict(state: TrainState) -> dict:
    """The state as plain containers for orbax: leaves by their path in the state. Frozen parameters
    are not stored, because the model's folder has them."""
    frozen = jax.tree_util.GetAttrKey("frozen")
    leaves = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if path[0] != frozen
    ]
    width = len(str(len(leaves)))
    return {
        f"{i:0{width}d}{jax.tree_util.keystr(path)}": leaf for i, (path, leaf) in enumerate(leaves)
    }
