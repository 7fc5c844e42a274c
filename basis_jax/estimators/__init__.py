"""Advantage estimators: pure functions of rewards, usable under ``jax.jit`` without a trainer.

Two faces. Library: one function each, ``basis(rewards, successes, trials) -> Estimate``. Trainer:
``make(name, **options)`` gives an ``Estimator`` whose state travels:

    est = make("basis"); state = est.init(successes, trials)   # over all M problems
    state, e = est.update(state, Signals(rewards=..., valid=..., problem_ids=..., lengths=...))
"""

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from basis_jax.estimators.batchwise import basis
from basis_jax.estimators.critic import gae, sr_ppo, vineppo
from basis_jax.estimators.group import dr_grpo, gpg, grpo, opo, reinforce_pp_baseline, rloo
from basis_jax.estimators.group_best import best_of_group, pass_at_k, ucpo
from basis_jax.estimators.history import (
    Evidence,
    dbb_init,
    dbb_update,
    ema,
    ema_init,
    ema_update,
    spo_init,
    spo_pp_update,
    spo_update,
)
from basis_jax.estimators.kernel import KernelHistory, kae_init, kae_update
from basis_jax.estimators.optimal_value import a_star_po
from basis_jax.estimators.shrinkage import james_stein, v05
from basis_jax.estimators.single import batch_mean, reinforce, reinforce_pp, remax
from basis_jax.estimators.table import Table, init_table
from basis_jax.estimators.value_filter import FilterState, value_filter_init, value_filter_update
from basis_jax.types import Estimate, Signals

__all__ = [
    "Estimate",
    "Estimator",
    "Evidence",
    "FilterState",
    "KernelHistory",
    "Signals",
    "Table",
    "a_star_po",
    "basis",
    "batch_mean",
    "best_of_group",
    "dr_grpo",
    "ema",
    "gae",
    "gpg",
    "grpo",
    "james_stein",
    "make",
    "opo",
    "option_names",
    "pass_at_k",
    "reinforce",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "rloo",
    "sr_ppo",
    "ucpo",
    "v05",
    "vineppo",
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
    takes_table: bool  # starts from offline trials where there are any
    group_size: int  # rollouts of a prompt, adjacent rows


# One function: stateless, its parameters named as in Signals or Table are taken from there.
# Two: init(successes, trials, **options) and update(state, signals, **options).
ESTIMATORS: dict[str, tuple[Callable, ...]] = {
    "a_star_po": (a_star_po,),
    "basis": (basis,),
    "batch_mean": (batch_mean,),
    "best_of_group": (best_of_group,),
    "dbb": (dbb_init, dbb_update),
    "dr_grpo": (dr_grpo,),
    "ema": (ema_init, ema_update),
    "gpg": (gpg,),
    "grpo": (grpo,),
    "james_stein": (james_stein,),
    "kae": (kae_init, kae_update),
    "opo": (opo,),
    "pass_at_k": (pass_at_k,),
    "reinforce": (reinforce,),
    "reinforce_pp": (reinforce_pp,),
    "reinforce_pp_baseline": (reinforce_pp_baseline,),
    "rloo": (rloo,),
    "spo": (spo_init, spo_update),
    "spo_pp": (spo_init, spo_pp_update),
    "v05": (v05,),
    "value_filter": (value_filter_init, value_filter_update),
}
STARTED_BY_TABLE = {"spo", "spo_pp", "value_filter"}
# functions of more than Signals and the table hold: what they need besides
LIBRARY_ONLY = {
    "gae": "a critic's token values",
    "remax": "the rewards of greedy completions",
    "sr_ppo": "a critic's prefix values",
    "ucpo": "log-probabilities of the completions",
    "vineppo": "rollouts from inside the completions",
}
GIVEN = {"rewards", "lengths", "valid", "successes", "trials", "divergence", "staleness"}


def option_names(name: str) -> frozenset[str]:
    """The options of ``make(name, ...)``. Raises ValueError for an unknown name."""
    return frozenset(_options(name))


def make(name: str, **options) -> Estimator:
    """The estimator called ``name``; the only place where a name becomes a function.

    Raises ValueError, naming what is allowed, for an unknown name or option, a value that the
    estimator refuses, and a group estimator with group_size < 2.
    """
    _check_options(name, options, _options(name))
    functions = ESTIMATORS[name]
    pair = _lift(functions[0], options) if len(functions) == 1 else _bind(*functions, options)
    needs_table = "successes" in inspect.signature(functions[-1]).parameters
    takes_table = needs_table or name in STARTED_BY_TABLE
    estimator = Estimator(*pair, needs_table, takes_table, options.get("group_size", 1))
    features = options.get("features")
    _trace(estimator, problems=1 if features is None else len(features))
    return estimator


def _lift(function: Callable[..., Estimate], options: dict) -> tuple[Callable, Callable]:
    """(init, update) of a function of rows; the state is the table, or nothing."""
    names = inspect.signature(function).parameters.keys() & GIVEN

    def init(successes, trials):
        return init_table(successes, trials) if "successes" in names else ()

    def update(state, signals: Signals):
        rows = {n: getattr(signals, n) for n in names & {"rewards", "lengths", "valid"}}
        table = {n: getattr(state, n)[signals.problem_ids] for n in names & {"successes", "trials"}}
        return state, function(**rows, **table, **options)

    return init, update


def _bind(init: Callable, update: Callable, options: dict) -> tuple[Callable, Callable]:
    """(init, update), each with those of the options that it takes."""
    return tuple(
        partial(f, **{n: x for n, x in options.items() if n in inspect.signature(f).parameters})
        for f in (init, update)
    )


def _options(name: str) -> dict[str, inspect.Parameter]:
    if name in LIBRARY_ONLY:
        raise ValueError(
            f"{name} needs {LIBRARY_ONLY[name]}, which a training step's Signals do not carry; "
            f"call estimators.{name} yourself or make another{_near(name, ESTIMATORS)}"
        )
    if name not in ESTIMATORS:
        raise ValueError(f"unknown estimator {name!r}{_near(name, ESTIMATORS)}")
    parameters = [p for f in ESTIMATORS[name] for p in inspect.signature(f).parameters.values()]
    keywords = (p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p for p in keywords if p.name not in GIVEN}


def _trace(estimator: Estimator, problems: int) -> None:
    """Trace one update without computing it, so that a refused value raises now."""
    counts, rows = jnp.zeros(problems), jnp.zeros(max(1, estimator.group_size))
    ids = rows.astype(jnp.int32)
    signals = Signals(rewards=rows, valid=rows == 0, problem_ids=ids, lengths=ids)
    jax.eval_shape(lambda k, n: estimator.update(estimator.init(k, n), signals), counts, counts)


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
