"""Checkpoints with orbax: the part of the train state that steps change, and the run's config.

A checkpoint is written in the background. When it is complete, digests of its files are added and
it is renamed. So a run that was killed while saving resumes from the checkpoint before, and so does
a run whose newest checkpoint has been damaged. Arrays are restored onto the current mesh, which may
differ from the one that they were saved on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from basis_jax import files, processes
from basis_jax.config import CheckpointSection
from basis_jax.runs.log import log_line
from basis_jax.runs.metrics import read_metrics
from basis_jax.types import TrainState

WRITING_S = 24 * 3600
"""Writing a checkpoint fails after so many seconds; orbax's own limit of 600 s is short for a large
model and a slow disk."""


class Sealed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A folder that is being written. A checkpoint gets the digests of its files just before it is
    renamed. The folders of its parts, which orbax renames in the same way, get none."""

    async def finalize(self) -> None:
        written, final = Path(self.get()), Path(self.get_final())
        if files.is_step(final.name):
            if self._checkpoint_metadata_store:  # orbax writes this file in a thread
                self._checkpoint_metadata_store.wait_until_finished()
            files.seal(written)
        written.rename(final)
        files.push_names_to_disk(final.parent)


@dataclass(frozen=True)
class Kept:
    """Which checkpoints stay: the ``newest``, and the ``best`` of those with an accuracy."""

    newest: int
    best: int
    accuracies: Callable[[], Mapping[int, float]]  # held-out accuracy by step

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> Sequence[bool]:
        steps = [info.step for info in checkpoints]
        found = self.accuracies() if self.best else {}
        by_accuracy = sorted(steps, key=lambda step: (found.get(step, -1.0), step))
        best = [step for step in by_accuracy if step in found][-self.best or len(steps) :]
        return [step in {*sorted(steps)[-self.newest :], *best} for step in steps]


def accuracies(run_dir: Path) -> dict[int, float]:
    """The held-out accuracy of every evaluated step of a run."""
    if not (run_dir / "metrics.jsonl").is_file():
        return {}
    lines = [line for line in read_metrics(run_dir) if line.get("eval/accuracy") is not None]
    return {line["step"]: line["eval/accuracy"] for line in lines}


@contextmanager
def open_checkpoints(run_dir: Path, section: CheckpointSection) -> Iterator[ocp.CheckpointManager]:
    """The manager of ``run_dir/checkpoints``. Leaving the block waits until saving has ended."""
    kept = Kept(
        section.keep, section.keep_best, lambda: processes.by_first(lambda: accuracies(run_dir))
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=kept,
        temporary_path_class=Sealed,
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(timeout_secs=WRITING_S),
        cleanup_tmp_directories=True,
    )
    folder = (run_dir / "checkpoints").absolute()
    names = ("state", "config")
    with (
        files.quiet(),
        ocp.CheckpointManager(folder, options=options, item_names=names) as checkpoints,
    ):
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
    with files.quiet():
        try:
            yield
        except Exception as error:  # classes of orbax, tensorstore and the system
            raise ValueError(
                f"checkpoint {checkpoints.directory / str(step)} could not be written "
                f"({_reason(error)}); fix that and give the same command again: it goes on from "
                "the checkpoint before"
            ) from error


