"""A long run with resumes in between: do memory, open files, step time and compiles stay flat?

    python -m studies.soak --steps 2000 --segments 8 --out soak      # soak.json and soak.png

The quickstart's model takes many small steps. Each segment is a separate process that resumes the
run and ends as in a crash. After every step the resident memory, the open files, the seconds and
the compiled programs are recorded. A segment is flat if the median of
its last quarter is at most 5 % above that of its second quarter in memory and 20 % in time, and if
no file stays open and no program is compiled after its first quarter.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from basis_jax.runs.compiles import count_compiles
from basis_jax.training.loop import train
from studies.fault_runs import BrokenOff, config_of, keep_programs

EVERY = {"eval.every": 50, "checkpoint.every": 25, "data.size": 512, "train.patience": 10**6}
MEMORY, SECONDS = 1.05, 1.20  # allowed growth within a segment


def take_segment(run_dir: Path, until: int, steps: int, rows: Path) -> None:
    """Resume the run up to a step, and append the measurements of every step."""
    page, before = os.sysconf("SC_PAGE_SIZE"), time.perf_counter()

    def note(step: int, _: object, metrics: Any) -> None:
        nonlocal before
        now = time.perf_counter()
        row = {
            "step": step,
            "until": until,
            "memory": int(Path("/proc/self/statm").read_text().split()[1]) * page,
            "files": len(os.listdir("/proc/self/fd")),
            "seconds": now - before,
            "programs": compiled.take()["compile/programs"],
            "reward": metrics["reward/mean"],
        }
        before = now
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if step == until < steps:
            raise BrokenOff

    config = config_of(run_dir, {**EVERY, "train.steps": steps})
    with count_compiles() as compiled, suppress(BrokenOff):
        train(config, callbacks=[note])


def judged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the second and the last quarter of a segment, and whether it is flat."""
    quarter = max(len(rows) // 4, 1)
    early, late = rows[quarter : 2 * quarter], rows[-quarter:]

    def median(part: list[dict[str, Any]], name: str) -> float:
        return statistics.median(row[name] for row in part)

    found = {n: (median(early, n), median(late, n)) for n in ("memory", "files", "seconds")}
    programs = sum(row["programs"] for row in rows[quarter:])
    flat = (
        found["memory"][1] <= MEMORY * found["memory"][0]
        and found["seconds"][1] <= SECONDS * found["seconds"][0]
        and found["files"][1] <= found["files"][0]
        and programs == 0
    )
    return {"until": rows[0]["until"], **found, "late programs": programs, "flat": flat}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    shown = {"memory": 2**20, "files": 1, "seconds": 1, "programs": 1}
    titles = ("resident memory (MiB)", "open files", "seconds a step", "programs compiled")
    figure = Figure(figsize=(8, 9), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True)
    for axis, (name, unit), title in zip(axes, shown.items(), titles, strict=True):
        axis.plot([r["step"] for r in rows], [r[name] / unit for r in rows], linewidth=0.8)
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
        for until in {r["until"] for r in rows}:
            axis.axvline(until, color="0.85", linewidth=0.8, zorder=0)
    axes[2].set_yscale("symlog", linthresh=0.1)
    axes[-1].set_xlabel("step (grey: resumed in a new process)")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--segments", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("soak"))
    parser.add_argument("--run-dir", type=Path, help="the run's folder (default: a temporary one)")
    parser.add_argument("--until", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows_path = options.out.with_suffix(".jsonl")
    if options.until:
        keep_programs(options.run_dir.parent / "programs")
        take_segment(options.run_dir, options.until, options.steps, rows_path)
        return
    rows_path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = options.run_dir or Path(folder) / "run"
        for number in range(1, options.segments + 1):
            until = options.steps * number // options.segments
            command = [sys.executable, "-m", "studies.soak", "--run-dir", run_dir]
            command += ["--until", until, "--steps", options.steps, "--out", options.out]
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in rows_path.read_text().splitlines()]
    ends = sorted({row["until"] for row in rows})
    found = [judged([row for row in rows if row["until"] == end]) for end in ends]
    for segment in found:
        print(json.dumps(segment))
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    draw(rows, options.out.with_suffix(".png"))
    sys.exit(not all(segment["flat"] for segment in found))


if __name__ == "__main__":
    main()
