r"""Where the answer stands in a completion, or in a worked solution. Linear in the text's length.

Marks, by rank: the last complete ``\boxed{}``, then the last ``#### x`` (GSM8K); the lenient mode
goes on to the last "the answer is x" or "Answer: x", the strict one does not.
"""

import re

MODES = ("lenient", "strict")
TAIL = 100_000

BOX = re.compile(r"\\(?:boxed|fbox)\s?\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
PHRASE = re.compile(
    r"\banswer(?: to (?:the|this) (?:problem|question))?(?: is| was|\s?[:=])", re.IGNORECASE
)
DECORATION = " \t*_:="
FORMULAS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
SENTENCE_END = re.compile(r"[.!?](?:\s|$)")


def extract_answer(completion: str, mode: str) -> str | None:
    """The answer that the end (``TAIL``) of a completion gives; None where it gives none."""
    completion = completion[-TAIL:]
    found = last_boxed(completion)
    if found is None:
        found = after_hashes(completion)
    if found is None and mode == "lenient":
        found = after_phrase(completion)
    return found or None


def last_boxed(text: str) -> str | None:
    """Inside of the last complete box, nested braces and boxes included; None where there is none.

    Escaped braces are text. An empty box, as in an instruction repeated, says nothing, nor does one
    left open, as by a completion cut short.
    """
    depth, opened, found = 0, [], None
    boxes = {match.end() - 1 for match in BOX.finditer(text)}
    for match in BRACE.finditer(text, min(boxes, default=len(text))):
        if match.group() == "{":
            depth += 1
            if match.start() in boxes:
                opened.append((depth, match.end()))
        elif match.group() == "}":
            if opened and opened[-1][0] == depth:
                found = text[opened.pop()[1] : match.start()].strip() or found
            depth = max(depth - 1, 0)
    return found


def after_hashes(text: str) -> str | None:
    """The rest of the line after the last ``####``; None where there is none."""
    _, mark, rest = text.rpartition("####")
    return rest.lstrip(" \t").partition("\n")[0].strip() if mark else None


def after_phrase(text: str) -> str | None:
    """What follows the last "answer is" or "Answer:": a formula, else the rest of the sentence."""
    ends = [match.end() for match in PHRASE.finditer(text)]
    if not ends:
        return None
    rest = text[ends[-1] :].lstrip(DECORATION + "\n")
    for opening, closing in FORMULAS:
        if rest.startswith(opening):
            inside, closed, _ = rest[len(opening) :].partition(closing)
            if closed:
                return inside.strip()
    line = rest.partition("\n")[0]
    end = SENTENCE_END.search(line)
    return (line[: end.start()] if end else line).strip(DECORATION)
