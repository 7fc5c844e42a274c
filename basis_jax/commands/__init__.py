"""The commands: ``basis-jax train``, ``basis-jax evaluate`` and so on, one module each.

``python scripts/train.py`` and the other scripts call the same functions.
"""

import difflib
import importlib
import sys

from basis_jax import command_line

COMMANDS = {
    "train": "train a language model on problems whose answers can be checked",
    "evaluate": "evaluate a model or a checkpoint on held-out sets",
    "generate": "show what a trained model answers",
    "plot": "draw the learning curves of one or more runs",
    "reference-stats": "make the offline reference table of a config",
    "convert": "turn a run or a GGUF file into a Hugging Face folder",
}


def main() -> None:
    """The program ``basis-jax``. A command gets its arguments as if it were a script of its own."""
    command_line.run(dispatch)


def dispatch() -> None:
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("--help", "-h", "help"):
        print(overview())
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown command {name}; {meant}Commands are {', '.join(COMMANDS)}")
    sys.argv = [f"basis-jax {name}", *rest]
    importlib.import_module(f"basis_jax.commands.{name.replace('-', '_')}").main()


def overview() -> str:
    lines = ["basis-jax: train language models to reason, with one rollout per prompt", ""]
    lines += [f"  basis-jax {name:16} {says}" for name, says in COMMANDS.items()]
    configs = ", ".join(command_line.packaged_configs())
    return "\n".join(
        [
            *lines,
            "",
            f"Configs in this package: {configs}. A first run: basis-jax train --config quickstart",
            "basis-jax COMMAND --help lists the options of a command.",
        ]
    )
