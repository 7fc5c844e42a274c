"""Checks of the options of plans. Each raises a ValueError of one sentence."""

import math
from typing import Any


def whole(name: str, value: Any, *, least: int, most: int | None = None) -> None:
    """Raise ValueError unless it is a whole number from ``least`` to ``most``."""
    inside = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not inside or (most is not None and value > most):
        allowed = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"got {name} {value!r}; give a whole number, {allowed}")


def number(name: str, value: Any, *, above: float) -> None:
    """Raise ValueError unless it is a finite number above ``above``."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (real and math.isfinite(value) and value > above):
        raise ValueError(f"got {name} {value!r}; give a number above {above:g}")


def switch(name: str, value: Any) -> None:
    """Raise ValueError unless it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"got {name} {value!r}; give True or False")


def word(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless it is one of the allowed words."""
    if value not in allowed:
        raise ValueError(f"got {name} {value!r}; allowed are {', '.join(allowed)}")
