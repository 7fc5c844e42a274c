"""``log.txt`` in a run folder: the run's output and errors, each line with its time."""

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from basis_jax.runs.stopping import StopRequested


def log_line(run_dir: Path, text: str) -> None:
    """Append one or more lines to ``log.txt``.

    The file is closed at once, so a kill loses nothing. If the log cannot be written, the run goes
    on.
    """
    moment = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        with (run_dir / "log.txt").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{moment}  {line}\n" for line in text.splitlines())
    except OSError:  # a full disk is reported when an important file is written
        pass


@contextmanager
def errors_logged(run_dir: Path) -> Iterator[None]:
    """Log errors that leave the block: ValueErrors and requested stops with their message, others
    with their traceback."""
    try:
        yield
    except StopRequested as stopped:
        log_line(run_dir, str(stopped))
        raise
    except ValueError as error:
        log_line(run_dir, f"error: {error}")
        raise
    except BaseException:
        log_line(run_dir, traceback.format_exc())
        raise
