"""Small runs for the fault drill: start, interrupt, finish and compare them bit for bit."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from basis_jax import command_line
from basis_jax.config import Config
from basis_jax.training.loop import train

ROOT = Path(__file__).parent.parent
STEPS = 4
SMALL = {
    "train.steps": STEPS,
    "train.prompts-per-step": 32,
    "train.minibatch-rollouts": 16,
    "train.microbatch-rollouts": 16,
    "train.sample-rollouts": 32,
    "data.size": 64,
    "estimator.table-samples": 2,
    "eval.size": 16,
    "eval.samples": 1,
    "eval.every": 2,
    "checkpoint.every": 1,
}
"""The quickstart with fewer and smaller steps; two updates a step, a checkpoint after each."""
WALL = ("time/", "throughput/", "compile/")  # differ between any two runs


class BrokenOff(Exception):
    """Ends a run after a step, with its checkpoint written."""


def overrides(run_dir: Path, changes: dict[str, Any] | None = None) -> list[str]:
    options = SMALL | {"run-dir": run_dir} | (changes or {})
    return ["--config", "quickstart", *(f"--{name}={value}" for name, value in options.items())]


def config_of(run_dir: Path, changes: dict[str, Any] | None = None) -> Config:
    return command_line.parse("", argv=overrides(run_dir, changes))[0]


def keep_programs(folder: Path) -> None:
    """Compile each program once for the whole drill."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)  # for other processes
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def take_steps(run_dir: Path, *, until: int = STEPS, **changes: Any) -> list[str]:
    """Begin or resume the run up to a step; returns the warnings that a user would see."""

    def leave(step: int, *_: object) -> None:
        if step == until < STEPS:
            raise BrokenOff

    said: list[str] = []
    shown = io.StringIO()
    with contextlib.suppress(BrokenOff), contextlib.redirect_stdout(shown):
        train(config_of(run_dir, changes), callbacks=[leave], report=said.append)
    lines = dict.fromkeys([*said, *shown.getvalue().splitlines()])
    return [line for line in lines if "warning" in line or "lost" in line]


def result(run_dir: Path) -> dict[str, Any]:
    """What must be equal: the lines of metrics and samples, and every leaf of the last state."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit()]
    folder = (run_dir / "checkpoints" / str(max(steps)) / "state").absolute()
    with ocp.PyTreeCheckpointer() as reader:  # as host arrays, whatever devices it was saved from
        shapes = reader.metadata(folder).item_metadata.tree
        kind = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        leaves = reader.restore(folder, ocp.args.PyTreeRestore(restore_args=kind))
    return {
        "metrics": [{k: v for k, v in row.items() if not k.startswith(WALL)} for row in rows],
        "samples": (run_dir / "samples.jsonl").read_text(),
        **{
            name: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
            for name, leaf in leaves.items()
        },
    }


def differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [k for k in sorted(found.keys() | wanted.keys()) if found.get(k) != wanted.get(k)]


def start_process(run_dir: Path, *more: str, **settings: Any) -> subprocess.Popen:
    """The same run in a separate process, by ``basis-jax train``."""
    return subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "train.py", *overrides(run_dir), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **settings,
    )


def wait_for(path: Path, process: subprocess.Popen | None = None, seconds: float = 300) -> bool:
    """Wait until a file exists; False if the process ends or ``seconds`` have passed."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end or (process is not None and process.poll() is not None):
            return False
        time.sleep(0.005)
    return True


Case = tuple[str, str, str]  # what was broken; same, said, refused or wrong; what was said


class Drill:
    """The unbroken run, and an interrupted one with which cases begin."""

    def __init__(self, work: Path):
        self.work = work
        keep_programs(work / "programs")
        take_steps(work / "whole")
        self.wanted = result(work / "whole")
        take_steps(work / "broken", until=STEPS - 1)
        if int(max(p.name for p in (work / "broken" / "checkpoints").iterdir())) != STEPS - 1:
            raise SystemExit(f"error: {work} was used by another drill; give an empty --work")

    def folder(self) -> Path:
        """A copy of the interrupted run."""
        case = self.work / "case"
        shutil.rmtree(case, ignore_errors=True)
        return shutil.copytree(self.work / "broken", case)

    def resume(self, what: str, run_dir: Path) -> Case:
        """Resume the run to its end and compare it."""
        try:
            said = take_steps(run_dir)
        except ValueError as error:
            return what, "refused", str(error)
        except Exception as error:
            return what, "wrong", f"{type(error).__name__}: {error}"
        return self.compared(what, run_dir, said)

    def compared(
        self, what: str, run_dir: Path, said: list[str], wanted: dict[str, Any] | None = None
    ) -> Case:
        found = result(run_dir)
        if other := differing(found, wanted or self.wanted):
            return what, "wrong", f"differs: {', '.join(other)}; said: {'; '.join(said)}"
        lost = [line for line in said if "damaged" in line or "lost" in line or "sha256" in line]
        return what, "said" if lost else "same", "; ".join(lost)
