"""Problems that are made and not read, by name. Standard library only, but for ``gym``.

A task is a module with ``problems(*, held_out: bool) -> list[Problem]``; the two calls return
disjoint sets, split by content and not by position. ``gym/NAME`` is a task of reasoning-gym.
"""

import hashlib
import importlib
import json
from dataclasses import dataclass

TASKS = ("arithmetic", "number_words")
GYM = "gym/"


@dataclass(frozen=True)
class Problem:
    """One problem. ``prompt`` is its text, or the messages of a chat as (role, content) pairs."""

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


def problems(name: str, *, held_out: bool) -> list[Problem]:
    """The training or the held-out problems of a task. Raises ValueError for an unknown name."""
    if name.startswith(GYM):
        from basis_jax.tasks import gym

        return gym.problems(name.removeprefix(GYM), held_out=held_out)
    if name not in TASKS:
        raise ValueError(
            f"unknown task {name!r}; allowed are {', '.join(TASKS)} and {GYM}NAME (reasoning-gym)"
        )
    return importlib.import_module(f"basis_jax.tasks.{name}").problems(held_out=held_out)
