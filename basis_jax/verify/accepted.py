"""Several accepted answers, written as one text: a completion is right if any of them matches.

``{"any of": ["4", "four"]}`` is how the data writes them (``data.answers.several``); so is
``{"all of": ["3", "-3"], ...}``, where a completion must give all, in any order.
"""

import json
from collections.abc import Callable, Sequence

from basis_jax.verify.criteria import ANY, MARK, are_answers, wanted_together
from basis_jax.verify.verdicts import Verdict


def alternatives(answer: str) -> list[str]:
    """The answers of which one is enough; any other text is the only one. Raises ValueError for a
    text that begins like several and is not written so."""
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
    """The answers that are wanted together; None for any other text."""
    return wanted_together(answer)[0] if answer.startswith(MARK) else None


def check_answer(answer: str) -> None:
    """Raise ValueError for an answer that begins like several and is not written so."""
    for text in alternatives(answer):
        together(text)


def any_of(
    grade: Callable[[Sequence[str], Sequence[str]], list[Verdict]],
    completions: Sequence[str],
    answers: Sequence[str],
) -> list[Verdict]:
    """Verdicts where several answers may be accepted. ``grade`` compares with one answer at a time;
    the best verdict counts: right before invalid before wrong."""
    accepted = [readable(answer) for answer in answers]
    repeated = [c for c, texts in zip(completions, accepted, strict=True) for _ in texts]
    verdicts = iter(grade(repeated, [text for texts in accepted for text in texts]))
    return [best([next(verdicts) for _ in texts]) for texts in accepted]


def readable(answer: str) -> list[str]:
    """The alternatives; where they are not written as such, the text, which nothing equals."""
    try:
        return alternatives(answer)
    except ValueError:
        return [answer]


def best(verdicts: Sequence[Verdict]) -> Verdict:
    return max(verdicts, key=lambda verdict: (verdict.reward, not verdict.valid))
