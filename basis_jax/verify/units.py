r"""Values with a unit or a magnitude behind them: ``5\text{ cm}^2``, ``2.5\text{ million}``.

A unit may be left out. Two known units must measure the same quantity, and are converted. Other
words after a number (``7 apples``) are ignored, unless they change its meaning (``7 or more``).
"""

import re
from collections.abc import Callable
from fractions import Fraction

from basis_jax.verify.notation import number, split_top

Unit = tuple[dict[str, int], Fraction]  # exponents of what is measured, size
Same = Callable[[str, str], bool]


def table(text: str) -> dict[str, Unit]:
    """Read lines ``name name: kind size``; the size is given in the kind's own unit."""
    units: dict[str, Unit] = {}
    for line in text.strip().splitlines():
        names, _, measure = line.partition(":")
        kind, size = measure.split()
        dimensions = {}
        for part in kind.split("*"):
            base, _, power = part.partition("^")
            dimensions[base] = int(power or 1)
        units |= {name: (dimensions, Fraction(size)) for name in names.split()}
    return units


UNITS = table("""
nm nanometer: length 1/1000000000
µm μm micrometer micron: length 1/1000000
mm millimeter millimetre: length 1/1000
cm centimeter centimetre: length 1/100
dm decimeter: length 1/10
m meter metre: length 1
km kilometer kilometre: length 1000
in inch inche: length 127/5000
ft foot feet: length 381/1250
yd yard: length 1143/1250
mi mile: length 201168/125
ms millisecond: time 1/1000
s sec second: time 1
min minute: time 60
h hr hour: time 3600
day: time 86400
week wk: time 604800
month: month 1
yr year: month 12
decade: month 120
century centurie: month 1200
mg milligram: mass 1/1000000
g gram: mass 1/1000
kg kilogram: mass 1
tonne: mass 1000
oz ounce: ounce 1
lb pound: ounce 16
ton: ounce 32000
ml milliliter millilitre: length^3 1/1000000
cl: length^3 1/100000
l liter litre: length^3 1/1000
cup: gallon 1/16
pint: gallon 1/8
quart: gallon 1/4
gallon gal: gallon 1
acre: acre 1
hectare ha: length^2 10000
mph: length*time^-1 1397/3125
kph kmh kmph: length*time^-1 5/18
cent ¢ penny pennie: dollar 1/100
dollar usd buck: dollar 1
euro eur: euro 1
yen: yen 1
yuan: yuan 1
rupee: rupee 1
degree deg: degree 1
radian rad: radian 1
degc celsiu celsius: celsius 1
degf fahrenheit: fahrenheit 1
kelvin: kelvin 1
hz hertz: time^-1 1
newton: newton 1
joule: joule 1
kj kilojoule: joule 1000
watt: watt 1
kw kilowatt: watt 1000
volt: volt 1
pa pascal: pascal 1
kpa: pascal 1000
amp ampere: ampere 1
ohm: ohm 1
mol mole: mol 1
ev: ev 1
unit: unit 1
am: am 1
pm: pm 1
""")
MAGNITUDES: dict[str, int | Fraction] = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "dozen": 12, "tenth": Fraction(1, 10), "hundredth": Fraction(1, 100),
    "thousandth": Fraction(1, 1000), "millionth": Fraction(1, 10**6),
}  # fmt: skip
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
TELLING = frozenset(
    """or and to through between not no more less fewer than least most over under above below
    before after plus minus times squared cubed even odd prime composite if when for where mod
    modulo base remainder negative positive nonnegative integer only except each
    factorial percent half quarter thirds iff bc ad factor multiple divides recurring
    repeating""".split()
)
"""Words that change the meaning of the number before them, or are not a unit of it."""

POWER = r"(?: ?\^ ?(?:\{ ?-?[0-9] ?\}|-?[0-9]))?"
WRAPPED = rf"(?:\\text ?\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}{POWER}|\^\\circ|\\text\{{deg[cf]\}})"
BEHIND = re.compile(
    rf"(.*?) ?((?:{WRAPPED}(?: ?(?:/|\\cdot) ?| ?))*{WRAPPED}(?: ?[a-zA-Z]{{1,3}}(?![a-zA-Z]))?)"
)
BARE = re.compile(
    rf"(.*?[0-9}}a-z]) ?(?<![a-zA-Z\\])([a-zA-Zµμ][a-zA-Z./ ]*?{POWER}(?: ?/ ?[a-zA-Z]+{POWER})?)"
)
TRIGONOMETRY = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc|cis)(?![a-zA-Z])")
CURRENCY = re.compile(r"([-+]?) ?\\text ?\{(dollar|euro|pound|yen|rupee)\} ?(.+)")
WORD = re.compile(r"([a-zA-Zµμ¢]+)\.?|\^ ?\{? ?(-?[0-9]) ?\}?|(/)|([^ ])")


def same_quantities(gold: str, answer: str, same: Same) -> bool | None:
    """Compare quantities. None if neither answer has a unit or a magnitude."""
    left, right = split_unit(gold), split_unit(answer)
    if left[0] == gold and right[0] == answer:
        return None
    (value, unit, words), (other, others_unit, others_words) = left, right
    if unit and others_unit:
        factor = conversion(unit, others_unit)
        if factor is None:
            return same_angle(value, unit, other, others_unit, same=same)
        return same(scaled(value, factor), other)
    if words != others_words and not (is_constant(value) and is_constant(other)):
        return False
    if same(value, other):
        return True
    for angle, side, radians in ((unit, value, other), (others_unit, other, value)):
        if angle and angle[0] == {"degree": 1} and number(radians) is None:
            return same(scaled(side, r"\frac{\pi}{180}"), radians)
    return False


