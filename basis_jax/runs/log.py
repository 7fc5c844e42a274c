"""``log.txt`` in a run folder: what the run printed, errors included, each line with its time."""

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from basis_jax.runs.stopping import StopRequested


def log_line(run_dir: Path, text: str) -> None:
    """Append a line, or several, to ``log.txt``. What is written is closed at once, so that a kill
    loses nothing; a log that cannot be written does not end the run."""
    moment = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        with (run_dir / "log.txt").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{moment}  {line}\n" for line in text.splitlines())
    except OSError:  # a full disk: whatever filled it is reported by the file that matters
        pass


@contextmanager
def errors_logged(run_dir: Path) -> Iterator[None]:
    """Errors that leave the block are logged: ValueErrors as their sentence, a stop that was asked
    for as its own, others with their traceback."""
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
