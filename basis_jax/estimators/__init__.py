"""Advantage estimators: pure functions of rewards, usable under ``jax.jit`` without a trainer.

Two faces. Library: one function each, ``basis(rewards, successes, trials) -> Estimate``. Trainer:
``make(name, **options)`` gives an ``Estimator`` whose state travels:

    est = make("basis"); state = est.init(successes, trials)   # over all M problems
    state, e = est.update(state, Signals(rewards=..., valid=..., problem_ids=..., lengths=...))
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from basis_jax.estimators.basis import basis
from basis_jax.estimators.group import dr_grpo, grpo, rloo
from basis_jax.estimators.single import batch_mean, reinforce, reinforce_pp
from basis_jax.estimators.table import Table, init_table
from basis_jax.types import Estimate, Signals

__all__ = [
    "Estimate",
    "Estimator",
    "Signals",
    "Table",
    "basis",
    "batch_mean",
    "dr_grpo",
    "grpo",
    "make",
    "reinforce",
    "reinforce_pp",
    "rloo",
]


class Estimator(NamedTuple):
    """A pair of pure functions, as in optax, and what the trainer must provide for them.

    ``init(successes, trials) -> state`` over all M problems (trials may be 0) and
    ``update(state, signals) -> (state, Estimate)`` on the rollouts of one step, whole and before
    any split. A problem id outside 0..M-1 gives NaN where a table or a history is read.
    """

    init: Callable[[Any, Any], Any]
    update: Callable[[Any, Signals], tuple[Any, Estimate]]
    needs_table: bool  # worthless without offline trials
    group_size: int  # rollouts of a prompt, adjacent rows


# name -> function of rows; parameters named as in Signals or Table are taken from there
STATELESS: dict[str, Callable[..., Estimate]] = {
    "basis": basis,
    "reinforce": reinforce,
    "batch_mean": batch_mean,
    "reinforce_pp": reinforce_pp,
    "rloo": rloo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
}
GIVEN = ("rewards", "lengths", "valid", "successes", "trials")


def option_names(name: str) -> frozenset[str]:
    """The options of ``make(name, ...)``. Raises ValueError for an unknown name."""
    if name not in STATELESS:
        raise ValueError(f"unknown estimator {name!r}{_near(name, STATELESS)}")
    return frozenset(inspect.signature(STATELESS[name]).parameters) - frozenset(GIVEN)


def make(name: str, **options) -> Estimator:
    """The estimator called ``name``; the only place where a name becomes a function.

    Raises ValueError, naming what is allowed, for an unknown name or option, a value that the
    estimator refuses, and a group estimator with group_size < 2.
    """
    if name not in STATELESS:
        raise ValueError(f"unknown estimator {name!r}{_near(name, STATELESS)}")
    function = STATELESS[name]
    parameters = inspect.signature(function).parameters
    _check_options(name, options, {n: p for n, p in parameters.items() if n not in GIVEN})
    needs_table = "successes" in parameters

    def init(successes, trials):
        return init_table(successes, trials) if needs_table else ()

    def update(state, signals: Signals):
        given = {"rewards": signals.rewards, "lengths": signals.lengths, "valid": signals.valid}
        if needs_table:
            given["successes"] = state.successes[signals.problem_ids]
            given["trials"] = state.trials[signals.problem_ids]
        given = {n: x for n, x in given.items() if n in parameters}
        return state, function(**given, **options)

    estimator = Estimator(init, update, needs_table, options.get("group_size", 1))
    _trace(estimator)
    return estimator


def _trace(estimator: Estimator) -> None:
    """Trace one update without computing it, so that a refused value raises now."""
    n = max(1, estimator.group_size)
    rows, ids = jnp.zeros(n), jnp.zeros(n, jnp.int32)
    signals = Signals(rewards=rows, valid=rows == 0, problem_ids=ids, lengths=ids)
    jax.eval_shape(estimator.update, estimator.init(rows[:1], rows[:1]), signals)


def _check_options(name: str, options: dict, allowed: dict[str, inspect.Parameter]) -> None:
    for option in options:
        if option not in allowed:
            raise ValueError(f"{name} has no option {option!r}{_near(option, allowed)}")
    for option, parameter in allowed.items():
        if parameter.default is inspect.Parameter.empty and option not in options:
            raise ValueError(f"{name} needs the option {option!r}; give it a value")


def _near(word: str, allowed) -> str:
    near = difflib.get_close_matches(word, allowed, n=3, cutoff=0.5)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{meant} (allowed: {', '.join(sorted(allowed)) or 'none'})"
