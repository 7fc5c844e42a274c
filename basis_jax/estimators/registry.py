"""The estimators by name, and ``make``, which builds the ``Estimator`` that a trainer uses."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from inspect import Parameter, signature
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array

from basis_jax.estimators import by_reference
from basis_jax.estimators.batchwise import basis
from basis_jax.estimators.critic import start_advantages
from basis_jax.estimators.declare import (
    OPTIONAL,
    SIGNALS,
    TABLE,
    Definition,
    Estimator,
    declared_by,
    near,
)
from basis_jax.estimators.filter_mixture import (
    filter_predict,
    value_filter_init,
    value_filter_update,
)
from basis_jax.estimators.group import dr_grpo, gpg, grpo, opo, reinforce_pp_baseline, rloo
from basis_jax.estimators.group_best import best_of_group, pass_at_k, ucpo
from basis_jax.estimators.history import (
    dbb_init,
    dbb_update,
    ema_init,
    ema_update,
    evidence_rates,
    spo_init,
    spo_pp_update,
    spo_update,
)
from basis_jax.estimators.kernel import kae_init, kae_update
from basis_jax.estimators.measured import (
    measured_mean_init,
    measured_mean_learn,
    measured_mean_update,
)
from basis_jax.estimators.optimal_value import a_star_po
from basis_jax.estimators.ranges import Number, Whole
from basis_jax.estimators.rows import at, share
from basis_jax.estimators.shrinkage import james_stein, v05, v05_filter_update
from basis_jax.estimators.single import batch_mean, reinforce, reinforce_pp, remax
from basis_jax.estimators.table import init_table, table_rates
from basis_jax.estimators.value_map import least_variance
from basis_jax.estimators.weighted import otb, weighted_mean_init, weighted_mean_update
from basis_jax.types import Estimate, Signals

ROWS = ("rewards", "valid")
GROUPS = ("rewards", "valid", "group_size")
HISTORY = ("rewards", "valid", "problem_ids")

ESTIMATORS = {
    "a_star_po": Definition(a_star_po, needs=(*ROWS, "table"), predict=table_rates),
    "basis": Definition(
        basis, needs=(*ROWS, "table"), takes=("reference_rewards",), predict=table_rates
    ),
    "batch_mean": Definition(batch_mean, needs=ROWS),
    "best_of_group": Definition(best_of_group, needs=GROUPS),
    "dbb": Definition(dbb_update, dbb_init, needs=HISTORY, predict=evidence_rates),
    "dr_grpo": Definition(dr_grpo, needs=GROUPS),
    "ema": Definition(ema_update, ema_init, needs=ROWS),
    "gae": Definition(start_advantages, needs=(*ROWS, "start_values")),
    "gpg": Definition(gpg, needs=GROUPS),
    "grpo": Definition(grpo, needs=GROUPS),
    "james_stein": Definition(james_stein, needs=GROUPS),
    "kae": Definition(kae_update, kae_init, needs=HISTORY),
    "measured_mean": Definition(
        measured_mean_update, measured_mean_init, needs=ROWS, learn=measured_mean_learn
    ),
    "opo": Definition(opo, needs=(*GROUPS, "lengths")),
    "otb": Definition(otb, needs=(*GROUPS, "score_norms")),
    "pass_at_k": Definition(pass_at_k, needs=GROUPS),
    "reinforce": Definition(reinforce, needs=ROWS),
    "reinforce_pp": Definition(reinforce_pp, needs=(*ROWS, "lengths")),
    "reinforce_pp_baseline": Definition(reinforce_pp_baseline, needs=(*GROUPS, "lengths")),
    "remax": Definition(remax, needs=(*ROWS, "greedy_rewards")),
    "rloo": Definition(rloo, needs=GROUPS),
    "spo": Definition(
        spo_update,
        spo_init,
        needs=(*HISTORY, "lengths"),
        takes=("table",),
        options=("decay", "convention", "low", "high"),  # no run measures ``divergence``
        predict=evidence_rates,
    ),
    "spo_pp": Definition(
        spo_pp_update,
        spo_init,
        needs=(*HISTORY, "lengths"),
        takes=("table",),
        options=("decay", "convention", "low", "high"),  # no run measures ``staleness``
        predict=evidence_rates,
    ),
    "v05": Definition(v05, needs=(*GROUPS, "table"), predict=table_rates),
    "v05_filter": Definition(
        v05_filter_update,
        value_filter_init,
        needs=(*HISTORY, "group_size"),
        takes=("table", "features"),
        options=("leave_one_out", "low", "high", "own_variance", "shared_variance"),
        predict=filter_predict,
    ),
    "ucpo": Definition(ucpo, needs=(*GROUPS, "logprob_sum", "lengths")),
    "value_filter": Definition(
        value_filter_update,
        value_filter_init,
        needs=HISTORY,
        takes=("table", "features"),
        predict=filter_predict,
    ),
    "vineppo": Definition(start_advantages, needs=(*ROWS, "start_values")),
    "weighted_mean": Definition(
        weighted_mean_update, weighted_mean_init, needs=(*ROWS, "score_norms")
    ),
}
"""The functions of each estimator and what it needs. A single function is a function of rows; two
are update(state, signals) and init(successes, trials). Module ``declare`` explains the words."""

LEAST_VARIANCE = "+least_variance"
"""A suffix: ``value_filter+least_variance`` is ``least_variance(make("value_filter"))``."""

LIBRARY_ONLY = {
    "sr_ppo": "a critic's prefix values",
}
"""Functions for which a training step's Signals and table are not enough, and what they need."""


