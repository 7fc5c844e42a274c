"""A new run that begins with a checkpoint of another run: ``--fork-from RUN[@STEP]``.

The new run may have other settings. It goes on from the checkpoint's step with its parameters, its
optimizer's moments and its estimator's state, and its records begin with those of the other run up
to that step. What does not fit the new settings starts afresh, which is reported. The other run is
only read.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from basis_jax import files, processes
from basis_jax.config import Config
from basis_jax.runs import checkpoint
from basis_jax.runs.identity import described, differences, read_config
from basis_jax.runs.log import log_line
from basis_jax.training.session import Session
from basis_jax.training.start import first_state, identity_of, state_shapes
from basis_jax.types import TrainState

STARTS_AFRESH = {
    ".opt_state": "the optimizer's moments start afresh",
    ".estimator_state": "the estimator's state starts afresh",
    ".critic": "the critic starts afresh",
}
RECORDS = ("metrics.jsonl", "samples.jsonl")


def find(fork_from: str, config: Config) -> Path | None:
    """The folder of the checkpoint that RUN or RUN@STEP means: the newest of RUN, or that of STEP.
    None if nothing is given, and if the new run has a checkpoint of its own already.

    Raises ValueError if there is none, it is damaged, or the new run has no steps after it.
    """
    if not fork_from:
        return None
    run, step = fork_from, ""
    if not Path(run).is_dir():
        run, _, step = fork_from.rpartition("@")
    folder = Path(run) / "checkpoints"
    itself = Path(run).resolve() == Path(config.run_dir).resolve()
    if not itself and any((Path(config.run_dir) / "checkpoints").glob("[0-9]*")):
        return None
    steps = sorted(int(p.name) for p in folder.glob("[0-9]*") if files.is_step(p.name))
    if not run or not steps:
        raise ValueError(
            f"--fork-from is {fork_from}, which holds no checkpoint; give RUN or RUN@STEP, where "
            "RUN is a run folder"
        )
    if step and not (files.is_step(step) and int(step) in steps):
        raise ValueError(
            f"--fork-from is {fork_from}; checkpoints of {run} are of the steps "
            f"{', '.join(map(str, steps))}"
        )
    if itself:
        raise ValueError(
            f"--fork-from is {fork_from}, the run folder itself; give another --run-dir"
        )
    found = folder / (step or str(steps[-1]))
    if wrong := processes.by_first(lambda: files.damage(found)):
        raise ValueError(
            f"checkpoint {found} is damaged ({wrong}); give another step as --fork-from RUN@STEP"
        )
    if config.train.steps <= int(found.name):
        raise ValueError(
            f"--fork-from begins after step {found.name} and train.steps is {config.train.steps}; "
            "it counts the steps before the fork too, so give more"
        )
    return found


def begin(
    session: Session, run_dir: Path, origin: Path, report: Callable[[str], None]
) -> TrainState:
    """The state that the new run begins with, and its records in ``run_dir``.

    It has no frozen parameters, as a restored one. Raises ValueError if the parameters are not
    those of the new run's model. Nothing is lost if it is killed: it is called again.
    """
    run = origin.parent.parent
    before = processes.by_first(lambda: read_config(run / "config.json"))
    now = dataclasses.asdict(session.config)
    changed = differences(
        described(before["config"], before.get("identity", {})),
        described(now, identity_of(session)),
    )
    names = {name: said for name, said in changed if name != "run_dir"}
    other_estimator = next((said for name, said in names.items() if of_estimator(name)), "")
    processes.by_first(lambda: _copy(run, run_dir, table=not other_estimator))
    fresh = {".estimator_state": other_estimator} if other_estimator else {}
    state, said = _carry(session, run_dir, origin, fresh, report)
    settings = "; ".join(names.values()) or "nothing"
    lines = [f"forked from {run} at step {origin.name}; changed: {settings}", *said]
    for line in lines:
        report(line)
    processes.by_first(lambda: log_line(run_dir, "\n".join(lines)))
    return state


def of_estimator(name: str) -> bool:
    """Whether the estimator's state means something else if this field or file is changed."""
    field = name.removeprefix("contents of.")
    rewards = ("data.verifier", "data.rewards", "data.answer_mode", "data.normalise_rewards")
    of_data = field == "data.path" and field != name  # the problems; their file may be moved
    return of_data or field.startswith(("estimator.", *rewards))


def _carry(
    session: Session,
    run_dir: Path,
    origin: Path,
    fresh: Mapping[str, str],
    report: Callable[[str], None],
) -> tuple[TrainState, list[str]]:
    """The state, and a sentence for every part that is not carried over."""
    like = state_shapes(session)
    wanted, stored = checkpoint.leaves_of(like), checkpoint.stored_leaves(origin)
    if differing := checkpoint.differing_leaf(".params", stored, wanted):
        raise ValueError(
            f"checkpoint {origin} is of another model: {differing}; give the model.path and "
            "model.lora that it was made with"
        )
    fresh = dict(fresh)
    for part in STARTS_AFRESH:
        if part not in fresh and (other := checkpoint.differing_leaf(part, stored, wanted)):
            fresh[part] = other
    carried = {p: x for p, x in wanted.items() if not p.startswith(tuple(fresh))}
    found: dict[str, Any] = checkpoint.read_leaves(origin, stored, carried)
    if fresh:
        begun = dataclasses.replace(first_state(session, run_dir, report), frozen=None)
        found = checkpoint.leaves_of(begun) | found
    state = checkpoint.state_of(like, [found[path] for path in wanted], str(origin))
    said = [f"warning: {STARTS_AFRESH[part]}, because {why}" for part, why in fresh.items()]
    return state, said


def _copy(run: Path, run_dir: Path, *, table: bool) -> None:
    """Copy the records, and the reference table that the estimator's state began with."""
    for name in (*RECORDS, *(["reference.npz"] if table else [])):
        if (run / name).is_file():
            files.replace_file(run_dir / name, (run / name).read_bytes())
