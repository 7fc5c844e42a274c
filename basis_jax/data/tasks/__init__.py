"""Tasks: problems that are generated instead of read from a file. They need the standard library
only, except ``gym``.

A task is a module with ``problems(*, held_out: bool) -> list[Problem]``. The training and the
held-out problems are disjoint; which side a problem is on depends on its content, not on its
position. A task named ``MODULE/REGIME`` calls ``problems(regime, *, held_out: bool)``. ``gym/NAME``
is a task of reasoning-gym.
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
