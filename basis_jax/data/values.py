"""Values of a row: missing ones, their description in errors, texts that hold a list or object."""

import ast
import json
from collections.abc import Iterable, Mapping
from typing import Any

MISSING_WORDS = frozenset({"nan", "<na>", "null"})
"""Texts, in lower case, that a data frame writes for a missing value, besides Python's "None"."""
SHOWN = 40  # characters of a text in an error
NAMED = 30  # columns of a row, or parts of an object, that an error names


def is_missing(value: Any) -> bool:
    """Whether it is null, NaN (the one value that differs from itself), or a blank text."""
    if isinstance(value, str):
        text = value.strip()
        return not text or (len(text) <= 4 and (text.lower() in MISSING_WORDS or text == str(None)))
    return value is None or (not isinstance(value, list | Mapping) and bool(value != value))


def described(value: Any) -> str:
    """What a value is, for an error: "a number", "a list of texts", "an object with a, b"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {json.dumps(value)}"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, Mapping):
        return f"an object with {listing(value) or 'nothing in it'}"
    if isinstance(value, list):
        kinds = {bool: "booleans", int: "numbers", float: "numbers", str: "texts", list: "lists"}
        found = {"objects" if isinstance(v, Mapping) else kinds.get(type(v), "") for v in value}
        return f"a list of {found.pop()}" if len(found) == 1 and "" not in found else "a mixed list"
    return f"of the type {type(value).__name__}"


def listing(names: Iterable[Any]) -> str:
    """Names separated by commas; after ``NAMED`` of them "..."."""
    names = [str(name) for name in names]
    return ", ".join(names[:NAMED] + ["..."] * (len(names) > NAMED))


def shown(text: str) -> str:
    """A text in quotes, cut after ``SHOWN`` characters."""
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")


def held_in(text: str) -> Any:
    """The list or object that a text holds, as JSON or in Python's notation; otherwise None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def check_characters(what: str, text: str) -> None:
    """Raise ValueError for half of a surrogate pair, which tokenizers and files cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds half of a character (\\u{ord(text[error.start]):04x}, at position "
            f"{error.start}); write the whole character or leave it out"
        ) from None
