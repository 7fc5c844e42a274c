r"""Equations that name a value (``x = 5``, ``m + n = 6``) and those that say something else
(``x^2 = 25`` is not 25); residues, ``3 \pmod 7``."""

import re
from collections.abc import Callable, Sequence

from basis_jax.verify.notation import number, split_top

Same = Callable[[str, str], bool]

FUNCTIONS = (
    r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|lg|exp|sqrt|frac|binom|lfloor|lceil|gcd|lcm|pm"
    r"|sum|int|prod|lim|left|right|infty|pi|mod|pmod|cdot|times"
)
NAME = re.compile(
    r"(?:[a-zA-Z]|[A-Z]{2,3}|[a-zA-Z]{4,}|\\text ?\{[^{}]*\}"
    rf"|\\(?!(?:{FUNCTIONS})(?![a-zA-Z]))[a-zA-Z]+(?: ?[A-Z]+)?)"
    r"(?:_(?:\w|\{[^{}]*\}))?'?(?:\^ ?\{ ?-1 ?\})?(?: ?\([^()=]*\))?|\([a-z](?:, ?[a-z])+\)"
)
VARIABLE = re.compile(r"([a-zA-Z])(_(?:\w|\{[^{}]*\}))?")
GREEK_ANGLE = re.compile(
    r"\\(?:sin|cos|tan|cot|sec|csc)(?:\^ ?\{?2\}?)? ?\(? ?\{?\\"
    r"(?:theta|alpha|beta|gamma|phi|varphi|angle [A-Z]+)\}? ?\)?"
)
AT_POINTS = re.compile(r"[a-zA-Z]'?\(-?[0-9.]+(?:,-?[0-9.]+)*\)")


def is_name(text: str) -> bool:
    r"""Whether a side of an equation names what is computed, and does not restrict an unknown: a
    single name (``x``, ``f(2)``, ``AB``), or an expression in several letters none of which is x,
    y or z (``m+n``), in capitals (``AB^2``), in an angle (``\sin\theta``) or in values of a
    function (``f(1)+f(2)``)."""
    if NAME.fullmatch(text) or GREEK_ANGLE.fullmatch(text):
        return True
    bare = re.sub(r"\\text ?\{[^{}]*\}|\\[a-zA-Z]+", " ", text)
    rest = AT_POINTS.sub(" ", bare)
    variables = {match[0] for match in VARIABLE.finditer(rest)}
    if not variables:
        return rest != bare
    unknown = any(v in ("x", "y", "z") for v in variables) or "!" in text
    return not unknown and (len(variables) > 1 or any(v[0].isupper() for v in variables))


def without_name(text: str) -> str:
    """The text to the right of ``x =``, if there is any; otherwise the whole text."""
    name, *rest = split_top(text, "=")
    return "=".join(rest) if rest and is_name(name) and not is_several(text) else text


def is_several(text: str) -> bool:
    """Whether it lists equations, as ``a = 3, b = 5`` does."""
    return sum("=" in part for part in split_top(text)) > 1


def same_relation(gold: str, answer: str, same: Same) -> bool | None:
    """Compare a named value with a bare one. Every side of an answer's equation that is not a name
    must equal the gold, so ``5 = 3`` does not equal 3, nor does ``x + 1 = 3``."""
    golds, answers = split_top(gold, "="), split_top(answer, "=")
    if is_several(answer) and not is_several(gold):
        return same(without_name(gold), answer) if without_name(gold) != gold else None
    if len(golds) > 1:
        return same_named(golds, answers, gold, answer=answer, same=same)
    if len(answers) == 1:
        return None
    if is_name(answers[0]):
        answers = answers[1:]
    elif NAME.fullmatch(answers[-1]) and not NAME.fullmatch(gold):
        answers = answers[:-1]
    return all(same(gold, part) for part in answers)


def same_named(
    golds: list[str], answers: list[str], gold: str, *, answer: str, same: Same
) -> bool | None:
    """Compare with a gold that is an equation. If its left side is a name, the values are compared.
    If the answer is another equation, it is None: algebra decides. Otherwise only an equation
    between constants can equal a bare answer, by its last side."""
    if len(answers) > 1 and golds[0] != answers[0]:
        return None
    if is_name(golds[0]):
        return same("=".join(golds[1:]), without_name(answer))
    if len(answers) > 1:
        return None
    constant = not re.search("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", gold))
    return constant and same(golds[-1], answer)


def by_name(parts: Sequence[str]) -> dict[str, str] | None:
    """The values of ``a = 3, b = 5`` by their names. None if a part has no name, or if two names
    have the same letter (the roots ``x_1 = 3, x_2 = 5`` have no order)."""
    values = {}
    for part in parts:
        name, *rest = split_top(part, "=")
        if len(rest) != 1 or not re.fullmatch(r"(?:[a-zA-Z]|\\[a-z]+)(?:_\{?\w+\}?)?", name):
            return None
        if name.partition("_")[0] in values:
            return None
        values[name.partition("_")[0]] = rest[0]
    return values


def same_by_name(golds: Sequence[str], answers: Sequence[str], same: Same) -> bool | None:
    """Compare named values by name. If only one side has names, the values are compared in order:
    in that of the gold if it has the names, in that of the alphabet if the answer has them. None if
    neither side names its values."""
    named, others = by_name(golds), by_name(answers)
    if len(golds) != len(answers) or len(golds) < 2:
        return None
    if named and others:
        return named.keys() == others.keys() and all(same(v, others[n]) for n, v in named.items())
    if named:
        return all(map(same, named.values(), answers))
    if others:
        latin_first = sorted(others, key=lambda name: (name.startswith("\\"), name))
        return all(map(same, golds, [others[name] for name in latin_first]))
    return None


CONGRUENT = re.compile(r"(.*?) ?\\pmod\{ ?(.*?) ?\}")
REMAINDER = re.compile(r"(.*?) ?\\mod ?(.+)")


def same_residues(gold: str, answer: str, same: Same) -> bool | None:
    r"""Compare residues: ``3 \pmod 7`` equals 3 and ``10 \pmod 7``, but not ``3 \pmod 5``. The
    operation ``7 \mod 4`` equals 3; with letters in it, it is left to algebra."""
    left = CONGRUENT.fullmatch(gold) or REMAINDER.fullmatch(gold)
    right = CONGRUENT.fullmatch(answer) or REMAINDER.fullmatch(answer)
    if left and right:
        if not same(left[2], right[2]):
            return False
        first, second = (number(without_name(side[1])) for side in (left, right))
        modulus = number(left[2])
        if first is None or second is None or not modulus:
            return same(left[1], right[1])
        return (first - second) % modulus == 0
    residue = left or right
    if residue is None:
        return None
    value, modulus = number(without_name(residue[1])), number(residue[2])
    if residue.re is REMAINDER:
        if value is None or not modulus:
            return None
        remainder = str(value % modulus)
        return same(remainder, answer) if left else same(gold, remainder)
    if not re.search("[0-9]", residue[1]):
        return False
    return same(residue[1], answer) if left else same(gold, residue[1])
