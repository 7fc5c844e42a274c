"""From the command line to a ``Config``: a config file, then typed dotted overrides."""

import argparse
import dataclasses
import difflib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from basis_jax.config import Config


def load_config(path: str | Path) -> Config:
    """The ``Config`` that the file's ``config()`` returns. Raises ValueError without one."""
    path = Path(path)
    if not path.is_file():
        files = path.parent.glob("*.py") if path.parent.is_dir() else []
        near = sorted(p.name for p in files if "def config(" in p.read_text(errors="replace"))
        raise ValueError(
            f"no config file {path}; give a Python file with a function config(), such as "
            f"{', '.join(near) or 'configs/quickstart.py'}"
        )
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
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


def field_names(config, prefix: str = "") -> list[str]:
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
    for argument in arguments:
        if not argument.startswith("--") or argument == "--help":
            continue
        name = argument[2:].split("=")[0].replace("-", "_")
        if name.startswith("estimator.options."):
            raise ValueError(
                f"{argument} is not how an estimator's option is given; write "
                f"--estimator.options {name.rpartition('.')[2]} VALUE"
            )
        if name not in known and name.removeprefix("no_") not in known:
            plain = name.replace("no_", "", 1)
            near = difflib.get_close_matches(plain, known, n=4, cutoff=0.4) or known[:4]
            raise ValueError(
                f"unknown config field --{argument[2:].split('=')[0]}; near ones are "
                f"{', '.join('--' + n for n in near)} (all: --help)"
            )


def parse(
    description: str, *, options: Sequence[str] = (), argv: Sequence[str] | None = None
) -> tuple[Config, argparse.Namespace]:
    """``--config FILE``, the script's own string ``options``, and overrides of any config field.

    Raises ValueError for a missing file or an unknown field; ``--help`` lists every field.
    """
    import tyro  # here: estimators are used without it

    parser = argparse.ArgumentParser(description=description, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE")
    for option in options:
        parser.add_argument(f"--{option}", default="")
    known, rest = parser.parse_known_args(argv)
    default = load_config(known.config)
    check_names(rest, default)
    return tyro.cli(Config, default=default, args=rest, description=description), known


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
