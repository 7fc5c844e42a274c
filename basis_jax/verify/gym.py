"""The verifier for problems of reasoning-gym (``tasks.gym``): their own scorers.

A scorer is written for trusted answers, and some scorers compile them. So scorers run in confined
worker processes, like those that do the algebra of ``mathematics``, where compiling is an error.
"""

import json
import os
from collections.abc import Sequence

from basis_jax.verify.extract import TAIL, extract_answer, tagged_answer
from basis_jax.verify.pool import Pool
from basis_jax.verify.verdicts import Verdict, Verifier, verdict_of


class GymVerifier(Verifier):
    """Right if the problem's scorer returns 1; partial credit counts as wrong.

    The answer is the content of the last ``<answer>`` tags, else what another mark gives
    (``extract``), else the whole completion. ``answers`` are task, options and problem as JSON. The
    limits are those of ``MathVerifier``.
    """

    def __init__(self, *, workers: int = 0, seconds: float = 5.0, memory_mb: int = 512):
        self.pool = Pool(
            kind="gym",
            package="reasoning-gym, which is in the extra [tasks]",
            workers=workers or min(os.cpu_count() or 1, 8),
            seconds=seconds,
            memory_mb=memory_mb,
        )

    def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """A verdict for each completion. Equal answers to a problem are scored once."""
        pairs = [(a, submitted_answer(c)) for c, a in zip(completions, answers, strict=True)]
        different = list(dict.fromkeys(pairs))
        replies = dict(zip(different, self.pool.run(different), strict=True))
        return [verdict_of(*replies[pair]) for pair in pairs]

    def stop(self) -> None:
        self.pool.stop()

    def close(self) -> None:
        self.pool.close()


def check_scorer(path: str, answers: Sequence[str]) -> None:
    """Try a scorer before a run. Raises ValueError unless the confined scorer accepts the own
    answer of each problem and reaches a verdict on the answers of the others."""
    with GymVerifier(workers=1) as verifier:
        right = [f"<answer>{json.loads(answer)['entry']['answer']}</answer>" for answer in answers]
        own = verifier.grade(right, answers)
        others = verifier.grade(right[1:] + right[:1], answers)
    for kind, trouble in (
        ("its own", [v for v in own if not v.reward]),
        ("another", [v for v in others if v.kind not in ("right", "wrong")]),
    ):
        if trouble:
            raise ValueError(
                f"{path} cannot be graded: its scorer says of {kind} answer "
                f"{trouble[0].reason!r}; scorers that compile the answer, read files or need more "
                "than JSON holds are refused, choose another task"
            )


def submitted_answer(completion: str) -> str:
    """The answer in a completion."""
    found = tagged_answer(completion[-TAIL:])
    return found or extract_answer(completion, "lenient") or completion[-TAIL:].strip()
