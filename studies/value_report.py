"""The value study's table, JSON and picture, all from the same rows."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from basis_jax.runs.plots import COLORS
from studies.value_methods import BINS, Method, Outcome, World, bin_name, score, slices

PAPER = (
    ("BASIS", 32, 1, 0.0205, (0.027, 0.049, 0.021, 0.020, 0.034)),
    ("REINFORCE++", 0, 1, 0.068, (0.205, 0.057, 0.005, 0.035, 0.102)),
    ("GRPO group mean", 0, 1, 0.177, None),
    ("GRPO group mean", 0, 2, 0.090, None),
    ("GRPO group mean", 0, 4, 0.047, None),
    ("GRPO group mean", 0, 8, 0.023, (0.011, 0.033, 0.037, 0.035, 0.014)),
)
"""(method, n, G, MSE, MSE by bin), read off the paper's figure 3a (+-.002): Qwen2.5-Math-7B on
MATH levels 3 to 5, B = 64, one checkpoint."""
DRAWN = (
    ("reinforce_pp", 0, 1),
    ("grpo group mean", 0, 4),
    ("grpo group mean", 0, 8),
    ("basis published", 64, 1),
    ("basis robust", 64, 1),
    ("basis robust", 8, 1),
    ("value_filter", 64, 1),
    ("value_filter", 8, 1),
    ("value_filter", 0, 1),
    ("value_filter, drift 1", 64, 1),
    ("value_filter, 32 features", 8, 1),
    ("value_filter, 32 features", 0, 1),
)
"""(estimator, n, G) of the lines in the picture, if a part has them."""
TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Part:
    """One setting of the study: its description, and a row for every method."""

    name: str
    about: dict
    rows: list[dict]


def make_part(
    name: str, about: dict, world: World, methods: Sequence[Method], outcomes: Sequence[Outcome]
) -> Part:
    """Score the outcomes; the references are reinforce_pp and the largest group's mean."""
    groups = [i for i, m in enumerate(methods) if m.name == "grpo group mean"]
    largest = max(groups, key=lambda i: methods[i].group_size)
    scored = score(world, outcomes, references={"reinforce_pp": 0, "grpo": largest})
    counted = slices(world)
    batch = world.ids.shape[2]
    rows = []
    for method, outcome, errors in zip(methods, outcomes, scored, strict=True):
        row = {
            "estimator": method.name,
            "n": method.trials,
            "G": method.group_size,
            "rollouts_per_step": batch * method.group_size,
            "slices": errors,
            "binary_share": {
                age: float(outcome.binary[counted[age]].mean()) for age in errors if age in counted
            },
        }
        if method.name.startswith("basis"):
            row["calibration"] = calibration(method, outcome, world)
        rows.append(row)
    return Part(name, {**about, "bootstrap_units": world.units}, rows)


def calibration(method: Method, outcome: Outcome, world: World) -> dict[str, float]:
    """How often the active set is below half of the batch's prompts with 0 < p < 1, and the share
    of rows without a fitted baseline (published rule: baseline 0; robust: the Jeffreys value)."""
    k = world.successes[method.trials]
    which = np.arange(len(k))[:, None, None]
    mixed = np.mean((k[which, world.ids] > 0) & (k[which, world.ids] < method.trials), axis=2)
    return {
        "degenerate_batches": float(np.mean(outcome.info["active_fraction"] < 0.5 * mixed)),
        "fallback_share": float(outcome.info["fallback_share"].mean()),
        "mixed_share": float(mixed.mean()),
        "beta_median": float(np.median(outcome.info["beta"])),
    }


# ----------------------------------------------------------------------------------------- table
def ages(part: Part) -> list[str]:
    return [s for s in part.rows[0]["slices"] if s != "all" and not s.startswith("V in")]


