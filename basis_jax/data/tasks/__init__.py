"""Problems that are made and not read, by name. Standard library only, but for ``gym``.

A task is a module with ``problems(*, held_out: bool) -> list[Problem]``; the two calls return
disjoint sets, split by content and not by position. ``gym/NAME`` is a task of reasoning-gym.
"""

import importlib

from basis_jax.data.problem import Problem

TASKS = ("arithmetic", "number_words")
GYM = "gym/"


def problems(name: str, *, held_out: bool) -> list[Problem]:
    """The training or the held-out problems of a task. Raises ValueError for an unknown name."""
    if name.startswith(GYM):
        from basis_jax.data.tasks import gym

        return gym.problems(name.removeprefix(GYM), held_out=held_out)
    if name not in TASKS:
        raise ValueError(
            f"unknown task {name!r}; allowed are {', '.join(TASKS)} and {GYM}NAME (reasoning-gym)"
        )
    return importlib.import_module(f"basis_jax.data.tasks.{name}").problems(held_out=held_out)
