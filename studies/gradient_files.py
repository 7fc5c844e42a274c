"""The gradient study's JSON and picture, from the rows of ``gradient_report``."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from basis_jax.runs.plots import COLORS
from studies.gradient_methods import WEIGHTS
from studies.gradient_report import Part, is_real, title
from studies.gradient_sketch import METRICS

DRAWN = ("none", "batch mean", "value_filter", "LV value_filter", "measured", "grpo")


LOST = "unreachable "


def read(path: Path) -> list[Part]:
    """The parts of a report that ``write`` has written: numbers with 4 digits."""
    return [
        Part(
            name=part["name"],
            about=part["about"],
            rows=with_nan(part["rows"]),
            lost={k.removeprefix(LOST): with_nan(v) for k, v in part.items() if k.startswith(LOST)},
        )
        for part in json.loads(path.read_text())["parts"]
    ]


def with_nan(x: Any) -> Any:
    """NaN for None, as before ``rounded``."""
    if isinstance(x, dict):
        return {k: with_nan(v) for k, v in x.items()}
    if isinstance(x, list):
        return [with_nan(v) for v in x]
    return float("nan") if x is None else x


def write(out: Path, parts: Sequence[Part], provenance: Mapping) -> None:
    """Write ``out``.json, with one line per method, and ``out``.png."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "studies.gradient_study", *sys.argv[1:]])
    head = {"command": command, **provenance}
    texts = []
    for part in parts:
        about = json.dumps({"name": part.name, "about": part.about})[:-1]
        tables = {"rows": part.rows} | {LOST + share: rows for share, rows in part.lost.items()}
        body = ", ".join(f'"{k}": [\n  {as_lines(rows)}]' for k, rows in tables.items())
        texts.append(f"{about}, {body}}}")
    text = f'{json.dumps(head, indent=1)[:-2]},\n "parts": [\n {", ".join(texts)}\n]}}\n'
    Path(f"{out}.json").write_text(text)
    draw(parts, Path(f"{out}.png"))


def as_lines(rows: Sequence[dict]) -> str:
    return ",\n  ".join(json.dumps(rounded(row)) for row in rows)


def rounded(x: Any) -> Any:
    """Floats with 4 digits; None for NaN and infinity."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    if not isinstance(x, float):
        return x
    return float(f"{x:.4g}") if np.isfinite(x) else None


# --------------------------------------------------------------------------------------- picture
def draw(parts: Sequence[Part], path: Path) -> None:
    """One row of panels per checkpoint: rollouts needed, squared cosines, unreachable problems."""
    figure = Figure(figsize=(17, 5.4 * len(parts)), dpi=90, layout="constrained")
    grid = figure.subplots(len(parts), 3, squeeze=False, width_ratios=(1.5, 1, 1))
    for panels, part in zip(grid, parts, strict=True):
        rows = [row for row in part.rows if row["told"] in ("", WEIGHTS[0])]
        draw_needed(panels[0], part, rows)
        draw_cosines(panels[1], rows)
        draw_lost(panels[2], part)
    figure.savefig(path)


def color(row: dict) -> str:
    """By family: ours, weighted, values, groups, plain, oracles."""
    families = (
        ("least_variance", "measured"),
        ("weighted", "otb"),
        ("value", "basis", "spo"),
        ("grpo", "rloo"),
    )
    if not is_real(row):
        return "grey"
    for family, names in enumerate(families):
        if row["method"].startswith(names):
            return COLORS[(5, 3, 0, 4)[family]]
    return COLORS[6]


def draw_needed(axes: Axes, part: Part, rows: Sequence[dict]) -> None:
    for y, row in enumerate(rows):
        for metric, marker, shift in zip(METRICS, "os", (-0.14, 0.14), strict=True):
            value, low, high = row[f"first {metric}"]["to_best"]
            axes.errorbar(
                value,
                y + shift,
                xerr=[[max(0, value - low)], [max(0, high - value)]],
                color=color(row),
                marker=marker,
                markersize=5,
                markerfacecolor=color(row) if metric == "sgd" else "white",
                capsize=2,
                label=f"metric of {metric}" if y == 0 else None,
            )
    axes.axvspan(0.95, 1.05, color="black", alpha=0.08, linewidth=0)
    axes.set_yticks(range(len(rows)), [title(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.6, min(20, axes.get_xlim()[1]))
    ticks = [t for t in (0.7, 1, 1.5, 2, 3, 5, 10, 20) if t < axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.legend(fontsize=8, frameon=False)
    value, ratio = part.about["mean_value"], part.about.get("m0/m1 sgd", np.nan)
    finish(
        axes, f"{part.name} (mean reward {value:.2f}, m0/m1 {ratio:.1f}): rollouts needed, best = 1"
    )


def draw_cosines(axes: Axes, rows: Sequence[dict]) -> None:
    for y, row in enumerate(rows):
        for update, marker in (("first", "s"), ("second", "x")):
            value, low, high = row[f"{update} adamw"]["cosine2_512"]
            axes.plot([low, high], [y, y], color=color(row), linewidth=0.8)
            axes.plot(value, y, marker, color=color(row), markersize=5,
                      label=f"{update} update" if y == 0 else None)  # fmt: skip
    axes.set_yticks(range(len(rows)), [])
    axes.invert_yaxis()
    axes.legend(fontsize=8, frameon=False)
    finish(axes, "cosine^2 to the true gradient, N = 512, AdamW")


def draw_lost(axes: Axes, part: Part) -> None:
    whole = {title(row): row for row in part.rows if row["told"] == WEIGHTS[0]}
    shares = [0.0, *map(float, part.lost)]
    for name, row in whole.items():
        if not name.startswith(
            ("none", "batch mean", "value_filter", "LV value", "measured", "grpo")
        ):
            continue
        lines = [row] + [next(r for r in rows if title(r) == name) for rows in part.lost.values()]
        needed = [r["first adamw"]["to_best"][0] for r in lines]
        style = "--" if row["n"] else "-"
        axes.plot(shares, needed, style, marker="o", markersize=3, color=color(row), label=name)
    axes.set_yscale("log")
    axes.set_ylim(0.9, 8)
    axes.set_yticks([1, 1.5, 2, 3, 5], ["1", "1.5", "2", "3", "5"])
    axes.set_yticks([], minor=True)
    axes.set_xlabel("share of unreachable problems")
    axes.legend(fontsize=8, frameon=False)
    finish(axes, "rollouts needed, best = 1, AdamW")


def finish(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
