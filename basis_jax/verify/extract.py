r"""Where the answer stands in a completion or in a worked solution. Linear time.

Marks, by rank: the last complete ``\boxed{}`` or ``\fbox{}``; the last ``#### x`` (GSM8K's
convention); in lenient mode also the last "the answer is x" or "Answer: x".
"""

import re

MODES = ("lenient", "strict")

BOX = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
HASHES = re.compile(r"####[ \t]*([^\n]*)")
PHRASE = re.compile(
    r"(?:answer\s{1,3}is|answer\s{0,3}:|answer\s{0,3}=)[*_\s]{0,6}:?[*_\s]{0,6}", re.IGNORECASE
)
SENTENCE_END = re.compile(r"\.(?:\s|$)|\n")
DELIMITED = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    """Inside of the last complete box, nested braces included; None where there is none.

    An escaped brace does not count. The first closing brace that fits ends a box, so a box left
    open at the end of a truncated completion says nothing.
    """
    for start in reversed([match.end() for match in BOX.finditer(text)][-8:]):
        depth = 1
        for brace in BRACE.finditer(text, start):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[start : brace.start()].strip()
    return None


def after_hashes(text: str) -> str | None:
    """The rest of the line after the last ``####``; None where there is none."""
    _, mark, rest = text.rpartition("####")
    return rest.lstrip().partition("\n")[0].strip() if mark else None
