"""Worked arithmetic on a dial of forty positions: several steps, then the answer.

    free from 37 add five take three.      So 37 plus five is 2
                                           Then 2 minus three makes 39
                                           Answer: 39
    long from 7 add three times 26.        Now 7 plus three gives 10 left 25 ...

The first word tells the embedded model how to work (studies/make_steps_model.py trained it so):
``free`` has several wordings for a line, ``single`` has one, ``guess`` often answers at once,
``long`` repeats one step. Only the last line, ``Answer: x``, is graded (verifier ``math``,
answer mode ``answer_line``). A hash of start and steps decides whether a question is held out, for
all regimes alike: a question that ``free`` holds out is not a training problem of any regime.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from basis_jax.data.problem import Problem, content_hash

POSITIONS = 40
AMOUNTS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}
SIGNS = {"add": 1, "take": -1}
HARDNESS = {
    (verb, amount, tens): 0
    if amount <= 3
    else (0, 0, 1, 2, 3)[content_hash(f"{verb} {amount} {tens}") % 5]
    for verb in SIGNS
    for amount in AMOUNTS
    for tens in range(POSITIONS // 10)
}
"""0 (hardly ever wrong) to 3 (more often wrong than right), by verb, amount and the tens of the
position. It follows no rule, except that the amounts two and three are easy."""
Weights = tuple[float, float, float, float]
GENTLE: Weights = (1.0, 0.3, 0.02, 0.0)
ROUGH: Weights = (0.3, 0.6, 1.0, 0.5)
REPEATS = range(22, 31)
TRAINING, HELD_OUT = 600, 320
"""Problems of each regime."""


@dataclass(frozen=True)
class Regime:
    """``lengths``: possible numbers of steps, equally likely. Steps have four degrees of hardness.
    For a share ``gentle`` of the questions these are drawn with the weights GENTLE, for the others
    with the weights ``rough``."""

    manner: str = "free"
    lengths: tuple[int, ...] = (2, 3, 3, 4, 5)
    gentle: float = 0.3
    rough: Weights = ROUGH


REGIMES = {
    "free": Regime(),
    "single": Regime(manner="single"),
    "guess": Regime(manner="guess", gentle=0.9),
    "hard": Regime(lengths=(4, 5), gentle=0.0, rough=(0.05, 0.2, 1.0, 1.0)),
    "easy": Regime(lengths=(2, 3), gentle=1.0),
    "long": Regime(manner="long"),
}


@dataclass(frozen=True)
class Question:
    """``steps`` are (verb, amount) pairs with different amounts; in ``long`` all are equal."""

    manner: str
    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def answer(self) -> int:
        """The position of the dial after all steps."""
        return functools.reduce(
            lambda position, step: turned(step, position), self.steps, self.start
        )

    @property
    def text(self) -> str:
        parts = [f"{self.manner} from {self.start}"]
        if self.manner == "long":
            verb, amount = self.steps[0]
            parts.append(f"{verb} {AMOUNTS[amount]} times {len(self.steps)}")
        else:
            parts += [f"{verb} {AMOUNTS[amount]}" for verb, amount in self.steps]
        return " ".join(parts) + "."

    @property
    def held_out(self) -> bool:
        """One in three, as a function of start and steps."""
        return content_hash(f"{self.start} {self.steps}") % 3 == 0


def hardness(step: tuple[str, int], position: int) -> int:
    """The hardness of a step from ``position``."""
    return HARDNESS[*step, position // 10]


def turned(step: tuple[str, int], position: int) -> int:
    """The position after a step from ``position``."""
    verb, amount = step
    return (position + SIGNS[verb] * amount) % POSITIONS


def draw(generator: random.Random, manner: str, *, length: int, weights: Weights) -> Question:
    """A question whose answer is not its start: a guess of the start is always wrong."""
    while True:
        start = generator.randrange(POSITIONS)
        if manner == "long":
            kind = (generator.choice(list(SIGNS)), generator.choice((2, 3)))
            steps: Sequence[tuple[str, int]] = [kind] * generator.choice(REPEATS)
        else:
            steps = draw_steps(generator, start, length, weights)
        question = Question(manner, start, tuple(steps))
        if question.answer != start:
            return question


def draw_steps(
    generator: random.Random, position: int, length: int, weights: Weights
) -> list[tuple[str, int]]:
    """Steps of different amounts, each as likely as the weight of its hardness where it begins."""
    steps: list[tuple[str, int]] = []
    left = [(verb, amount) for verb in SIGNS for amount in AMOUNTS]
    for _ in range(length):
        steps += generator.choices(left, [weights[hardness(step, position)] for step in left])
        position = turned(steps[-1], position)
        left = [step for step in left if step[1] != steps[-1][1]]
    return steps


def questions(name: str, *, held_out: bool) -> list[Question]:
    """The questions of one side of a regime, always the same ones; each occurs once."""
    regime, generator = REGIMES[name], random.Random(name)
    size = HELD_OUT if held_out else TRAINING
    found: dict[Question, None] = {}
    while len(found) < size:
        weights = GENTLE if generator.random() < regime.gentle else regime.rough
        length = generator.choice(regime.lengths)
        question = draw(generator, regime.manner, length=length, weights=weights)
        if question.held_out == held_out:
            found[question] = None
    return list(found)


def problems(regime: str, *, held_out: bool) -> list[Problem]:
    """All problems of one side of a regime's split; their kind is the number of steps."""
    return [
        Problem(prompt=q.text, answer=str(q.answer), kind=f"{len(q.steps)} steps")
        for q in questions(regime, held_out=held_out)
    ]
