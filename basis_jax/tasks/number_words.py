"""Arithmetic in words and digit counts, for the embedded model.

    What is forty-two plus seventeen?   59
    Take forty-two from seventeen.      -25
    Count the digit 5 in 65514.         2

A question is held out, or not, by a hash of its kind and operands (unordered where order does not
matter), whatever its wording: 17 + 42 is never trained on where 42 + 17 is held out.
"""

import random
from dataclasses import dataclass

from basis_jax.tasks import Problem, content_hash

TRAINING = {"plus": 320, "minus": 320, "times": 120, "chain": 120, "count": 120}
HELD_OUT = {"plus": 160, "minus": 160, "times": 30, "chain": 80, "count": 80}
"""Problems of each kind; at most as many as there are."""

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDINGS = {
    "plus": ("What is {} plus {}?", "Add {1} to {0}."),
    "minus": ("What is {} minus {}?", "Take {1} from {0}."),
    "times": ("What is {} times {}?", "Multiply {} by {}."),
    "chain": ("What is {} plus {} minus {}?",),
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
    a, b, c = (generator.randrange(100) for _ in range(3))
    operands, answer = {
        "plus": ((a, b), a + b),
        "minus": ((a, b), a - b),
        "times": ((a // 2, 2 + b % 4), a // 2 * (2 + b % 4)),
        "chain": ((a % 20, b % 20, c % 20), a % 20 + b % 20 - c % 20),
    }[kind]
    text = generator.choice(WORDINGS[kind]).format(*map(in_words, operands))
    return Question(kind, operands, text, answer)


def draw_count(generator: random.Random) -> Question:
    """How often a digit occurs among three to five; two in five are made equal to it."""
    digit = generator.randrange(10)
    digits = [
        digit if generator.random() < 0.4 else generator.randrange(10)
        for _ in range(generator.randint(3, 5))
    ]
    text = f"Count the digit {digit} in {''.join(map(str, digits))}."
    return Question("count", (digit, *digits), text, digits.count(digit))


def questions(*, held_out: bool) -> list[Question]:
    """The questions of one side, drawn once and for all; each content once, in one wording."""
    chosen = []
    for kind, size in (HELD_OUT if held_out else TRAINING).items():
        generator = random.Random(kind)
        drawn = (draw(generator, kind) for _ in range(20_000))
        found = {tuple(q.operands): q for q in drawn if q.held_out == held_out}
        chosen += list(found.values())[:size]
    return chosen


def problems(*, held_out: bool) -> list[Problem]:
    """All problems of one side of the split."""
    return [
        Problem(prompt=q.text, answer=str(q.answer), kind=q.kind)
        for q in questions(held_out=held_out)
    ]
