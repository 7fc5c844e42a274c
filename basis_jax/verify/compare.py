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
    r"(?:[a-zA-Z]|[A-Z]{2,3}|[a-zA-Z]{4,}|\\text ?\{[^{}]*\}|\\[a-zA-Z]+(?: ?[A-Z]+)?)"
    r"(?:_\{?\w+\}?)?'?(?: ?\([^()=]*\))?|\([a-z](?:, ?[a-z])+\)"
)
ORDER = re.compile(r" ?(<|>|\\[lg]e(?![a-zA-Z])) ?")
MATRIX = re.compile(r"\[?\\begin\{([pb]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}\]?")
BUILDER = re.compile(r"\\\{ ?([a-zA-Z]) ?(?:\\mid|\||:) ?(.*)\\\}")
BASED = re.compile(r"\(?([0-9A-Z]*[0-9][0-9A-Z]*)\)?_ ?(?:([0-9]+)|\{ ?([0-9]+) ?\})")
TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
WORDS = re.compile(r"[a-zA-Z][a-zA-Z0-9 '-]*")
UNIT = re.compile(
    r"(.*?) ?(?:\\text ?\{((?:[^{}]|\{[^{}]*\})*)\}|(?<=[ 0-9}])([a-zA-Z][a-zA-Z./ ]*))"
    r"(?: ?\^ ?\{?[23]\}?)?"
)
UNITS = {
    "millimeter": "mm", "centimeter": "cm", "meter": "m", "kilometer": "km", "inch": "in",
    "inche": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi", "second": "s",
    "minute": "min", "hour": "h", "hr": "h", "gram": "g", "kilogram": "kg", "pound": "lb",
    "ounce": "oz", "liter": "l", "litre": "l", "mile per hour": "mph", "am": "am", "pm": "pm",
}  # fmt: skip
"""Units told apart where both answers have one; other words after a number are ignored."""


def equivalent(gold: str, answer: str, scalars: Scalars) -> bool:
    """Whether ``answer`` says what the right answer ``gold`` says. It may say more: name what it
    computes (``x = 5`` for 5), add a unit, or go on to an approximation."""
    return same(canonical(gold), canonical(answer), scalars)


def same(gold: str, answer: str, scalars: Scalars) -> bool:
    """``equivalent`` for answers in canonical notation, or parts of one."""
    gold, answer = simplify(gold), simplify(answer)
    if unwrapped(gold) == unwrapped(answer):
        return gold != ""
    if not gold or not answer:
        return False
    if bool(ORDER.search(gold)) != bool(ORDER.search(answer)):
        gold, answer = as_intervals(gold), as_intervals(answer)
    values = number(gold), number(answer)
    if None not in values:
        return values[0] == values[1]
    for compare in KINDS:
        verdict = compare(gold, answer, scalars)
        if verdict is not None:
            return verdict
    if re.search("(?<![0-9_^])[0-9]+ [0-9]", answer):
        return False  # the parser of LaTeX would read 4 2 as 42
    return scalars(gold, answer)


def unwrapped(text: str) -> str:
    r"""Without ``\text``, and without spaces but those between digits."""
    return re.sub("(?<![0-9]) +| +(?![0-9])", "", TEXT.sub(r"\1", text))


def simplify(text: str) -> str:
    r"""Without ``x \in``, set-builder braces around a condition, ``\approx ...``, ``\pmod ...``."""
    text = re.sub(r"^[a-zA-Z] ?\\in(?![a-zA-Z])", "", text)
    text = re.sub(r"(?<=.) ?\\(?:approx|[pb]?mod)(?![a-zA-Z]).*", "", text)
    builder = BUILDER.fullmatch(text)
    text = builder[2] if builder else text
    if ORDER.search(text):
        text = ",".join(upward(condition) for condition in split_top(text))
    return peel(text)


def upward(condition: str) -> str:
    """``b > x`` as ``x<b``."""
    parts = ORDER.split(condition)
    if ">" not in parts and r"\ge" not in parts:
        return condition
    turned = {">": "<", r"\ge": r"\le ", "<": ">", r"\le": r"\ge "}
    return "".join(turned.get(part, part) for part in reversed(parts))


