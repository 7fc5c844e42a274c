"""Draw the learning curves of one or more runs.

basis-jax plot runs/quickstart
basis-jax plot runs/basis runs/grpo --out comparison.png
"""

import argparse
from pathlib import Path

from basis_jax import command_line
from basis_jax.runs import plots


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out", metavar="FILE", help="default: curves.png, in the folder of a single run"
    )
    command_line.add_debug(parser)
    arguments = parser.parse_args()
    folder = Path(arguments.runs[0]) if len(arguments.runs) == 1 else Path()
    print(plots.draw(arguments.runs, arguments.out or folder / "curves.png"))