def definition(estimator: str | Callable | Definition) -> Definition:
    """What an estimator declares: its functions, ``needs``, ``takes`` and ``options``.

    ``estimator`` is a name out of ``ESTIMATORS``, a reference (``FILE.py:NAME`` with a path
    relative to the current directory, or ``package.module:NAME``), or what ``stateless``,
    ``stateful`` or ``Definition`` made. The suffix ``+least_variance`` of a name or reference turns
    its values into the baselines of ``least_variance``. Raises ValueError, naming what is allowed,
    for anything else, for a reference that cannot be loaded, and for something that is not
    declared.

    >>> estimators.definition("grpo").needs
    ('rewards', 'valid', 'group_size')
    >>> estimators.definition("value_filter").takes
    ('table', 'features')
    """
    if isinstance(estimator, Definition):
        return estimator
    if not isinstance(estimator, str):
        return _declared(estimator, getattr(estimator, "__name__", repr(estimator)))
    if estimator.endswith(LEAST_VARIANCE):
        inner = definition(estimator.removesuffix(LEAST_VARIANCE))
        return replace(inner, name=estimator, wrap=least_variance)
    if ":" in estimator:
        return _declared(by_reference.load(estimator), estimator)
    if estimator in LIBRARY_ONLY:
        raise ValueError(
            f"{estimator} needs {LIBRARY_ONLY[estimator]}, which a training step's Signals do not "
            f"carry; call estimators.{estimator} yourself or make another"
            f"{near(estimator, ESTIMATORS)}"
        )
    if estimator not in ESTIMATORS:
        allowed = [*ESTIMATORS, *by_reference.FORMS.split(" or ")]
        raise ValueError(f"unknown estimator {estimator!r}{near(estimator, allowed)}")
    return replace(ESTIMATORS[estimator], name=estimator)


def option_names(estimator: str | Callable | Definition) -> frozenset[str]:
    """The options of ``make(estimator, ...)``, ``group_size`` and ``features`` included where the
    estimator has them. Raises ValueError as ``definition``.

    >>> sorted(estimators.option_names("grpo"))
    ['convention', 'group_size']
    """
    return frozenset(_options(definition(estimator)))


