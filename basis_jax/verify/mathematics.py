"""The verifier for mathematical answers. It finds the answer of a completion and compares it in
plain Python if that is enough (most answers), and in a worker process if algebra is needed."""

import os
from collections.abc import Sequence
from typing import cast

from basis_jax.verify.accepted import any_of
from basis_jax.verify.compare import equivalent
from basis_jax.verify.criteria import read_criterion
from basis_jax.verify.extract import MODES, extract_answer
from basis_jax.verify.notation import LONGEST
from basis_jax.verify.pool import Pool, Stopped
from basis_jax.verify.verdicts import RIGHT, WRONG, Verdict, Verifier, verdict_of

MAX_NESTING = 20
MAX_REMEMBERED = 100_000
MAX_PLAIN_LENGTH = 300
MAX_PLAIN_SECONDS = 0.03
"""Limit of a comparison in the trainer's process. What takes longer goes to a worker."""


Pair = tuple[str, str | None]  # the right answer, and that of a completion


class NeedsAlgebra(Exception):
    """Raised in ``equivalent`` when plain Python cannot decide."""


class MathVerifier(Verifier):
    """Right if the completion's answer is equivalent to the right one.

    ``mode`` says which marks count as giving an answer (``extract``). ``seconds`` (of CPU time) and
    ``memory_mb`` limit one comparison. An answer that exceeds them is wrong, of the kind "timeout"
    or "memory". A right answer may have a tolerance or several parts (``criteria``).
    """

    def __init__(
        self,
        *,
        mode: str = "lenient",
        workers: int = 0,
        seconds: float = 5.0,
        memory_mb: int = 512,
    ):
        """``workers``: number of processes; 0 means one per core, at most 8. Raises ValueError for
        an unknown mode."""
        if mode not in MODES:
            raise ValueError(f"verifier mode is {mode!r}; allowed are {', '.join(MODES)}")
        self.mode = mode
        self.seconds = seconds
        workers = workers or min(os.cpu_count() or 1, 8)
        self.pool = Pool(
            kind="math",
            package="math-verify, which is in the extra [llm]",
            workers=workers,
            seconds=seconds,
            memory_mb=memory_mb,
        )
        self.remembered: dict[Pair, Verdict] = {}

    def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """A verdict for each completion; any of several accepted answers is enough."""
        return any_of(self.grade_single, completions, answers)

    def grade_single(self, completions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """A verdict for each completion with one right answer. Equal comparisons are made once."""
        pairs: list[Pair] = []
        verdicts: dict[Pair, Verdict | None] = {}
        for completion, gold in zip(completions, answers, strict=True):
            if self.pool.stopped.is_set():
                raise Stopped
            answer = extract_answer(completion, self.mode)
            pairs.append((gold, answer))
            if (gold, answer) not in verdicts:
                known = self.remembered.get((gold, answer))
                verdicts[gold, answer] = known or plain_verdict(gold, answer)
        hard = [
            (gold, answer)
            for (gold, answer), verdict in verdicts.items()
            if verdict is None and answer is not None  # None has a verdict
        ]
        for pair, reply in zip(hard, self.pool.run(hard), strict=True):
            verdict = verdict_of(*reply)
            verdicts[pair] = verdict
            if verdict.kind != "failure":
                self.remembered[pair] = verdict
        if len(self.remembered) > MAX_REMEMBERED:
            self.remembered.clear()
        return [cast(Verdict, verdicts[pair]) for pair in pairs]  # by now all have one

    def stop(self) -> None:
        self.pool.stop()

    def close(self) -> None:
        self.pool.close()


def plain_verdict(gold: str, answer: str | None) -> Verdict | None:
    """The verdict, if it takes neither algebra nor long; otherwise None."""
    if answer is None:
        return verdict_of("no_answer", "no answer found")
    try:
        text, tolerance = read_criterion(gold)
    except ValueError as error:
        return verdict_of("gold", str(error))
    if text.strip() == answer.strip():
        return RIGHT
    if trouble := why_not_comparable(text):
        return verdict_of("gold", f"the right answer {trouble}")
    if trouble := why_not_comparable(answer):
        return verdict_of("unfit", f"the answer {trouble}")
    if len(text) + len(answer) > MAX_PLAIN_LENGTH:
        return None
    try:
        right = equivalent(
            text, answer, need_algebra, tolerance=tolerance, seconds=MAX_PLAIN_SECONDS
        )
    except Exception:  # NeedsAlgebra and Overtime; any other one is raised again in the worker
        return None
    return RIGHT if right else WRONG


def need_algebra(gold: str, answer: str) -> bool:
    raise NeedsAlgebra


def why_not_comparable(text: str) -> str:
    """Why a text cannot be compared as an answer; "" if it can."""
    if len(text) > LONGEST:
        return f"is longer than {LONGEST} characters"
    if any("\ud800" <= c <= "\udfff" for c in text):
        return "holds half of a character"
    if any(ord(c) < 32 and c not in "\t\n\r" or c == "\x7f" for c in text):
        return "holds control characters"
    if any(c.isdecimal() and not c.isascii() for c in text):
        return "holds digits other than 0-9"
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, abs(depth))
    return f"is nested deeper than {MAX_NESTING}" if deepest > MAX_NESTING else ""
