"""Rows of a local text file, each with its number: JSON and CSV, compressed or not."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from basis_jax.files import Repeated, without_repeats

Rows = Iterator[tuple[int, Mapping[str, Any]]]

JSON, CSV, PARQUET = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv"), (".parquet",)
COMPRESSED: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": lambda file: cast(BinaryIO, gzip.GzipFile(fileobj=file)),
    ".bz2": lambda file: cast(BinaryIO, bz2.BZ2File(file)),
    ".xz": lambda file: cast(BinaryIO, lzma.LZMAFile(file)),
}
LARGEST_TEXT = 8 << 30
"""Bytes of a file, after unpacking if it is compressed."""
BLOCK = 1 << 20  # bytes that are unpacked at a time
SIGNATURES = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz"}
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
ARRAY = re.compile(r"\s*\[")
GAP = re.compile(r"[ \t\n\r,]*+")
FLOAT_INTEGER = re.compile(r"-?\d{1,15}\.0")
EMPTY_CELLS = frozenset({"nan", "null", "none", "<na>", "#n/a", "na", "n/a"})
READABLE = "give a .json, .jsonl, .ndjson, .csv, .tsv or .parquet file (also .gz, .bz2 or .xz)"


def file_kind(path: Path) -> tuple[str, ...] | None:
    """``JSON``, ``CSV`` or ``PARQUET`` by the end of a name; None for any other."""
    ends = [end.lower() for end in path.suffixes]
    if ends and ends[-1] in COMPRESSED:
        ends.pop()
    return next((kind for kind in (JSON, CSV, PARQUET) if ends and ends[-1] in kind), None)


def read_table(path: Path) -> tuple[str, Rows]:
    """(the word for a row in messages, "line" or "row"; the rows of a JSON or CSV file, numbered).

    Raises ValueError, here or while the rows are read, if the file cannot be read. It names the
    file, and the line or row if there is one.
    """
    text = read_text(path)
    if file_kind(path) is CSV:
        ends = [end.lower() for end in path.suffixes]
        return "line", csv_rows(path, text, "\t" if ".tsv" in ends[-2:] else ",")
    if ARRAY.match(text):
        return "row", array_rows(path, text)
    return "line", line_rows(path, text)


def read_text(path: Path) -> str:
    """A file's text, unpacked, without byte-order marks, its lines ended by newlines."""
    try:
        if (size := path.stat().st_size) > LARGEST_TEXT:
            raise ValueError(f"it has {size:,} bytes, and {LARGEST_TEXT:,} are allowed")
        data = unpacked(path.read_bytes())
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise ValueError(f"cannot read {path} ({error}); give another file") from error
    encoding = "utf-8"
    for mark, name in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            data, encoding = data[len(mark) :], name
            break
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "replace").count("\n") + 1
        raise ValueError(
            f"{path}, line {line}: not {encoding.upper()} text ({error.reason}); save it as UTF-8"
        ) from error
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\n\ufeff" in text:  # files put one after the other
        text = text.replace("\n\ufeff", "\n")
    return text.lstrip("\ufeff")


def unpacked(data: bytes) -> bytes | bytearray:
    """The unpacked data; data that are not compressed are returned unchanged. Raises ValueError for
    more than ``LARGEST_TEXT`` bytes."""
    suffix = next((s for mark, s in SIGNATURES.items() if data.startswith(mark)), None)
    if suffix is None:
        return data
    file, found = COMPRESSED[suffix](io.BytesIO(data)), bytearray()
    while block := file.read(BLOCK):  # reading it at once would reserve the largest size
        found += block
        if len(found) > LARGEST_TEXT:
            raise ValueError(f"it unpacks to more than {LARGEST_TEXT:,} bytes")
    return found


def json_trouble(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, Repeated):
        return str(error)
    return "a number has too many digits"


def line_rows(path: Path, text: str) -> Rows:
    """One JSON object per line. A text that is a single object on several lines is one row."""
    # Not splitlines(): JSON strings may contain other line separators.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line, object_pairs_hook=without_repeats)
        except (ValueError, RecursionError) as error:
            whole = whole_object(text)
            if whole is not None:
                yield 1, whole
                return
            raise ValueError(
                f"{path}, line {number}: no whole JSON object ({json_trouble(error)}); give one "
                "object a line, or one array of objects"
            ) from error
        check_row(row, path, "line", number)
        yield number, row


def whole_object(text: str) -> dict | None:
    try:
        found = json.loads(text, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def array_rows(path: Path, text: str) -> Rows:
    """The objects of one JSON array."""
    try:
        rows = json.loads(text, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}, {broken_item(text)}: no JSON array of whole objects ({json_trouble(error)})"
        ) from error
    for number, row in enumerate(rows, start=1):
        check_row(row, path, "row", number)
        yield number, row


def broken_item(text: str) -> str:
    """Row and line of the item at which an array cannot be read."""
    decoder = json.JSONDecoder(object_pairs_hook=without_repeats)
    position, number = after_gap(text, text.index("[") + 1), 1
    try:
        while position < len(text) and text[position] != "]":
            _, position = decoder.raw_decode(text, position)
            position = after_gap(text, position)
            number += 1
    except (ValueError, RecursionError):
        pass
    return f"row {number} (line {text.count(chr(10), 0, position) + 1})"


def after_gap(text: str, position: int) -> int:
    gap = GAP.match(text, position)
    return gap.end() if gap else position


def check_row(row: Any, path: Path, unit: str, number: int) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{path}, {unit} {number}: no object with named columns")


def csv_rows(path: Path, text: str, delimiter: str) -> Rows:
    """Rows under a line of column names. Their numbers are those of the lines where they begin.

    Empty cells, and the words that data frames write for them, are missing values; 43.0 is 43,
    which is how they write integers beside missing values.
    """
    limit = csv.field_size_limit(sys.maxsize)  # no cell is too long
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    line = 1
    try:
        for cells in reader:
            if any(cells) and not names:
                names = [name.strip() for name in cells]
                check_names(names, path, line)
            elif any(cells):
                if len(cells) != len(names):
                    raise ValueError(
                        f"{path}, line {line}: {len(cells)} cells under {len(names)} column names"
                    )
                yield line, dict(zip(names, map(cell_value, cells), strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: no CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


def check_names(names: list[str], path: Path, line: int) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{path}, line {line}: two columns are called {twice[0]!r}; rename one")


def cell_value(cell: str) -> str | None:
    if len(cell) < 6 and cell.strip().lower() in EMPTY_CELLS:
        return None
    return cell[:-2] if FLOAT_INTEGER.fullmatch(cell) else cell
