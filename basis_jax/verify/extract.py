r"""Find the answer in a completion or in a worked solution, in time linear in the text's length.

``MODES`` says which marks give an answer, depending on the data set's prompt. In the lenient mode
the last of these counts: a box, GSM8K's ``#### x``, a line ``Answer: x``, a heading "Final Answer"
with something under it, ``<answer>`` tags. Without any, it is the last "the answer is x".
"""

import re
from collections.abc import Callable

from basis_jax.verify.prose import ADVERBS, without_talk

TAIL = 60_000  # characters at the end of a completion that are searched, to bound the time
MAX_MARKS = 50  # of one kind that are tried, from the end
Found = tuple[int, str]  # position of the mark, the answer

BOX = re.compile(r"\\(?:boxed|fbox)\s?\{")
BARE_BOX = re.compile(
    r"\\boxed *(-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?:\\?%)?|-?\\[a-zA-Z]+(?:\{[^{}\n]{0,200}\}){0,2}"
    r"|-?(?<= )[a-zA-Z](?![a-zA-Z])|\([^()\n]{0,200}\))"
)
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
GAP = re.compile(
    r"(?:\s|\$|\\[()\[\],;:! ]|\\q?quad|\\text ?\{[ ,]*(?:and|or)?[ ,]*\}|[,;&*]|and\b|or\b"
    r"|as well as\b|[a-zA-Z](?:_\{?\w\}?)? ?=|\([a-z0-9]\))*"
)
JOINS = re.compile(r"[,;&]|\band\b|\bor\b|\bas well as\b")
HASHES = re.compile(r"####(?!#)[ \t]*([^\n]*)")
LINE = re.compile(
    r"^[ \t>#*_-]*(?:(?:the|my|so the|thus the) )?(?:final |correct )?answers?[ \t*_]*"
    r"(?:[:：=][ \t*_]*|$)",
    re.IGNORECASE | re.MULTILINE,
)
ANSWER_COLON = re.compile(r"answer[ \t]*:[ \t]*(?=[^\n])", re.IGNORECASE)
TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
PHRASE = re.compile(
    r"\banswers?(?: to (?:the|this) (?:problem|question))?"
    r"(?: is| was| are| equals| must be| should be|\s?[:=])(?![a-zA-Z])",
    re.IGNORECASE,
)
FENCE = re.compile(r"```[a-zA-Z]{0,10}\n(.*?)```", re.DOTALL)
DECORATION = " \t*_:=`"
FORMULAS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
DISPLAYED = ("$$", r"\[")
SENTENCE_END = re.compile(r"[.!?](?:\s|[*_`\"]|$)")
GOES_ON = re.compile(
    r"\s*(?:\$?%|\\%|(?:,|and\b|or\b|to\b|,\s*(?:and|or)\b)\s*(?:\$|\\\(|-?\d|more\b|less\b)"
    r"|(?:hundred|thousand|million|billion|trillion|dozen|percent|or|to)\b)"
)
CLAUSE = re.compile(
    r",? (?:and|but|so|then) (?:we|this|it|that|is|hence|therefore|thus|the|I|you|not|so|done)\b.*",
    re.DOTALL,
)
PLACEHOLDER = re.compile(r"\W*(?:your |the |final )*answer\W*|\W*", re.IGNORECASE)
NUMBERED = re.compile(r"\(?[0-9]{1,2}\)?[.):]\s+\**[A-Za-z]")
VALUE = re.compile(r"[-+±]?\s?(?:\\?[$€£]\s?)?\.?\d|\\(?:frac|sqrt|pi|text\{|boxed|\(|\[)|\$")
WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
TALK = re.compile(
    r"(?:not|in|as|that|to|reasonable|correct|right|wrong|incorrect|valid|invalid|consistent|unique"
    r"|verified|confirmed|plausible|clear|clearly|obvious|obtained|found|given|boxed|below|above|what"
    r"|also|already|sensible|expected|therefore|because|simplified|positive|negative|indeed|one of"
    r"|supposed|required|based|likely|probably|still|now|a|an|the|your|our|we|just|only)\b",
    re.IGNORECASE,
)


def extract_answer(completion: str, mode: str) -> str | None:
    """The answer in the end (``TAIL``) of a completion; None if there is none."""
    completion = completion[-TAIL:]
    found = [mark(completion) for mark in MARKS[mode]]
    last = max((mark for mark in found if mark is not None), default=None)
    if last is None and mode == "lenient":
        return after_phrase(completion) or None
    return last[1] if last else None


def boxes(text: str) -> list[tuple[int, int, str]]:
    """Start, end and content of each complete box. A nested box is part of the outer one.

    Escaped braces are text. Empty boxes, as in a repeated instruction, are left out, and so are
    boxes that do not end, as in a completion that was cut. ``\\boxed 5``, without braces, holds the
    next token.
    """
    depth, opened = 0, []
    found = [(m.start(), m.end(), m[1].strip()) for m in BARE_BOX.finditer(text)]
    starts = {match.end() - 1: match.start() for match in BOX.finditer(text)}
    for match in BRACE.finditer(text, min(starts, default=len(text))):
        if match.group() == "{":
            depth += 1
            if match.start() in starts:
                opened.append((depth, match.start()))
        elif match.group() == "}":
            if opened and opened[-1][0] == depth:
                brace = opened.pop()[1]
                inside = text[brace + 1 : match.start()].strip()
                if inside:
                    while found and found[-1][0] > starts[brace]:
                        found.pop()
                    found.append((starts[brace], match.end(), inside))
            depth = max(depth - 1, 0)
    return sorted(found)