def table(part: Part) -> str:
    """One line per method. The JSON has the errors with more digits."""
    names = ages(part)
    shown = names if len(names) <= 8 else names[:: -(-len(names) // 8)]
    width = max(len(row["estimator"]) for row in part.rows)
    head = f"{'estimator':{width}}   n  G rollouts    MSE [95 % interval]    /R++  /GRPO"
    lines = [part.name, head + "".join(f"{name.split(' ', 1)[-1]:>8}" for name in shown)]
    for row in part.rows:
        whole = row["slices"]["all"]
        ratios = [whole[f"ratio_to_{k}"]["ratio"] for k in ("reinforce_pp", "grpo")]
        line = (
            f"{row['estimator']:{width}} {row['n']:3d} {row['G']:2d} {row['rollouts_per_step']:8d}"
        )
        line += f"  {whole['mse']:.4f} [{whole['low']:.4f}, {whole['high']:.4f}]"
        line += "".join(f" {ratio:6.3f}" for ratio in ratios)
        lines.append(line + "".join(f"{row['slices'][name]['mse']:8.4f}" for name in shown))
    for row in part.rows:
        if "calibration" in row:
            c = row["calibration"]
            lines.append(
                f"{row['estimator']} n={row['n']}: active set below half of the mixed prompts in "
                f"{c['degenerate_batches']:.1%} of batches; rows without a fitted baseline "
                f"{c['fallback_share']:.1%}; median beta {c['beta_median']:.2f}"
            )
    return "\n".join(lines)


def paper_table() -> str:
    lines = ["reference: read off the paper's figure 3a (+-.002), Qwen2.5-Math-7B on MATH, B = 64"]
    for name, _, group, error, bins in PAPER:
        by_bin = f"   by true value {' '.join(f'{x:.3f}' for x in bins)}" if bins else ""
        lines.append(f"{name:16} G={group}  {error:.4f}{by_bin}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ file
def write(out: Path, parts: Sequence[Part], settings: dict, provenance: dict) -> None:
    """Write ``out``.json and ``out``.png. ``provenance`` is that of the start of the study."""
    out.parent.mkdir(parents=True, exist_ok=True)
    paper = [dict(zip(("estimator", "n", "G", "mse", "bins"), row, strict=True)) for row in PAPER]
    content = {
        "command": shlex.join(["python", "-m", "studies.value_study", *sys.argv[1:]]),
        **provenance,
        "settings": settings,
        "paper_read_off_figure_3a": paper,
        "parts": [vars(part) for part in parts],
    }
    Path(f"{out}.json").write_text(as_lines(rounded(content)))
    draw(parts, Path(f"{out}.png"))


def as_lines(content: dict) -> str:
    """JSON with one line per method."""
    head = {key: value for key, value in content.items() if key != "parts"}
    parts = []
    for part in content["parts"]:
        about = json.dumps({key: value for key, value in part.items() if key != "rows"})[:-1]
        rows = ",\n  ".join(json.dumps(row) for row in part["rows"])
        parts.append(f'{about}, "rows": [\n  {rows}]}}')
    return f'{json.dumps(head, indent=1)[:-2]},\n "parts": [\n {", ".join(parts)}\n]}}\n'


def rounded(x):
    """Floats with 6 digits; more are meaningless and make the file hard to read."""
    if isinstance(x, dict):
        return {str(k): rounded(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(v) for v in x]
    if isinstance(x, Path):
        return str(x)
    return float(f"{x:.6g}") if isinstance(x, float) else x


# --------------------------------------------------------------------------------------- picture
def draw(parts: Sequence[Part], path: Path) -> None:
    """One row of panels per part: overall, by true value, by age, share of 0/1 baselines."""
    figure = Figure(figsize=(20, 4.6 * len(parts) + 0.4), dpi=110, layout="constrained")
    grid = figure.subplots(len(parts), 4, squeeze=False)
    for line, part in zip(grid, parts, strict=True):
        rows = [r for key in DRAWN for r in part.rows if key == (r["estimator"], r["n"], r["G"])]
        draw_overall(line[0], part, rows)
        bins = [bin_name(low) for low in BINS]
        draw_lines(line[1], rows, bins, "true value V", [name[5:] for name in bins])
        draw_ages(line[2], part, rows)
        draw_binary(line[3], rows)
        line[0].set_ylabel(part.name, fontsize=12, fontweight="bold")
    handles, labels = grid[0][1].get_legend_handles_labels()
    for line in grid[1:]:
        for handle, text in zip(*line[1].get_legend_handles_labels(), strict=True):
            if text not in labels:
                handles, labels = [*handles, handle], [*labels, text]
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path)


def label(row: dict) -> str:
    name = row["estimator"]
    if row["G"] > 1:
        return f"{name}, G={row['G']}"
    return name if name in ("reinforce_pp", "batch_mean") else f"{name}, n={row['n']}"


def style(row: dict) -> dict:
    """Colour by family, line by n."""
    families = ("reinforce_pp", "grpo", "basis robust", "basis published", "value_filter,", "value")
    family = next(i for i, name in enumerate(families) if row["estimator"].startswith(name))
    line = {64: "-", 32: "-.", 8: "--", 4: ":", 0: ":"}.get(row["n"], "-")
    if row["estimator"] in ("reinforce_pp", "grpo group mean"):
        line = ":" if row["G"] == 4 else "-"
    return {"color": COLORS[(6, 4, 0, 5, 3, 1)[family]], "linestyle": line}


def draw_overall(axes: Axes, part: Part, rows: Sequence[dict]) -> None:
    names = [label(row) for row in rows]
    for y, row in enumerate(rows):
        whole = row["slices"]["all"]
        spread = [[whole["mse"] - whole["low"]], [whole["high"] - whole["mse"]]]
        color = style(row)["color"]
        axes.errorbar(whole["mse"], y, xerr=spread, color=color, marker="o", capsize=3)
        axes.text(whole["high"] * 1.12, y, f"{whole['mse']:.4f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("log")
    most = max(row["slices"]["all"]["high"] for row in rows)
    axes.set_xlim(right=2.2 * most)
    ticks = [t for t in TICKS if axes.get_xlim()[0] <= t <= most]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("mean squared error of the value")
    if part.about.get("beside_paper"):
        for name, _, group, error, _ in PAPER:
            if name != "GRPO group mean" or group in (4, 8):
                axes.axvline(error, color="grey", linewidth=0.8, linestyle="--")
        axes.set_xlabel("mean squared error of the value (dashed: read off the paper's figure 3a)")
    finish(axes, "Overall")


def draw_lines(
    axes: Axes, rows: Sequence[dict], names: list[str], unit: str, ticks: list[str]
) -> None:
    for row in rows:
        points = [row["slices"].get(name) for name in names]
        errors = [p["mse"] if p else np.nan for p in points]
        axes.plot(
            range(len(names)), errors, marker="o", markersize=3, label=label(row), **style(row)
        )
    axes.set_yscale("log")
    axes.set_xticks(range(len(ticks)), ticks, fontsize=9)
    axes.set_xlabel(unit)
    finish(axes, "By true value")


def draw_ages(axes: Axes, part: Part, rows: Sequence[dict]) -> None:
    names = ages(part)
    if not names:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "one batch, no history", ha="center", transform=axes.transAxes)
        return
    unit, ticks = names[0].split(" ", 1)[0], [name.split(" ", 1)[-1] for name in names]
    draw_lines(axes, rows, names, unit, ticks)
    finish(axes, "By age of the table")


def draw_binary(axes: Axes, rows: Sequence[dict]) -> None:
    for y, row in enumerate(rows):
        share = row["binary_share"]["all"]
        axes.barh(y, share, color=style(row)["color"], alpha=0.8, height=0.7)
        axes.text(share, y, f" {share:.1%}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=9)
    axes.set_xlim(0, 1.1)
    axes.invert_yaxis()
    finish(axes, "Share of baselines exactly 0 or 1")


def finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
