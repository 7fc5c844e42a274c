"""A problem: its text, its answer, and a number that identifies both."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from basis_jax.verify.verdicts import Submission


@dataclass(frozen=True)
class Problem:
    """One problem. ``prompt`` is its text, or the messages of a chat as (role, content) pairs.

    ``answer`` is one text; several accepted answers are written as one (``answers.several``).
    ``columns`` are those of its row, for reward functions. They are not part of its identity: two
    problems that differ only in columns are equal and have the same uid.
    """

    prompt: str | tuple[tuple[str, str], ...]
    answer: str
    kind: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def uid(self) -> int:
        """63-bit hash of prompt and answer: the same in every order, file, subset and Python."""
        return content_hash(json.dumps([self.prompt, self.answer]))

    def submission(self, completion: str, *, tokens: int, terminated: bool) -> Submission:
        """A completion of this problem, in the form that verifiers get."""
        return Submission(
            completion=completion,
            answer=self.answer,
            prompt=self.prompt,
            columns=self.columns,
            tokens=tokens,
            terminated=terminated,
        )


def content_hash(text: str) -> int:
    """The first 63 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
