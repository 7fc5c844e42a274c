"""Problems that are made and not read, by name. Standard library only, but for ``gym``.

A task is a module with ``problems(*, held_out: bool) -> list[Problem]``; the two calls return
disjoint sets, split by content and not by position. Of ``MODULE/REGIME`` the regime comes first:
``problems(regime, *, held_out: bool)``. ``gym/NAME`` is a task of reasoning-gym.
"""

import importlib

from basis_jax.data.problem import Problem

REGIMES = ("free", "single", "guess", "hard", "easy", "long")
TASKS = ("arithmetic", "number_words", *(f"steps/{regime}" for regime in REGIMES))
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
    module, *regime = name.split("/")
    make = importlib.import_module(f"basis_jax.data.tasks.{module}").problems
    return make(*regime, held_out=held_out)
