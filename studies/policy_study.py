"""Which estimator teaches fastest: held-out accuracy at equal steps and at equal generated tokens.

    python -m studies.policy_study --config configs/quickstart.py --out runs/policy_study

Runs scripts/train.py for every method and seed, one after another, in OUT/METHOD/seed_N, and writes
``--report``.json and .png. The same command again runs what is missing. Other options override the
config of every run (``--optim.lr 5e-4``).

A step has the same number of rollouts for every method (a group of 8 takes an eighth of the
prompts) and is one optimizer update. A run generates as many rollouts as any other, its offline
table's included: without a table it takes more steps. Equal steps: the first ``--steps`` of every
run; equal tokens: up to the largest count of tokens that all runs reach. While a table is made the
policy stands still. One constant learning rate for all and no gradient clipping: AdamW takes the
same steps at any constant scale of the advantages, so dividing by a standard deviation (grpo,
reinforce_pp, spo) gains no step size; under SGD it would.

- tokens: of completions, mean length times rollouts; prefills are not counted. The run folder does
  not record a table's: they are its trials times the mean length of step 1 (the same policy's).
- seconds: steps times the median step (sample, verify, estimate, update; the median leaves out
  compilation), and the table's rollouts at the median step's sampling seconds a rollout.
- area: mean height of the accuracy curve from 0 to the end of the comparison.
- intervals: 95 % Student t over seeds, for these held-out problems; differences are paired by seed
  (same data order, same evaluation noise) and not corrected for their number.
"""

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.special import stdtrit

from basis_jax import command_line
from basis_jax.runs.metrics import read_metrics
from basis_jax.runs.plots import COLORS
from basis_jax.runs.provenance import provenance
from studies.policy_plan import METHODS, Run, plan

TRAIN = Path(__file__).parents[1] / "scripts" / "train.py"
REFERENCE = "basis_robust"  # of the paired differences


