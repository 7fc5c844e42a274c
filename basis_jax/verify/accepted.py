"""Several accepted answers, written as one text: a completion is right if any of them matches.

``data.answers.several`` writes them as ``{"any of": ["4", "four"]}``, or as
``{"all of": ["3", "-3"], ...}`` if a completion must give all of them, in any order.
"""

import json
from collections.abc import Callable, Sequence

from basis_jax.verify.criteria import ANY, MARK, are_answers, wanted_together
from basis_jax.verify.verdicts import Verdict


def alternatives(answer: str) -> list[str]:
    """The answers of which one is enough; a plain answer is the only one. Raises ValueError for a
    text that begins like several answers but is not a list of them."""
    if not answer.startswith(ANY):
        return [answer]
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        found = {}
    answers = found.get("any of")
    if len(found) != 1 or not are_answers(answers) or any(a.startswith(ANY) for a in answers):
        raise ValueError(
            "the answer begins like several accepted answers and does not hold a list of texts; "
            f'write {ANY}["4", "four"]}}'
        )
    return answers


def together(answer: str) -> list[str] | None:
    """The answers of which all are wanted; None for any other text."""
    return wanted_together(answer)[0] if answer.startswith(MARK) else None


def check_answer(answer: str) -> None:
    """Raise ValueError for an answer that begins like several answers but is not a list of them."""
    for text in alternatives(answer):
        together(text)


def any_of(
    grade: Callable[[Sequence[str], Sequence[str]], list[Verdict]],
    completions: Sequence[str],
    answers: Sequence[str],
) -> list[Verdict]:
    """Verdicts if several answers may be accepted. ``grade`` compares with one answer at a time.
    The best verdict counts: right is better than invalid, and invalid better than wrong."""
    accepted = [readable(answer) for answer in answers]
    repeated = [c for c, texts in zip(completions, accepted, strict=True) for _ in texts]
    verdicts = iter(grade(repeated, [text for texts in accepted for text in texts]))
    return [best([next(verdicts) for _ in texts]) for texts in accepted]


def readable(answer: str) -> list[str]:
    """``alternatives``; if they cannot be read, the text itself, which no completion equals."""
    try:
        return alternatives(answer)
    except ValueError:
        return [answer]


def best(verdicts: Sequence[Verdict]) -> Verdict:
    return max(verdicts, key=lambda verdict: (verdict.reward, not verdict.valid))
