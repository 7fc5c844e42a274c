"""Make the offline reference table of a config.

    python scripts/reference_stats.py --config configs/quickstart.py --out tables/quickstart.npz

The same as ``basis-jax reference-stats``; see basis_jax/commands/reference_stats.py.
"""

from basis_jax import command_line
from basis_jax.commands import reference_stats

if __name__ == "__main__":
    command_line.run(reference_stats.main)
