"""Make a ``Config`` from the command line: a config file, then overrides of single fields."""

import argparse
import dataclasses
import difflib
import importlib.util
import os
import shlex
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import MappingProxyType
from typing import Any

from basis_jax.config import Config
from basis_jax.files import one_line

LONGEST = 400  # characters shown of a library's message
BY_NAME = (
    *("estimator.options", "sampling.plan_options", "data.chat_template_options"),
    *("data.rewards", "data.more_sets"),
    *("eval.set_samples", "eval.set_temperatures", "eval.set_verifiers"),
)
"""Fields that hold a dict. On the command line, names and values follow the field."""
PROCESSES = {
    "processes N": "how many processes run this command, or auto (docs/several-processes.md)",
    "coordinator HOST:PORT": "of the first process, if there are several",
    "process-id K": "number of this process, from 0",
}
"""Options of the commands that several processes can run."""
COMMON = {"config FILE": "a Python file with a function config(), or the name of a packaged config"}
DEBUG = "show the traceback of an error"


def packaged_configs() -> dict[str, Path]:
    """The configs that come with the package, by name: those in the repository's ``configs/``."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):  # a wheel; a source tree
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.py"))}
    return {}


def find_config(name: str | Path) -> Path:
    """The file ``name``, or the packaged config of that name. Raises ValueError if there is
    neither."""
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
    """The ``Config`` that the function ``config()`` of a file or a packaged config returns.

    Raises ValueError if there is no such file or it does not return a ``Config``.
    """
    path = find_config(name)
    loader = SourceFileLoader(f"config_{path.stem}", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None  # every source file has one
    module = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
        config = module.config()
    except Exception as error:  # a config file is a program, so it may raise anything
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
    """Raise ValueError for the first ``--field`` that the config does not have."""
    known = field_names(config)
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        if not argument.startswith("--") or argument in ("--help", "-h"):
            continue
        name = argument[2:].split("=")[0].replace("-", "_")
        section, _, option = name.rpartition(".")
        if section in BY_NAME:
            raise ValueError(
                f"{argument} is not how such an option is given; write "
                f"--{section.replace('_', '-')} {option} VALUE"
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
    description: str,
    *,
    options: Mapping[str, str] = MappingProxyType({}),
    flags: Mapping[str, str] = MappingProxyType({}),
    argv: Sequence[str] | None = None,
) -> tuple[Config, argparse.Namespace]:
    """Parse ``--config NAME``, the command's own ``options`` and ``flags``, and overrides of config
    fields.

    ``options`` ("out FOLDER") and ``flags`` ("compile") come with what they mean, which ``--help``
    prints, followed by every field and its value in the config, or in the quickstart's config if
    none is given. The values of options are strings. Raises ValueError without a config, for a
    missing file and for an unknown field.
    """
    import tyro  # imported here, because estimators are used without it

    parser = argparse.ArgumentParser(description=description, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE")
    for option in options:
        parser.add_argument(f"--{option.split()[0]}", default="")
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true")
    known, rest = parser.parse_known_args(argv)
    if not known.config and not {"--help", "-h"} & set(rest):
        raise ValueError(
            f"no config is given; add --config with a Python file or with one of "
            f"{', '.join(packaged_configs())} (--help lists everything else)"
        )
    default = load_config(known.config or "quickstart")
    check_names(rest, default)
    rest = with_auto(rest)
    own = listed({**COMMON, **options, **flags, "debug": DEBUG})
    described = f"{description}\n\n{own}"
    given = {a[2:].split("=")[0].replace("-", "_") for a in rest if a.startswith("--")}
    kept = {name: field_of(default, name) for name in BY_NAME if name not in given}
    empty = with_fields(default, {} if "help" in given else dict.fromkeys(BY_NAME, {}))
    made = tyro.cli(Config, default=empty, args=rest, description=described)
    return with_fields(made, kept), known


def listed(options: Mapping[str, str]) -> str:
    """The command's own options, one per line, as ``--help`` shows them."""
    width = max(map(len, options)) + 2
    lines = [f"    --{name:{width}}{meaning}" for name, meaning in options.items()]
    return "\n".join(["Options of this command, besides the fields of the config:", "", *lines])


def field_of(config: Config, name: str) -> Any:
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)


