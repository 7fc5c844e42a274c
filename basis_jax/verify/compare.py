r"""Whether two answers mean the same, by structure: lists, tuples, intervals, matrices, units.

This module takes the structure apart, in plain Python and bounded time, until pairs without
structure are left. Two plain numbers are compared exactly (0.333 is not 1/3), words as words. Only
other pairs go to ``scalars``, which does algebra.
"""

import re
import time
from collections.abc import Callable, Sequence
from fractions import Fraction

from basis_jax.verify.criteria import EXACT, Tolerance
from basis_jax.verify.equations import (
    by_name,
    same_by_name,
    same_relation,
    same_residues,
    without_name,
)
from basis_jax.verify.notation import canonical, closing, number, peel, split_top
from basis_jax.verify.prose import choice
from basis_jax.verify.units import same_quantities

MAX_ITEMS = 40
MAX_DEPTH = 8
Scalars = Callable[[str, str], bool]
Same = Callable[[str, str], bool]

ORDER = re.compile(r" ?(<|>|\\[lg]e(?![a-zA-Z])) ?")
DISTANCE = re.compile(r"\|([a-z]) ?([-+] ?[0-9./]+)?\| ?(<|\\le) ?(\S+)")
MATRIX = re.compile(r"\[?\\begin\{([pb]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}\]?")
BUILDER = re.compile(r"\\\{ ?([a-zA-Z]) ?(?:\\mid|\||:) ?(.*)\\\}")
BASED = re.compile(r"\(?([0-9A-Z]*[0-9][0-9A-Z]*)\)?_ ?(?:([0-9]+)|\{ ?([0-9]+) ?\})")
TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
WORDS = re.compile(r"[a-zA-Z][a-zA-Z0-9 '-]*")
POINT = re.compile(r"[A-Z](?:_(?:\w|\{\w+\}))?'? ?(?=\()")
CONSTANT = re.compile(
    r"\+ ?(?:[CcKk](?:_(?:\d|\{\d\}))?|\\text ?\{ ?[Cc](?:onst(?:ant|\.)?)? ?\})$"
)
REPEATED = re.compile(r"(?:\\%|\^\\circ) ?(?:\\%|\^)")  # 50%% is nothing
APPROXIMATE = re.compile(r"(.+?) ?\\approx(?![a-zA-Z]) ?(.*)")


COUNTS = {
    name: str(count)
    for count, name in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
        " fifteen sixteen seventeen eighteen nineteen twenty".split()
    )
}


class Overtime(Exception):
    """A comparison took longer than it may."""


def equivalent(
    gold: str,
    answer: str,
    scalars: Scalars,
    *,
    tolerance: Tolerance = EXACT,
    seconds: float = float("inf"),
) -> bool:
    """Whether ``answer`` means the same as the right answer ``gold``. It may say more: name what it
    computes (``x = 5`` for 5), add a unit, or add an approximation.

    Raises Overtime after ``seconds`` without a result.
    """
    comparison = Comparison(scalars, tolerance, time.perf_counter() + seconds)
    return comparison.same(canonical(gold), canonical(answer))


class Comparison:
    """The comparison of one answer, with the settings that are the same for all its parts."""

    def __init__(self, scalars: Scalars, tolerance: Tolerance, deadline: float):
        self.scalars, self.tolerance, self.deadline = scalars, tolerance, deadline
        self.depth = 0

    def same(self, gold: str, answer: str) -> bool:
        """``equivalent`` for answers in canonical notation, or parts of one. Parts that are nested
        deeper than ``MAX_DEPTH`` count as different."""
        if time.perf_counter() > self.deadline:
            raise Overtime
        if self.depth >= MAX_DEPTH:
            return False
        self.depth += 1
        try:
            return self._same(simplify(gold), simplify(answer))
        finally:
            self.depth -= 1

    def _same(self, gold: str, answer: str) -> bool:
        if unwrapped(gold) == unwrapped(answer):
            return gold != ""
        if not gold or not answer:
            return False
        if bool(ORDER.search(gold)) != bool(ORDER.search(answer)):
            gold, answer = as_intervals(gold), as_intervals(answer)
        left, right = number(gold), number(answer)
        if left is not None and right is not None:
            return self.tolerance.allows(left, right)
        if REPEATED.search(answer):
            return False
        for compare in KINDS:
            verdict = compare(gold, answer, self.same)
            if verdict is not None:
                return verdict
        if re.search("(?<![0-9_^])[0-9]+ [0-9]", answer):
            return False  # the parser of LaTeX would read 4 2 as 42
        return self.scalars(gold, answer)


def unwrapped(text: str) -> str:
    r"""Without ``\text``, and without spaces except those between digits."""
    return re.sub("(?<![0-9]) +| +(?![0-9])", "", TEXT.sub(r"\1", text))


