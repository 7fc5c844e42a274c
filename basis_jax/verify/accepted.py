"""Several accepted answers, written as one text: a completion is right if any of them matches.

``{"any of": ["4", "four"]}`` is how the data writes them (``data.answers.several``); so is
``{"all of": ["3", "-3"], ...}``, where a completion must give all, in any order.
"""

import json
from collections.abc import Callable, Sequence

from basis_jax.verify.verdicts import Verdict

ANY, ALL = '{"any of": ', '{"all of": '


def alternatives(answer: str) -> list[str]:
    """The answers of which one is enough; any other text is the only one."""
    return json.loads(answer)["any of"] if answer.startswith(ANY) else [answer]


def together(answer: str) -> list[str] | None:
    """The answers that are wanted together; None for any other text."""
    return json.loads(answer)["all of"] if answer.startswith(ALL) else None


def any_of(
    grade: Callable[[Sequence[str], Sequence[str]], list[Verdict]],
    completions: Sequence[str],
    answers: Sequence[str],
) -> list[Verdict]:
    """Verdicts where several answers may be accepted. ``grade`` compares with one answer at a time;
    the best verdict counts: right before invalid before wrong."""
    accepted = [alternatives(answer) for answer in answers]
    repeated = [c for c, texts in zip(completions, accepted, strict=True) for _ in texts]
    verdicts = iter(grade(repeated, [text for texts in accepted for text in texts]))
    return [best([next(verdicts) for _ in texts]) for texts in accepted]


def best(verdicts: Sequence[Verdict]) -> Verdict:
    return max(verdicts, key=lambda verdict: (verdict.reward, not verdict.valid))
