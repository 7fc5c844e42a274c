"""The verifier for mathematical answers. What a completion says is found and compared in plain
Python where that suffices (most answers), and in worker processes where algebra is needed."""

import os
from collections.abc import Sequence

from basis_jax.verify.compare import equivalent
from basis_jax.verify.extract import MODES, extract_answer
from basis_jax.verify.notation import LONGEST
from basis_jax.verify.pool import Pool
from basis_jax.verify.verdicts import RIGHT, WRONG, Verdict, Verifier

DEEPEST = 20
REMEMBERED = 100_000


class NeedsAlgebra(Exception):
    """Raised out of ``equivalent`` where plain Python cannot tell."""


class MathVerifier(Verifier):
    """Right where the completion's answer is equivalent to the right one.

    ``mode`` says which marks count as giving an answer (``extract``). ``seconds`` of wall-clock
    time and ``memory_mb`` of memory are for one comparison: beyond them it is an error, not wrong.
    """

    def __init__(
        self,
        *,
        mode: str = "lenient",
        workers: int = 0,
        seconds: float = 5.0,
        memory_mb: int = 512,
    ):
        """``workers`` 0: as many as cores, at most 8. Raises ValueError for an unknown mode."""
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
        self.remembered: dict[tuple[str, str], Verdict] = {}

    def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """A verdict for each completion. Equal comparisons are made once."""
        pairs, verdicts = [], {}
        for completion, gold in zip(completions, answers, strict=True):
            answer = extract_answer(completion, self.mode)
            pairs.append((gold, answer))
            if (gold, answer) not in verdicts:
                verdicts[gold, answer] = self.remembered.get((gold, answer)) or glance(gold, answer)
        hard = [pair for pair, verdict in verdicts.items() if verdict is None]
        for pair, (status, reason) in zip(hard, self.pool.run(hard), strict=True):
            verdict = Verdict(float(status == "right"), status != "error", reason)
            verdicts[pair] = verdict
            if verdict.valid:
                self.remembered[pair] = verdict
        if len(self.remembered) > REMEMBERED:
            self.remembered.clear()
        return [verdicts[pair] for pair in pairs]

    def close(self) -> None:
        self.pool.close()


def glance(gold: str, answer: str | None) -> Verdict | None:
    """The verdict where it takes no algebra; None where it does."""
    if answer is None:
        return Verdict(0.0, True, "no answer found")
    if gold.strip() == answer.strip():
        return RIGHT
    if trouble := unfit(gold):
        return Verdict(0.0, False, f"the right answer {trouble}")
    if trouble := unfit(answer):
        return Verdict(0.0, True, f"the answer {trouble}")
    try:
        return RIGHT if equivalent(gold, answer, need_algebra) else WRONG
    except NeedsAlgebra:
        return None


def need_algebra(gold: str, answer: str) -> bool:
    raise NeedsAlgebra


def unfit(text: str) -> str:
    """Why a text is no answer that can be compared; "" where it can be."""
    if len(text) > LONGEST:
        return f"is longer than {LONGEST} characters"
    if any(ord(c) < 32 and c not in "\t\n\r" or c == "\x7f" for c in text):
        return "holds control characters"
    if any(c.isdecimal() and not c.isascii() for c in text):
        return "holds digits other than 0-9"
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, abs(depth))
    return f"is nested deeper than {DEEPEST}" if deepest > DEEPEST else ""