def simplify(text: str) -> str:
    r"""Without ``x \in``, set-builder braces around a condition, ``\approx ...``."""
    text = re.sub(r"^[a-zA-Z] ?\\in(?![a-zA-Z])", "", text)
    if approximate := APPROXIMATE.fullmatch(text):
        text = approximate[2 if re.fullmatch("[a-zA-Z]", approximate[1]) else 1]
    text = usual_brackets(text)
    builder = BUILDER.fullmatch(text)
    text = builder[2] if builder else text
    if ORDER.search(text):
        text = ",".join(upward(condition) for condition in split_top(text))
    return peel(text)


def usual_brackets(text: str) -> str:
    """The open interval ``]1,3[`` as ``(1,3)``."""
    if not text.startswith("]") and not text.endswith("["):
        return text
    return re.sub(
        r"([\[\]]) ?([^\[\]()]*,[^\[\]()]*?) ?([\[\]])",
        lambda match: (
            ("(" if match[1] == "]" else "[") + match[2] + (")" if match[3] == "[" else "]")
        ),
        text,
    )


def upward(condition: str) -> str:
    """``b > x`` as ``x<b``, and ``|x - 2| < 3`` as ``-1<x<5``."""
    if distance := DISTANCE.fullmatch(condition):
        variable, middle, order, radius = distance.groups()
        middle, radius = -(number(middle or "0") or 0), number(radius)
        if radius is not None and radius > 0:
            low, high = (plain_fraction(middle + side * radius) for side in (-1, 1))
            return f"{low}{order}{variable}{order}{high}"
    parts = ORDER.split(condition)
    if ">" not in parts and r"\ge" not in parts:
        return condition
    turned = {">": "<", r"\ge": r"\le ", "<": ">", r"\le": r"\ge "}
    return "".join(turned.get(part, part) for part in reversed(parts))


def plain_fraction(value: Fraction) -> str:
    return f"{value.numerator}/{value.denominator}" if value.denominator > 1 else str(value)


def as_intervals(text: str) -> str:
    r"""``x < 1 or 2 \le x < 3`` as ``(-\infty,1)\cup[2,3)``; any other text unchanged."""
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
    r"""The brackets around a whole text ("" if there are none), and the parts between its commas.
    ``\pm`` gives two parts."""
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


def same_items(gold: str, answer: str, same: Same) -> bool | None:
    """Compare lists, sets, tuples and intervals. Lists and sets may be in any order; tuples and
    intervals need the same order and the same brackets. A list without brackets may stand for a
    tuple. Named values are matched by name (``same_by_name``). None if neither has parts."""
    (left, golds), (right, answers) = items(gold), items(answer)
    if left and len(golds) > 1 and not right:
        right, answers = items(without_point(answer))
    elif right and len(answers) > 1 and not left:
        left, golds = items(without_point(gold))
    for brackets, parts in ((left, golds), (right, answers)):
        if not brackets and len(parts) == 1 and "=" in parts[0]:
            return None
    if left != r"\{\}" != right and max(len(golds), len(answers)) == 1:
        return None
    if any(r"\cup" in part for part in golds + answers if not (left and right)):
        return None
    if max(len(golds), len(answers)) > MAX_ITEMS:
        return False
    if {left, right} <= {"", "()"}:
        verdict = same_by_name(golds, answers, same)
        if verdict is not None and (left or right or by_name(golds)):
            return verdict
    unordered = ("", r"\{\}")
    if left in unordered and right in unordered:
        if r"\{\}" in (left, right):
            golds, answers = distinct(golds, same), distinct(answers, same)
        return same_in_any_order(golds, answers, same)
    if left != right and {left, right} != {"", "()"}:
        return False
    return len(golds) == len(answers) and all(
        same(g, without_name(a)) for g, a in zip(golds, answers, strict=True)
    )


def without_point(text: str) -> str:
    """``(3,4)`` for ``P(3,4)``; any other text unchanged."""
    point = POINT.match(text)
    if not point or closing(text, point.end()) != len(text) - 1:
        return text
    return text[point.end() :] if len(split_top(text[point.end() + 1 : -1])) > 1 else text


def distinct(parts: Sequence[str], same: Same) -> list[str]:
    """One of each, in the order of their first appearance."""
    kept: list[str] = []
    for part in parts:
        if not any(same(other, part) for other in kept):
            kept.append(part)
    return kept


def same_in_any_order(golds: Sequence[str], answers: Sequence[str], same: Same) -> bool:
    """Whether the answers can be paired with the golds; sameness is transitive, so the first free
    partner will do."""
    if len(golds) != len(answers):
        return False
    free = list(answers)
    for gold in golds:
        partner = next((i for i, answer in enumerate(free) if same(gold, answer)), None)
        if partner is None:
            return False
        del free[partner]
    return True


