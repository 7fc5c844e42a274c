"""Every algorithm end to end: a short run of each on the embedded model, one table, one picture.

    python -m studies.gallery
    python -m studies.gallery --only REBEL A*-PO --steps 40

Every run takes --steps steps of 128 rollouts, whatever its group size, from the same model with the
same seed and learning rate. The table shows that each algorithm works, and which options select it.
It is not a comparison: there is one seed and no tuning, and algorithms with an offline table or
greedy completions take more rollouts. ``policy_study`` compares. Runs that are finished in --out
are not repeated. The table is also in docs/choosing-an-estimator.md.
"""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

from basis_jax import command_line
from basis_jax.config import Config
from basis_jax.runs.metrics import read_metrics
from basis_jax.runs.plots import COLORS
from basis_jax.runs.provenance import provenance
from basis_jax.training.loop import train

ROLLOUTS = 128

BASIS = "--estimator.name basis --estimator.table-samples 8"
GROUPS = "--sampling.group-size 8"
SEQUENCES = "--loss.aggregation sequence_mean"
ALGORITHMS = {
    # one rollout a prompt
    "BASIS": BASIS,
    "BASIS, as published": f"{BASIS} --estimator.options rule published",
    "value filter": "--estimator.name value_filter",
    "measured mean": "--estimator.name measured_mean",
    "weighted mean": "--estimator.name weighted_mean",
    "least variance": "--estimator.name value_filter+least_variance",
    "REINFORCE": "--estimator.name reinforce",
    "REINFORCE++": "--estimator.name reinforce_pp",
    "SPO": "--estimator.name spo --sampling.plan weighted",
    "KAE": "--estimator.name kae --sampling.plan sticky",
    "GRPO-DBB": "--estimator.name dbb",
    "ReMax": "--estimator.name remax --sampling.plan greedy_beside",
    "PPO with a critic": "--estimator.name gae --critic.warmup-steps 2",
    "VinePPO": (
        "--estimator.name vineppo --sampling.plan branch "
        "--sampling.plan-options rollouts 4 separator ''"
    ),
    "A*-PO": (
        "--estimator.name a_star_po --estimator.table-samples 8 --loss.objective a_star_po "
        + SEQUENCES
    ),
    "TBRM": f"--estimator.name reinforce --loss.objective tbrm --loss.beta 0.02 {SEQUENCES}",
    "BASIS with AIS": f"{BASIS} --loss.sampler-correction ais --sampling.dtype bfloat16",
    # groups
    "GRPO": f"--estimator.name grpo {GROUPS} {SEQUENCES}",
    "DAPO": f"--estimator.name grpo {GROUPS} --loss.clip-high 0.28",
    "Dr. GRPO": f"--estimator.name dr_grpo {GROUPS} --loss.aggregation constant_length",
    "GSPO": (
        f"--estimator.name grpo {GROUPS} --loss.objective gspo --loss.clip-low 3e-4 "
        f"--loss.clip-high 4e-4 {SEQUENCES}"
    ),
    "CISPO": f"--estimator.name grpo {GROUPS} --loss.objective cispo --loss.clip-low 1",
    "RLOO": f"--estimator.name rloo {GROUPS}",
    "GPG": f"--estimator.name gpg {GROUPS} --loss.objective gpg",
    "OPO": f"--estimator.name opo {GROUPS}",
    "REINFORCE++-baseline": f"--estimator.name reinforce_pp_baseline {GROUPS}",
    "James-Stein": "--estimator.name james_stein --sampling.group-size 2",
    "UCPO": f"--estimator.name ucpo {GROUPS}",
    "REBEL": (
        "--estimator.name reinforce --loss.objective rebel --loss.beta 1 --sampling.group-size 2 "
        + SEQUENCES
    ),
    "V_0.5": "--estimator.name v05_filter --sampling.plan sequential --sampling.group-size 16",
    "pass@k": f"--estimator.name pass_at_k --estimator.options k 4 {GROUPS}",
    "best of a group": f"--estimator.name best_of_group {GROUPS}",
}
"""Name -> options that are added to ``basis-jax train --config quickstart``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", default="runs/gallery", help="folder of the runs")
    parser.add_argument("--report", default="results/gallery", help="the .json and the .png")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    options, overrides = parser.parse_known_args()
    found = {}
    for name in options.only:
        found[name] = run(name, options.out, steps=options.steps, overrides=overrides)
    print("\n".join(line(name, row) for name, row in found.items()))
    Path(options.report).parent.mkdir(parents=True, exist_ok=True)
    about = {"steps": options.steps, "rollouts": ROLLOUTS, **provenance()}
    content = {"about": about, "algorithms": found}
    Path(f"{options.report}.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(Path(f"{options.report}.png"), found)
    print(f"\n{options.report}.json\n{options.report}.png")


def config_of(name: str, out: str, *, steps: int, overrides: Sequence[str] = ()) -> Config:
    """The configuration of an algorithm's run."""
    own = shlex.split(ALGORITHMS[name])
    group = (
        int(own[own.index("--sampling.group-size") + 1]) if "--sampling.group-size" in own else 1
    )
    common: dict[str, Any] = {
        "run-dir": Path(out, folder_name(name)),
        "estimator.table-samples": 0,
        "train.steps": steps,
        "train.prompts-per-step": ROLLOUTS // group,
        "train.minibatch-rollouts": ROLLOUTS,
        "train.microbatch-rollouts": ROLLOUTS,
        "optim.lr": 2e-4,
        "optim.schedule": "constant",
        "eval.every": 0,
        "eval.samples": 16,
        "checkpoint.every": 1000,
    }
    words = [word for field, value in common.items() for word in (f"--{field}", str(value))]
    argv = ["--config", "quickstart", *words, *own, *overrides]
    return command_line.parse(__doc__, argv=argv)[0]


