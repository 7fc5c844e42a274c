"""Read the right answer of a row as one text: numbers, worked solutions, several answers."""

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from basis_jax.data.values import check_characters, described, held_in, is_missing
from basis_jax.verify.accepted import check_answer
from basis_jax.verify.criteria import ANY, EXACT, MARK, Tolerance, criterion
from basis_jax.verify.extract import BOX, after_hashes, last_boxed

WANTED = ("any", "all")
MARKED = (ANY, MARK)
FORMULA = re.compile(
    r"\$\$([^$]+)(?<!\\)\$\$|\$([^$]+)(?<!\\)\$"
    r"|\\\(((?:(?!\\[()]).)+)\\\)|\\\[((?:(?!\\[\[\]]).)+)\\\]",
    re.DOTALL,
)
EXACT_FLOATS = 2**53  # every integer up to here is a float
SAFE_DIGITS = 15  # decimal digits that a float keeps


def several(answers: Sequence[str], wanted: str, tolerance: Tolerance = EXACT) -> str:
    """Several accepted answers as one text, in JSON: ``{"any of": [...]}`` if one is enough, or
    ``{"all of": [...], "absolute": 0.0, "relative": 0.0}`` with the tolerance. Equal answers are
    listed once. A single answer without a tolerance is written as it is; no answer gives the empty
    text.
    """
    different = list(dict.fromkeys(answers))
    if wanted == "all" and len(different) > 1:
        return criterion(different, tolerance)
    accepted = [a if a.startswith(MARKED) else criterion(a, tolerance) for a in different]
    if len(accepted) < 2:
        return accepted[0] if accepted else ""
    return json.dumps({"any of": accepted})


def read_answer(
    value: Any, *, worked: bool = False, wanted: str = "any", tolerance: Tolerance = EXACT
) -> str:
    """The answer in a value; empty if the value is missing.

    ``worked``: the value is a solution in which the answer is marked. A list, or a text that holds
    a list of texts, gives several accepted answers; ``wanted`` says whether a completion must give
    any or all of them. ``tolerance`` is for numbers. Raises ValueError for a value that cannot be
    an answer.
    """
    if isinstance(value, str) and value[:2] in ('["', "['", '{"'):
        value = listed(value)
    parts = value if isinstance(value, list) else [value]
    while len(parts) == 1 and isinstance(parts[0], list):
        parts = parts[0]
    if len(parts) > 1:
        parts = [part for part in parts if not is_missing(part)]
    answers = [one_answer(part, worked) for part in parts]
    found = several([answer for answer in answers if answer], wanted, tolerance)
    if found.startswith(MARKED):
        check_answer(found)
    return found


def listed(text: str) -> Any:
    """The list of texts that a text holds, or the text."""
    if text.startswith(MARKED):
        return text
    found = held_in(text)
    is_list = isinstance(found, list) and all(isinstance(part, str) for part in found)
    return found if is_list else text


def one_answer(value: Any, worked: bool) -> str:
    """The answer in a single value."""
    if isinstance(value, str):
        return from_text(value, worked)
    if is_missing(value):
        return ""
    if isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float | Decimal):
        return from_number(value)
    part = next(iter(value), "value") if isinstance(value, Mapping) else ""
    advice = (
        f"name one of its parts, as in --data.answer-field answer.{part}"
        if isinstance(value, Mapping)
        else "give a text, a number, or a list of them"
    )
    raise ValueError(f"the answer is {described(value)}; {advice}")


def from_text(text: str, worked: bool) -> str:
    """The answer in a text: what follows the last ``####``, else the content of the last box, else,
    unless it is ``worked``, the whole text. Dollar signs around it and a full stop after it are
    removed. A mark with nothing after it gives no answer."""
    if text.startswith(MARKED):
        answer = text
    else:
        marked = after_hashes(text) or last_boxed(text)
        whole = "" if worked or marked is not None or is_empty_mark(text) else text.strip()
        answer = marked or whole
        if answer[:1] in ("$", "\\") and (formula := FORMULA.fullmatch(answer.removesuffix("."))):
            answer = next(filter(None, formula.groups())).strip()
    if not answer.isascii():
        check_characters("the answer", answer)
    return "" if is_missing(answer) else answer


def is_empty_mark(text: str) -> bool:
    """Whether a text has a mark of an answer; called if none of its marks gives an answer."""
    return "####" in text or ("\\" in text and BOX.search(text) is not None)


def from_number(value: float | Decimal) -> str:
    """A number as it was written: 43 for 43.0, which is how data frames write integers beside
    missing values. Raises ValueError for infinity and for an integer whose digits are lost."""
    if isinstance(value, Decimal):
        if not value.is_finite():
            raise ValueError("the answer is an infinite number; write it as a text")
        return str(int(value)) if value == value.to_integral_value() else f"{value.normalize():f}"
    if value in (float("inf"), float("-inf")):
        raise ValueError("the answer is an infinite number; write it as a text, such as \\infty")
    if not value.is_integer():
        return json.dumps(value)
    if abs(value) < EXACT_FLOATS:
        return str(int(value))
    if len(Decimal(repr(value)).normalize().as_tuple().digits) > SAFE_DIGITS:
        raise ValueError(
            f"the answer {value!r} is an integer that was turned into a float and has lost its "
            "last digits; write it as a text"
        )
    return json.dumps(value)
