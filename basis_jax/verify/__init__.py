"""Grade completions as right, wrong or invalid. A completion is invalid (``valid`` False) if it
could not be graded for a reason that is not the policy's fault. Invalid completions are never
counted as 0 without notice. No JAX here."""

from collections.abc import Sequence
from typing import Any

from basis_jax import references
from basis_jax.verify.accepted import any_of, together
from basis_jax.verify.extract import MODES
from basis_jax.verify.verdicts import RIGHT, WRONG, Verdict, Verifier

VERIFIERS = ("exact", "math", "math_strict", "gym")


def is_own(name: str) -> bool:
    """Whether a name is a reference to a user's own function."""
    return ":" in name


def needs_answers(name: str) -> bool:
    """Whether a problem without an answer cannot be graded by this verifier or reward."""
    return name in VERIFIERS


def source_fingerprint(name: str) -> str | None:
    """SHA-256 in hex of the file of a user's own reward function; None for a built-in name.

    Raises ValueError for a file or module that does not exist."""
    return references.fingerprint(name, "reward function") if is_own(name) else None


class ExactVerifier(Verifier):
    """Right if the whole completion is the answer, apart from spaces around it. If several answers
    are all wanted, they may come in any order, separated by commas."""

    def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        return any_of(self.grade_single, completions, answers)

    def grade_single(self, completions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        pairs = zip(completions, answers, strict=True)
        return [RIGHT if is_exactly(c, a) else WRONG for c, a in pairs]


def is_exactly(completion: str, answer: str) -> bool:
    wanted = together(answer)
    if wanted is None:
        return completion.strip() == answer.strip()
    parts = [part.strip() for part in completion.split(",")]
    return sorted(parts) == sorted(part.strip() for part in wanted)


def extraction_mode(verifier: str, mode: str = "") -> str:
    """Where a verifier looks for the answer (``extract.MODES``): ``mode``, or if it is empty,
    "strict" for ``math_strict`` and "lenient" for the others.

    Raises ValueError for an unknown mode, and for one given to a verifier other than ``math``.
    """
    if mode and verifier != "math":
        raise ValueError(
            f"data.answer_mode is {mode!r} for data.verifier {verifier!r}; only 'math' takes one, "
            "leave it empty"
        )
    if mode and mode not in MODES:
        raise ValueError(f"data.answer_mode is {mode!r}; allowed are {', '.join(MODES)}")
    return mode or ("strict" if verifier == "math_strict" else "lenient")


def make_verifier(name: str, *, mode: str = "", **options: Any) -> Verifier:
    """The verifier called ``name``.

    - ``exact``: the completion is the answer.
    - ``math``: finds and compares mathematical answers (options: ``MathVerifier``; ``mode``:
      ``extraction_mode``).
    - ``math_strict``: ``math`` that takes only boxed answers and those after ``####``.
    - ``gym``: the scorers of reasoning-gym.
    - A reference to a user's own function: ``OwnReward``.

    A problem may have several accepted answers, of which one is enough or all are wanted
    (``accepted``). Raises ValueError for an unknown name or mode, and for a function that cannot be
    loaded."""
    mode = extraction_mode(name, mode)
    if is_own(name):
        from basis_jax.verify.own import OwnReward

        return OwnReward(name, **options)
    if name not in VERIFIERS:
        raise ValueError(
            f"data.verifier is {name!r}; allowed are {', '.join(VERIFIERS)}, {references.FORMS}"
        )
    if name == "gym":
        from basis_jax.verify.gym import GymVerifier

        return GymVerifier(**options)
    if name == "exact":
        return ExactVerifier(**options)
    from basis_jax.verify.mathematics import MathVerifier

    return MathVerifier(mode=mode, **options)
