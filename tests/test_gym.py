"""Problems and scorers of reasoning-gym; run where the extra [tasks] is installed."""

import json

import pytest

from basis_jax.config import DataSection
from basis_jax.data import sources, tasks
from basis_jax.evaluation import completions
from basis_jax.opening.checks import check_scorers
from basis_jax.verify import make_verifier
from basis_jax.verify.gym import submitted_answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (" 12 \n", "12"),
        ("so <answer>3</answer>, no: <answer> 4\n5 </answer>", "4\n5"),
        ("<answer>open <answer>6</answer>", "6"),
        (r"thus \boxed{7}", "7"),
        ("The answer is 8.", "8"),
    ],
)
def test_the_answer_is_in_the_last_tags_else_at_a_mark_else_all(completion, answer):
    assert submitted_answer(completion) == answer


def test_gym_problems_and_the_gym_verifier_need_each_other():
    check_scorers("gym", ("task:gym/chain_sum", "task:gym/leg_counting?size=5"))
    check_scorers("exact", (DataSection().path,))
    for verifier, path in (("gym", "task:arithmetic"), ("math", "task:gym/chain_sum")):
        with pytest.raises(ValueError, match="need the verifier 'gym'"):
            check_scorers(verifier, (path,))


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="needs reasoning-gym; pip install it"):
        tasks.problems("gym/chain_sum", held_out=False)


@pytest.mark.slow
def test_problems_are_made_split_by_content_and_graded_by_their_own_scorer():
    pytest.importorskip("reasoning_gym")
    spec = "gym/spell_backward?size=60&max_word_len=6"
    train, held = (tasks.problems(spec, held_out=h) for h in (False, True))
    assert train == tasks.problems(spec, held_out=False)
    assert len(train) + len(held) == 60 and 3 < len(held) < 25  # of 60 different words
    assert not {p.prompt for p in train} & {p.prompt for p in held}
    right = [json.loads(p.answer)["entry"]["answer"] for p in train[:4]]
    with make_verifier("gym", workers=1) as verifier:
        answers = [p.answer for p in train[:4]]
        assert [v.reward for v in verifier.grade(right, answers)] == [1] * 4
        partial = verifier.grade([right[0] + "x", "", "\x00", "9**9**9**9"], answers[:1] * 4)
    assert [v.reward for v in partial] == [0] * 4 and all(v.valid for v in partial)


@pytest.mark.slow
def test_what_cannot_be_made_or_graded_is_refused():
    """number_sorting's scorer hands the answer to Python's compiler, where the worker stops it."""
    pytest.importorskip("reasoning_gym")
    for spec, words in (
        ("chain_sums", "has no task 'chain_sums'; it has .*chain_sum,"),
        ("chain_sum?min_terms=9&max_terms=2", "refuses its options"),
        ("chain_sum?colour=red", "refuses its options"),
        ("chain_sum?size", "refuses its options"),
        ("number_sorting?size=20", "cannot be graded: .*its own .*compile, which is refused"),
        ("spiral_matrix?size=20", "cannot be graded: .*another .*compile, which is refused"),
    ):
        with pytest.raises(ValueError, match=words):
            sources.load(sources.Source(f"task:gym/{spec}"), held_out=False)


@pytest.mark.slow
def test_a_question_that_comes_twice_is_one_problem_and_options_reach_the_scorer():
    pytest.importorskip("reasoning_gym")
    few = tasks.problems("gym/count_bits?size=200&max_n=9", held_out=False)
    assert 0 < len(few) == len({p.prompt for p in few}) < 12
    spec = "gym/decimal_arithmetic?size=20&max_num_decimal_places=8"
    problem = tasks.problems(spec, held_out=False)[0]
    with make_verifier("gym", workers=1) as verifier:
        answer = json.loads(problem.answer)["entry"]["answer"]
        near = str(float(answer) + 5e-4)  # equal to three places, the scorer's default
        verdicts = verifier.grade([answer, near], [problem.answer] * 2)
    assert [v.reward for v in verdicts] == [1, 0]


def test_a_majority_of_gym_answers_is_over_their_texts():
    for completion in ("so <answer>41 b</answer>", "41 b"):
        assert completions.vote(completions.extracted(completion, "gym"), "gym") == "41 b"
