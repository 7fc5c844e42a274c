"""Equality of sympy expressions by their values to 50 digits: those of constants, and those of
functions at chosen points."""

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction

from sympy import (
    Abs,
    Basic,
    Expr,
    Float,
    Mod,
    N,
    Pow,
    Product,
    Rational,
    Sum,
    Symbol,
    binomial,
    ceiling,
    factorial,
    floor,
    im,
    log,
    re,
)

from basis_jax.verify.criteria import EXACT, Tolerance

DIGITS = 60  # e^(pi sqrt(163)) is a whole number to 30 of them
INTEGER_NAMES = frozenset("jkmnKMN")
"""Letters that are taken for whole numbers if two expressions agree only at whole numbers."""
INTEGERS = ((7, 12), (6, 4), (9, 6), (10, 15), (5, 8), (12, 18), (-4, -9))
"""Values of the first two variables, with and without common factors, of either parity."""


def same_constants(left: Basic, right: Basic, tolerance: Tolerance = EXACT) -> bool | None:
    """Whether two constants are equal: exactly if both are rational, otherwise to 50 digits, or
    within the tolerance. None if one is not a constant, or if the digits of both are only rounding
    noise, as those of an expression whose value is 0."""
    if not all(isinstance(side, Expr) and not side.free_symbols for side in (left, right)):
        return None
    left, right = left.doit(), right.doit()
    if left.is_Rational and right.is_Rational:
        return tolerance.allows(*(to_fraction(side) for side in (left, right)))
    values = N(left, DIGITS), N(right, DIGITS)
    if not all(value.is_number and value.is_finite for value in values):
        return None
    if not any(map(is_precise, values)):
        return None
    size = max(abs(value) for value in values)
    limit = Rational(tolerance.absolute) + Rational(tolerance.relative) * abs(values[0])
    return bool(abs(values[0] - values[1]) <= max(limit, size / 10**50))


def to_fraction(value: Rational) -> Fraction:
    return Fraction(int(value.p), int(value.q))


def is_precise(value: Expr) -> bool:
    """Whether a number's digits are more than the rounding noise of a sum that cancels."""
    parts = value.atoms(Float)
    return any(part and part._prec > 10 for part in parts) or bool(value.is_Rational and value)


def same_functions(left: Basic, right: Basic) -> bool | None:
    """Whether two expressions agree at every chosen point at which both are real (or complex, if
    the variables are positive). None if they are not expressions, or if no point is of use.

    Integer functions are tried at integers too. If the only variables are letters that usually
    stand for integers (k, m, n), agreement at integers is enough.
    """
    if not all(isinstance(side, Expr) for side in (left, right)):
        return None
    symbols = sorted(left.free_symbols | right.free_symbols, key=lambda symbol: symbol.name)
    if not symbols:
        return None
    discrete = any(side.has(floor, ceiling, Mod, factorial, binomial) for side in (left, right))
    discrete = discrete or any(is_of_integers(side) for side in (left, right))
    whole = None
    named = all(symbol.name.partition("_")[0] in INTEGER_NAMES for symbol in symbols)
    if discrete or named:
        signed = not any(
            side.has(factorial, binomial, Sum, Product) or is_of_integers(side)
            for side in (left, right)
        )
        whole = agree(left, right, integer_points(symbols, signed=signed))
        if whole is False:
            return False
    if any(is_of_integers(side) for side in (left, right)):
        return whole
    verdict = agree(left, right, real_points(symbols))
    return True if whole and named and verdict is not None else verdict


def is_of_integers(side: Expr) -> bool:
    """Whether the expression has a function that is defined for integers only."""
    return any(type(f).__name__ in ("Gcd", "Lcm") for f in side.atoms(Expr) if f.is_Function)


def real_points(symbols: Sequence[Symbol]) -> Iterator[tuple[dict[Symbol, Rational], bool]]:
    """Points, and whether all variables are positive there: three with all positive (in one of them
    all large), one with all negative, and for several variables one with alternating signs."""
    for numerator, signs in ((17, (1,)), (31, (1,)), (1009, (1,)), (23, (-1,)), (19, (1, -1))):
        if len(symbols) == 1 and len(signs) == 2:
            continue
        values = {
            symbol: Rational(numerator * sign, 11 + 2 * i)
            for i, (symbol, sign) in enumerate(zip(symbols, itertools.cycle(signs), strict=False))
        }
        yield values, signs == (1,)


def integer_points(
    symbols: Sequence[Symbol], *, signed: bool
) -> Iterator[tuple[dict[Symbol, Rational], bool]]:
    """Points of integers, and whether all are positive there; all are unless ``signed``."""
    for first in INTEGERS:
        later = range(3, 3 + 2 * len(symbols), 2)
        values = dict(zip(symbols, (*first, *later), strict=False))
        if signed or first[0] > 0:
            yield {symbol: Rational(value) for symbol, value in values.items()}, first[0] > 0


def agree(
    left: Expr, right: Expr, points: Iterator[tuple[dict[Symbol, Rational], bool]]
) -> bool | None:
    """Whether two expressions have equal values at every point that is used. None if none is, or if
    a point with positive variables cannot decide (no value, or digits that are rounding noise)."""
    verdict_so_far = None
    for values, positive in points:
        if not positive and not (has_real_roots(left, values) and has_real_roots(right, values)):
            continue
        sides = left.xreplace(values), right.xreplace(values)
        if not positive and not all(map(is_real, sides)):
            continue
        verdict = same_constants(*sides)
        if verdict is False or (verdict is None and positive):
            return verdict
        verdict_so_far = verdict_so_far or verdict
    return verdict_so_far


def has_real_roots(side: Expr, values: dict[Symbol, Rational]) -> bool:
    """Whether every root and logarithm in the expression has a real value at a point. Two that have
    none can multiply to a real number, as sqrt(-2) sqrt(-3) does."""
    for part in side.atoms(Pow, log):
        inside = part.args[0].xreplace(values)
        whole = isinstance(part, Pow) and part.exp.xreplace(values).is_integer
        if not whole and inside.is_negative:
            return False
    return True


def is_real(value: Expr) -> bool:
    """Whether a constant is finite and real."""
    if value.is_Rational:
        return True
    number = N(value.doit(), DIGITS)
    if not number.is_number or not number.is_finite:
        return False
    real, imaginary = re(number), im(number)
    return bool(Abs(imaginary) <= Abs(real) / 10**40)