def same_union(gold: str, answer: str, same: Same) -> bool | None:
    """Compare unions of as many parts, in any order. None for any others."""
    golds, answers = split_top(gold, r"\cup"), split_top(answer, r"\cup")
    if len(golds) != len(answers) or len(golds) == 1:
        return None
    return same_in_any_order(golds, answers, same)


def same_matrix(gold: str, answer: str, same: Same) -> bool | None:
    """Compare matrices entry by entry, whatever their brackets. A matrix equals only a matrix."""
    tables = []
    for match in (MATRIX.fullmatch(gold), MATRIX.fullmatch(answer)):
        rows = match[2].split("\\\\") if match else []
        tables.append([row.split("&") for row in rows if row.strip()])
    left, right = tables
    if not left and not right:
        return None
    return [len(row) for row in left] == [len(row) for row in right] and all(
        same(g.strip(), a.strip())
        for rows in zip(left, right, strict=True)
        for g, a in zip(*rows, strict=True)
    )


def same_percent(gold: str, answer: str, same: Same) -> bool | None:
    r"""``50\%`` equals 50, by convention, and also 1/2, by its meaning."""
    bare = [text.removesuffix(r"\%").strip() for text in (gold, answer)]
    if bare == [gold, answer]:
        return None
    if same(*bare):
        return True
    if gold.endswith(r"\%") == answer.endswith(r"\%"):
        return False
    values = [number(text) for text in bare]
    percent, other = values if gold.endswith(r"\%") else values[::-1]
    if percent is None or other is None:
        return False
    return percent == 100 * other


def same_choice(gold: str, answer: str, same: Same) -> bool | None:
    """Compare options by letter or content: ``(C) 12`` equals C, and also 12."""
    (letter, says), (other, others) = choice(gold), choice(answer)
    if letter and other:
        return letter == other
    if not says and not others:
        return None
    if letter:
        return same(says, answer)
    return same(gold, others)


def same_integral(gold: str, answer: str, same: Same) -> bool | None:
    """Compare integrals whatever their constant is called, such as ``+C`` or ``+c``."""
    left, right = CONSTANT.search(gold), CONSTANT.search(answer)
    if not left or not right or gold[left.start() :].replace(" ", "")[1:2] not in ("C", "\\"):
        return None
    bare = gold[: left.start()].strip(), answer[: right.start()].strip()
    letters = re.sub(r"\\[a-zA-Z]+", "", bare[0] + bare[1])
    if not re.search("[a-zA-Z]", letters) or re.search("[cCkK]", letters):
        return None
    return same(*bare)


def same_base(gold: str, answer: str, same: Same) -> bool | None:
    """Compare numbers with a base, their digits as text. The answer may leave out the gold's base.
    If the gold has none, that of the answer must be 10: ``101_2`` does not equal 101."""
    written = [BASED.fullmatch(TEXT.sub(r"\1", text)) for text in (gold, answer)]
    if written == [None, None]:
        return None
    (digits, base), (others, other) = (
        (match[1], match[2] or match[3]) if match else (text, "")
        for match, text in zip(written, (gold, answer), strict=True)
    )
    return digits == others and other in ((base, "") if base else ("10",))


def same_parts(gold: str, answer: str, same: Same) -> bool | None:
    r"""Compare ratios and times of day by part, so ``2:3`` is not ``4:6``; also ``x \ne 2``."""
    separator = r"\ne" if r"\ne" in gold and r"\ne" in answer else ":"
    golds, answers = gold.split(separator), answer.split(separator)
    if len(golds) == len(answers) == 1:
        return None
    return len(golds) == len(answers) and all(
        same(g.strip(), a.strip()) for g, a in zip(golds, answers, strict=True)
    )


def same_words(gold: str, answer: str, same: Same) -> bool | None:
    """Compare words, ignoring case. Four letters in a row are a word, not a product."""
    left, right = (TEXT.sub(r"\1", text).strip() for text in (gold, answer))
    counts = [COUNTS.get(text.casefold(), text) for text in (left, right)]
    if counts != [left, right]:
        return same(*counts)
    if WORDS.fullmatch(left) and WORDS.fullmatch(right) and len(left) > 1:
        if " ".join(left.split()).casefold() == " ".join(right.split()).casefold():
            return True
    elif left == right:
        return True
    word = any(WORDS.fullmatch(t) and re.search("[a-zA-Z]{4}", t) for t in (left, right))
    return False if word else None


KINDS = (
    same_choice,
    same_residues,
    same_quantities,
    same_items,
    same_union,
    same_relation,
    same_matrix,
    same_percent,
    same_base,
    same_parts,
    same_integral,
    same_words,
)
