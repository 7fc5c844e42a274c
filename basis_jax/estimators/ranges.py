"""The allowed values of options. The decorator ``Options`` checks them before a function is called.

All other classes are ranges. Their method ``checked(who, option, value)`` returns the value, or
raises a ValueError that says what was given and what is allowed. Numbers are compared as float32. A
traced number (``jax.vmap`` over an option) cannot be compared and is accepted.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.typing import ArrayLike

Function = TypeVar("Function", bound=Callable)


class Options:
    """A decorator that checks the arguments it names: ``@Options(decay=SHARE)``."""

    def __init__(self, **ranges: Any):
        self.ranges = ranges

    def __call__(self, function: Function) -> Function:
        parameters, who = inspect.signature(function), function.__name__
        for end in ("_update", "_init"):
            who = who.removesuffix(end)

        @functools.wraps(function)
        def checking(*args: Any, **options: Any) -> Any:
            try:
                given = parameters.bind_partial(*args, **options)
            except TypeError:
                return function(*args, **options)  # raises a clearer TypeError
            for name in self.ranges.keys() & given.arguments.keys():
                checked = self.ranges[name].checked(who, name, given.arguments[name])
                given.arguments[name] = checked
            return function(*given.args, **given.kwargs)

        return cast(Function, checking)


@dataclass(frozen=True)
class Number:
    """Finite numbers from ``low`` to ``high``. Both ends are included unless they are named in
    ``without`` ("low", "high"). ``axes``: 0 for one number, k for an array with k axes, None for
    either."""

    low: float = -np.inf
    high: float = np.inf
    without: tuple[str, ...] = ()
    axes: int | None = 0

    def checked(self, who: str, option: str, value: Any) -> Any:
        if isinstance(value, jax.core.Tracer):
            return value
        try:
            array = np.asarray(value)
        except ValueError:  # rows of unequal length
            array = np.asarray("rows of unequal length")
        number = array.dtype.kind in "iuf" or isinstance(value, jax.Array)
        if not number or self.axes not in (None, array.ndim) or (array.ndim < 2 and not array.size):
            raise ValueError(f"{who} got {option}={_short(value)}; give {self}")
        bad = np.argwhere(~self._has(array))
        if len(bad):
            raise ValueError(f"{who} got {option}={_short(value, bad[0])}; give {self}")
        return value if array.ndim or isinstance(value, float) else float(array)

    def _has(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            x = np.asarray(values, np.float32)
        above = x > self.low if "low" in self.without else x >= self.low
        below = x < self.high if "high" in self.without else x <= self.high
        return np.asarray(np.isfinite(x) & above & below)

    def __str__(self) -> str:
        what = {0: "a finite number", 1: "one or more finite numbers"}.get(
            self.axes if self.axes is not None else 1, f"finite numbers in {self.axes} axes"
        )
        limits = []
        if np.isfinite(self.low):
            limits.append(f"{'above' if 'low' in self.without else 'of at least'} {self.low:g}")
        if np.isfinite(self.high):
            limits.append(f"{'below' if 'high' in self.without else 'of at most'} {self.high:g}")
        return " ".join([what, " and ".join(limits)]).strip()


@dataclass(frozen=True)
class Whole:
    """Whole numbers from ``least`` on."""

    least: int
    reason: str = ""

    def checked(self, who: str, option: str, value: Any) -> int:
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or value < self.least:
            why = f" ({self.reason})" if self.reason else ""
            raise ValueError(
                f"{who} got {option}={_short(value)}; give a whole number of at least "
                f"{self.least}{why}"
            )
        return int(value)


@dataclass(frozen=True)
class OneOf:
    """One of these words."""

    words: tuple[str, ...]

    def checked(self, who: str, option: str, value: Any) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise ValueError(
                f"{who} got {option} {_short(value)}; choose one of {', '.join(self.words)}"
            )
        return value


@dataclass(frozen=True)
class Switch:
    """True or False."""

    def checked(self, who: str, option: str, value: Any) -> bool:
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{who} got {option}={_short(value)}; give True or False")
        return bool(value)


@dataclass(frozen=True)
class OrNone:
    """What the other range allows, or None."""

    other: Any

    def checked(self, who: str, option: str, value: Any) -> Any:
        return None if value is None else self.other.checked(who, option, value)


@dataclass(frozen=True)
class Rewards:
    """Rewards from ``low`` to ``high``."""

    low: Any = 0.0
    high: Any = 1.0

    def check(self, who: str, rewards: ArrayLike, valid: ArrayLike | None = None) -> None:
        """Raise ValueError unless low < high and every valid reward lies between them; NaN does not
        count. Traced numbers pass."""
        if isinstance(self.low, jax.core.Tracer) or isinstance(self.high, jax.core.Tracer):
            return
        low, high = np.float32(self.low), np.float32(self.high)
        if not low < high:
            raise ValueError(f"{who} got low={self.low}, high={self.high}; low must be below high")
        if isinstance(rewards, jax.core.Tracer) or isinstance(valid, jax.core.Tracer):
            return
        found = np.asarray(rewards, np.float32)
        outside = (found < low) | (found > high)
        if valid is not None and np.shape(valid) == found.shape:
            outside &= np.asarray(valid, bool)
        if outside.any():
            place = tuple(np.argwhere(outside)[0].tolist())
            raise ValueError(
                f"{who} got the reward {found[place]:g} in row {', '.join(map(str, place))}; its "
                f"rewards lie between {low:g} and {high:g}: scale them, or give their range as low "
                "and high where it has these options"
            )


def _short(value: Any, place: Any = ()) -> str:
    """The value as text, or that of the entry at this place of an array."""
    if len(place):
        return f"{np.asarray(value)[tuple(place)]} at {place.tolist()}"
    if np.ndim(value) if not isinstance(value, (list, tuple)) else True:
        return f"{type(value).__name__} of shape {np.shape(np.asarray(value, object))}"
    return repr(value)


FINITE = Number()
NOT_NEGATIVE = Number(0.0)
POSITIVE = Number(0.0, without=("low",))
SHARE = Number(0.0, 1.0)
BETWEEN = Number(0.0, 1.0, without=("low", "high"))
SWITCH = Switch()
GROUP = Whole(2, "it compares the rollouts of a prompt")
