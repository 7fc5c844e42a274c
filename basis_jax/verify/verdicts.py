"""What a verifier says of a completion, and what every verifier offers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KINDS = {
    "right": "equal to the right answer",
    "wrong": "not equal to it",
    "no_answer": "the completion gives no answer",
    "unfit": "the answer is too long, nested too deep or has odd characters",
    "timeout": "comparing the answer takes too long",
    "memory": "comparing the answer takes too much memory",
    "nonsense": "comparing the answer ends in an error",
    "refused": "comparing the answer needs what a grading process may not do",
    "gold": "the right answer cannot be read (invalid)",
    "failure": "the grading process was killed, or could not start (invalid)",
    "ungraded": "a reward function gave None (invalid)",
}
INVALID = ("gold", "failure", "ungraded")
RIGHT_ABOVE = 0.5
"""A reward above this counts as right, wherever right completions are counted."""


@dataclass(frozen=True)
class Submission:
    """A completion that is to be graded, and what is known about it. ``prompt`` is a text, or the
    messages of a chat as (role, content) pairs; ``answer`` is empty where the data has none."""

    completion: str
    answer: str
    prompt: str | tuple[tuple[str, str], ...] = ""
    columns: Mapping[str, Any] = field(default_factory=dict)  # of the data set
    tokens: int = 0  # of the completion, its end included
    terminated: bool = True  # False: cut at the length limit


@dataclass(frozen=True)
class Verdict:
    """The grade of one completion. ``reward``: 1 or 0, or any finite number of a reward function.
    ``valid``: False if it could not be graded, for a reason that the policy has no part in.
    ``reason``: for a reader. ``kind``: for counting, one of ``KINDS``. ``parts``: the single
    rewards where there are several."""

    reward: float
    valid: bool
    reason: str
    kind: str = ""
    parts: tuple[float, ...] = ()


def verdict_of(kind: str, reason: str) -> Verdict:
    """What a kind means for reward and validity."""
    return Verdict(float(kind == "right"), kind not in INVALID, reason, kind)


RIGHT = verdict_of("right", "equal")
WRONG = verdict_of("wrong", "differs")


def shares(kinds: Sequence[str]) -> dict[str, float]:
    """The share of each kind of verdict among ``kinds``, one a verdict, as metrics:
    ``verify/timeout`` and so on, 0 for a kind that does not occur. All kinds but right and wrong,
    which are the reward. Raises ValueError where there are no verdicts."""
    if not kinds:
        raise ValueError("no verdicts; give at least one")
    return {
        f"verify/{kind}": kinds.count(kind) / len(kinds)
        for kind in KINDS
        if kind not in ("right", "wrong")
    }


class Verifier:
    """A context manager; its processes, where it has any, end with the block."""

    name = ""
    part_names: tuple[str, ...] = ()
    """Of the single rewards, where there are several; the first is the verifier's own."""
    columns: tuple[str, ...] | None = ()
    """Columns of the data set that it reads; None: all."""
    required_columns: tuple[str, ...] = ()
    """Those without which it cannot grade."""
    whole_batches = False
    """Whether it wants all completions of a step in one call; otherwise they may come in parts."""

    def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """A verdict for each completion; ``answers`` are the right ones. From any thread."""
        raise NotImplementedError

    def judge(self, rows: Sequence[Submission]) -> list[Verdict]:
        """``grade``, with all that is known about each completion."""
        return self.grade([row.completion for row in rows], [row.answer for row in rows])

    def settle(self, verdicts: list[Verdict]) -> list[Verdict]:
        """The verdicts of a step, once all are there."""
        return verdicts

    def stop(self) -> None:
        """End a call of ``grade`` in another thread soon, by an exception."""

    def close(self) -> None:
        """End the processes."""

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
