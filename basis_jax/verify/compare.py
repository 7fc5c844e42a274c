r"""Whether two answers say the same, by their structure: lists, tuples, intervals, matrices, units.

The structure is taken apart here, in plain Python and bounded time; what remains are pairs without
structure. Two plain numbers are compared exactly (0.333 is not 1/3), words as words; only other
pairs go to ``scalars``, which knows algebra.
"""

import re
from collections.abc import Callable, Sequence

from basis_jax.verify.notation import canonical, closing, number, peel, split_top

MOST_ITEMS = 40
Scalars = Callable[[str, str], bool]

NAME = re.compile(
    r"(?:[a-zA-Z]|\\[a-zA-Z]+)(?:_\{?\w+\}?)?'?|[a-zA-Z] ?\([a-z]\)|\([a-z](?:, ?[a-z])+\)"
)
MATRIX = re.compile(r"\[?\\begin\{([pb]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}\]?")
BUILDER = re.compile(r"\\\{ ?([a-zA-Z]) ?(?:\\mid|\||:) ?(.*)\\\}")
BASED = re.compile(r"\(?([0-9A-Z]*[0-9][0-9A-Z]*)\)?_ ?(?:([0-9]+)|\{ ?([0-9]+) ?\})")
TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
WORDS = re.compile(r"[a-zA-Z][a-zA-Z0-9 '-]*")
UNIT = re.compile(
    r"(.*?) ?(?:\\text ?\{([^{}]*)\}|(?<=[ 0-9}])([a-zA-Z][a-zA-Z./ ]*))(?: ?\^ ?\{?[23]\}?)?"
)
UNITS = {
    "millimeter": "mm", "centimeter": "cm", "meter": "m", "kilometer": "km", "inch": "in",
    "inche": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi", "second": "s",
    "minute": "min", "hour": "h", "hr": "h", "gram": "g", "kilogram": "kg", "pound": "lb",
    "ounce": "oz", "liter": "l", "litre": "l", "mph": "mph", "am": "am", "pm": "pm",
}  # fmt: skip
"""Units told apart where both answers have one; other words after a number are ignored."""


def equivalent(gold: str, answer: str, scalars: Scalars) -> bool:
    """Whether ``answer`` says what the right answer ``gold`` says. It may say more: name what it
    computes (``x = 5`` for 5), add a unit, or go on to an approximation."""
    return same(canonical(gold), canonical(answer), scalars)


def same(gold: str, answer: str, scalars: Scalars) -> bool:
    """``equivalent`` for answers in canonical notation, or parts of one."""
    gold, answer = simplify(gold), simplify(answer)
    if gold.replace(" ", "") == answer.replace(" ", ""):
        return gold != ""
    if not gold or not answer:
        return False
    values = number(gold), number(answer)
    if None not in values:
        return values[0] == values[1]
    for compare in (same_items, same_union, same_relation, same_matrix, same_percent, same_units):
        verdict = compare(gold, answer, scalars)
        if verdict is not None:
            return verdict
    return same_words(gold, answer, scalars)


def simplify(text: str) -> str:
    r"""Without ``x \in`` before a set, set-builder braces around a condition, or ``\approx ...``."""
    text = re.sub(r"^[a-zA-Z] ?\\in(?![a-zA-Z])", "", text)
    text = re.sub(r"(?<=.) ?\\approx.*", "", text)
    builder = BUILDER.fullmatch(text)
    return peel(builder[2] if builder else text)


def items(text: str) -> tuple[str, list[str]]:
    r"""The brackets around all of a text ("" where none) and what stands between its commas, the
    two values of ``\pm`` apart."""
    brackets = ""
    for opening, closings in ((r"\{", (r"\}",)), ("(", (")", "]")), ("[", (")", "]"))):
        end = [c for c in closings if text.endswith(c)]
        start = len(opening) - 1
        if end and text.startswith(opening) and closing(text, start) == len(text) - 1:
            brackets = opening + end[0]
            text = text[len(opening) : -len(end[0])]
            break
    parts = [text] if number(text) is not None else [p for p in split_top(text) if p]
    if brackets in ("", r"\{\}"):
        parts = [
            part.replace(r"\pm", sign).replace(r"\mp", "-" if sign == "+" else "+")
            for part in parts
            for sign in (("+", "-") if r"\pm" in part else ("+",))
        ]
    return brackets, parts


def same_items(gold: str, answer: str, scalars: Scalars) -> bool | None:
    """Lists and sets in any order, tuples and intervals in theirs, brackets alike; a list without
    brackets may stand for a tuple. None where neither is one."""
    (left, golds), (right, answers) = items(gold), items(answer)
    if left != r"\{\}" != right and max(len(golds), len(answers)) == 1:
        return None
    if max(len(golds), len(answers)) > MOST_ITEMS:
        return False
    unordered = ("", r"\{\}")
    if left in unordered and right in unordered:
        if r"\{\}" in (left, right):
            golds, answers = distinct(golds, scalars), distinct(answers, scalars)
        return same_in_any_order(golds, answers, scalars)
    inequality = r"<|>|\\[lg]e(?![a-zA-Z])"
    if re.search(inequality, gold) or re.search(inequality, answer):
        return None
    if left != right and "" not in (left, right):
        return False
    return len(golds) == len(answers) and all(
        same(g, without_name(a), scalars) for g, a in zip(golds, answers, strict=True)
    )
