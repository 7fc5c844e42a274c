"""Turn a run or a GGUF file into a Hugging Face folder.

    python scripts/convert.py run runs/quickstart --to models/quickstart_trained

The same as ``basis-jax convert``; see basis_jax/commands/convert.py.
"""

from basis_jax import command_line
from basis_jax.commands import convert

if __name__ == "__main__":
    command_line.run(convert.main)