def with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with other values of ``section.field``.

    It is used for dicts: one given on the command line replaces the config's whole dict. tyro would
    allow only the names that the config already has.
    """
    for name, value in values.items():
        section, _, field = name.partition(".")
        changed = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


AUTO = ("--train.microbatch_rollouts", "--train.sample_rollouts")
"""Fields for which ``auto`` may be given instead of 0."""


def with_auto(arguments: Sequence[str]) -> list[str]:
    """The arguments, with ``auto`` replaced by 0."""
    words = [word for argument in arguments for word in _value_apart(argument)]
    pairs = zip(["", *words], words, strict=False)
    return ["0" if word == "auto" and _field(name) in AUTO else word for name, word in pairs]


def _value_apart(argument: str) -> list[str]:
    return argument.split("=") if _field(argument.split("=")[0]) in AUTO else [argument]


def _field(name: str) -> str:
    return "--" + name[2:].replace("-", "_")


def add_debug(parser: argparse.ArgumentParser) -> None:
    """List ``--debug`` in the help of a command with its own parser. ``run`` itself reads it."""
    parser.add_argument("--debug", action="store_true", help=DEBUG)


def same_command() -> str:
    """The command that started this process, as one would type it."""
    program, *arguments = sys.argv
    python = "" if program.startswith("basis-jax ") else "python "
    return python + " ".join([program, *map(shlex.quote, arguments)])


def other_command(name: str, *words: object) -> str:
    """Another command of this package, called in the way in which this process was started."""
    program = Path(sys.argv[0])
    start = f"basis-jax {name}"
    if program.suffix == ".py":
        start = f"python {program.with_name(name.replace('-', '_') + '.py')}"
    return " ".join([start, *(shlex.quote(str(word)) for word in words)])


def arguments_without(*options: str) -> list[str]:
    """The arguments of this process, without these options and their values."""
    words = zip(["", *sys.argv[1:]], sys.argv[1:], strict=False)
    return [word for before, word in words if not {before, word.split("=")[0]} & {*options}]


def run(main: Callable[[], None]) -> None:
    """Call a script's main; with ``--debug`` among its arguments, errors keep their tracebacks.

    Without it, errors that a user can correct end the script with one sentence: our own
    ValueErrors, files that cannot be read or written, packages that are not installed, and errors
    raised by a library. Ctrl-C and a closed pipe end it with the exit codes of shells. Other
    errors of this package, and all errors in a user's own files, keep their tracebacks.
    """
    debug = "--debug" in sys.argv[1:]
    if debug:
        sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        main()
    except KeyboardInterrupt:
        if debug:
            raise
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not {"-h", "--help"} & {*sys.argv}:
            print("stopped: whatever reads the output has ended", file=sys.stderr)
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        sentence = None if debug else one_sentence(error)
        if sentence is None:
            raise
        sys.exit(f"error: {sentence}")


def one_sentence(error: Exception) -> str | None:
    """The error's message if a user can correct it; None if its traceback is needed."""
    package, library = origin(error)
    text = one_line(str(error))
    if isinstance(error, OSError) or (package == "ours" and isinstance(error, ValueError)):
        return text
    if isinstance(error, ModuleNotFoundError) and package == "ours":
        return f"{text}; install it, or the extra of basis_jax that brings it (see README.md)"
    if package != "library":
        return None
    text = text if len(text) <= LONGEST else text[:LONGEST] + " ..."
    name = type(error).__name__
    return f"{text or name} ({name} in {library}; --debug shows the traceback)"


def origin(error: Exception) -> tuple[str, str]:
    """Whose code raised the error ("ours", "library" or "user"), and the name of its package.

    JAX removes its own frames from tracebacks, so its errors are recognised by their classes.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    file = frame.f_code.co_filename
    if file.startswith("<"):  # compiled from text, such as jinja2's templates
        return "library", frame.f_globals.get("__name__") or file
    path, package = Path(file).resolve(), Path(__file__).resolve().parent
    if package in path.parents:
        defined = type(error).__module__.partition(".")[0]
        own = defined in ("builtins", package.name)
        return ("ours", package.name) if own else ("library", defined)
    for name in ("purelib", "platlib", "stdlib", "platstdlib"):  # the last two contain the others
        folder = Path(sysconfig.get_path(name)).resolve()
        if folder in path.parents:
            return "library", path.relative_to(folder).parts[0].removesuffix(".py")
    return "user", path.stem
