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

import sys
from pathlib import Path

from basis_jax import command_line, processes
from basis_jax.commands import dry_run
from basis_jax.runs import plots
from basis_jax.runs.compiles import keep_compiled
from basis_jax.runs.metrics import read_metrics
from basis_jax.runs.stopping import StopRequested
from basis_jax.training.loop import train


def main() -> None:
    config, own = command_line.parse(
        __doc__,
        options=("topology", "fork-from", *command_line.PROCESSES),
        flags=("dry-run", "compile"),
    )
    if own.dry_run:
        sys.exit(not dry_run.run(config, own.topology, compiled=own.compile))
    if own.topology or own.compile:
        raise ValueError("--topology and --compile are for plans; add --dry-run")
    with processes.joined(own.processes, own.coordinator, own.process_id):
        report = processes.spoken(print)
        if processes.count() == 1:  # several need a folder that all of them see
            keep_compiled(report)
        try:
            run_dir = train(config, fork_from=own.fork_from)
        except StopRequested as stopped:
            report(f"{stopped}:\n  {command_line.same_command()}")
            sys.exit(stopped.exit_code)
        processes.by_first(lambda: summarise(run_dir))


def summarise(run_dir: Path) -> None:
    """Print held-out accuracy before and after training, and the paths of the files."""
    curves = plots.draw([run_dir], run_dir / "curves.png")
    evaluated = [m for m in read_metrics(run_dir) if "eval/accuracy" in m]
    for line in evaluated[:1] + evaluated[1:][-1:]:
        print(
            f"held-out accuracy {'after' if line['step'] else 'before'} (step {line['step']}): "
            f"{line['eval/accuracy']:.1%} [{line['eval/accuracy_low']:.1%}, "
            f"{line['eval/accuracy_high']:.1%}], greedy {line['eval/greedy_accuracy']:.1%} "
            f"[{line['eval/greedy_accuracy_low']:.1%}, {line['eval/greedy_accuracy_high']:.1%}]"
        )
    if evaluated:
        print("intervals: 95 % bootstrap over held-out problems")
    for name in ("metrics.jsonl", "samples.jsonl", "checkpoints"):
        print(f"{name:14} {run_dir / name}")
    print(f"{'curves':14} {curves}")
