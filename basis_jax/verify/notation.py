r"""Answers in one notation: ``\dfrac12``, ``{1}/2.`` and ``$\frac{1}{2}$`` become alike.

All functions map text to text, by the conventions of MATH and AIME answers, except ``number``,
which computes plain numbers. No pattern can backtrack far, and callers limit the length
(``LONGEST``).
"""

import re
from fractions import Fraction

from basis_jax.verify.prose import without_talk

LONGEST = 1000

SIGNS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ",
    "∞": r"\infty ", "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ", "θ": r"\theta ", "√": r"\sqrt ",
    "ℝ": r"\mathbb{R}", "≈": r"\approx ", "²": "^2", "³": "^3", "½": r"\frac12 ", "，": ",",
    "⅓": r"\frac13 ", "⅔": r"\frac23 ", "¼": r"\frac14 ", "¾": r"\frac34 ", "：": ":", "∶": ":",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∠": r"\angle ",
    "’": "'", "′": "'", "₂": "_2", "€": r"\text{euro}", "£": r"\text{pound}",
    "¥": r"\text{yen}", "₹": r"\text{rupee}", "¢": r"\text{cent}",
    "\u00a0": " ", "\u2009": " ", "\t": " ", "\n": " ",
})  # fmt: skip

BRACED = r"\{(?:[^{}]|\{[^{}]*\})*\}"
TEXT = r"\\text ?\{ ?"
INDEX = r"(?:\{([^{}]+)\}|([0-9a-z]))"
LETTER_C = r"(?:C|\\text ?\{ ?C ?\})"
BASES = {
    name: base
    for base, name in enumerate(
        "two three four five six seven eight nine ten eleven twelve".split(), start=2
    )
} | {"sixteen": 16}
NUMERAL = "|".join(sorted(BASES, key=len, reverse=True))  # "six" would match in "sixteen"


def combination(match: re.Match) -> str:
    r"""``_{10}C_3``, ``C_{10}^3`` and ``C^3_{10}`` as ``\binom{10}{3}``. Of two numbers, n is the
    larger one; otherwise it is the lower index (the first one in ``_nC_k``)."""
    first, second = match[1] or match[2], match[3] or match[4]
    if re.fullmatch("[0-9]+", first) and re.fullmatch("[0-9]+", second):
        first, second = sorted((first, second), key=int, reverse=True)
    elif re.match(r"(?:C|\\text ?\{ ?C ?\}) ?\^", match[0]):
        first, second = second, first
    return rf"\binom{{{first}}}{{{second}}}"


MODULI = (
    (
        r" ?\(? ?\\pmod ?(?:\{([^{}]*)\}|(\w+)) ?\)?"
        rf"| ?\( ?(?:{TEXT})?\\?b?mod(?:ulo)?(?![a-z]) ?\}}? ?([^()]*)\)"
        rf"| ?{TEXT}\( ?mod(?:ulo)? ?\}} ?([^()]*)\)",
        lambda match: rf" \pmod{{{next(m for m in match.groups() if m is not None)}}}",
    ),
    (
        rf"\\bmod(?![a-zA-Z])|{TEXT}mod(?:ulo)? ?\}}|(?<![\\a-zA-Z])mod(?:ulo)?(?![a-zA-Z])",
        r"\\mod ",
    ),
)
"""Congruence, ``\\pmod{m}``, and the remainder as an operation, ``\\mod m``."""

RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # layout
        (r" +", " "),
        (r"(?<!\\)(\\\\)*\\\$", r"\1\\text{dollar}"),
        (r"\$|(?<!\\)\\[()]", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|bf|rm|it|large|Large|huge"
         r"|Huge|small|normalsize|scriptstyle|boxed|fbox|framebox|ensuremath)(?![a-zA-Z])\.?", ""),
        (r"\\f?(?:text)?color(?:box)? ?(?:\[[^\[\]]*\])?\{[^{}]*\} ?", ""),
        (r"\\(?:[hv]space\*?|[hv]?phantom|label|tag\*?) ?\{[^{}]*\}", " "),
        (r", ?\\! ?(?=\d{3}(?!\d))", ""),
        (r"\\!", ""),
        (r"(?<=\d)\\,(?=\d{3}(?!\d))", ""),
        (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"(?<![\d.,_^ ])(?<![\d.,_^] )\d{1,3}(?: \d{3})+(?! ?[\d/])",
         lambda match: match[0].replace(" ", "")),
        (r"(?<=\\\\) ?\[\d+ ?pt\]", ""),
        # one name for each command
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
        (r"\\operatorname\*? ?\{ ?((?:arc)?(?:sin|cos|tan)h?|log|gcd|lcm|det)\}", r"\\\1 "),
        (r"\\(?:operatorname\*?|text(?:bf|it|rm|sf|tt|normal)|math(?:rm|bf|it|sf|tt|normal)|mbox"
         r"|emph|underline|bm|boldsymbol)(?![a-zA-Z])", r"\\text"),
        (r"\\text(?: ?\{ ?([eid]|\\pi) ?\}| ([eid])(?![a-zA-Z]))", r"\1\2"),
        (r"\\text ?\{ ?(cis|lg|exp|floor|ceil|max|min) ?\}", r"\\\1 "),
        (r"\\lg(?![a-zA-Z])", r"\\log_{10}"),
        (r"\\([lgn]e)q(?:slant)?(?![a-zA-Z])", r"\\\1"),
        (r"\\varnothing(?![a-zA-Z])|\\\{ ?\\\}", r"\\emptyset"),
        (
            rf"\\mathbb ?(?:\{{R\}}|R)|(?:{TEXT})?[aA]ll real(?: numbers|s)(?: ?\}})?",
            r"(-\\infty,\\infty)",
        ),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\equiv(?![a-zA-Z])", "="),
        (r"<=|=<", r"\\le "),
        (r">=", r"\\ge "),
        (r"\*\*", "^"),
        (r"\*", r"\\cdot "),
        # words that are signs
        (r"(?<![\\a-zA-Z])(sqrt|pi|infinity|sin|cos|tan|log|ln)(?![a-zA-Z])", r"\\\1"),
        (r"\\infinity", r"\\infty"),
        (rf"(?<!\\)%|{TEXT}(?:percent|\\?%) ?\}}|(?<![a-zA-Z])percent(?![a-zA-Z])", r"\\%"),
        (rf" ?(?:\^ ?(?:\{{ ?\\circ ?\}}|\\circ)|\\degree|{TEXT}degrees? ?\}}"
         r"|(?<![a-zA-Z])degrees?(?![a-zA-Z])) ?", r"^\\circ "),
        (rf"\^\\circ (?:{TEXT}([CF]|Celsius|Fahrenheit) ?\}}"
         r"|([CF]|Celsius|Fahrenheit)(?![a-zA-Z]))",
         lambda match: r"\text{deg" + (match[1] or match[2])[0].lower() + "}"),
        *MODULI,
        (rf"(?:{TEXT})?[nN]o (?:real )?solutions?(?: ?\}})?", r"\\emptyset"),
        # thousands, where the comma cannot separate items
        (
            r"(?<![0-9,(\[{ ])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,)\]}])",
            lambda match: match[0].replace(",", ""),
        ),
        # repeating decimals
        (r"\\dot ?\{?(\d)\}?(\d*)\\dot ?\{?(\d)\}?", r"\\overline{\1\2\3}"),
        (r"(?<=\.)(\d*)\\(?:bar|dot|overline) ?(?:\{(\d+)\}|(\d))", r"\1\\overline{\2\3}"),
        (r"(?<![\d.])(0?\.\d*|\d+\.)\((\d+)\)", r"\1\\overline{\2}"),
        # combinations
        (r"^([^{}]+)\\choose([^{}]+)$|\{([^{}]+)\\choose([^{}]+)\}",
         lambda match: rf"\binom{{{match[1] or match[3]}}}{{{match[2] or match[4]}}}"),
        (rf"(?:\{{ ?\}})? ?[_^] ?{INDEX} ?{LETTER_C} ?_ ?{INDEX}", combination),
        (rf"(?<![a-zA-Z\\{{]){LETTER_C} ?_ ?{INDEX} ?\^ ?{INDEX}", combination),
        (rf"(?<![a-zA-Z\\{{]){LETTER_C} ?\^ ?{INDEX} ?_ ?{INDEX}", combination),
        # numerals
        (r"(?<=\d) ?[xX] ?(?=10 ?\^)", r"\\times "),
        (rf"(?<=[0-9A-F)]) ?_ ?\{{? ?\(?(?:{TEXT})?(?:base[- ]?)?({NUMERAL}) ?\)?(?: ?\}})*",
         lambda match: f"_{{{BASES[match[1]]}}}"),
        (r"_ ?\{ ?\( ?(\d+) ?\) ?\}", r"_{\1}"),
        (rf"(?<=[0-9A-F)]) ?(?:{TEXT})?(?:in )?base[- ]? ?\}}? ?\{{?(\d+)(?: ?\}})?", r"_{\1}"),
        # between the items of a list
        (rf"(?<=[0-9}}]) ?(?:{TEXT}to ?\}}|(?<![\\a-zA-Z])to(?![a-zA-Z])) ?(?=[0-9\\])", ":"),
        (rf"\{{ ?([,:]) ?\}}|{TEXT}([,:]) ?\}}", r"\1\2"),
        (rf"{TEXT}([^{{}}]*(?:[,;0-9]|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z]))[^{{}}]*)\}}", r" \1 "),
        (rf",? ?(?:{TEXT}(?:and|or) ?\}}|(?<![\\a-zA-Z])(?:and|or)(?![a-zA-Z])),?", ","),
        (r";", ","),
        (r"(^|[(\[,]) ?\+ ?", r"\1"),
        (r"(?<![0-9.])([0-9]+) ([0-9]+) ?/ ?([0-9]+)", r"\1\\frac{\2}{\3}"),
        # arguments without braces or with round ones
        (r"\\frac ?([0-9a-zA-Z])", r"\\frac{\1}"),
        (rf"(\\frac ?{BRACED}) ?([0-9a-zA-Z])", r"\1{\2}"),
        (r"\\sqrt ?([0-9]+|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"(\\sqrt|\^) ?\(([^()]*)\)", r"\1{\2}"),
    )
]  # fmt: skip