def main() -> None:
    options, overrides = parse()
    runs = plan(options, overrides)
    run_all(runs, options.out)
    curves: dict[str, list[Curve]] = {}
    for run in runs:
        curves.setdefault(run.method, []).append(read_curve(run))
    compared = {
        "steps": compare(curves, "steps", options.steps),
        "tokens": compare(curves, "tokens", equal_tokens(curves)),
    }
    seconds = {name: summary([c.seconds for c in found]) for name, found in curves.items()}
    print(table(compared, seconds))
    report = Path(options.report)
    report.parent.mkdir(parents=True, exist_ok=True)
    write(Path(f"{report}.json"), compared, seconds, curves)
    draw(Path(f"{report}.png"), compared, curves)
    print(f"\n{report}.json\n{report}.png")


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The study's own options, and the rest: overrides of every run's config."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    for name, default, text in (
        ("out", "runs/policy_study", "folder of the runs"),
        ("report", "results/policy_study", "where the .json and the .png go"),
        ("seeds", 5, "seeds 0 to SEEDS - 1"),
        ("steps", 48, "steps of a run with the largest table"),
        ("rollouts", 128, "rollouts of a step"),
        ("problems", 256, "problems to train on"),
        ("table-samples", 16, "offline rollouts a problem, for BASIS"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    return parser.parse_known_args(argv)


# ------------------------------------------------------------------------------------------ runs
def run_all(runs: Sequence[Run], out: str) -> None:
    """Train what is not trained yet, one after another."""
    missing = [run for run in runs if not finished(run)]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are there")
    seconds = []
    for number, run in enumerate(missing, 1):
        started = time.monotonic()
        train(run, out)
        seconds.append(time.monotonic() - started)
        left = median(seconds) * (len(missing) - number) / 60
        print(f"{run.folder}: {seconds[-1]:.0f} s; {left:.0f} min for the rest", flush=True)


def finished(run: Run) -> bool:
    """Whether the run's folder has all its steps; it may have more. Ends the study where they are
    of other settings."""
    if not (run.folder / "metrics.jsonl").is_file():
        return False
    stored = json.loads((run.folder / "config.json").read_text())["config"]
    planned = json.loads(json.dumps(dataclasses.asdict(run.config)))
    for config in (stored, planned):
        del config["run_dir"], config["train"]["steps"]  # a moved or a longer study
    if stored != planned:
        sys.exit(f"error: {run.folder} holds a run of other settings; give another --out")
    rows = read_metrics(run.folder)
    return bool(rows) and rows[-1]["step"] >= run.config.train.steps


def train(run: Run, out: str) -> None:
    """scripts/train.py in a process of its own; what it prints goes to output.txt."""
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / "output.txt"
    command = [sys.executable, str(TRAIN), *run.arguments]
    with log.open("ab") as file:
        done = subprocess.run(command, stdout=file, stderr=file, env=environment(out))
    if done.returncode:
        sys.exit(f"error: {run.folder} failed; the end of {log} says why")


def environment(out: str) -> dict[str, str]:
    """Ours, with compiled programs kept between the runs: same programs, same numbers."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(Path(out).resolve() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return cache | os.environ


# ------------------------------------------------------------------------------------ statistics
@dataclass(frozen=True)
class Curve:
    """Held-out accuracy of a run at its evaluations, the first before the first step."""

    run: Run
    steps: Int[np.ndarray, " E"]
    tokens: Num[np.ndarray, " E"]  # generated up to there, the table's included
    accuracy: Float[np.ndarray, " E"]
    table_tokens: float
    seconds: float  # of the whole run


def read_curve(run: Run) -> Curve:
    rows = [row for row in read_metrics(run.folder) if row["step"] <= run.config.train.steps]
    taken = rows[1:]
    evaluated = [row for row in rows if row["step"] % run.config.eval.every == 0]
    steps = np.array([row["step"] for row in evaluated])
    file = run.folder / "reference.npz"
    trials = int(np.load(file)["trials"].sum()) if file.is_file() else 0
    lengths = np.array([row["completion/length_mean"] for row in taken])
    tokens = trials * lengths[0] + run.rollouts_per_step * np.cumsum([0, *lengths])
    parts = ("time/sample_s", "time/verify_s", "time/update_s")
    step_seconds = median(sum(row[part] for part in parts) for row in taken)
    sampling = median(row["time/sample_s"] for row in taken) / run.rollouts_per_step
    return Curve(
        run=run,
        steps=steps,
        tokens=tokens[steps],
        accuracy=np.array([row["eval/accuracy"] for row in evaluated]),
        table_tokens=float(tokens[0]),
        seconds=len(taken) * step_seconds + trials * sampling,
    )


def equal_tokens(curves: Mapping[str, Sequence[Curve]]) -> float:
    """The largest count of tokens that all runs reach."""
    return min(float(curve.tokens[-1]) for found in curves.values() for curve in found)


def area(x: Num[np.ndarray, " E"], y: Num[np.ndarray, " E"], end: float | int) -> float:
    """Mean height from 0 to ``end``; the curve is linear between its points and flat before."""
    inside = np.concatenate([[0], x[(x > 0) & (x < end)], [end]])
    return float(np.trapezoid(np.interp(inside, x, y), inside) / end)


def summary(values: Sequence[float | int] | Num[np.ndarray, " S"]) -> dict[str, float | None]:
    """Mean with its 95 % Student t interval; a single value has none."""
    x = np.asarray(values, float)
    if x.size < 2:
        return {"mean": float(x.mean()), "low": None, "high": None}
    half = stdtrit(x.size - 1, 0.975) * x.std(ddof=1) / np.sqrt(x.size)
    return {"mean": float(x.mean()), "low": float(x.mean() - half), "high": float(x.mean() + half)}


def compare(curves: Mapping[str, Sequence[Curve]], kind: str, end: float | int) -> dict[str, Any]:
    """Accuracy at ``end`` of the ``kind`` (steps, tokens), area up to there, and both minus those
    of the reference, seed by seed."""
    values = {}
    for name, found in curves.items():
        lines = [(getattr(c, kind), c.accuracy) for c in found]
        values[name] = {
            "accuracy": [float(np.interp(end, x, y)) for x, y in lines],
            "area": [area(x, y, end) for x, y in lines],
        }
    methods = {}
    for name, measured in values.items():
        methods[name] = {key: summary(seeds) for key, seeds in measured.items()}
        if REFERENCE in values and name != REFERENCE:
            for key, seeds in measured.items():
                difference = np.subtract(seeds, values[REFERENCE][key])
                methods[name][f"{key} minus {REFERENCE}"] = summary(difference)
    return {"end": end, "methods": methods}


# ---------------------------------------------------------------------------------------- report
def table(compared: Mapping[str, Any], seconds: Mapping[str, Any]) -> str:
    """One block a comparison, in per cent with intervals."""
    columns = ("accuracy", f"accuracy minus {REFERENCE}", "area", f"area minus {REFERENCE}")
    head = f"{'method':26}{''.join(f'{column:29}' for column in columns)}seconds a run"
    lines = []
    for kind, found in compared.items():
        lines += ["", f"equal {kind}: {found['end']:,.0f}", head]
        for name, method in found["methods"].items():
            line = "".join(f"{shown(method.get(column)):29}" for column in columns)
            lines.append(f"{name:26}{line}{seconds[name]['mean']:.1f}")
    return "\n".join(lines)


def shown(found: Mapping[str, float | None] | None) -> str:
    if found is None:
        return ""
    mean, low, high = (None if x is None else 100 * x for x in found.values())
    return f"{mean:.1f}" if low is None else f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def write(
    path: Path,
    compared: Mapping[str, Any],
    seconds: Mapping[str, Any],
    curves: Mapping[str, Sequence[Curve]],
) -> None:
    content = {
        "command": shlex.join(["python", "-m", "studies.policy_study", *sys.argv[1:]]),
        **provenance(),
        **{f"equal {kind}": found for kind, found in compared.items()},
        "seconds": seconds,
        "runs": [described(curve) for found in curves.values() for curve in found],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def described(curve: Curve) -> dict[str, Any]:
    run = curve.run
    starts = json.loads((run.folder / "config.json").read_text())["starts"]
    return {
        "method": run.method,
        "seed": run.seed,
        "arguments": shlex.join(run.arguments),
        "commits": [[start["commit"], start["uncommitted_changes"]] for start in starts],
        **{name: np.asarray(x).tolist() for name, x in vars(curve).items() if name != "run"},
    }


def draw(path: Path, compared: Mapping[str, Any], curves: Mapping[str, Sequence[Curve]]) -> None:
    """Mean over seeds with its interval, against steps and against tokens."""
    figure = Figure(figsize=(15, 6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, kind in ((left, "steps"), (right, "tokens")):
        draw_panel(axes, kind, compared[kind]["end"], curves)
    left.set_title("At equal steps", loc="left", fontweight="bold")
    right.set_title("At equal generated tokens, tables included", loc="left", fontweight="bold")
    left.set_ylabel("held-out accuracy at temperature 1 (band: 95 % over seeds)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path)


def draw_panel(
    axes: Axes, kind: str, end: float | int, curves: Mapping[str, Sequence[Curve]]
) -> None:
    at = np.linspace(0, end, 101)
    for name, found in curves.items():
        index = list(METHODS).index(name)
        color, line = COLORS[index % len(COLORS)], ("-", "--")[index // len(COLORS)]
        heights = np.array([np.interp(at, getattr(c, kind), c.accuracy) for c in found])
        axes.plot(at, heights.mean(axis=0), label=name, color=color, linestyle=line)
        if len(found) > 1:
            bands = [summary(column) for column in heights.T]
            low, high = (np.array([b[edge] for b in bands], float) for edge in ("low", "high"))
            axes.fill_between(at, low, high, color=color, alpha=0.07, linewidth=0)
    axes.set_xlabel(kind)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


if __name__ == "__main__":
    command_line.run(main)