def as_intervals(text: str) -> str:
    r"""``x < 1 or 2 \le x < 3`` as ``(-\infty,1)\cup[2,3)``; any other text as it is."""
    intervals = []
    for condition in split_top(text):
        parts = ORDER.split(condition)
        if len(parts) == 3 and re.fullmatch("[a-zA-Z]", parts[0]):
            parts = [r"-\infty", "<", *parts]
        elif len(parts) == 3:
            parts = [*parts, "<", r"\infty"]
        if len(parts) != 5 or not re.fullmatch("[a-zA-Z]", parts[2]):
            return text
        low, left, _, right, high = parts
        brackets = "[" if left == r"\le" else "(", "]" if right == r"\le" else ")"
        intervals.append(f"{brackets[0]}{low},{high}{brackets[1]}")
    return r"\cup".join(intervals)


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
    for brackets, parts in ((left, golds), (right, answers)):
        if not brackets and len(parts) == 1 and "=" in parts[0]:
            return None
    if left != r"\{\}" != right and max(len(golds), len(answers)) == 1:
        return None
    if any(r"\cup" in part for part in golds + answers if not (left and right)):
        return None
    if max(len(golds), len(answers)) > MOST_ITEMS:
        return False
    unordered = ("", r"\{\}")
    if left in unordered and right in unordered:
        if r"\{\}" in (left, right):
            golds, answers = distinct(golds, scalars), distinct(answers, scalars)
        return same_in_any_order(golds, answers, scalars)
    if left != right and {left, right} != {"", "()"}:
        return False
    return len(golds) == len(answers) and all(
        same(g, without_name(a), scalars) for g, a in zip(golds, answers, strict=True)
    )


def distinct(parts: Sequence[str], scalars: Scalars) -> list[str]:
    """One of each, in the order of their first appearance."""
    kept: list[str] = []
    for part in parts:
        if not any(same(other, part, scalars) for other in kept):
            kept.append(part)
    return kept


def same_in_any_order(golds: Sequence[str], answers: Sequence[str], scalars: Scalars) -> bool:
    """Whether the answers can be paired with the golds; sameness is transitive, so the first free
    partner will do."""
    if len(golds) != len(answers):
        return False
    free = list(answers)
    for gold in golds:
        partner = next((i for i, answer in enumerate(free) if same(gold, answer, scalars)), None)
        if partner is None:
            return False
        del free[partner]
    return True


def same_union(gold: str, answer: str, scalars: Scalars) -> bool | None:
    """Unions of as many parts, in any order."""
    golds, answers = split_top(gold, r"\cup"), split_top(answer, r"\cup")
    if len(golds) != len(answers) or len(golds) == 1:
        return None
    return same_in_any_order(golds, answers, scalars)


def without_name(text: str) -> str:
    """What stands right of ``x =``, where something does."""
    name, *rest = split_top(text, "=")
    return "=".join(rest) if rest and NAME.fullmatch(name) else text


def same_relation(gold: str, answer: str, scalars: Scalars) -> bool | None:
    """A named value against a bare one. Whatever an answer equates without naming it must be the
    gold itself, so ``5 = 3`` is not 3."""
    golds, answers = split_top(gold, "="), split_top(answer, "=")
    if len(golds) > 1:
        named = without_name(gold)
        if named == gold or (len(answers) > 1 and golds[0] != answers[0]):
            return None
        return same(named, without_name(answer), scalars)
    if len(answers) == 1:
        return None
    letters = re.sub(r"\\[a-zA-Z]+", "", answers[0])
    if NAME.fullmatch(answers[0]) or re.search("[a-zA-Z]", letters):
        answers = answers[1:]
    return all(same(gold, part, scalars) for part in answers)


