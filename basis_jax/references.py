"""Find a user's own function or class by reference: ``FILE.py:NAME``, or ``package.module:NAME``.

A file is run anew each time it is loaded. Its path is relative to the current directory. Its folder
is not put on the import path: the file may import installed packages, but not the files beside it.
So the fingerprint of this one file shows what runs. Code in several files belongs in a package,
which is given as ``package.module:NAME`` and must be on the import path (installed, or its folder
in PYTHONPATH).
"""

import difflib
import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

FORMS = "FILE.py:NAME or package.module:NAME"


def near(word: str, allowed: Iterable[str]) -> str:
    """The end of a message about an unknown word: similar words, and all allowed words."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(word, allowed, n=3, cutoff=0.5)
    meant = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"{meant} (allowed: {', '.join(allowed) or 'none'})"


def load(reference: str, what: str, is_one: Callable[[Any], bool] = callable) -> Any:
    """The object that the reference names.

    ``what`` ("estimator" or "reward function") and ``is_one`` (whether an object of the module is
    one) are only used in messages. Raises ValueError for another form of reference, for a file or
    module that does not exist or raises when it is imported, and for a name that is not in it.
    """
    where, name = parts(reference, what)
    module = _module(where)
    if not hasattr(module, name):
        offered = [n for n, x in vars(module).items() if not n.startswith("_") and is_one(x)]
        raise ValueError(f"{where} has no {what} {name!r}{near(name, offered)}")
    return getattr(module, name)


def fingerprint(reference: str, what: str) -> str:
    """SHA-256 in hex of the file that the reference names, without the modules it imports.

    Raises ValueError like ``load``, and for a module that has no file.
    """
    where, _ = parts(reference, what)
    path = _file(where) if where.endswith(".py") else _module(where).__file__
    if path is None:
        raise ValueError(f"{where} has no file of its own; name the module that has the {what}")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def absolute(reference: str, what: str) -> str:
    """The reference with the absolute path of its file."""
    where, name = parts(reference, what)
    return f"{_file(where)}:{name}" if where.endswith(".py") else reference


def parts(reference: str, what: str) -> tuple[str, str]:
    """File or module, and name. Raises ValueError for another form."""
    where, _, name = reference.rpartition(":")
    module = all(part.isidentifier() for part in where.split("."))
    if not name.isidentifier() or not (where.endswith(".py") or module):
        raise ValueError(f"got the {what} {reference!r}; write {FORMS}")
    return where, name


def _module(where: str) -> ModuleType:
    if where.endswith(".py"):
        return _run(_file(where))
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise ValueError(_failed(where, error)) from error
        raise ValueError(
            f"there is no module {where} on the import path (no {error.name}); install it, add its "
            "folder to PYTHONPATH, or give a file as FILE.py:NAME"
        ) from error
    except Exception as error:
        raise ValueError(_failed(where, error)) from error


def _file(where: str) -> Path:
    path = Path(os.path.realpath(os.path.expanduser(where)))
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}; give an existing one as FILE.py:NAME, its path relative to "
            "the current directory"
        )
    return path


def _run(path: Path) -> ModuleType:
    """Run the file as a module.

    It is put into ``sys.modules``, where dataclasses and pickle look for it. Its name there is made
    from its absolute path, so files of the same name in two folders do not collide.
    """
    module = ModuleType(f"own_file_{hashlib.sha256(str(path).encode()).hexdigest()}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except Exception as error:
        del sys.modules[module.__name__]
        raise ValueError(_failed(str(path), error)) from error
    return module


def _failed(where: str, error: Exception) -> str:
    """The message for a file or module that raised an error."""
    advice = "correct it"
    if isinstance(error, ModuleNotFoundError):
        advice = (
            "install that module, or add its folder to PYTHONPATH (the folder of a file is not on "
            "the import path)"
        )
    said = " ".join(str(error).split())  # one line
    name = f"{where} raised {type(error).__name__}{line_of(error, where)}"
    return f"{name} on import: {said}; {advice}"


def line_of(error: BaseException, file: str) -> str:
    """The line of a file where an error was raised, as `` in line 3``; empty for other files."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f" in line {lines[-1]}" if lines else ""
