"""Algebra: whether two expressions in LaTeX are equal, by math-verify on sympy.

For worker processes only: an expression can take for ever and all memory. math-verify's own time
limit is off (it needs the main thread, and can hang), and its ways to ``eval`` are not taken: its
reader of plain text is not used, its reader of LaTeX is given a ``parse_number`` that only counts.
"""

from latex2sympy2_extended.latex2sympy2 import (
    ConversionConfig,
    NormalizationConfig,
    _Latex2Sympy,
    normalize_latex,
)
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy import Basic, Expr, I, MatrixBase, N, Rational, Symbol, nan, zoo

from basis_jax.verify.notation import number

NORMALIZATION = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
CONVERSION = ConversionConfig(lowercase_symbols=False)
DIGITS = 60  # e^(pi sqrt(163)) is a whole number to 30 of them


class Reader(_Latex2Sympy):
    """math-verify's reader; numbers are exact, and never given to ``sympify``, which evaluates."""

    def parse_number(self, text: str) -> Rational:
        return Rational(text.replace(",", ""))


class Unreadable(Exception):
    """The right answer is in no notation that the parser knows."""


def same_scalars(gold: str, answer: str) -> bool:
    """Equal as numbers, expressions, relations or sets; an answer that is no mathematics is not.

    Raises Unreadable where it is the gold that cannot be read.
    """
    real = not should_treat_as_complex(gold + " " + answer)
    try:
        left = read(gold, real)
    except Exception as error:
        raise Unreadable(f"the right answer {gold!r} cannot be read") from error
    try:
        right = read(answer, real)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # the parser raises bare Exceptions
        return False
    if any(
        side in (zoo, nan) or not isinstance(side, Basic | MatrixBase) for side in (left, right)
    ):
        return False
    for decide in (same_constants, same_functions):
        verdict = decide(left, right)
        if verdict is not None:
            return verdict
    return verify(
        left, right, timeout_seconds=None, allow_set_relation_comp=True, raise_on_error=True
    )


def read(latex: str, real: bool) -> Basic | MatrixBase:
    """LaTeX as a sympy object in which i is the imaginary unit."""
    value = number(latex)
    if value is not None:
        return Rational(value.numerator, value.denominator)
    reader = Reader(is_real=real, config=CONVERSION)
    found = reader.parse(normalize_latex(latex, NORMALIZATION))
    if not isinstance(found, Basic):
        return found
    return found.xreplace({s: I for s in found.atoms(Symbol) if s.name == "i"})


def same_constants(left: Basic, right: Basic) -> bool | None:
    """Whether two constants are equal: exactly where rational, else to 50 digits. None where one
    is no constant, or both are near 0, where digits say nothing."""
    if not all(isinstance(side, Expr) and not side.free_symbols for side in (left, right)):
        return None
    left, right = left.doit(), right.doit()
    if left.is_Rational and right.is_Rational:
        return bool(left == right)
    values = N(left, DIGITS), N(right, DIGITS)
    if not all(value.is_number and value.is_finite for value in values):
        return None
    size = max(abs(value) for value in values)
    if size < Rational(1, 10**DIGITS):
        return None
    return bool(abs(values[0] - values[1]) < size / 10**50)


def same_functions(left: Basic, right: Basic) -> bool | None:
    """Whether two expressions agree at chosen points, to 50 digits: twice with every variable
    positive, where the usual identities hold, and once with every variable negative. None where
    only the last differs (``log x^2`` and ``2 log x``), or a value says nothing."""
    if not all(isinstance(side, Expr) for side in (left, right)):
        return None
    symbols = sorted(left.free_symbols | right.free_symbols, key=lambda symbol: symbol.name)
    for numerator in (17, 31, -23):
        values = {s: Rational(numerator, 11 + 2 * i) for i, s in enumerate(symbols)}
        verdict = same_constants(left.xreplace(values), right.xreplace(values))
        if not verdict:
            return verdict if numerator > 0 else None
    return True
