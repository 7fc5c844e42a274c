r"""Remove words around an answer: ``\text{The answer is } 5``, ``4 (since k = 2)``."""

import re

LEAD = re.compile(
    r" ?(?:\\(?:text|mathrm|textbf) ?\{ ?)?(?:"
    r"(?:i|my|the|there|so|thus|hence|therefore|then|we|it|our|this|that|total|final|answer|result"
    r"|maximum|minimum|number|area|volume|length|value|probability|sum|product)\b[a-z ,'-]*?"
    r"\b(?:is|are|equals|be|get|have|gives|equal to) ?[:=]?"
    r"|[a-z' -]*(?:[a-z]{3,} ?:|[a-z]{4,} ?=)|(?:so|thus|hence|therefore|finally) ?,)"
    r"(?: ?\})?(?![a-z])(?= ?\S)",
    re.IGNORECASE,
)
"""Words before an answer that end in a verb or a colon. They have at least three letters, so
``A: 5``, ``a:b`` and ``at least 5`` do not match."""
ADVERBS = re.compile(
    r" ?(?:indeed|then|thus|therefore|hence|simply|just|exactly|clearly|now|precisely|equal to"
    r"|given by|always|only|still|again|in fact)\b ?,?",
    re.IGNORECASE,
)
COMMENT = re.compile(
    r" ?,?;? ?(?:\\(?:text|mathrm|textbf) ?\{[ ,;]*)?(?:"
    r"\(? ?(?<![a-zA-Z\\])(?:(since|because|which)|as|whereby|where|due|thanks|using|obtained"
    r"|attained|achieved|so that|so|thus|hence|therefore|i\.e\.|that is)"
    r"|\( ?(?:when|at|for|if|by|from|with|see|check|approximately|approx|rounded|exactly|namely)"
    r")\b(?![a-zA-Z{_^=(]).*",
    re.DOTALL,
)
"""A reason after an answer. A condition or a place matches only in parentheses, where it is an
aside. After words, only what is certainly a reason matches: "increases as x decreases" is one
answer."""


def without_talk(text: str) -> str:
    """The answer without the words that introduce it and the reason given after it."""
    lead = LEAD.match(text)
    if lead:
        text = text[lead.end() :]
        if lead[0].count("{") > lead[0].count("}"):
            text = text.replace("}", "", 1) if text.count("}") > text.count("{") else text
        adverb = ADVERBS.match(text)
        text = text[adverb.end() :] if adverb else text
    comment = COMMENT.search(text, 1)
    if not comment:
        return text
    before = text[: comment.start()]
    words = re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{4,}", before) and not re.search("[0-9]", before)
    joined = re.search(r"\b(?:or|and|not) ?$", before)  # "4 or so, maybe 5"
    if joined or (words and not comment[1]):
        return text
    return before + "}" * max(before.count("{") - before.count("}"), 0)


CHOICE = re.compile(
    r" ?(?:[Oo]ption |[Cc]hoice )?(?:\(([A-J])\)|([A-J])(?: ?[.):](?!=))) ?(?=[^ ,;.&])"
)
ANOTHER = re.compile(r"\([A-J]\)")
LETTER = re.compile(r"(?:[Oo]ption |[Cc]hoice )?\(?([A-J])\)?")


def choice(text: str) -> tuple[str, str]:
    """The letter of an option and its content: ("C", "12") for ``(C) 12``. Both are "" if there is
    no letter in front, or if there are letters of several options."""
    text = re.sub(r"\\text ?\{([^{}]*)\}", r"\1", text).strip()
    if whole := LETTER.fullmatch(text):
        return whole[1], ""
    found = CHOICE.match(text)
    if not found or ANOTHER.search(text, found.end()):
        return "", ""
    return found[1] or found[2], text[found.end() :].strip()
