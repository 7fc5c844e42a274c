"""Whatever a completion holds, the trainer's process neither raises nor waits for it."""

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from basis_jax.data.answers import read_answer
from basis_jax.verify import make_verifier
from basis_jax.verify.extract import MODES, extract_answer
from basis_jax.verify.gym import submitted_answer
from basis_jax.verify.mathematics import plain_verdict
from basis_jax.verify.verdicts import Verdict

GOLDS = (
    "5",
    "x+1",
    "(1,2),(3,4)",
    r"50\%",
    r"5\text{ cm}^2",
    "a=3, b=5",
    "[0,1)",
    r"\text{Friday}",
)
PIECES = (
    r"\boxed{", r"\boxed 5", "####", "#### 5\n", "\nAnswer: ", "answer is ", "<answer>",
    "</answer>",
    r"\%", r"\frac{1}{", "{", "}", "(", ")", "[", "]", "$", "\\", "\n", r"\text{", r"^\circ", "9^{",
    r"\pm", "=", "1,", "1 ", "x", "٥", "\ud800", "\x00", "`", "```\n", "**", r"\overline{",
    r"\mod 3", "_{10}C_3", "or ", r"\cup", "<", "|", "&", r"\choose", "since ", r"\dot{3}", r"\!",
    r",\! 111", " ", "the ", "is ", ": ", "C ", r"\sqrt(", "1/", "(mod ", "_", "to ", "e", r"\$",
    r"\begin{pmatrix}", "\t", "!", "^", "5", "\u200b", "é", "𝟝",
)  # fmt: skip
LIMIT = 0.2


def seconds(function, *arguments, tries=3):
    """CPU seconds of this thread: the clock would measure what else runs here. A long one is
    measured again, since neighbours on the same core slow it down, too: the quickest counts."""
    quickest = float("inf")
    for _ in range(tries):
        started = time.thread_time()
        function(*arguments)
        quickest = min(quickest, time.thread_time() - started)
        if quickest < LIMIT / 2:
            break
    return quickest


def look(completion):
    """All that the trainer's process does with a completion, and more: every mode."""
    submitted_answer(completion)
    for mode in MODES:
        answer = extract_answer(completion, mode)
        for gold in GOLDS:
            verdict = plain_verdict(gold, answer)
            assert verdict is None or isinstance(verdict, Verdict)


@pytest.mark.parametrize("piece", PIECES, ids=ascii)
def test_a_piece_repeated_to_any_length_takes_no_time(piece):
    for length in (30, 100, 250, 1000, 100_000, 1_000_000):
        text = piece * (length // len(piece))
        for completion in (
            text,
            rf"so $\boxed{{{text}}}$.",
            f"Answer: {text}",
            f"x answer is {text}",
        ):
            for mode in MODES:
                assert seconds(extract_answer, completion, mode) < LIMIT
            answer = extract_answer(completion, "lenient")
            for gold in GOLDS:
                assert seconds(plain_verdict, gold, answer) < LIMIT


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join), st.sampled_from(GOLDS))
def test_no_mixture_of_pieces_raises_or_takes_time(text, gold):
    for completion in (text, rf"so $\boxed{{{text}}}$."):
        assert seconds(look, completion) < LIMIT * len(MODES) * len(GOLDS)
    assert seconds(plain_verdict, gold, text) < LIMIT


@settings(max_examples=80, deadline=None)
@given(st.text(st.characters(codec=None), max_size=300))
def test_no_text_at_all_raises(text):
    look(text)
    look(rf"\boxed{{{text}}}")


UNGRADABLE = {
    "percent signs": r"50\%" + r"\%" * 1000,
    "few percent signs": r"50\%" + r"\%" * 90,
    "nested braces": "{" * 300 + "5" + "}" * 300,
    "nested parentheses": "(" * 18 + "5" + ")" * 18 + ")",
    "fifty thousand characters": "x" * 50_000,
    "deep fractions": r"\frac{1}{" * 15 + "2" + "}" * 15,
    "deeper fractions": r"\frac{1}{" * 300 + "2" + "}" * 300,
    "tower of powers": "9^{9^{9^9}}",
    "unicode digits": "٥٤",
    "mathematical digits": "𝟝",
    "surrogate": "5\ud800",
    "null": "5\x00",
    "equations": "x=" * 200 + "5=6",
    "relations": "1<" * 150 + "2",
    "unions": r"(1,2)\cup" * 60 + "(3,4)",
    "tuples in tuples": "(1," * 18 + "2" + ")" * 18,
}


@pytest.mark.slow
def test_the_ungradable_is_wrong_and_counted_and_its_neighbours_are_graded():
    with make_verifier("math", workers=2, seconds=2.0) as verifier:
        for gold in ("5", r"\sqrt{2}"):
            texts = [rf"\boxed{{{answer}}}" for answer in UNGRADABLE.values()]
            verdicts = verifier.grade([*texts, rf"\boxed{{{gold}}}"], [gold] * (len(texts) + 1))
            assert verdicts[-1].reward == 1
            for name, verdict in zip(UNGRADABLE, verdicts, strict=False):
                assert (verdict.valid, verdict.reward) == (True, 0), (name, verdict)
                assert verdict.kind in ("wrong", "unfit", "timeout", "memory", "nonsense"), name
            assert verdicts[list(UNGRADABLE).index("null")].kind == "unfit"


@pytest.mark.parametrize(
    "gold",
    [
        '{"all of": ["4"], "other": 1}',
        '{"all of": ["4"], "absolute": NaN}',
        '{"all of": ["4"], "relative": "0"}',
        '{"all of": 7}',
        '{"all of": ',
        "{\"all of\": ['4']}",
        '{"any of": [], "all of": ["4"]}',
        '{"any of": ["4"], "other": 1}',
        '{"any of": ["{\\"all of\\": 7}", "5"]}',
        '{"any of": ' + "[" * 100_000,
    ],
)
def test_an_answer_that_begins_like_several_is_refused_when_read_and_never_raises(gold):
    with pytest.raises(ValueError, match="begins like several accepted answers"):
        read_answer(gold)
    with make_verifier("math", workers=1) as verifier:
        (verdict,) = verifier.grade([r"\boxed{4}"], [gold])
    assert (verdict.kind, verdict.valid) == ("gold", False)
