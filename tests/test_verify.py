"""Finding answers, and comparing those that need no algebra."""

import time
from fractions import Fraction

import pytest

from basis_jax.verify import compare, criteria, extract, make_verifier, mathematics
from basis_jax.verify.compare import equivalent
from basis_jax.verify.mathematics import plain_verdict
from basis_jax.verify.notation import canonical, number
from basis_jax.verify.verdicts import KINDS, shares, verdict_of


def test_exact_means_the_whole_completion():
    with make_verifier("exact") as verifier:
        verdicts = verifier.grade([" 12\n", "12.", "the answer is 12", "13"], ["12"] * 4)
    assert [v.reward for v in verdicts] == [1, 0, 0, 0]
    assert all(v.valid for v in verdicts)


def test_an_unknown_verifier_or_mode_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'maths'; allowed are exact, math, math_strict"):
        make_verifier("maths")
    from basis_jax.verify.mathematics import MathVerifier

    with pytest.raises(ValueError, match="mode is 'loose'; allowed are lenient, strict"):
        MathVerifier(mode="loose")


def test_completions_and_answers_are_as_many():
    with pytest.raises(ValueError), make_verifier("math") as verifier:
        verifier.grade(["1"], ["1", "2"])


FOUND = [  # completion, lenient answer, strict answer
    (r"so \boxed{12}.", "12", "12"),
    (r"\boxed{1}, no: \boxed{2}", "2", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", r"\frac{1}{2}"),
    (r"\boxed{\text{a \} b}}", r"\text{a \} b}", r"\text{a \} b}"),
    (r"\boxed{\boxed{5}}", r"\boxed{5}", r"\boxed{5}"),
    (r"\fbox{7} } {", "7", "7"),
    (r"\boxed {x}", "x", "x"),
    (r"\boxed{3} and so \boxed{4", "3", "3"),
    (r"Put your final answer in \boxed{}.", None, None),
    (r"\boxed{8} as asked, in \boxed{}", "8", "8"),
    (r"\boxed{6}" + "\nThe answer is 7.", "6", "6"),
    ("3 * 4 = 12\n#### 12", "12", "12"),
    ("#### 11\n#### 12 \nbye", "12", "12"),
    ("#### 11, or \\boxed{12}", "12", "12"),
    ("The answer is 12.", "12", None),
    ("The final answer is: $\\frac{1}{2}$. Done.", r"\frac{1}{2}", None),
    ("**Answer:** 3.5", "3.5", None),
    ("Answer: 34", "34", None),
    ("So the answer is\n\n\\[ x^2 \\]", "x^2", None),
    ("The answer is 1. Wait, the answer is 2", "2", None),
    ("I think 12", None, None),
    ("", None, None),
]


@pytest.mark.parametrize("completion, lenient, strict", FOUND)
def test_answers_are_found_by_their_marks(completion, lenient, strict):
    assert extract.extract_answer(completion, "lenient") == lenient
    assert extract.extract_answer(completion, "strict") == strict


@pytest.mark.parametrize(
    "completion, found",
    [
        ("\\boxed{1}\n#### 2\n<answer>3</answer>\nAnswer: 4", ("1", "2", "4", "3")),
        ("Answer: 4\n<answer>3</answer>\n#### 2\n\\boxed{1}", ("1", "2", "4", "3")),
        ("Answer: 4\nAnswer: 5", (None, None, "5", None)),
        ("So, answer: $\\frac12$ (done)", (None, None, "$\\frac12$ (done)", None)),
        ("Answer: \\boxed{6}", ("6", None, "6", None)),
        ("of the form Answer: $Answer", (None, None, None, None)),
        ("the answer is 4", (None, None, None, None)),
        ("<answer>1</answer><ANSWER> 2</ANSWER>", (None, None, None, "2")),
        ("<answer>open", (None, None, None, None)),
        ("#### Step 3", (None, None, None, None)),
    ],
)
def test_a_data_set_s_mode_takes_the_mark_of_its_prompt_alone(completion, found):
    modes = ("boxed", "hashes", "answer_line", "answer_tags")
    assert tuple(extract.extract_answer(completion, mode) for mode in modes) == found


def test_a_verifier_takes_the_mode_of_the_data_set():
    with make_verifier("math", mode="answer_line") as verifier:
        verdicts = verifier.grade(["\\boxed{1}\nAnswer: 2", "\\boxed{2}"], ["2", "2"])
    assert [(v.reward, v.kind) for v in verdicts] == [(1, "right"), (0, "no_answer")]


def test_kinds_of_verdicts_are_counted_and_only_ours_are_invalid():
    verdicts = [verdict_of(kind, "") for kind in KINDS]
    assert [v.kind for v in verdicts if not v.valid] == ["gold", "failure", "ungraded"]
    assert [v.kind for v in verdicts if v.reward] == ["right"]
    counted = shares([*[v.kind for v in verdicts[:4]], *["timeout"] * 4])
    assert counted["verify/timeout"] == 0.5 and counted["verify/no_answer"] == 0.125
    assert counted["verify/failure"] == 0 and "verify/right" not in counted
    with pytest.raises(ValueError, match="at least one"):
        shares([])


@pytest.mark.parametrize(
    "gold, answer, allowed",
    [
        ("100", "100.0009", True), ("100", "100.002", False), ("-2.5", "-2.50002", True),
        ("0", "0.00000001", True), ("0", "0.0000001", False),
    ],
)  # fmt: skip
def test_minerva_s_numbers_may_differ_as_its_evaluation_lets_them(gold, answer, allowed):
    """NumPy's isclose: 1e-8 + 1e-5 |right|."""
    assert abs(float(gold) - float(answer)) <= 1e-8 + 1e-5 * abs(float(gold)) or not allowed
    assert equivalent(gold, answer, never, tolerance=criteria.MINERVA) is allowed


def test_olympiad_bench_s_error_is_that_of_the_problem():
    assert criteria.olympiad_tolerance(None).absolute == pytest.approx(1.01e-8)
    assert criteria.olympiad_tolerance("1e-1").absolute == pytest.approx(0.101)
    assert criteria.olympiad_tolerance("0.1, 0.01").absolute == pytest.approx(0.0101)
    with pytest.raises(ValueError):
        criteria.olympiad_tolerance("small")


def test_a_criterion_without_tolerance_is_its_answer_and_an_empty_one_is_refused():
    assert criteria.criterion(["5"]) == "5" == criteria.criterion("5")
    assert criteria.read_criterion(r"\{1,2\}") == (r"\{1,2\}", criteria.EXACT)
    written = criteria.criterion(["1,000", "(1,2)"], criteria.MINERVA)
    assert criteria.read_criterion(written) == ("1000, (1,2)", criteria.MINERVA)
    for answers in ([], [""], " "):
        with pytest.raises(ValueError, match="give at least one"):
            criteria.criterion(answers)


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 150_000,
        "\\boxed{" + "{" * 500_000 + "}" * 500_000 + "}",
        "answer is " * 100_000,
        "answer is $" + "x" * 1_000_000,
        "\\" * 1_000_000,
        "#" * 1_000_000,
    ],
    ids=lambda text: text[:12],
)
def test_a_megabyte_is_searched_in_no_time(text):
    started = time.perf_counter()
    extract.extract_answer(text, "lenient")
    assert time.perf_counter() - started < 1