def source_fingerprint(name: str) -> str | None:
    """SHA-256 in hex of the file behind an estimator by reference; None for a built-in name.

    It makes the file's content part of a run's identity. What the file imports is not part of it.
    Raises ValueError for an unknown name and for a file or module that does not exist.

    >>> estimators.source_fingerprint("basis") is None
    True
    >>> len(estimators.source_fingerprint("basis_jax.estimators.batchwise:basis"))
    64
    """
    if ":" in name:
        return by_reference.fingerprint(name.removesuffix(LEAST_VARIANCE))
    definition(name)
    return None


def make(estimator: str | Callable | Definition, /, **options: Any) -> Estimator:
    """Make the ``Estimator`` that a trainer uses, from a name or what else ``definition`` accepts.

    ``options`` are keyword-only parameters of the estimator's functions. Raises ValueError, naming
    what is allowed, for an unknown name or option, a value that the estimator refuses, a group
    estimator with group_size < 2, and an update that does not return what an update must.

    >>> estimator = estimators.make("rloo", group_size=2)
    >>> state = estimator.init(np.zeros(9), np.zeros(9))  # nine problems, no offline table
    >>> signals = estimators.Signals(rewards=jnp.float32([1, 0]), valid=jnp.array([True, True]),
    ...                              problem_ids=jnp.array([3, 3]), lengths=jnp.array([5, 6]))
    >>> state, estimate = estimator.update(state, signals)
    >>> estimate.advantages.tolist()
    [1.0, -1.0]
    """
    declared = definition(estimator)
    if "group_size" in declared.takes:
        options = {"group_size": 1, **options}
    _check_options(declared, options)
    init, update = _lift(declared, options) if declared.init is None else _bind(declared, options)
    needs_table = "table" in declared.needs
    takes_rewards = "reference_rewards" in declared.takes
    takes_table = "table" in declared.provided or takes_rewards
    size = options.get("group_size", 1)
    learn = _bound(declared.learn, options) if declared.learn else None
    made = Estimator(
        init, update, needs_table, takes_table, size, takes_rewards, learn, declared.predict
    )
    _trace(made, declared, options)
    made = made._replace(update=_guarded(update, declared))
    if declared.wrap is None:
        return made
    return declared.wrap(made, **{n: options[n] for n in ("low", "high") if n in options})


def _declared(found: Any, name: str) -> Definition:
    declared = declared_by(found)
    if declared is None:
        raise ValueError(
            f"{name} is not declared as an estimator (it is of type {type(found).__name__}); put "
            '@estimators.stateless(needs=("rewards", "valid")) above a function of rows, or '
            "@estimators.stateful(init, needs=...) above an update(state, signals)"
        )
    return replace(declared, name=name)


def _options(declared: Definition) -> list[str]:
    by_make = [word for word in ("group_size", "features") if word in declared.provided]
    return [*(declared.options or ()), *by_make]


def _check_options(declared: Definition, options: dict) -> None:
    allowed = _options(declared)
    for option in options:
        if option not in allowed:
            raise ValueError(f"{declared.name} has no option {option!r}{near(option, allowed)}")
    required = [
        n for n in declared.options or () if declared.parameters[n].default is Parameter.empty
    ]
    required += [word for word in ("group_size",) if word in declared.needs]
    for option in required:
        if option not in options:
            raise ValueError(f"{declared.name} needs the option {option!r}; give it a value")
    if options.get("features") is not None:
        Number(axes=2).checked(declared.name, "features", options["features"])
    if "group_size" in declared.provided:
        Whole(1).checked(declared.name, "group_size", options["group_size"])
    if "group_size" in declared.needs and options["group_size"] < 2:
        raise ValueError(
            f"got group_size={options['group_size']}; {declared.name} compares the rollouts of a "
            "prompt and needs 2 or more"
        )


