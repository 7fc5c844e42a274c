"""The policy study's table, JSON and figure, from the finished runs in its folder."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from basis_jax.runs.metrics import read_metrics
from basis_jax.runs.plots import COLORS
from basis_jax.runs.provenance import provenance
from studies import policy_plan
from studies.policy_plan import (
    METHODS,
    REFERENCE,
    STEPS,
    TUNING_SEEDS,
    Found,
    Job,
    powers_of,
    tuning,
)
from studies.policy_runs import FINAL, Reported, found_in
from studies.policy_statistics import area, summary

NEAR_BEST = 0.02  # of a method's best tuned accuracy: how wide its range of rates is


def write(
    out: str, regimes: Sequence[str], report: Path, earlier: Mapping[str, Any] | None = None
) -> None:
    """Print the tables; write ``report``.json and .png. The runs of an ``earlier`` report count
    where the folder ``out`` has nothing."""
    earlier = earlier or {}
    known: Mapping[str, Reported] = earlier.get("regimes", {})
    compared = {}
    for regime in regimes:
        reported = known.get(regime, {})
        methods = reported.get("methods", {})
        compared[regime] = {
            "start": reported.get("start")
            or json.loads(Path(out, regime, "start.json").read_text()),
            "methods": {
                method: described(out, regime, method, runs, methods.get(method, {}))
                for method, runs in found_in(out, regime, reported).items()
                if runs
            },
        }
        add_differences(compared[regime]["methods"])
        print(table(regime, compared[regime]))
    report.parent.mkdir(parents=True, exist_ok=True)
    plan = {
        name: value
        for name, value in vars(policy_plan).items()
        if name.isupper() and name not in ("METHODS", "SGD", "FIRST_TWO")
    }
    made_with = [{name: earlier[name] for name in ("command", "commit")}] if earlier else []
    content = {
        "command": shlex.join(["python", "-m", "studies.policy_study", *sys.argv[1:]]),
        **provenance(),
        "earlier": [*earlier.get("earlier", ()), *made_with],
        "plan": plan | {"METHODS": {name: method._asdict() for name, method in METHODS.items()}},
        "regimes": compared,
    }
    Path(f"{report}.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(Path(f"{report}.png"), compared)
    print(f"\n{report}.json\n{report}.png")


def described(
    out: str, regime: str, method: str, runs: Found, reported: Mapping[str, Any]
) -> dict[str, Any]:
    """A method in a regime: accuracy by rate, and what is known of its test runs. ``reported`` is
    what an earlier report says of the method."""
    best, _ = tuning(runs, powers_of(regime))
    rates = sorted({power for power, seed in runs if seed in TUNING_SEEDS})
    tuned = {p: [runs[p, s] for s in TUNING_SEEDS if (p, s) in runs] for p in rates}
    means = {p: float(np.mean(tuned[p])) for p in rates}
    near = [p for p in rates if means[p] >= max(means.values()) - NEAR_BEST]
    told: dict[str, Any] = {
        "rates": {f"{Job(regime, method, p, 0).rate:.3g}": tuned[p] for p in rates},
        "rates near the best": 10 ** ((max(near) - min(near)) / 2) if near else None,
    }
    if best is None:
        return told
    seeds = sorted(seed for power, seed in runs if power == best and seed not in TUNING_SEEDS)
    told["rate"], told["seeds"] = Job(regime, method, best, 0).rate, seeds
    if not seeds:
        return told
    tests = tests_in(reported) | {
        seed: test_of(folder)
        for seed in seeds
        if ((folder := Path(out, Job(regime, method, best, seed).name)) / FINAL).is_file()
    }
    curves = [tests[seed]["curve"] for seed in seeds]
    measures = [name for name in tests[seeds[0]] if name != "curve"]
    per_seed = {name: [tests[seed][name] for seed in seeds] for name in measures}
    told["per seed"] = per_seed
    told["mean"] = {name: summary(values) for name, values in per_seed.items()}
    told["curves"] = curves
    return told


def tests_in(reported: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """By seed, the test runs of a method that a report holds."""
    return {
        seed: {name: values[i] for name, values in reported["per seed"].items()}
        | {"curve": reported["curves"][i]}
        for i, seed in enumerate(reported.get("seeds", ()))
    }


def test_of(folder: Path) -> dict[str, Any]:
    """A finished test run: its curve, and one number of every kind."""
    final, c = json.loads((folder / FINAL).read_text()), curve(folder)
    return {
        "accuracy": final["accuracy"],
        "greedy": final["greedy"],
        "pass@8": final["pass@8"],
        "best temperature": max(final["accuracy"], final["greedy"], *final["cooler"].values()),
        "at equal steps": float(np.interp(STEPS, c["steps"], c["accuracy"])),
        "area": area(np.array(c["steps"]), np.array(c["accuracy"]), STEPS),
        "entropy": c["entropy"][-1],
        "kl": c["kl"][-1],
        "seconds": c["seconds"],
        "tokens": c["tokens"],
        "curve": c,
    }


def curve(folder: Path) -> dict[str, Any]:
    """Held-out accuracy of a run against steps and against its KL from the start.

    A step whose rewards are all equal makes no update. Its KL and entropy are those of the step
    before, because the policy is the same.
    """
    rows, last = read_metrics(folder), {"policy/kl_ref": 0.0, "policy/entropy": None}
    for row in rows:
        last |= {name: row[name] for name in last if name in row}
        row |= last
    evaluated = [row for row in rows if "eval/accuracy" in row]
    parts = ("time/sample_s", "time/verify_s", "time/update_s")
    lengths = [row["completion/length_mean"] for row in rows[1:]]
    return {
        "steps": [row["step"] for row in evaluated],
        "accuracy": [row["eval/accuracy"] for row in evaluated],
        "greedy": [row["eval/greedy_accuracy"] for row in evaluated],
        "kl": [row["policy/kl_ref"] for row in evaluated],
        "entropy": [row["policy/entropy"] for row in evaluated],
        "seconds": sum(row.get(part, 0.0) for row in rows[1:] for part in parts),
        "tokens": float(policy_plan.ROLLOUTS * np.sum(lengths)),
        "noise": {
            name: float(np.mean([row[f"estimate/noise_{name}"] for row in rows[1:]]))
            for name in ("none", "mean", "values", "baselines")
        },
    }


COMPARED = ("accuracy", "at equal steps", "greedy", "best temperature", "pass@8")


def add_differences(methods: Mapping[str, dict[str, Any]]) -> None:
    """What is ``COMPARED`` minus that of the reference, seed by seed."""
    reference = methods.get(REFERENCE, {})
    if "per seed" not in reference:
        return
    for name, method in methods.items():
        if name == REFERENCE or "per seed" not in method:
            continue
        for kind in COMPARED:
            of_reference = dict(zip(reference["seeds"], reference["per seed"][kind], strict=True))
            pairs = zip(method["seeds"], method["per seed"][kind], strict=True)
            both = [a - of_reference[seed] for seed, a in pairs if seed in of_reference]
            if both:
                method["mean"][f"{kind} minus {REFERENCE}"] = summary(both)


# ------------------------------------------------------------------------------------------ table
COLUMNS = (
    *("accuracy", f"accuracy minus {REFERENCE}", "at equal steps", "area"),
    *("greedy", f"greedy minus {REFERENCE}", "best temperature", "pass@8"),
)


def table(regime: str, compared: Mapping[str, Any]) -> str:
    """In per cent, with intervals."""
    start = compared["start"]
    best = max(start["accuracy"], start["greedy"], *start["cooler"].values())
    lines = [
        "",
        f"{regime}: before training {start['accuracy']:.1%}, greedy {start['greedy']:.1%}, at its "
        f"best temperature {best:.1%}, pass@8 {start['pass@8']:.1%}",
        f"{'method':20}{'rate':>10}{'seeds':>6}  {''.join(f'{c:27}' for c in COLUMNS)}",
    ]
    for name, method in compared["methods"].items():
        if "mean" not in method:
            lines.append(f"{name:20}  tuning: {len(method['rates'])} rates")
            continue
        cells = "".join(f"{shown(method['mean'].get(column)):27}" for column in COLUMNS)
        lines.append(f"{name:20}{method['rate']:10.2g}{len(method['seeds']):6}  {cells}")
    return "\n".join(lines)


def shown(found: Mapping[str, float | None] | None) -> str:
    if found is None:
        return ""
    mean, low, high = (None if x is None else 100 * x for x in found.values())
    return f"{mean:.1f}" if low is None else f"{mean:.1f} [{low:.1f}, {high:.1f}]"


# ----------------------------------------------------------------------------------------- figure
def draw(path: Path, compared: Mapping[str, Any]) -> None:
    """One row a regime: accuracy, sampled and greedy, against steps; accuracy against the KL from
    the start and against the learning rate."""
    figure = Figure(figsize=(19, 4.6 * len(compared)), dpi=100, layout="constrained")
    grid = figure.subplots(len(compared), 4, squeeze=False)
    for row, (regime, found) in zip(grid, compared.items(), strict=True):
        for name, method in found["methods"].items():
            style = style_of(name)
            if "curves" in method:
                draw_curve(row[0], method["curves"], "steps", "accuracy", style)
                draw_curve(row[1], method["curves"], "steps", "greedy", style)
                draw_curve(row[2], method["curves"], "kl", "accuracy", style)
            rates = {float(rate): np.mean(a) for rate, a in method["rates"].items()}
            scale = METHODS[name].rate
            row[3].plot([r / scale for r in rates], list(rates.values()), label=name, **style)
        titles = (
            f"{regime}: accuracy at temperature 1, by step",
            "greedy accuracy, by step",
            "accuracy at temperature 1, by KL from the start",
            "tuning: accuracy at the end, by learning rate",
        )
        for axes, title in zip(row, titles, strict=True):
            axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
        row[3].set_xscale("log")
        for axes in row:
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, linewidth=0.6)
    handles = grid[0][3].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", frameon=False)
    figure.savefig(path)


def style_of(method: str) -> dict[str, Any]:
    index = list(METHODS).index(method)
    return {"color": COLORS[index % len(COLORS)], "linestyle": ("-", "--")[index // len(COLORS)]}


def draw_curve(
    axes: Axes, curves: Sequence[Mapping[str, Any]], x: str, y: str, style: Mapping[str, Any]
) -> None:
    """Mean over seeds."""
    shortest = min(len(c["steps"]) for c in curves)
    at = np.mean([c[x][:shortest] for c in curves], axis=0)
    axes.plot(at, np.mean([c[y][:shortest] for c in curves], axis=0), **style)