def last_boxed(text: str) -> str | None:
    """Content of the last complete box; None if there is none."""
    found = boxes(text)
    return found[-1][2] if found else None


def last_boxes(text: str) -> Found | None:
    """The last box, together with boxes before it that are joined to it by a comma, "and" or "or",
    which give several answers. The position is that of the last box."""
    found = boxes(text)
    if not found:
        return None
    together = [found[-1]]
    for box in reversed(found[:-1]):
        gap = text[box[1] : together[-1][0]]
        if len(gap) > 60 or not GAP.fullmatch(gap) or not JOINS.search(gap):
            break
        together.append(box)
    inside = list(dict.fromkeys(box[2] for box in reversed(together)))
    return found[-1][0], ", ".join(inside)


def after_hashes(text: str) -> str | None:
    """The rest of the line after the last ``####``; None if there is none."""
    _, mark, rest = text.rpartition("####")
    return rest.lstrip(" \t").partition("\n")[0].strip() if mark else None


def last_matches(mark: re.Pattern, text: str) -> list[re.Match]:
    """The last ``MAX_MARKS`` matches, the last one first."""
    return list(mark.finditer(text))[: -MAX_MARKS - 1 : -1]


def last_hashes(text: str) -> Found | None:
    """What follows the last ``####`` that is a value and not a heading, which has words."""
    for match in last_matches(HASHES, text):
        content = tidy(match[1])
        if content and is_value(content, last=not text[match.end() :].strip()):
            return match.start(), content
    return None


def is_value(content: str, *, last: bool) -> bool:
    """Whether a line is a value and not a heading. A line with words must begin like a value and be
    the ``last`` one of the text."""
    if NUMBERED.match(content):
        return False
    if WORD.search(content.replace(r"\text", "")):
        return last and bool(VALUE.match(content))
    return any(c.isalnum() for c in content)


def last_line(text: str) -> Found | None:
    """The last line ``Answer: x``, or the text under a heading "Answer"."""
    for match in last_matches(LINE, text):
        content = value_at(text, match.end())
        if not PLACEHOLDER.fullmatch(content):
            return match.start(), content
    return None


def answer_colon(text: str) -> Found | None:
    """DAPO's mark: the text after the last ``Answer:``, to the end of the line."""
    for match in last_matches(ANSWER_COLON, text):
        content = tidy(text[match.end() :].partition("\n")[0])
        if not PLACEHOLDER.fullmatch(content):
            return match.start(), last_boxed(content) or content
    return None


def last_tag(text: str) -> Found | None:
    """Content of the last ``<answer>`` tags."""
    end = None
    for match in reversed(list(TAG.finditer(text))):
        if match[1]:
            end = end or match
        elif end:
            inside = text[match.end() : end.start()].strip()
            return (match.start(), inside) if inside else None
    return None


def tagged_answer(text: str) -> str | None:
    """Content of the last ``<answer>`` tags; None if there are none."""
    found = last_tag(text)
    return found[1] if found else None


def after_phrase(text: str) -> str | None:
    """The value after the last "answer is" that a value follows. If there is none, the words after
    the last one with words that can be an answer: "the answer is correct" gives none."""
    words = None
    for match in last_matches(PHRASE, text):
        content = value_at(text, match.end())
        if not content or PLACEHOLDER.fullmatch(content):
            continue
        if VALUE.match(content) or not WORD.search(content):
            return content
        if words is None and not TALK.match(content):
            words = content
    return words


def value_at(text: str, start: int) -> str:
    """A formula, a block of code, or else the rest of the sentence without the reasons in it."""
    rest = text[start : start + 2000].lstrip(DECORATION.replace("`", "") + "\n")
    if adverb := ADVERBS.match(rest):
        rest = rest[adverb.end() :].lstrip(DECORATION.replace("`", "") + "\n")
    if fence := FENCE.match(rest):
        return fence[1].strip()
    line = rest.partition("\n")[0]
    for opening, closing in FORMULAS:
        if rest.startswith(opening):
            inside, closed, after = rest[len(opening) :].partition(closing)
            if closed and (opening in DISPLAYED or not GOES_ON.match(after)):
                return inside.strip()
    end = SENTENCE_END.search(line)
    line = line[: end.start()] if end else line
    line = PHRASE.split(line)[-1]
    return tidy(without_talk(CLAUSE.sub("", line))) or tidy(line)


def tidy(line: str) -> str:
    return line.strip(DECORATION)


MARKS: dict[str, tuple[Callable[[str], Found | None], ...]] = {
    "lenient": (last_boxes, last_hashes, last_line, last_tag),
    "strict": (last_boxes, last_hashes),
    "boxed": (last_boxes,),
    "hashes": (last_hashes,),
    "answer_line": (answer_colon,),
    "answer_tags": (last_tag,),
}
MODES = tuple(MARKS)
"""``answer_line`` is for DAPO's prompt, ``hashes`` for GSM8K's, ``answer_tags`` for R1's."""
