"""Small sums as few-shot plain text, for a pretrained model that has not been taught to chat.

    2 + 6 = 8
    9 + 1 = 10
    7 + 4 =

The completion up to the newline is the answer. A hash of a question's kind and its operands, in any
order, decides whether it is held out: if 7 + 4 is held out, 4 + 7 is too. The worked lines in front
are training questions in both sets, and never the question itself.
"""

import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from basis_jax.data.problem import Problem, content_hash

ONE, TWO = range(10), range(10, 100)


@dataclass(frozen=True)
class Kind:
    """``size`` questions with operands from ``left`` and ``right``, each after ``worked`` lines."""

    text: str
    function: Callable[[int, int], int]
    left: Sequence[int]
    right: Sequence[int]
    size: int
    worked: int = 2


KINDS = {
    "a + b": Kind("{} + {} =", operator.add, ONE, ONE, size=100),
    "a * b": Kind("{} * {} =", operator.mul, ONE[2:], ONE[2:], size=64),
    "ab + c": Kind("{} + {} =", operator.add, TWO, ONE, size=300),
    "ab + cd": Kind("{} + {} =", operator.add, TWO, TWO, size=200),
    "max": Kind("max({}, {}) =", max, TWO, TWO, size=200),
}


def problems(*, held_out: bool) -> list[Problem]:
    """All problems of one side of the split; about a fifth of the questions is held out."""
    return [p for name in KINDS for p in of_kind(name, held_out=held_out)]


def of_kind(name: str, *, held_out: bool) -> list[Problem]:
    """One side of a kind's questions, always the same ones, in the order of the operands."""
    kind = KINDS[name]
    pairs = [(a, b) for a in kind.left for b in kind.right]
    chosen = sorted(random.Random(name).sample(pairs, kind.size))
    shown = [pair for pair in pairs if not is_held_out(name, pair)]
    return [
        Problem(
            prompt=worked_lines(kind, shown, pair) + kind.text.format(*pair),
            answer=str(kind.function(*pair)),
            kind=name,
        )
        for pair in chosen
        if is_held_out(name, pair) == held_out
    ]


def is_held_out(name: str, pair: tuple[int, int]) -> bool:
    """A function of kind and operands, whatever their order."""
    return content_hash(f"{name} {sorted(pair)}") % 5 == 0


def worked_lines(kind: Kind, shown: Sequence[tuple[int, int]], pair: tuple[int, int]) -> str:
    """Training questions with answers, none of them the asked question in either order. The asked
    question decides which."""
    draw = random.Random(kind.text.format(*pair)).sample(shown, kind.worked + 2)
    others = [other for other in draw if sorted(other) != sorted(pair)][: kind.worked]
    return "".join(f"{kind.text.format(*other)} {kind.function(*other)}\n" for other in others)
