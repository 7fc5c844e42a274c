"""Several accepted answers: right if any matches; all, where the row says so."""

import json

import pytest

from basis_jax.config import DataSection
from basis_jax.data import sources
from basis_jax.verify import make_verifier


def graded(folder, row, name, completions, **options):
    path = folder / "own.jsonl"
    path.write_text(json.dumps(row))
    (problem,) = sources.load_training(DataSection(path=str(path)))
    with make_verifier(name, **options) as verifier:
        verdicts = verifier.grade(completions, [problem.answer] * len(completions))
    assert all(verdict.valid for verdict in verdicts)
    return [int(verdict.reward) for verdict in verdicts]


def test_one_of_several_answers_is_enough(tmp_path):
    row = {"problem": "2+2?", "answer": ["4", "four", 5.0]}
    assert graded(tmp_path, row, "exact", ["4", "four", "5", "6", "4, four"]) == [1, 1, 1, 0, 0]
    boxes = [f"\\boxed{{{a}}}" for a in ("4", "8/2", "5", "6")]
    assert graded(tmp_path, row, "math", boxes, workers=1) == [1, 1, 1, 0]


def test_all_are_wanted_where_the_row_says_so(tmp_path):
    row = {"problem": "x^2=9?", "answer": ["$3$", "$-3$"], "is_multiple_answer": True}
    assert graded(tmp_path, row, "exact", ["3, -3", "-3,3", "3"]) == [1, 1, 0]
    boxes = [f"\\boxed{{{a}}}" for a in ("3, -3", "-3, 3", "3", "3, 4")]
    assert graded(tmp_path, row, "math", boxes, workers=1) == [1, 1, 0, 0]


@pytest.mark.parametrize("name", ["exact", "math"])
def test_a_single_answer_is_graded_as_before(tmp_path, name):
    row = {"problem": "2+2?", "answer": 4}
    texts = {"exact": ["4", "5"], "math": [r"\boxed{4}", r"\boxed{5}"]}[name]
    assert graded(tmp_path, row, name, texts) == [1, 0]
