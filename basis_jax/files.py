"""Files that survive a kill: one writer at a time, replaced in one step, whole lines only."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO


def lock(file: IO, what: str, option: str) -> None:
    """Hold an open file for this process until it is closed or the process ends.

    These are POSIX record locks: worker processes forked from this one do not keep them alive, and
    closing any other handle of the same file in this process releases them. Raises ValueError
    where another process holds the file: ``what`` it writes to, and the ``option`` that names
    another place.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another process is writing to {what}; wait for it, stop it, or give another {option}"
        ) from None


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns the system's refusals (a full disk, a folder that may not be written) into a ValueError
    with the file's name and what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path} could not be written ({error.strerror or error}); mend that and give the same "
            "command again: what was complete before is kept"
        ) from error


def replace_file(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file in one step: after a kill or a power cut it holds the old content or the new.

    Raises ValueError where it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            push_to_disk(file)
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name reaches the disk too
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def push_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def append_json_lines(file: BinaryIO, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object a line, as UTF-8, on disk when this returns. Half of a surrogate pair,
    which UTF-8 does not have, is written as JSON's escape. Raises ValueError where the file cannot
    be written."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with writing(file.name):
        file.write("".join(lines).encode("utf-8", "backslashreplace"))
        push_to_disk(file)


def whole_lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(line, position of its end) from the start of the file; a last line without its newline,
    which a kill or a full disk leaves behind, is left out."""
    file.seek(0)
    end = 0
    for line in file:
        if not line.endswith(b"\n"):
            return
        end += len(line)
        yield line, end


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError where the file cannot be read as one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; an object is needed")
    return value
