"""The arithmetic task: right answers, and nothing of the held-out questions in training."""

import re

import pytest

from basis_jax.data import tasks
from basis_jax.data.tasks import arithmetic

TRAIN = arithmetic.problems(held_out=False)
HELD_OUT = arithmetic.problems(held_out=True)


def content(line):
    """Kind of sum and unordered operands of a line, whether answered or not."""
    question = line.split("=")[0]
    return re.sub(r"\d+", "", question), tuple(sorted(map(int, re.findall(r"\d+", question))))


def value(line):
    """The answer by another road: Python's own arithmetic on the text before the equals sign."""
    return str(eval(line.split("=")[0], {"max": max}))


def test_every_line_is_right_and_the_last_is_open_and_new():
    for problem in TRAIN + HELD_OUT:
        *worked, asked = problem.prompt.split("\n")
        assert asked.endswith(" =") and value(asked) == problem.answer
        assert all(line == f"{line.split('=')[0]}= {value(line)}" for line in worked)
        assert len(worked) == arithmetic.KINDS[problem.kind].worked
        assert content(asked) not in map(content, worked)


def test_no_held_out_question_is_trained_on_or_shown_in_either_order():
    hidden = {content(p.prompt.split("\n")[-1]) for p in HELD_OUT}
    lines = {content(line) for p in TRAIN for line in p.prompt.split("\n")}
    lines |= {content(line) for p in HELD_OUT for line in p.prompt.split("\n")[:-1]}
    assert not hidden & lines


def test_both_sides_hold_every_kind_and_all_questions_together():
    total = sum(kind.size for kind in arithmetic.KINDS.values())
    assert len({p.uid for p in TRAIN + HELD_OUT}) == len(TRAIN + HELD_OUT) == total == 864
    assert {p.kind for p in TRAIN} == {p.kind for p in HELD_OUT} == set(arithmetic.KINDS)
    assert 0.1 < len(HELD_OUT) / total < 0.3


def test_the_problems_never_change():
    """Reference tables name problems by content: the first problem is pinned, text and all."""
    assert TRAIN == arithmetic.problems(held_out=False)
    assert TRAIN[0].prompt == "5 + 8 = 13\n2 + 5 = 7\n0 + 0 ="


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown task 'sums'; allowed are arithmetic, number_wor"):
        tasks.problems("sums", held_out=False)
