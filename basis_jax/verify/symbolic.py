r"""Algebra: whether two expressions in LaTeX are equal, by math-verify on sympy.

For worker processes only: an expression can take all memory and never end. math-verify's own time
limit is off, because it needs the main thread and can hang. Its calls of ``eval`` are avoided: its
reader of plain text is not used, and its reader of LaTeX gets a ``parse_number`` that only reads
numbers.
"""

import math
import re
from collections.abc import Iterable

from latex2sympy2_extended.latex2sympy2 import (
    ConversionConfig,
    NormalizationConfig,
    _Latex2Sympy,
    normalize_latex,
)
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy import Basic, Expr, Function, I, Integer, MatrixBase, Rational, Symbol, nan, zoo

from basis_jax.verify.criteria import EXACT, Tolerance
from basis_jax.verify.notation import BRACED, number
from basis_jax.verify.sampling import same_constants, same_functions
from basis_jax.verify.units import TRIGONOMETRY

NORMALIZATION = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
CONVERSION = ConversionConfig(lowercase_symbols=False)

ANGLE = (
    r"(?:\((?:[^()]|\([^()]*\))*\)|\{[^{}]*\}"
    rf"|\\frac ?{BRACED} ?{BRACED}|[0-9.]+(?:\\pi|[a-z])?|\\[a-z]+|[a-z])"
)
DEGREES = re.compile(rf"({ANGLE}) ?\^\\circ ?")
CIS = re.compile(rf"\\cis ?({ANGLE}(?:/[0-9]+)?)")
CHOSEN = re.compile(r"(?<![a-zA-Z\\])C ?\( ?([0-9]+|[a-z]) ?, ?([0-9]+|[a-z]) ?\)")


class IntegerFunction(Function):
    """A function of integers, which sympy would evaluate as a function of polynomials. It stays
    unevaluated until its arguments are integers."""

    @classmethod
    def eval(cls, *arguments):
        if all(isinstance(a, Integer) for a in arguments):
            return Integer(cls.compute(*map(int, arguments)))
        if any(a.is_number and not a.is_integer for a in arguments):
            return nan
        return None


class Gcd(IntegerFunction):
    compute = math.gcd


class Lcm(IntegerFunction):
    compute = math.lcm


class Reader(_Latex2Sympy):
    """math-verify's reader, with exact numbers. They are not passed to ``sympify``, which uses
    ``eval``."""

    def parse_number(self, text: str) -> Rational:
        return Rational(text.replace(",", ""))

    def handle_gcd_lcm(self, f: str, args: Iterable[Expr]) -> Expr:
        return {"gcd": Gcd, "lcm": Lcm}[f](*args)


class Unreadable(Exception):
    """The parser cannot read the right answer."""


def same_scalars(gold: str, answer: str, tolerance: Tolerance = EXACT) -> bool:
    """Whether two answers are equal as numbers, expressions, relations or sets. An answer that
    cannot be read is not equal.

    Raises Unreadable if the gold cannot be read.
    """
    gold, answer = prepared(gold), prepared(answer)
    real = not should_treat_as_complex(gold + " " + answer)
    try:
        left = read(gold, real)
    except (MemoryError, RecursionError):
        raise
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
    verdict = same_constants(left, right, tolerance)
    if verdict is None:
        verdict = same_functions(left, right)
    if verdict is not None:
        return verdict
    return verify(
        left, right, timeout_seconds=None, allow_set_relation_comp=True, raise_on_error=True
    )


def prepared(text: str) -> str:
    r"""The canonical notation without what the reader does not know: ``\cis``, ``C(n,k)``, and
    degrees, which become radians if the text has trigonometric functions and are dropped if not."""
    if TRIGONOMETRY.search(text):
        text = DEGREES.sub(r"(\1\\cdot\\frac{\\pi}{180})", text)
    text = text.replace(r"^\circ", "")
    text = CIS.sub(r"(\\cos(\1)+i\\sin(\1))", text)
    return CHOSEN.sub(r"\\binom{\1}{\2}", text)


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
