"""A problem: its text, its answer, and a number that identifies both."""

import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One problem. ``prompt`` is its text, or the messages of a chat as (role, content) pairs.

    ``answer`` is one text; several accepted answers are written as one (``answers.several``).
    """

    prompt: str | tuple[tuple[str, str], ...]
    answer: str
    kind: str = ""

    @property
    def uid(self) -> int:
        """63-bit hash of prompt and answer: the same in every order, file, subset and Python."""
        return content_hash(json.dumps([self.prompt, self.answer]))


def content_hash(text: str) -> int:
    """The first 63 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