def same_angle(value: str, unit: Unit, other: str, others_unit: Unit, *, same: Same) -> bool:
    """Compare angles: degrees and radians are converted."""
    kinds = [set(unit[0]), set(others_unit[0])]
    if kinds == [{"degree"}, {"radian"}]:
        return same(scaled(value, r"\frac{\pi}{180}"), other)
    if kinds == [{"radian"}, {"degree"}]:
        return same(value, scaled(other, r"\frac{\pi}{180}"))
    return False


def conversion(unit: Unit, other: Unit) -> Fraction | None:
    """How many of ``other`` one ``unit`` is; None if they do not measure the same quantity. The
    word "unit" may stand for any unit. Only for lengths the powers must agree: square units may be
    square centimeters."""
    dimensions = [u[0] for u in (unit, other)]
    if any("unit" in d for d in dimensions):
        powers = [sum(d.values()) for d in dimensions]
        lengths = all(set(d) <= {"unit", "length"} for d in dimensions)
        return Fraction(1) if powers[0] == powers[1] or not lengths else None
    return unit[1] / other[1] if dimensions[0] == dimensions[1] else None


def scaled(value: str, factor: Fraction | str) -> str:
    r"""The product in LaTeX; a plain number if the value is one."""
    if factor == 1:
        return value
    exact = number(value)
    if isinstance(factor, Fraction):
        if exact is not None:
            product = exact * factor
            return rf"\frac{{{product.numerator}}}{{{product.denominator}}}"
        factor = rf"\frac{{{factor.numerator}}}{{{factor.denominator}}}"
    return rf"({value})\cdot {factor}"


def is_constant(value: str) -> bool:
    """Whether no letter of the value is a variable."""
    return not re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", value))


def split_unit(text: str) -> tuple[str, Unit | None, tuple[str, ...]]:
    """The value times its magnitude, the unit if it is known (else None), and the other words after
    it. A text that is no quantity gives the text itself, None and ()."""
    nothing = text, None, ()
    if currency := CURRENCY.fullmatch(text):
        sign, name, rest = currency.groups()
        value, unit, words = split_unit(rest)
        if "," not in split_top(value) and (unit is None or unit == UNITS[name]):
            return sign + value, UNITS[name], words
    wrapped = BEHIND.fullmatch(text)
    match = wrapped or BARE.fullmatch(text)
    if not match or not match[1] or any(sign in text for sign in ("=", "<", ">", r"\cup")):
        return nothing
    value = match[1].strip()
    if number(value) is None and len(split_top(value)) > 1:
        return nothing
    if re.search(r"[-+*^_(\[{]$|\\mod$", value):
        return nothing
    if TRIGONOMETRY.search(value) and "^\\circ" in match[2]:
        return nothing
    magnitude, unit, words = read_unit(match[2])
    if TELLING.intersection(words):
        return nothing
    if not wrapped and not plain_unit(value, text, match[2], unit=unit):
        return nothing
    if words and not is_constant(value):
        return nothing
    return scaled(value, magnitude), unit, words


def plain_unit(value: str, text: str, tail: str, *, unit: Unit | None) -> bool:
    r"""Whether words without ``\text`` are a unit. After a plain number, a known unit is one if it
    has two letters or follows a space (``5x`` is algebra), and an unknown one if it has three
    letters and follows a space. After another constant only known units of two letters are."""
    spaced = text[len(value) : len(value) + 1] == " "
    word = re.match("[a-zA-Zµμ]*", tail)
    letters = len(word[0]) if word else 0
    if number(value) is None:
        return is_constant(value) and spaced and unit is not None and letters > 1
    if unit is not None:
        return letters > 1 or spaced
    return letters > 2 and spaced


def read_unit(text: str) -> tuple[Fraction, Unit | None, tuple[str, ...]]:
    """The magnitude, the unit (None if one of its words is not known) and the unknown words."""
    text = re.sub(r"\\text ?\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1 ", text).replace(
        "^\\circ", "degree"
    )
    text = re.sub(r"\b([ap])\. ?m\b\.?", r"\1m", text.replace("\\cdot", " "))
    magnitude, size = Fraction(1), Fraction(1)
    dimensions: dict[str, int] = {}
    unknown, last, pending, below = [], None, 1, 1
    for word, power, slash, other in WORD.findall(text):
        name = singular(word)
        if slash or name == "per":
            below, last = -1, None
        elif power and last:
            size = add(dimensions, last, below * (int(power) - 1), size)
        elif name in MAGNITUDES and not dimensions:
            magnitude *= MAGNITUDES[name]
        elif name in POWERS and name not in ("squared", "cubed"):
            pending = POWERS[name]
        elif name in POWERS and last:
            size = add(dimensions, last, below * (POWERS[name] - 1), size)
        elif name in UNITS:
            last = UNITS[name]
            size = add(dimensions, last, below * pending, size)
            pending = 1
        elif word or other:
            unknown.append(word.lower() or other)
    known = {kind: power for kind, power in dimensions.items() if power}
    unit = (known, size) if known and not unknown else None
    return magnitude, unit, tuple(unknown)


def add(dimensions: dict[str, int], unit: Unit, power: int, size: Fraction) -> Fraction:
    """Multiply ``dimensions`` in place by a power of a unit; returns the size of the product."""
    for kind, exponent in unit[0].items():
        dimensions[kind] = dimensions.get(kind, 0) + exponent * power
    return size * unit[1] ** power


def singular(word: str) -> str:
    name = word.lower()
    if name in UNITS or name in MAGNITUDES or name in POWERS:
        return name
    return name.removesuffix("s")
