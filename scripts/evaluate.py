"""Evaluate a model, or a checkpoint of a run, on held-out sets.

    python scripts/evaluate.py --config configs/quickstart.py --out runs/eval_start

The same as ``basis-jax evaluate``; basis_jax/commands/evaluate.py has more examples.
"""

from basis_jax import command_line
from basis_jax.commands import evaluate

if __name__ == "__main__":
    command_line.run(evaluate.main)
