"""Show what a trained model answers.

    python scripts/generate.py runs/quickstart "What is two plus three?"

The same as ``basis-jax generate``; see basis_jax/commands/generate.py.
"""

from basis_jax import command_line
from basis_jax.commands import generate

if __name__ == "__main__":
    command_line.run(generate.main)
