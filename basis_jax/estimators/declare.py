"""Declare an estimator: which functions it has, and what a run must provide for them.

A stateless estimator is one function of rows. A stateful one is a pair: ``init(successes, trials)``
over all M problems and ``update(state, signals)`` on the rollouts of one step.

    @estimators.stateless(needs=("rewards", "valid"))
    def above(rewards, *, valid=None, threshold=0.5): ...

    @estimators.stateful(start, needs=("rewards", "valid", "problem_ids"), takes=("table",))
    def remembered(state, signals, *, rate=0.1): ...

``needs`` lists what the estimator requires, ``takes`` what it uses if the run has it. Both use
these words:

- every field of ``Signals`` (``rewards``, ``valid``, ``problem_ids``, ``lengths``,
  ``score_norms``, ``logprob_sum``, ``start_values``, ``greedy_rewards``), [N]: a stateless function
  gets it as the argument of that name, ``update`` finds it in ``signals``. Training gives all of
  them, except that ``start_values`` need a critic (``gae``) or the rollout plan ``branch``, and
  ``greedy_rewards`` the plan ``greedy_beside``. If the caller leaves out one of the last four, an
  estimator that ``needs`` it raises a ValueError;
- ``table``, the offline reference table: a stateless function gets the arguments ``successes`` and
  ``trials`` of its rows' problems, [N]. ``init`` always gets those of all problems, [M]; without a
  table trials are 0;
- ``reference_rewards``, the rewards of the table's completions [M n], NaN where there is none. A
  run has them only if one of them is neither 0 nor 1; otherwise the counts say everything. So this
  word is for ``takes`` only, and its parameter has a default. A stateless function gets those of
  its rows' problems, [N n], as the argument of that name; ``init`` gets those of all problems as a
  keyword;
- ``features``, prompt features [M e]: ``init`` gets the keyword ``features``;
- ``group_size``, the number of rollouts per prompt, which are adjacent rows: a keyword of any
  function.

All other keyword-only parameters are the estimator's options.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

from basis_jax.references import near
from basis_jax.types import Estimate, Measurement, Signals

Function = TypeVar("Function", bound=Callable)
SIGNALS = tuple(field.name for field in dataclasses.fields(Signals))
OPTIONAL = ("score_norms", "logprob_sum", "start_values", "greedy_rewards")  # may be None
WORDS = (*SIGNALS, "table", "reference_rewards", "features", "group_size")
BY_KEYWORD = ("reference_rewards", "features", "group_size")
TABLE = ("successes", "trials")  # the arguments that stand for the word ``table``


@dataclass(frozen=True)
class Definition:
    """An estimator's functions and what it declares; ``ESTIMATORS`` is a table of these.

    ``needs`` and ``takes``: words of the module ``declare``. ``options``: names of keyword-only
    parameters; by default all that the run does not provide. ``stateless`` and ``stateful`` make
    one as the attribute ``definition`` of a function, which stays as it is.

    Raises ValueError, naming what is allowed, for an unknown word or option, and for a declaration
    that does not match the functions' parameters.

    >>> spo = estimators.ESTIMATORS["spo"]
    >>> spo.needs, spo.takes
    (('rewards', 'valid', 'problem_ids', 'lengths'), ('table',))
    >>> spo.options
    ('decay', 'convention', 'low', 'high')
    >>> doubled = estimators.Definition(lambda rewards: estimators.reinforce(2 * rewards),
    ...                                 needs=("rewards",), name="doubled")
    >>> estimators.make(doubled).group_size
    1
    """

    update: Callable  # of rows where init is None, else update(state, signals)
    init: Callable | None = None
    needs: Sequence[str] = ()
    takes: Sequence[str] = ()
    options: Sequence[str] | None = None
    name: str = ""  # in messages; by default that of ``update``
    wrap: Callable[..., "Estimator"] | None = None  # applied to the finished Estimator
    learn: Callable | None = None  # learn(state, measurement); may have options of ``update``
    predict: Callable | None = None  # predict(state): see ``Estimator``

    def __post_init__(self):
        set_field = object.__setattr__  # the dataclass is frozen
        set_field(self, "name", self.name or getattr(self.update, "__name__", repr(self.update)))
        for field in ("needs", "takes"):
            set_field(self, field, _words(self.name, field, getattr(self, field)))
        _check_parameters(self)
        options = self.options
        if options is None:
            options = [n for n in self.parameters if n not in self.arguments]
        for option in options:
            _check_option(self, option)
        set_field(self, "options", tuple(options))

    @property
    def provided(self) -> tuple[str, ...]:
        """The words of ``needs`` and ``takes``."""
        return (*self.needs, *self.takes)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The parameters that a run provides by name; those of ``update`` if it is stateless."""
        if self.init is not None:
            return tuple(w for w in self.provided if w in BY_KEYWORD)
        return tuple(a for w in self.provided for a in (TABLE if w == "table" else (w,)))

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters of both functions."""
        functions = [f for f in (self.init, self.update) if f is not None]
        every = [p for f in functions for p in inspect.signature(f).parameters.values()]
        return {p.name: p for p in every if p.kind is inspect.Parameter.KEYWORD_ONLY}


class Estimator(NamedTuple):
    """A pair of pure functions, as in optax, and what the trainer must provide for them.

    ``init(successes, trials) -> state`` over all M problems (trials may be 0) and
    ``update(state, signals) -> (state, Estimate)`` on the rollouts of one step, whole and before
    any split. A problem id outside 0..M-1 gives NaN where a table or a history is read, and writes
    nothing. A valid row whose reward is NaN or infinite counts as invalid (``info["nan_share"]``).

    >>> def update(state, signals):
    ...     return state, estimators.reinforce(signals.rewards, valid=signals.valid)
    >>> by_hand = estimators.Estimator(lambda successes, trials: (), update, False, False, 1)
    >>> by_hand.init(np.zeros(9), np.zeros(9))
    ()
    """

    init: Callable[[Any, Any], Any]
    update: Callable[[Any, Signals], tuple[Any, Estimate]]
    needs_table: bool  # cannot work without offline trials
    takes_table: bool  # starts from offline trials if there are any
    group_size: int  # rollouts per prompt, adjacent rows
    takes_rewards: bool = False  # ``init`` has the keyword ``reference_rewards``
    learn: Callable[[Any, Measurement], Any] | None = None  # from what training steps measure
    predict: Callable[[Any], Any] | None = None
    """The expected rewards of all M problems under the state, as success rates in 0..1: for rollout
    plans."""


def stateless(
    *, needs: Sequence[str], takes: Sequence[str] = (), options: Sequence[str] | None = None
) -> Callable[[Function], Function]:
    """Declare a function of rows as an estimator: a decorator that leaves the function as it is.

    The function gets what ``needs`` and ``takes`` list (words of the module ``declare``) and its
    options by name, and returns an ``Estimate`` of the N rows. Raises the errors of ``Definition``.

    >>> @estimators.stateless(needs=("rewards", "valid"))
    ... def above(rewards, *, valid=None, threshold=0.5):
    ...     rewards, valid = estimators.rows.read(rewards, valid)
    ...     values = jnp.full_like(rewards, threshold)
    ...     return estimators.rows.estimate(rewards - values, values, valid)
    >>> above(np.float32([1, 0])).advantages.tolist()
    [0.5, -0.5]
    >>> estimators.option_names(above)
    frozenset({'threshold'})
    """

    def declare(function: Function) -> Function:
        cast(Any, function).definition = Definition(
            function, needs=needs, takes=takes, options=options
        )
        return function

    return declare


def stateful(
    init: Callable,
    *,
    needs: Sequence[str],
    takes: Sequence[str] = (),
    options: Sequence[str] | None = None,
    predict: Callable | None = None,
) -> Callable[[Function], Function]:
    """Declare a pair of functions as an estimator: a decorator of ``update(state, signals) ->
    (state, Estimate)``, which it leaves as it is. ``init(successes, trials) -> state`` is over all
    M problems.

    The state is any pytree whose shapes and types do not change. An option goes to whichever of the
    two functions have it as a keyword-only parameter. ``predict(state)`` is for rollout plans: see
    ``Estimator``. Raises the errors of ``Definition``.

    >>> def start(successes, trials):
    ...     return jnp.float32(0)
    >>> @estimators.stateful(start, needs=("rewards", "valid"))
    ... def last_mean(state, signals):
    ...     rewards, valid = estimators.rows.read(signals.rewards, signals.valid)
    ...     values = jnp.full_like(rewards, state)
    ...     return jnp.mean(rewards), estimators.rows.estimate(rewards - values, values, valid)
    >>> estimator = estimators.make(last_mean)
    >>> state = estimator.init(np.zeros(9), np.zeros(9))
    >>> signals = estimators.Signals(rewards=jnp.float32([1, 0]), valid=jnp.array([True, True]),
    ...                              problem_ids=jnp.array([3, 7]), lengths=jnp.array([5, 6]))
    >>> state, estimate = estimator.update(state, signals)
    >>> float(state), estimate.values.tolist()
    (0.5, [0.0, 0.0])
    """

    def declare(update: Function) -> Function:
        cast(Any, update).definition = Definition(
            update, init, needs, takes, options, predict=predict
        )
        return update

    return declare


def declared_by(found: Any) -> Definition | None:
    """The Definition that something is or carries, or None."""
    carried = found if isinstance(found, Definition) else getattr(found, "definition", None)
    return carried if isinstance(carried, Definition) else None


def _words(name: str, field: str, words: Sequence[str]) -> tuple[str, ...]:
    if isinstance(words, str):
        raise ValueError(f"{name} has {field}={words!r}; give a tuple: {field}=({words!r},)")
    for word in words:
        if word not in WORDS:
            raise ValueError(f"{name} {field} {word!r}, which no run provides{near(word, WORDS)}")
    return tuple(words)


def _check_parameters(definition: Definition) -> None:
    """Raise ValueError unless the functions' parameters fit what is declared."""
    name, has = definition.name, definition.parameters
    if "reference_rewards" in definition.needs:
        raise ValueError(
            f"{name} needs 'reference_rewards', which a run with rewards of 0 and 1 does not have; "
            "put it in takes"
        )
    if definition.init is None:
        if "features" in definition.provided:
            raise ValueError(
                f"{name} is stateless but declares 'features', which only an init gets; declare it "
                "with @estimators.stateful(init, ...)"
            )
        has = dict(inspect.signature(definition.update).parameters)
        for parameter in has.values():
            fixed = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            if fixed and parameter.name not in definition.arguments:
                raise ValueError(
                    f"{name} has the parameter {parameter.name!r} that nothing in needs or takes "
                    "provides; declare it there, or make it a keyword-only option"
                )
    for argument in definition.arguments:
        if argument not in has:
            raise ValueError(
                f"{name} has no parameter {argument!r}, which its needs or takes provide; add the "
                "parameter or take the word out"
            )


def _check_option(definition: Definition, option: str) -> None:
    """Raise ValueError unless the option is a keyword-only parameter that no run provides."""
    if option not in definition.parameters:
        raise ValueError(
            f"{definition.name} declares the option {option!r} but has no such keyword-only "
            f"parameter{near(option, definition.parameters)}"
        )
    if option in WORDS or option in TABLE:
        raise ValueError(
            f"{definition.name} has the parameter {option!r} but neither needs nor takes provide "
            f"it; add {'table' if option in TABLE else option!r} to one of them"
        )