def _reason(error: Exception) -> str:
    """The system's reason at the end of tensorstore's long message; the first line of any other."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    if "os_error_code" not in first:
        return first
    return first.rpartition(": ")[2].partition(" [os_error_code")[0]


def newest_good(checkpoints: Any, report: Callable[[str], None] = print) -> int | None:
    """The step of the newest checkpoint whose files are as they were written, or None if there is
    no checkpoint.

    Newer ones are renamed and reported. Raises ValueError if all are damaged.
    """
    finish(checkpoints)
    folder = Path(checkpoints.directory)

    def find() -> tuple[int | None, list[str]]:
        damaged: dict[int, str] = {}
        for step in sorted(checkpoints.all_steps(), reverse=True):
            wrong = files.damage(folder / str(step))
            if wrong is None:
                said = [_set_aside(folder, *found, step) for found in damaged.items()]
                said += [] if files.is_sealed(folder / str(step)) else [_unsealed(folder, step)]
                for sentence in said:
                    log_line(folder.parent, sentence)
                return step, said
            damaged[step] = wrong
        if damaged:
            listed = "; ".join(f"{step} ({wrong})" for step, wrong in damaged.items())
            raise ValueError(
                f"all checkpoints of {folder} are damaged: {listed}; put their files back, or give "
                "another --run-dir to start anew"
            )
        return None, []

    step, said = processes.by_first(find)
    for sentence in said:
        report(sentence)
    checkpoints.reload()
    return step


def _set_aside(folder: Path, step: int, wrong: str, before: int) -> str:
    """Rename a damaged checkpoint; returns the sentence for the user."""
    number, aside = 1, folder / f"damaged-{step}"
    while aside.exists():
        number += 1
        aside = folder / f"damaged-{step}.{number}"
    with files.writing(aside):
        (folder / str(step)).rename(aside)
    return (
        f"warning: checkpoint {folder / str(step)} is damaged ({wrong}), so the run goes on from "
        f"step {before}, and the damaged one is kept as {aside.name}"
    )


def _unsealed(folder: Path, step: int) -> str:
    return (
        f"warning: checkpoint {folder / str(step)} has no {files.DIGESTS} (it is of an older "
        "version, or the file was removed), so its files cannot be checked"
    )


def restore(
    checkpoints: ocp.CheckpointManager,
    like: TrainState,
    report: Callable[[str], None] = print,
) -> TrainState | None:
    """The newest checkpoint that is complete and not damaged, laid out like ``like`` (arrays or
    shapes), or None.

    It has no frozen parameters. Damaged ones are reported. Raises ValueError if it cannot be read,
    if it is of another state than ``like``, or if parameters or moments are not finite.
    """
    step = newest_good(checkpoints, report)
    if step is None:
        return None
    check_same_leaves(Path(checkpoints.directory) / str(step), like)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(like))
    items = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    try:
        restored = checkpoints.restore(step, args=items)["state"]
    except files.UNREADABLE as error:
        raise ValueError(
            f"checkpoint {checkpoints.directory / str(step)} cannot be read ({error}); remove that "
            "folder to resume from the one before"
        ) from error
    return state_of(like, jax.tree.leaves(restored), str(checkpoints.directory / str(step)))


def state_of(like: TrainState, leaves: Iterable[Any], folder: str) -> TrainState:
    """The state that has these leaves of the checkpoint ``folder``, without frozen parameters.

    Raises ValueError as ``check_finite`` for parameters, moments and critic.
    """
    parts = (like.step, like.params, like.opt_state, like.estimator_state, like.critic)
    step, params, opt_state, estimator_state, critic = jax.tree.unflatten(
        jax.tree.structure(parts), leaves
    )
    check_finite({"params": params, "opt_state": opt_state, "critic": critic}, folder)
    return TrainState(
        step=step,
        params=params,
        opt_state=opt_state,
        estimator_state=estimator_state,
        critic=critic,
    )


@dataclass(frozen=True)
class Stored:
    """A leaf of a state on disk: its name there, and what it holds."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def stored_leaves(folder: Path) -> dict[str, Stored]:
    """The leaves of a checkpoint by their path in the state, such as ``.params['embedding']``."""
    try:
        files.check_all_regular(folder)
        with files.quiet():
            tree = ocp.PyTreeCheckpointHandler().metadata((folder / "state").absolute()).tree
        return {
            name.lstrip("0123456789"): Stored(name, tuple(leaf.shape), str(leaf.dtype))
            for name, leaf in tree.items()
        }
    except files.UNREADABLE as error:
        raise ValueError(f"checkpoint {folder} cannot be read ({_reason(error)})") from error


def leaves_of(state: TrainState) -> dict[str, Any]:
    """The leaves that a checkpoint of this state has, by their path in it."""
    return {name.lstrip("0123456789"): leaf for name, leaf in _as_dict(state).items()}


PARTS = {
    ".params": ("the parameters", "model.path and model.lora"),
    ".opt_state": ("the optimizer's moments", "optim"),
    ".estimator_state": ("the estimator's state", "estimator and data.path"),
    ".critic": ("the critic", "critic"),
}


def differing_leaf(part: str, stored: Mapping[str, Stored], wanted: Mapping[str, Any]) -> str:
    """Name the first leaf of a part of the state that differs, or "" if none does."""
    here = {p: (x.shape, str(x.dtype)) for p, x in wanted.items() if p.startswith(part)}
    there = {p: (x.shape, x.dtype) for p, x in stored.items() if p.startswith(part)}
    for path in sorted(here.keys() | there.keys()):
        if here.get(path) != there.get(path):
            shown = [
                f"{x[path][1]}{list(x[path][0])}" if path in x else "absent" for x in (there, here)
            ]
            return f"{path.removeprefix('.')} is {shown[0]} there and {shown[1]} here"
    return ""


def check_same_leaves(folder: Path, like: TrainState) -> None:
    """Raise ValueError if the checkpoint's leaves are not those of ``like``, or have other shapes.
    The message names the part of the state and the first leaf that differs."""
    stored, wanted = stored_leaves(folder), leaves_of(like)
    for part, (what, fields) in PARTS.items():
        if differing := differing_leaf(part, stored, wanted):
            raise ValueError(
                f"checkpoint {folder} holds {what} of another run: {differing}; give the {fields} "
                "that it was made with, or another --run-dir"
            )


def read_leaves(folder: Path, stored: Mapping[str, Stored], wanted: Mapping[str, Any]) -> dict:
    """Some leaves of a checkpoint by their path, laid out like ``wanted``."""
    item = {stored[path].name: like for path, like in wanted.items()}
    layout = {
        name: ocp.ArrayRestoreArgs(sharding=like.sharding, dtype=like.dtype)
        for name, like in item.items()
    }
    args = ocp.args.PyTreeRestore(item=item, restore_args=layout, partial_restore=True)
    try:
        found = ocp.PyTreeCheckpointHandler().restore((folder / "state").absolute(), args=args)
    except files.UNREADABLE as error:
        raise ValueError(f"checkpoint {folder} cannot be read ({_reason(error)})") from error
    return {path: found[stored[path].name] for path in wanted}


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
