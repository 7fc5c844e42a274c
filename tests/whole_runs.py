"""Commands run as a user runs them, in processes of their own, on runs of a few small steps."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
WALL = ("time/", "throughput/", "compile/")  # differ between any two runs


def command(script, config, *arguments):
    return [
        sys.executable,
        str(ROOT / "scripts" / script),
        "--config",
        str(ROOT / "configs" / config),
        *map(str, arguments),
    ]


def environment():
    """One CPU device, and no strictness that a user does not have."""
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}


def run(script, config, *arguments, cwd=None):
    return subprocess.run(
        command(script, config, *arguments),
        capture_output=True,
        text=True,
        env=environment(),
        cwd=cwd,
    )


def run_killed(script, config, *arguments, written, line_count, linger=0.0):
    """kill -9, ``linger`` seconds after a file has ``line_count`` lines or the process ended."""
    process = subprocess.Popen(
        command(script, config, *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    while process.poll() is None:
        if written.exists() and written.read_bytes().count(b"\n") >= line_count:
            break
        time.sleep(0.01)
    time.sleep(linger)
    process.send_signal(signal.SIGKILL)
    process.wait()


def documented_metrics():
    """The keys of metrics.jsonl that docs/metrics.md explains."""
    rows = re.findall(
        r"^\| (`[a-z_]+/.*?) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE
    )
    keys = {key for row in rows for key in re.findall(r"`([^`]+)`", row)}
    kinds = {key.removeprefix("verify/") for key in keys if key.startswith("verify/")}
    return keys | {f"eval/verify/{kind}" for kind in kinds}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def repeatable(rows):
    return [{k: v for k, v in row.items() if not k.startswith(WALL)} for row in rows]


def small(folder, problems, run_dir, **changes):
    """Overrides that make any config a tiny run."""
    options = {
        "model.path": folder,
        "model.compute-dtype": "float32",
        "data.path": problems,
        "data.max-prompt-tokens": 128,
        "eval.sets": problems,
        "eval.size": 8,
        "run-dir": run_dir,
        "sampling.max-new-tokens": 6,
        "estimator.table-samples": 4,
        "train.steps": 4,
        "train.prompts-per-step": 8,
        "train.minibatch-rollouts": 8,
        "train.microbatch-rollouts": 4,
        "train.sample-rollouts": 8,
        "checkpoint.every": 2,
        "optim.lr": 1e-3,
    } | changes
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def final_arrays(run_dir):
    """Every leaf of the newest checkpoint."""
    import orbax.checkpoint as ocp

    steps = sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())
    state = ocp.StandardCheckpointer().restore(run_dir / "checkpoints" / str(steps[-1]) / "state")
    return steps[-1], {name: np.asarray(leaf) for name, leaf in state.items()}
