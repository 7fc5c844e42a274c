"""Train a language model on verifiable problems with one rollout per prompt.

    python scripts/train.py --config configs/quickstart.py

The same as ``basis-jax train``. The loop itself is basis_jax/training/loop.py.
"""

from basis_jax import command_line
from basis_jax.commands import train

if __name__ == "__main__":
    command_line.run(train.main)
