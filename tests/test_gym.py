"""Problems and scorers of reasoning-gym; run where the extra [tasks] is installed."""

import json

import pytest

from basis_jax import data, tasks
from basis_jax.config import DataSection
from basis_jax.config_check import check_scorers
from basis_jax.verify import make_verifier
from basis_jax.verify.gym import given


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
    assert given(completion) == answer


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
    assert len(train) + len(held) == 60 and 3 < len(held) < 25
    assert not {p.prompt for p in train} & {p.prompt for p in held}
    entries = [json.loads(p.answer) for p in train[:4]]
    right = [e["answer"] for e in entries]
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
        ("number_sorting?size=5", "cannot be graded: .*compile, which is refused"),
    ):
        with pytest.raises(ValueError, match=words):
            data.load(data.Source(f"task:gym/{spec}"), held_out=False)
