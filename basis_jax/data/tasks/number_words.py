"""Arithmetic in words and digit counts, for the embedded model.

    What is twenty-two plus seventeen?   39
    Take twenty-two from seventeen.      -5
    Count the digit 5 in 65514.          2

A hash of a question's kind and operands decides whether it is held out; the order of the operands
counts only where it matters. If 22 + 17 is held out, 17 + 22 is too. The corpus on which the
embedded model was pretrained is not split this way (studies/make_quickstart_model.py).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from basis_jax.data.problem import Problem, content_hash

TRAINING = {"plus": 320, "minus": 320, "times": 90, "chain": 150, "count": 150}
HELD_OUT = {"plus": 130, "minus": 130, "times": 30, "chain": 100, "count": 100}
"""Problems of each kind; at most as many as there are."""

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDINGS = {
    "plus": "What is {} plus {}?",
    "minus": "Take {1} from {0}.",
    "times": "What is {} times {}?",
    "chain": "What is {} plus {} minus {}?",
    "count": "Count the digit {} in {}.",
}
OPERANDS = {
    "plus": (range(30), range(30)),
    "minus": (range(30), range(30)),
    "times": (range(2, 13), range(2, 13)),
    "chain": (range(10), range(10), range(10)),
}


@dataclass(frozen=True)
class Question:
    """``operands`` of a count are the digits, the counted one first."""

    kind: str
    operands: tuple[int, ...]
    text: str
    answer: int

    @property
    def held_out(self) -> bool:
        """One in five, as a function of kind and operands."""
        unordered = self.kind in ("plus", "times")
        operands = sorted(self.operands) if unordered else list(self.operands)
        return content_hash(f"{self.kind} {operands}") % 5 == 0


def in_words(number: int) -> str:
    """0..99 in words."""
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


def draw(generator: random.Random, kind: str) -> Question:
    """A question of this kind, of either side of the split."""
    if kind == "count":
        return draw_count(generator)
    operands = tuple(generator.choice(values) for values in OPERANDS[kind])
    formulas: dict[str, Callable[..., int]] = {
        "plus": lambda a, b: a + b,
        "minus": lambda a, b: a - b,
        "times": lambda a, b: a * b,
        "chain": lambda a, b, c: a + b - c,
    }
    text = WORDINGS[kind].format(*map(in_words, operands))
    return Question(kind, operands, text, formulas[kind](*operands))


def draw_count(generator: random.Random) -> Question:
    """How often a digit occurs among three to five digits; about two in five are set to it."""
    digit = generator.randrange(10)
    digits = [
        digit if generator.random() < 0.4 else generator.randrange(10)
        for _ in range(generator.randint(3, 5))
    ]
    text = WORDINGS["count"].format(digit, "".join(map(str, digits)))
    return Question("count", (digit, *digits), text, digits.count(digit))


def questions(*, held_out: bool) -> list[Question]:
    """The questions of one side, always the same ones; each occurs once, in one wording."""
    chosen = []
    for kind, size in (HELD_OUT if held_out else TRAINING).items():
        generator = random.Random(kind)
        drawn = (draw(generator, kind) for _ in range(4_000))
        found = {q.operands: q for q in drawn if q.held_out == held_out}
        chosen += list(found.values())[:size]
    return chosen


def problems(*, held_out: bool) -> list[Problem]:
    """All problems of one side of the split."""
    return [
        Problem(prompt=q.text, answer=str(q.answer), kind=q.kind)
        for q in questions(held_out=held_out)
    ]
