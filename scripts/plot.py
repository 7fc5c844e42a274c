"""Draw the learning curves of one or more runs.

    python scripts/plot.py runs/quickstart

The same as ``basis-jax plot``; see basis_jax/commands/plot.py.
"""

from basis_jax import command_line
from basis_jax.commands import plot

if __name__ == "__main__":
    command_line.run(plot.main)
