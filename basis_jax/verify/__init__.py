"""Grading completions: right, wrong, or, where it is not the policy's doing that nothing can be
told, invalid (``valid`` False, never a silent 0). No JAX here."""

from collections.abc import Sequence

from basis_jax.verify.verdicts import RIGHT, WRONG, Verdict, Verifier

VERIFIERS = ("exact", "math", "math_strict", "gym")


class ExactVerifier(Verifier):
    """Right when the whole completion, spaces around it aside, is the answer."""

    def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        pairs = zip(completions, answers, strict=True)
        return [RIGHT if c.strip() == a.strip() else WRONG for c, a in pairs]


def make_verifier(name: str, **options) -> Verifier:
    """The verifier called ``name``: ``exact``; ``math``, which finds and compares mathematical
    answers (``MathVerifier`` has the options; ``mode`` is where answers stand by the data set's
    prompt, ``extract.MODES``); ``math_strict``, which takes only boxed answers and those after
    ``####``; ``gym``, the scorers of reasoning-gym. Raises ValueError for an unknown name."""
    if name not in VERIFIERS:
        raise ValueError(f"data.verifier is {name!r}; allowed are {', '.join(VERIFIERS)}")
    if name == "exact":
        return ExactVerifier(**options)
    if name == "gym":
        from basis_jax.verify.gym import GymVerifier

        return GymVerifier(**options)
    from basis_jax.verify.mathematics import MathVerifier

    if name == "math_strict":
        options = {"mode": "strict"} | options
    return MathVerifier(**options)
