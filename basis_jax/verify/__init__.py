"""Grading completions: right, wrong, or error (``valid`` False, never a silent 0). No JAX here."""

from collections.abc import Sequence
from dataclasses import dataclass

VERIFIERS = ("exact", "math")


@dataclass(frozen=True)
class Verdict:
    """``reward`` 1 or 0; ``valid`` False where nothing could be told; ``reason`` for a reader."""

    reward: float
    valid: bool
    reason: str


class ExactVerifier:
    """Right when the whole completion, spaces around it aside, is the answer."""

    def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        return [
            Verdict(1.0, True, "equal") if c.strip() == a.strip() else Verdict(0.0, True, "differs")
            for c, a in zip(completions, answers, strict=True)
        ]

    def close(self) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def make_verifier(name: str):
    """The verifier called ``name``, a context manager. Raises ValueError for an unknown name."""
    if name == "exact":
        return ExactVerifier()
    if name == "math":
        from basis_jax.verify.pool import MathVerifier

        return MathVerifier()
    raise ValueError(f"data.verifier is {name!r}; allowed are {', '.join(VERIFIERS)}")