WRITTEN_PLAINLY = re.compile(r" *-?[0-9]+(?:\.[0-9]+)? *")  # nearly all answers: no rule applies
LONE_DOLLAR = re.compile(r"(?<!\\)\$( ?[0-9.]|)")
OPEN, CLOSE = "([{", ")]}"
PEELED = ("{", r"\text{", r"\text {", r"\boxed{", "(")


def canonical(text: str) -> str:
    """The answer in one notation, without brackets around all of it and without words about it."""
    if WRITTEN_PLAINLY.fullmatch(text):
        return text.strip()
    if len(LONE_DOLLAR.findall(text)) % 2:
        text = LONE_DOLLAR.sub(r"\\$\1", text)
    text = without_talk(text.translate(SIGNS))
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    return peel(re.sub(" +", " ", text))


def peel(text: str) -> str:
    """The text without full stops at its end and without braces, boxes and redundant parentheses
    around all of it."""
    before = None
    while text != before:
        before = text
        text = text.strip().rstrip(" .,:\\")
        for opening in PEELED:
            start = len(opening) - 1
            whole = text.startswith(opening) and closing(text, start) == len(text) - 1
            if whole and not (opening == "(" and len(split_top(text[1:-1])) > 1):
                text = text[start + 1 : -1]
    return text


def closing(text: str, start: int) -> int:
    """Where the bracket at ``start`` closes, or -1. Any closing bracket closes any opening one."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in OPEN) - (text[i] in CLOSE)
        if depth == 0:
            return i
    return -1


def split_top(text: str, separator: str = ",") -> list[str]:
    """The parts between those separators that are not inside brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in OPEN) - (character in CLOSE)
        if depth == 0 and text.startswith(separator, i):
            parts.append(text[start:i])
            start = i + len(separator)
    return [part.strip() for part in (*parts, text[start:])]


INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
PLAIN = rf"(?:{INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"
SIGNED = f"[+-]?{PLAIN}"
NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:"
    rf"(?P<scaled>{PLAIN})(?:\\(?:times|cdot) ?10\^\{{?|[eE])(?P<power>[+-]?[0-9]{{1,3}})\}}?"
    rf"|(?P<whole>{INTEGER})?\\frac\{{(?P<above>{SIGNED})\}}\{{(?P<below>{SIGNED})\}}"
    r"|(?P<fixed>[0-9]*\.[0-9]*)\\overline\{(?P<cycle>[0-9]+)\}"
    rf"|(?P<left>{PLAIN})(?:/(?P<right>{PLAIN}))?)"
)


def number(text: str) -> Fraction | None:
    r"""The exact value of an integer, decimal (repeating ones too), fraction, mixed number
    (``2\frac{1}{3}`` is 7/3) or decimal times a power of ten; None for anything else."""
    match = NUMBER.fullmatch(re.sub(r" ?([-+/^{}\\]) ?", r"\1", text))
    if match is None:
        return None

    def part(name, default="0"):
        return Fraction((match[name] or default).replace(",", ""))

    below = part("below", "1") * part("right", "1")
    if below == 0:
        return None
    value = part("whole") + (part("above") + part("left")) / below
    value += part("scaled") * Fraction(10) ** int(match["power"] or 0)
    if match["cycle"]:  # 0.1666... = 0.1 + 0.0666..., and 0.666... = 6/9
        decimals = len(match["fixed"].partition(".")[2])
        value += Fraction("0" + match["fixed"])
        value += part("cycle") / (10 ** len(match["cycle"]) - 1) / 10**decimals
    return -value if match["sign"] == "-" else value
