"""Find an estimator by reference: ``FILE.py:NAME``, or ``package.module:NAME``.

A file is run by itself each time it is asked for. Its path is relative to the current directory.
Its folder is not put on the import path: it may import what is installed, but not the files beside
it, so that the fingerprint of the one file says what runs. Estimators of several files belong in a
package, which is given as ``package.module:NAME`` and must be on the import path (installed, or
its folder in PYTHONPATH).
"""

import hashlib
import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from basis_jax.estimators.declare import declared_by, near

FORMS = "FILE.py:NAME or package.module:NAME"


def load(reference: str) -> Any:
    """What the reference names.

    Raises ValueError for another form, a file or module that does not exist or that raises when it
    is imported, and a name that is not in it.
    """
    where, name = _parts(reference)
    module = _module(where)
    if not hasattr(module, name):
        declared = [n for n, x in vars(module).items() if declared_by(x)]
        raise ValueError(f"{where} has no estimator {name!r}{near(name, declared)}")
    return getattr(module, name)


def fingerprint(reference: str) -> str:
    """SHA-256 in hex of the file that the reference names; what it imports is not part of it.

    Raises ValueError as ``load``, and for a module that has no file.
    """
    where, _ = _parts(reference)
    path = _file(where) if where.endswith(".py") else _module(where).__file__
    if path is None:
        raise ValueError(f"{where} has no file of its own; name the module that has the estimator")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _parts(reference: str) -> tuple[str, str]:
    where, _, name = reference.rpartition(":")
    module = all(part.isidentifier() for part in where.split("."))
    if not name.isidentifier() or not (where.endswith(".py") or module):
        raise ValueError(f"got the estimator {reference!r}; write {FORMS}")
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
    path = Path(where).expanduser().resolve()
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}; give an existing one as FILE.py:NAME, its path relative to "
            "the current directory"
        )
    return path


def _run(path: Path) -> ModuleType:
    """The file as a module. In ``sys.modules``, where dataclasses and pickle look for it, it has a
    name made of its whole path: files of the same name in two folders do not meet."""
    module = ModuleType(f"estimator_file_{hashlib.sha256(str(path).encode()).hexdigest()}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except Exception as error:
        del sys.modules[module.__name__]
        raise ValueError(_failed(str(path), error)) from error
    return module


def _failed(where: str, error: Exception) -> str:
    """The message of a file or module that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == where]
    line = f" in line {lines[-1]}" if lines else ""
    advice = "correct it"
    if isinstance(error, ModuleNotFoundError):
        advice = (
            "install that module, or add its folder to PYTHONPATH (the folder of a file is not on "
            "the import path)"
        )
    said = " ".join(str(error).split())  # one line
    return f"{where} raised {type(error).__name__}{line} on import: {said}; {advice}"
