"""The verdict on a completion, and the interface of every verifier."""

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
    messages of a chat as (role, content) pairs. ``answer`` is empty if the data has none."""

    completion: str
    answer: str
    prompt: str | tuple[tuple[str, str], ...] = ""
    columns: Mapping[str, Any] = field(default_factory=dict)  # of the data set
    tokens: int = 0  # of the completion, its end included
    terminated: bool = True  # False: cut at the length limit


@dataclass(frozen=True)
class Verdict:
    """The grade of one completion. ``reward``: 1 or 0, or any finite number of a reward function.
    ``valid``: False if it could not be graded for a reason that is not the policy's fault.
    ``reason``: a text for people. ``kind``: one of ``KINDS``, to be counted. ``parts``: the single
    rewards, if there are several."""

    reward: float
    valid: bool
    reason: str
    kind: str = ""
    parts: tuple[float, ...] = ()


def verdict_of(kind: str, reason: str) -> Verdict:
    """The verdict of a kind: reward 1 for "right", else 0; not valid if the kind is ``INVALID``."""
    return Verdict(float(kind == "right"), kind not in INVALID, reason, kind)


RIGHT = verdict_of("right", "equal")
WRONG = verdict_of("wrong", "differs")


def shares(kinds: Sequence[str]) -> dict[str, float]:
    """The share of each kind among the ``kinds`` of verdicts, as metrics: ``verify/timeout`` and so
    on, 0 for a kind that does not occur. "right" and "wrong" are left out, because the reward shows
    them. Raises ValueError if there are no verdicts."""
    if not kinds:
        raise ValueError("no verdicts; give at least one")
    return {
        f"verify/{kind}": kinds.count(kind) / len(kinds)
        for kind in KINDS
        if kind not in ("right", "wrong")
    }


class Verifier:
    """A context manager. If a verifier has processes, they end with the block."""

    name = ""
    part_names: tuple[str, ...] = ()
    """Names of the single rewards, if there are several; the first is the verifier's own."""
    columns: tuple[str, ...] | None = ()
    """Columns of the data set that the verifier reads; None: all."""
    required_columns: tuple[str, ...] = ()
    """Columns without which it cannot grade."""
    whole_batches = False
    """Whether it needs all completions of a step in one call; otherwise they may come in parts."""

    def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """A verdict for each completion; ``answers`` are the right ones. Any thread may call it."""
        raise NotImplementedError

    def judge(self, rows: Sequence[Submission]) -> list[Verdict]:
        """``grade``, with all that is known about each completion."""
        return self.grade([row.completion for row in rows], [row.answer for row in rows])

    def settle(self, verdicts: list[Verdict]) -> list[Verdict]:
        """The final verdicts of a step, made of all its verdicts."""
        return verdicts

    def stop(self) -> None:
        """End a call of ``grade`` in another thread soon, by an exception."""

    def close(self) -> None:
        """End the processes."""

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