def same_matrix(gold: str, answer: str, scalars: Scalars) -> bool | None:
    """Entry by entry, whatever the brackets; a matrix is nothing but a matrix."""
    tables = []
    for match in (MATRIX.fullmatch(gold), MATRIX.fullmatch(answer)):
        rows = match[2].split("\\\\") if match else []
        tables.append([row.split("&") for row in rows if row.strip()])
    left, right = tables
    if not left and not right:
        return None
    return [len(row) for row in left] == [len(row) for row in right] and all(
        same(g.strip(), a.strip(), scalars)
        for rows in zip(left, right, strict=True)
        for g, a in zip(*rows, strict=True)
    )


def same_percent(gold: str, answer: str, scalars: Scalars) -> bool | None:
    r"""``50\%`` is 50, by convention, and a half, by meaning."""
    bare = [text.removesuffix(r"\%").strip() for text in (gold, answer)]
    if bare == [gold, answer]:
        return None
    if same(*bare, scalars):
        return True
    if gold.endswith(r"\%") == answer.endswith(r"\%"):
        return False
    values = [number(text) for text in bare]
    if None in values:
        return False
    percent, other = values if gold.endswith(r"\%") else values[::-1]
    return percent == 100 * other


def same_units(gold: str, answer: str, scalars: Scalars) -> bool | None:
    """The values, where at least one answer has a unit and known units do not differ."""
    (left, unit), (right, other) = split_unit(gold), split_unit(answer)
    if not unit and not other:
        return None
    names = (UNITS.get(name, name) for name in (unit, other))
    known = {name for name in names if name in UNITS.values()}
    return len(known) < 2 and same(left, right, scalars)


def split_unit(text: str) -> tuple[str, str]:
    """A value and the unit after it in the singular, "" where there is none. A word without
    ``\\text`` is a unit only after a plain number: ``5x`` is algebra."""
    match = UNIT.fullmatch(text)
    if not match or not match[1]:
        return text, ""
    value, wrapped, bare = match.groups()
    unit = (wrapped or bare or "").replace(".", "").strip().lower()
    unit = unit if unit in UNITS else unit.removesuffix("s")
    if bare:
        spaced = text[len(value) : len(value) + 1] == " "
        usual = unit in UNITS or unit in UNITS.values()
        word = len(unit) > 1 if usual else len(unit) > 2 and spaced
        if number(value) is None or not (word or (usual and spaced)):
            return text, ""
    return value, unit or "?"


def same_base(gold: str, answer: str, scalars: Scalars) -> bool | None:
    """Digits as text, and the bases where both are given: ``101_2`` is not a number in tens."""
    written = [BASED.fullmatch(TEXT.sub(r"\1", text)) for text in (gold, answer)]
    if written == [None, None]:
        return None
    (digits, base), (others, other) = (
        (match[1], match[2] or match[3]) if match else (text, "")
        for match, text in zip(written, (gold, answer), strict=True)
    )
    return digits == others and other in ((base, "") if base else ("10",))


def same_parts(gold: str, answer: str, scalars: Scalars) -> bool | None:
    r"""Ratios and times of day, part by part, so ``2:3`` is not ``4:6``; and ``x \ne 2``."""
    separator = r"\ne" if r"\ne" in gold and r"\ne" in answer else ":"
    golds, answers = gold.split(separator), answer.split(separator)
    if len(golds) == len(answers) == 1:
        return None
    return len(golds) == len(answers) and all(
        same(g.strip(), a.strip(), scalars) for g, a in zip(golds, answers, strict=True)
    )


def same_words(gold: str, answer: str, scalars: Scalars) -> bool | None:
    """Words, in any case; four letters together are a word and not a product."""
    left, right = (TEXT.sub(r"\1", text).strip() for text in (gold, answer))
    if WORDS.fullmatch(left) and WORDS.fullmatch(right) and len(left) > 1:
        if " ".join(left.split()).casefold() == " ".join(right.split()).casefold():
            return True
    elif left == right:
        return True
    word = any(WORDS.fullmatch(t) and re.search("[a-zA-Z]{4}", t) for t in (left, right))
    return False if word else None


KINDS = (
    same_items,
    same_union,
    same_relation,
    same_matrix,
    same_percent,
    same_units,
    same_base,
    same_parts,
    same_words,
)
