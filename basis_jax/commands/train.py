"""Train a language model on verifiable problems with one rollout per prompt.

    basis-jax train --config quickstart
    basis-jax train --config configs/qwen_math.py --model.path /models/Qwen3-4B

Any field of the config can be overridden (``--optim.lr 3e-6``; ``--help`` lists all). The same
command again resumes the run in ``--run-dir`` from its newest checkpoint. On several machines,
start it on each with ``--processes auto``, or with ``--processes N --coordinator HOST:PORT
--process-id K`` (docs/several-processes.md).
"""

import sys
from pathlib import Path

from basis_jax import command_line, processes
from basis_jax.runs import plots
from basis_jax.runs.metrics import read_metrics
from basis_jax.runs.stopping import StopRequested
from basis_jax.training.loop import train


def main() -> None:
    config, options = command_line.parse(__doc__, options=command_line.PROCESSES)
    with processes.joined(options.processes, options.coordinator, options.process_id):
        report = processes.spoken(print)
        try:
            run_dir = train(config)
        except StopRequested as stopped:
            report(f"{stopped}:\n  {command_line.same_command()}")
            sys.exit(stopped.exit_code)
        processes.by_first(lambda: summarise(run_dir))


def summarise(run_dir: Path) -> None:
    """Print held-out accuracy before and after, and where everything lies."""
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
