"""Right answers with a tolerance, or with several parts that are all wanted.

``criterion`` writes them as one string, which is stored as the problem's answer. The verifier for
mathematics reads it back. Any other string is a plain right answer, compared exactly.

- Minerva (``MINERVA``): two numbers within |a - b| <= 1e-8 + 1e-5 |b|, as the ``numeric_equality``
  of the set's own evaluation does with NumPy's ``isclose``.
- OlympiadBench: two numbers within 1.01 times the ``error`` of the problem, or 1e-8 if it has none,
  as the set's ``MathJudger`` does. ``final_answer`` is a list of answers that are all wanted.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class Tolerance:
    """How far from the right number an answer may be: ``absolute`` + ``relative`` times it."""

    absolute: float = 0.0
    relative: float = 0.0

    def allows(self, gold: Fraction, answer: Fraction) -> bool:
        if gold == answer:
            return True
        limit = Fraction(self.absolute) + Fraction(self.relative) * abs(gold)
        return abs(gold - answer) <= limit


EXACT = Tolerance()
MINERVA = Tolerance(absolute=1e-8, relative=1e-5)
MARK, ANY = '{"all of": ', '{"any of": '


def olympiad_tolerance(error: Any) -> Tolerance:
    """The tolerance of a problem's column ``error``, which may be empty or hold one number. Of
    several numbers, one per answer, the smallest is used. Raises ValueError for anything else."""
    parts = str(error if error is not None else "").replace(",", " ").split()
    try:
        errors = [float(part) for part in parts]
    except ValueError:
        errors = [math.nan]
    if not all(0 <= e < math.inf for e in errors):
        raise ValueError(
            f"the error of the answer is {error!r}; give a number of 0 or more, or leave it empty"
        )
    return Tolerance(absolute=1.01 * min(errors, default=1e-8))


def criterion(answers: str | Sequence[str], tolerance: Tolerance = EXACT) -> str:
    """The right answer as one string. Raises ValueError if there is none."""
    answers = [answers] if isinstance(answers, str) else list(answers)
    if not answers or not all(answer.strip() for answer in answers):
        raise ValueError(
            f"the right answers are {answers!r}; give at least one, none of them empty"
        )
    if len(answers) == 1 and tolerance == EXACT:
        return answers[0]
    return MARK + json.dumps(answers) + ", " + json.dumps(vars(tolerance))[1:]


def read_criterion(text: str) -> tuple[str, Tolerance]:
    """The wanted answers, as one text in LaTeX with commas between them, and the tolerance. Raises
    ValueError for a text that begins like a criterion but is none."""
    if not text.startswith((MARK, ANY)):  # alternatives are graded one by one
        return text, EXACT
    answers, tolerance = wanted_together(text)
    if len(answers) > 1:  # the comma in 1,000 would separate two answers
        answers = [re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", a.strip(" $.")) for a in answers]
    return ", ".join(answers), tolerance


def wanted_together(text: str) -> tuple[list[str], Tolerance]:
    """The answers of a criterion, and the tolerance. Raises ValueError if the text is none."""
    try:
        found = json.loads(text)
        answers = found.pop("all of")
        tolerance = Tolerance(**found)  # with no other fields
        limits = (tolerance.absolute, tolerance.relative)
        whole = are_answers(answers) and all(0 <= limit < math.inf for limit in limits)
    except (ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(
            "the answer begins like several accepted answers and does not hold a list of texts; "
            f'write {MARK}["3", "-3"], "absolute": 0.0, "relative": 0.0}}'
        )
    return answers, tolerance


def are_answers(value: Any) -> bool:
    """Whether it is a list of texts, none of them empty."""
    texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
    return texts and bool(value) and all(text.strip() for text in value)
