"""Find problems that share texts: held-out with training problems, or within one set."""

import re
from collections.abc import Sequence

from basis_jax.data.problem import Problem

OVERLAP, COMMON = 13, 10  # as GPT-3's check of its benchmarks (arXiv 2005.14165, appendix C)
WORD = re.compile(r"[^\W_]+")


def overlapping(
    held_out: Sequence[Problem], training: Sequence[Problem]
) -> list[tuple[Problem, Problem, str]]:
    """Held-out problems, each with the first training problem that shares ``OVERLAP`` words in a
    row with it, and those words. Runs of words in more than ``COMMON`` training problems do not
    count: they belong to a template.

    Words are runs of letters and digits, in lower case. A text with fewer words must be equal,
    apart from case and spaces. Memory grows with the held-out problems, time with both: it takes a
    minute or two for a million training problems.
    """
    runs = [word_runs(problem) for problem in held_out]
    held_out_runs = set().union(*runs)
    counts: dict[tuple[str, ...], int] = {}
    first: dict[tuple[str, ...], Problem] = {}
    for problem in training:
        for run in word_runs(problem) & held_out_runs:
            counts[run] = counts.get(run, 0) + 1
            first.setdefault(run, problem)
    found = []
    for problem, own in zip(held_out, runs, strict=True):
        shared = sorted(run for run in own if 0 < counts.get(run, 0) <= COMMON)
        if shared:
            found.append((problem, first[shared[0]], " ".join(shared[0])))
    return found


def contradictions(problems: Sequence[Problem]) -> list[tuple[Problem, Problem]]:
    """For each prompt that has several answers, two problems with different ones. Answers differ if
    their texts do, apart from case and spaces."""
    first: dict[str | tuple, Problem] = {}
    found: dict[str | tuple, tuple[Problem, Problem]] = {}
    for problem in problems:
        other = first.setdefault(problem.prompt, problem)
        if other is not problem and plain(other.answer) != plain(problem.answer):
            found.setdefault(problem.prompt, (other, problem))
    return list(found.values())


def plain(text: str) -> str:
    return "".join(text.split()).lower()


def word_runs(problem: Problem) -> set[tuple[str, ...]]:
    """All runs of ``OVERLAP`` words in the prompt. A shorter text is one run, signs included."""
    messages = problem.prompt if isinstance(problem.prompt, tuple) else (("", problem.prompt),)
    text = " ".join(content for _, content in messages).lower()
    words = WORD.findall(text)
    if len(words) < OVERLAP:
        return {tuple(text.split())}
    return {tuple(words[i : i + OVERLAP]) for i in range(len(words) - OVERLAP + 1)}
