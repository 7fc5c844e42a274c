"""Learning curves of one or more runs in one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from basis_jax.runs.metrics import read_metrics


class Panel(NamedTuple):
    title: str
    unit: str
    key: str
    low: str = ""  # interval around the points, drawn where the run has it
    high: str = ""
    scale: str = "linear"


PANELS = (
    Panel("Reward of the rollouts", "mean reward", "reward/mean"),
    Panel(
        "Held-out accuracy",
        "accuracy, 95 % interval",
        "eval/accuracy",
        "eval/accuracy_low",
        "eval/accuracy_high",
    ),
    Panel("Value error", "mean squared error", "estimate/value_error"),
    Panel("Completion length", "tokens", "completion/length_mean"),
    Panel("Policy entropy", "nats per token", "policy/entropy"),
    Panel(
        "Log-prob gap, sampler to trainer",
        "largest of a step, nats",
        "sampler/logprob_gap_max",
        scale="log",
    ),
)

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours of Okabe and Ito, which colour-blind readers can distinguish."""

DASHES = ("-", "--", ":", "-.")
"""One for every seven runs, so that 28 runs can be distinguished."""


def draw(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Draw the ``PANELS`` for which any of the runs has a metric, and write the picture.

    A panel without an interval shows the raw values in a light colour and their moving average over
    5 % of the run. Raises ValueError for a folder without metrics and for an unknown file format.
    """
    runs = {name: _history(folder) for name, folder in _names(run_dirs).items()}
    panels = [p for p in PANELS if any(_series(rows, p)[0].size for rows in runs.values())]
    if not panels:
        keys = ", ".join(panel.key for panel in PANELS)
        raise ValueError(f"none of the runs has a metric that is drawn; these are {keys}")
    last = max(row["step"] for rows in runs.values() for row in rows)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(4.3 * columns, 2.9 * lines + 0.6), dpi=150, layout=layout)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        _draw_panel(axes, panel, runs)
        axes.set_xlim(-0.02 * last - 0.1, 1.02 * last + 0.1)  # the same in all panels
    _legend(figure, list(runs))
    figure.align_ylabels()
    return _save(figure, Path(out))


def _names(run_dirs: Sequence[str | Path]) -> dict[str, Path]:
    """Label -> folder. The label is the folder's last part, or its path if that is ambiguous."""
    folders = [Path(folder) for folder in run_dirs]
    short = [folder.resolve().name for folder in folders]
    return {
        name if short.count(name) == 1 else str(folder): folder
        for name, folder in zip(short, folders, strict=True)
    }


def _history(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder)
    if not rows:
        raise ValueError(f"metrics.jsonl in {folder} has no step yet; wait for the first one")
    return rows


def _series(rows: Sequence[Mapping[str, Any]], panel: Panel) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the lines that have the panel's metric."""
    points = [(row["step"], row[panel.key]) for row in rows if row.get(panel.key) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over 5 % of the points; fewer at both ends."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _draw_panel(axes: Axes, panel: Panel, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    for index, rows in enumerate(runs.values()):
        steps, values = _series(rows, panel)
        if not steps.size:
            continue
        style = _style(index)
        color = style["color"]
        if panel.low:
            axes.plot(steps, values, marker="o", markersize=4, linewidth=1.8, **style)
            low, high = (
                np.array([row.get(key, np.nan) for row in rows if row.get(panel.key) is not None])
                for key in (panel.low, panel.high)
            )
            opacity = 0.18 if len(runs) <= 3 else 0.06  # many bands would hide each other
            axes.fill_between(steps, low, high, color=color, alpha=opacity, linewidth=0)
        else:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
            axes.plot(steps, _smooth(values), linewidth=1.8, **style)
    _style_axes(axes, panel)


def _style(index: int) -> dict[str, Any]:
    """Colour and dashes of a run's line."""
    cycle, color = divmod(index, len(COLORS))
    return {"color": COLORS[color], "linestyle": DASHES[cycle % len(DASHES)]}


def _style_axes(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("step")
    axes.set_yscale(panel.scale)
    if panel.key == "eval/accuracy":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=9)


def _legend(figure: Figure, names: Sequence[str]) -> None:
    """The names of the runs above the panels, as many beside each other as fit."""
    handles = [
        Line2D([], [], linewidth=2.5, label=name, **_style(i)) for i, name in enumerate(names)
    ]
    inches = 0.8 + 0.1 * max(map(len, names))  # of an entry, roughly
    columns = max(1, int(figure.get_figwidth() / inches))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False)


def _save(figure: Figure, out: Path) -> Path:
    kinds = figure.canvas.get_supported_filetypes()
    if out.suffix[1:] not in kinds:
        raise ValueError(
            f"a picture called {out} is of no known kind; end its name in one of "
            + ", ".join(f".{kind}" for kind in sorted(kinds))
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out