def _guarded(update: Callable, declared: Definition) -> Callable:
    """The update, which raises ValueError if signals that it needs are missing, and treats a row
    whose reward is NaN or infinite as invalid. This also guards a user's own estimator."""
    needed = [name for name in OPTIONAL if name in declared.needs]

    def guarded(state: Any, signals: Signals) -> tuple[Any, Estimate]:
        for name in needed:
            if getattr(signals, name) is None:
                raise ValueError(
                    f"{declared.name} needs {name}, which these Signals lack; give "
                    f"Signals({name}=...), one number per row"
                )
        finite, valid = jnp.isfinite(signals.rewards), signals.valid
        rewards = jnp.where(finite, signals.rewards, 0)
        clean = replace(signals, rewards=rewards, valid=valid & finite)
        state, told = update(state, clean)
        lost = valid & ~finite
        return state, Estimate(
            advantages=jnp.where(lost, 0, told.advantages),
            values=jnp.where(lost, 0, told.values),
            baselines=jnp.where(lost, 0, told.baselines),
            info={**told.info, "nan_share": share(~finite, valid)},
        )

    return guarded


def _lift(declared: Definition, options: dict) -> tuple[Callable, Callable]:
    """(init, update) of a function of rows; the state is the table, or nothing."""
    names = [word for word in declared.provided if word in SIGNALS]
    counts, rewarded = (word in declared.provided for word in ("table", "reference_rewards"))

    def init(successes: Any, trials: Any, *, reference_rewards: Any = None) -> Any:
        if not (counts or rewarded):
            return ()
        kept = reference_rewards if rewarded else None
        return init_table(successes, trials, reference_rewards=kept)

    def update(state: Any, signals: Signals) -> tuple[Any, Any]:
        every = {name: getattr(signals, name) for name in names}
        given = {name: x for name, x in every.items() if x is not None}
        if counts:
            given |= {name: at(getattr(state, name), signals.problem_ids) for name in TABLE}
        if rewarded and state.rewards is not None:
            given["reference_rewards"] = at(state.rewards, signals.problem_ids)
        return state, declared.update(**given, **options)

    return init, update


def _bind(declared: Definition, options: dict) -> tuple[Callable, Callable]:
    """(init, update), each with the options that it takes."""
    return _bound(cast(Callable, declared.init), options), _bound(declared.update, options)


def _bound(function: Callable, options: dict) -> Callable:
    taken = {n: x for n, x in options.items() if n in signature(function).parameters}
    return partial(function, **taken)


def _trace(estimator: Estimator, declared: Definition, options: dict) -> None:
    """Trace one update without computing it, so that a refused value raises now, and check what it
    returns."""
    features = options.get("features")
    problems, rows = 1 if features is None else len(features), max(1, estimator.group_size)
    given = {}
    if "features" in declared.needs and features is None:
        given = {"features": jnp.zeros((problems, 1))}
    kinds = {"valid": bool, "problem_ids": jnp.int32, "lengths": jnp.int32}
    signals = Signals(**{name: jnp.zeros(rows, kinds.get(name, jnp.float32)) for name in SIGNALS})

    def one_step(successes: Array, trials: Array, signals: Signals) -> tuple[Any, Any, Estimate]:
        state = estimator.init(successes, trials, **given)
        returned = estimator.update(state, signals)
        pair = isinstance(returned, tuple) and len(returned) == 2
        if not (pair and isinstance(returned[1], Estimate)):
            got = type(returned[1] if declared.init is None else returned).__name__
            raise ValueError(
                f"{declared.name} returned type {got}; a function of rows returns an Estimate, an "
                "update the pair of the new state and an Estimate"
            )
        return state, returned[0], returned[1]

    counts = jnp.zeros(problems)
    state, after, estimate = jax.eval_shape(one_step, counts, counts, signals)
    if _kinds(state) != _kinds(after):
        raise ValueError(
            f"{declared.name} turned a state {_kinds(state)} into {_kinds(after)}; return one with "
            "the shapes and types of the old one"
        )
    for field in ("advantages", "values", "baselines"):
        array = getattr(estimate, field)
        if array.shape != (rows,) or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{declared.name} returned {field} {array.dtype}{list(array.shape)} for {rows} "
                "rows; give one float per row"
            )


def _kinds(state: Any) -> tuple[str, list[str]]:
    leaves, structure = jax.tree.flatten(state)
    return str(structure), [f"{x.dtype}{list(x.shape)}" for x in leaves]
