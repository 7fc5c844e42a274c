"""Files that survive a kill: one writer at a time, replaced in one step, read by complete lines."""

import fcntl
import hashlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO


def lock(file: IO, what: str, option: str) -> None:
    """Lock an open file for this process until it is closed or the process ends.

    It is a POSIX record lock: worker processes forked from this one do not keep it, and closing any
    other handle of the same file in this process releases it. Raises ValueError if another process
    has the lock. The message names ``what`` it writes to and the ``option`` that sets another
    place.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another process is writing to {what}; wait for it, stop it, or give another {option}"
        ) from None


LONGEST = 1500
"""Characters of a message that are printed, if a part of it comes from a file or a model."""


def one_line(text: str) -> str:
    """A message that is safe to print: on one line, without control characters, and without its
    middle if it is longer than ``LONGEST``."""
    text = " ".join(cut(text).split())
    return cut("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 500]} ... {text[-450:]}"


def is_step(name: str) -> bool:
    """Whether a checkpoint's folder may have this name: a number. "²" is a digit, and no number."""
    return name.isascii() and name.isdigit()


def home(path: str | Path) -> Path:
    """The path, with ``~`` replaced by the home folder."""
    return Path(os.path.expanduser(path))


def check_regular(path: Path) -> None:
    """Raise ValueError for a pipe or a device, because reading it may never end. Missing files and
    folders are left to the reader."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ValueError(f"{path} is a pipe or a device and no file; give a file")


def check_all_regular(folder: Path) -> None:
    """Raise ValueError for the first pipe or device in a folder and those in it."""
    for path in folder.rglob("*"):
        check_regular(path)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn errors of the system (a full disk, a folder without write permission) into a ValueError
    with the file's name and advice."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path} could not be written ({error.strerror or error}); fix that and give the same "
            "command again: what was complete before is kept"
        ) from error


def replace_file(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file in one step: after a kill or a power cut it has the old or the new content.

    Raises ValueError if it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            push_to_disk(file)
        partial.replace(path)
        push_names_to_disk(path.parent)


def push_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def push_names_to_disk(folder: Path) -> None:
    """Write the names of a folder's files to disk; their contents are not part of it."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def check_links(folder: Path) -> None:
    """Raise ValueError if something in ``folder`` is a link to a place outside of it, because what
    is written there would change other files, or is neither a file nor a folder, because reading it
    may never end. The folder itself may be a link."""
    inside = folder.resolve()
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent) / name for name in (*folders, *names)):
            # resolve() raises for a link to itself
            target = Path(os.path.realpath(path)) if path.is_symlink() else inside
            if not target.is_relative_to(inside):
                raise ValueError(
                    f"{path} is a link to {target}, outside of the run folder; remove it, "
                    "or give another --run-dir (which may itself be a link)"
                )
            try:
                check_regular(path)
            except ValueError as error:
                raise ValueError(f"{error}: remove it, or give another --run-dir") from None


DIGESTS = "sha256.json"
"""A file in a sealed folder: the SHA-256 digests of all others, by their path in the folder."""


def seal(folder: Path) -> None:
    """Push everything in ``folder`` to disk and write its ``sha256.json``."""
    digests_file = folder / DIGESTS
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != digests_file)

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:  # hashing large blocks lets other threads run
        digests = list(pool.map(digest, files))
    names = [path.relative_to(folder).as_posix() for path in files]
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        push_names_to_disk(inner)
    replace_file(
        folder / DIGESTS, json.dumps(dict(zip(names, digests, strict=True)), indent=0) + "\n"
    )


def is_sealed(folder: Path) -> bool:
    return (folder / DIGESTS).exists()


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, beginning with a file's name, or None.

    A folder without ``sha256.json`` was not sealed or has lost it; then it is only checked that it
    holds nothing but files.
    """
    try:
        check_all_regular(folder)
    except ValueError as error:
        return str(error)
    if not is_sealed(folder):
        return None
    try:
        wanted = read_json(folder / DIGESTS)
    except ValueError:
        return f"{DIGESTS} is not readable"
    if not wanted:
        return f"{DIGESTS} names no file"
    inside = Path(os.path.abspath(folder))

    def wrong(name: str) -> str | None:
        try:
            if not Path(os.path.abspath(folder / name)).is_relative_to(inside):
                return f"{DIGESTS} names {name}, which is outside of the folder"
            check_regular(folder / name)
            with (folder / name).open("rb") as file:
                same = hashlib.file_digest(file, "sha256").hexdigest() == wanted[name]
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read ({error})"
        return None if same else f"{name} is not as it was written"

    with ThreadPoolExecutor() as pool:
        found = next(filter(None, pool.map(wrong, wanted)), None)
    return found and one_line(found)


UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What orbax raises for damaged files."""


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the tracebacks of failures of orbax that are already raised as an error.

    Orbax logs the traceback of each of its threads. Those of tensorstore fail because the first
    failure has closed the event loop.
    """
    log, hook = logging.getLogger("absl"), sys.unraisablehook
    level = log.level

    def ignore_closed_loop(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    log.setLevel(logging.CRITICAL)
    sys.unraisablehook = ignore_closed_loop
    try:
        yield
    finally:
        log.setLevel(level)
        sys.unraisablehook = hook


def append_json_lines(file: BinaryIO, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object per line, as UTF-8; they are on disk when this returns.

    UTF-8 cannot encode half of a surrogate pair, so it is written as an escape of JSON. Raises
    ValueError if the file cannot be written.
    """
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with writing(file.name):
        file.write("".join(lines).encode("utf-8", "backslashreplace"))
        push_to_disk(file)


def whole_lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(line, position of its end) from the start of the file. A last line without a newline, left
    by a kill or a full disk, is skipped."""
    file.seek(0)
    end = 0
    for line in file:
        if not line.endswith(b"\n"):
            return
        end += len(line)
        yield line, end


LARGEST_JSON = 1 << 26
"""Bytes of a JSON file of settings. Larger ones are not what they should be."""


class Repeated(ValueError):
    """A JSON object has a key twice."""


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values, for ``json``. Raises Repeated, as readers differ in
    which value counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise Repeated(f"an object has the key {twice!r} twice; keep one")
    return found


def json_object(text: str | bytes) -> dict[str, Any] | None:
    """The JSON object that a text holds; None if it holds none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def check_size(path: Path) -> None:
    """Raise ValueError for a file of settings that is larger than ``LARGEST_JSON``, and for a pipe
    or a device."""
    check_regular(path)
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ValueError(
            f"it has {size:,} bytes, and {LARGEST_JSON:,} are allowed; give a smaller one"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a byte-order mark before it is ignored.

    Raises ValueError if the file is not readable, larger than ``LARGEST_JSON``, nested too deep,
    not a JSON object, or has a key twice.
    """
    try:
        check_size(path)
        content = path.read_text(encoding="utf-8-sig")
        value = json.loads(content, object_pairs_hook=without_repeats)
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read as JSON: it is nested too deep") from error
    except (OSError, ValueError) as error:
        raise ValueError(one_line(f"{path} cannot be read as JSON: {error}")) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; an object is needed")
    return value
