"""Train a language model on verifiable problems with one rollout per prompt.

    basis-jax train --config quickstart
    basis-jax train --config configs/qwen_math.py --model.path /models/Qwen3-4B

Any field of the config can be overridden (``--optim.lr 3e-6``; ``--help`` lists all). The same
command again resumes the run in ``--run-dir`` from its newest checkpoint. On several machines,
start it on each with ``--processes auto``, or with ``--processes N --coordinator HOST:PORT
--process-id K`` (docs/several-processes.md).

``--fork-from RUN`` begins a new run with the newest checkpoint of another one, and ``RUN@STEP``
with that of a step; settings may differ (docs/resume.md).

``--dry-run`` reads no weights and trains nothing. It prints the memory and time that the run needs,
by part, and exits with 1 if the run does not fit. ``--topology v5e:4x4`` (or h100:8, l4, ...) plans
for devices that are not present. ``--compile`` adds the compiler's figures, for TPU topologies
(with libtpu) and for the devices that are present.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from basis_jax import command_line, processes
from basis_jax.commands import dry_run
from basis_jax.files import whole_lines
from basis_jax.runs import plots
from basis_jax.runs.compiles import keep_compiled
from basis_jax.runs.metrics import read_metrics
from basis_jax.runs.stopping import StopRequested
from basis_jax.runs.terminal import announcement
from basis_jax.training.loop import train

OPTIONS = {
    "fork-from RUN": "begin with the newest checkpoint of another run, or that of RUN@STEP",
    "topology NAME": "with --dry-run: plan for these devices, such as v5e:4x4 or h100:8",
    **command_line.PROCESSES,
}
FLAGS = {
    "dry-run": "print the memory and time that the run needs, and train nothing",
    "compile": "with --dry-run: also print the compiler's figures",
}


def main() -> None:
    config, own = command_line.parse(__doc__, options=OPTIONS, flags=FLAGS)
    if own.dry_run:
        sys.exit(not dry_run.run(config, own.topology, compiled=own.compile))
    if own.topology or own.compile:
        raise ValueError("--topology and --compile are for plans; add --dry-run")
    with processes.joined(own.processes, own.coordinator, own.process_id):
        report = processes.spoken(print)
        report(announcement(config))
        if processes.count() == 1:  # several need a folder that all of them see
            keep_compiled(report)
        try:
            run_dir = train(config, fork_from=own.fork_from)
        except StopRequested as stopped:
            report(f"{stopped}:\n  {command_line.same_command()}")
            sys.exit(stopped.exit_code)
        processes.by_first(lambda: summarise(run_dir))


def summarise(run_dir: Path) -> None:
    """Print what was gained in held-out accuracy, where the files are, and what to do next."""
    curves = plots.draw([run_dir], run_dir / "curves.png")
    evaluated = [m for m in read_metrics(run_dir) if "eval/accuracy" in m]
    if evaluated:
        print(gain("held-out accuracy", "eval/accuracy", evaluated[0], evaluated[-1]))
        print(gain("greedy accuracy", "eval/greedy_accuracy", evaluated[0], evaluated[-1]))
        print(
            f"(steps {evaluated[0]['step']} and {evaluated[-1]['step']}; bootstrap over held-out "
            "problems, both evaluations taken as independent)"
        )
    else:
        print("no held-out accuracy, because eval.sets is empty")
    for name in ("metrics.jsonl", "samples.jsonl", "checkpoints"):
        print(f"{name:14} {run_dir / name}")
    print(f"{'curves':14} {curves}")
    print("next:")
    for command in next_commands(run_dir, held_out=bool(evaluated)):
        print(f"  {command}")


def gain(label: str, key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The change of an accuracy with its 95 % interval: of the two intervals [l_b, u_b] and
    [l_a, u_a] around b and a, it goes from d - sqrt((a - l_a)^2 + (u_b - b)^2) to
    d + sqrt((u_a - a)^2 + (b - l_b)^2) around d = a - b (Newcombe 1998, method 10)."""

    def below(metrics: Mapping[str, Any]) -> float:
        return metrics[key] - metrics[f"{key}_low"]

    def above(metrics: Mapping[str, Any]) -> float:
        return metrics[f"{key}_high"] - metrics[key]

    change = after[key] - before[key]
    low = change - math.hypot(below(after), above(before))
    high = change + math.hypot(above(after), below(before))
    return (
        f"{label} {before[key]:.1%} -> {after[key]:.1%} ({100 * change:+.1f} points, 95 % interval "
        f"{100 * low:+.1f} to {100 * high:+.1f})"
    )


def next_commands(run_dir: Path, *, held_out: bool) -> Iterator[str]:
    """Commands that evaluate, try and export the run, ready to paste."""
    if held_out:
        out = run_dir / "evaluation"
        arguments = command_line.arguments_without()
        yield command_line.other_command(
            "evaluate", *arguments, "--checkpoint", run_dir, "--out", out
        )
    yield command_line.other_command("generate", run_dir, example_prompt(run_dir))
    yield command_line.other_command("convert", run_dir, "--to", run_dir / "model")


def example_prompt(run_dir: Path) -> str:
    """A short prompt of the run, or the word PROMPT if it has none."""
    with (run_dir / "samples.jsonl").open("rb") as file:
        prompts = [json.loads(line)["problem"] for line, _ in whole_lines(file)]
    short = (p for p in prompts if isinstance(p, str) and len(p) <= 80 and p.isprintable())
    return next(short, "PROMPT")