def folder_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def run(name: str, out: str, *, steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Train, or read the finished run: held-out accuracy before and after, and the last metrics."""
    config = config_of(name, out, steps=steps, overrides=overrides)
    begun = Path(config.run_dir, "metrics.jsonl").exists()
    lines = read_metrics(config.run_dir) if begun else []
    if not lines or lines[-1]["step"] < steps:
        train(config, report=lambda text: None)
        lines = read_metrics(config.run_dir)
    evaluated = [row for row in lines if "eval/accuracy" in row]
    taken = [row for row in lines if row["step"] > 1]  # the first one compiles
    return {
        "line": ALGORITHMS[name],
        "before": evaluated[0]["eval/accuracy"],
        "after": evaluated[-1]["eval/accuracy"],
        "low": evaluated[-1]["eval/accuracy_low"],
        "high": evaluated[-1]["eval/accuracy_high"],
        "updates": sum(row.get("estimate/no_signal") == 0 for row in lines),
        "seconds": sum(row["time/update_s"] + row["time/sample_s"] for row in taken),
    }


def line(name: str, found: Mapping[str, Any]) -> str:
    return f"{name:22} {found['before']:6.1%} -> {found['after']:6.1%}   {found['line']}"


def draw(path: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw held-out accuracy before and after, one row per algorithm, with 95 % intervals."""
    figure = Figure(figsize=(7, 1.2 + 0.26 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(found.values()):
        axes.plot([row["before"], row["after"]], [place, place], color="#cccccc", zorder=1)
        axes.plot([row["low"], row["high"]], [place, place], color=COLORS[0], lw=1.5, zorder=2)
        axes.plot(row["before"], place, "o", color="#999999", ms=4, zorder=3)
        axes.plot(row["after"], place, "o", color=COLORS[0], ms=5, zorder=3)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MultipleLocator(0.05))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("held-out accuracy before (grey) and after a short run; one seed, not tuned")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color="#eeeeee")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    command_line.run(main)