NUMBERS = [
    ("42", 42), ("-7", -7), ("+7", 7), ("007", 7), ("1,234,567", 1234567), ("1,00", None),
    (".5", Fraction(1, 2)), ("-0.25", Fraction(-1, 4)), ("3/4", Fraction(3, 4)), ("3/0", None),
    (r"\frac{-3}{4}", Fraction(-3, 4)), (r"-\frac12", Fraction(-1, 2)), (r"\frac{1}{0}", None),
    (r"2\frac{1}{3}", Fraction(7, 3)), (r"-2 \frac13", Fraction(-7, 3)), ("2 1/3", Fraction(7, 3)),
    (r"1.5 \times 10^{3}", 1500), (r"7\cdot10^{-2}", Fraction(7, 100)),
    (r"0.1\overline{6}", Fraction(1, 6)), (r"0.\overline{142857}", Fraction(1, 7)),
    ("0.333333", Fraction(333333, 1000000)), ("4 2", None), ("5x", None), ("٤٢", None),
    ("4²", None), ("", None), ("-", None), (".", None), ("1e3", 1000),
]  # fmt: skip


@pytest.mark.parametrize("text, value", NUMBERS)
def test_plain_numbers_are_exact(text, value):
    assert number(canonical(text)) == value


def never(gold, answer):
    raise AssertionError(f"{gold!r} against {answer!r} needs no algebra")


