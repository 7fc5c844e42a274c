"""From the command line to a ``Config``: a config file, then typed dotted overrides."""

import argparse
import dataclasses
import difflib
import importlib.util
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from basis_jax.config import Config


def packaged_configs() -> dict[str, Path]:
    """The configs that come with the package, by name: those of ``configs/`` in its repository."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):  # a wheel; a source tree
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.py"))}
    return {}


def find_config(name: str | Path) -> Path:
    """The file ``name``, or the packaged config of that name. Raises ValueError for neither."""
    path, packaged = Path(name), packaged_configs()
    if path.is_file():
        return path
    if str(name) in packaged:
        return packaged[str(name)]
    files = path.parent.glob("*.py") if path.parent.is_dir() else []
    near = sorted(p.name for p in files if "def config(" in p.read_text(errors="replace"))
    beside = f" ({path.parent} has {', '.join(near)})" if near else ""
    raise ValueError(
        f"no config file {path}{beside}; give a Python file with a function config(), or the name "
        f"of a config in this package: {', '.join(packaged)}"
    )


def load_config(name: str | Path) -> Config:
    """The ``Config`` that the ``config()`` of a file or of a packaged config returns.

    Raises ValueError where there is no such file or it returns none.
    """
    path = find_config(name)
    loader = SourceFileLoader(f"config_{path.stem}", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None  # every source file has one
    module = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
        config = module.config()
    except (SyntaxError, AttributeError, ImportError, NameError, TypeError) as error:
        raise ValueError(
            f"config file {path} does not run ({type(error).__name__}: {error}); it must have a "
            "function config() that returns a basis_jax Config"
        ) from error
    if not isinstance(config, Config):
        raise ValueError(
            f"config() of {path} returns a {type(config).__name__}; it must return a basis_jax "
            "Config"
        )
    return config


def field_names(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of every field that can be overridden."""
    names = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{prefix}{field.name}"
        names += field_names(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return names


def check_names(arguments: Sequence[str], config: Config) -> None:
    """Raise a ValueError for the first ``--field`` that the config does not have."""
    known = field_names(config)
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        if not argument.startswith("--") or argument in ("--help", "-h"):
            continue
        name = argument[2:].split("=")[0].replace("-", "_")
        if name.startswith("estimator.options."):
            raise ValueError(
                f"{argument} is not how an estimator's option is given; write "
                f"--estimator.options {name.rpartition('.')[2]} VALUE"
            )
        if name not in known and name.removeprefix("no_") not in known:
            if previous[2:].replace("-", "_") in known:
                raise ValueError(
                    f"{argument} is no config field; if it is the value of {previous}, write "
                    f"{previous}={argument}"
                )
            plain = name.replace("no_", "", 1)
            near = difflib.get_close_matches(plain, known, n=4, cutoff=0.4) or known[:4]
            raise ValueError(
                f"unknown config field --{argument[2:].split('=')[0]}; near ones are "
                f"{', '.join('--' + n for n in near)} (all: --help)"
            )


def parse(
    description: str, *, options: Sequence[str] = (), argv: Sequence[str] | None = None
) -> tuple[Config, argparse.Namespace]:
    """``--config NAME``, the command's own string ``options``, and overrides of any config field.

    Raises ValueError without a config, for a missing file and for an unknown field. ``--help``
    lists every field with the values of the config, or of the quickstart's where none is given.
    """
    import tyro  # here: estimators are used without it

    parser = argparse.ArgumentParser(description=description, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE")
    for option in options:
        parser.add_argument(f"--{option}", default="")
    known, rest = parser.parse_known_args(argv)
    if not known.config and not {"--help", "-h"} & set(rest):
        raise ValueError(
            f"no config is given; add --config with a Python file or with one of "
            f"{', '.join(packaged_configs())} (--help lists everything else)"
        )
    default = load_config(known.config or "quickstart")
    check_names(rest, default)
    return tyro.cli(Config, default=default, args=rest, description=description), known


def same_command() -> str:
    """The command that started this process, to be typed again."""
    program, *arguments = sys.argv
    python = "" if program.startswith("basis-jax ") else "python "
    return python + " ".join([program, *map(shlex.quote, arguments)])


def run(main: Callable[[], None]) -> None:
    """Call a script's main; our own ValueErrors, and files that cannot be read or written, end it
    with their one sentence, no traceback."""
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}")
    except ValueError as error:
        frames = list(traceback.walk_tb(error.__traceback__))
        raised_in = Path(frames[-1][0].f_code.co_filename).resolve()
        if Path(__file__).resolve().parent not in raised_in.parents:
            raise
        sys.exit(f"error: {error}")