@pytest.mark.parametrize(
    "gold, answer, right",
    [
        ("1,2", "2, 1", True),
        ("1,2", "1", False),
        ("(1,2)", "(2,1)", False),
        ("(1,2)", "[1,2]", False),
        ("[1,2]", "1,2", False),
        ("(1,2)", "1,2", True),
        (r"\{1,2\}", "(1,2)", False),
        (r"\{1,2,2\}", "2,1", True),
        (r"\pm 3", "3,-3", True),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", True),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", False),
        (r"(-\infty,1)\cup[2,\infty)", r"x\ge2 \text{ or } x<1", True),
        ("3", "5=3", False),
        ("5", "2+3=5=5", None),
        ("5", "x=5", True),
        ("101_2", "101_3", False),
        ("12", "12_8", False),
        (r"5\text{ cm}", r"5\text{ m}", False),
        ("5", r"5\text{ cm}^2", True),
        (r"50\%", "0.5", True),
        (r"50\%", r"5\%", False),
        (r"\text{Friday}", "friday", True),
        (r"\text{east}", "seat", False),
        ("10", "1 0", False),
        ("$$", ".", False),
        (r"\frac{1}{3}", "0.333333", False),
    ],
)
def test_structure_is_compared_without_algebra(gold, answer, right):
    if right is None:
        with pytest.raises(AssertionError, match="needs no algebra"):
            equivalent(gold, answer, never)
    else:
        assert equivalent(gold, answer, never) is right


def test_a_right_answer_that_cannot_be_compared_is_an_error_and_not_a_zero():
    for gold in ("x" * 2000, "5\x00", "(" * 30 + "5" + ")" * 30):
        ungraded, wrong = plain_verdict(gold, "5"), plain_verdict("5", gold)
        assert (ungraded.reward, ungraded.valid, ungraded.kind) == (0, False, "gold")
        assert (wrong.reward, wrong.valid, wrong.kind) == (0, True, "unfit")


@pytest.mark.parametrize("error", [RecursionError, MemoryError, ValueError, compare.Overtime])
def test_what_the_trainer_s_process_cannot_compare_at_once_goes_to_a_worker(monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(mathematics, "equivalent", fails)
    assert plain_verdict("5", "6") is None


def test_the_trainer_s_process_compares_nothing_long_and_for_no_long_time(monkeypatch):
    many = ",".join(map(str, range(80)))
    assert plain_verdict(many, many + ",80") is None  # by its length
    with pytest.raises(compare.Overtime):
        compare.equivalent("1,2", "2,1", never, seconds=-1.0)
    monkeypatch.setattr(mathematics, "MAX_PLAIN_SECONDS", -1.0)
    assert plain_verdict("1,2", "2,1") is None


def test_parts_within_parts_are_compared_to_a_bounded_depth():
    deep = "(1," * 30 + "2" + ")" * 30
    assert equivalent(deep.replace("2", "3"), deep, never) is False


def test_digits_of_other_scripts_are_no_digits():
    """Python's int() and regular expressions take them for digits."""
    verdict = plain_verdict("x+5", "x+\u0665")
    assert verdict.valid and verdict.reward == 0 and "digits" in verdict.reason


@pytest.mark.parametrize("filler", "{}()[],:=\\^_5x &<>", ids=ord)
def test_no_text_of_the_longest_length_takes_long(filler):
    """Patterns that backtrack and loops over loops would show here."""
    for text in (filler * 1000, ("1" + filler) * 500, ("\\frac" + filler) * 160):
        started = time.perf_counter()
        try:
            equivalent("x+1", text[:1000], lambda gold, answer: False)
        except RecursionError:
            pytest.fail("nested too deep for Python")
        assert time.perf_counter() - started < 0.5
