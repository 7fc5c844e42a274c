"""Whatever stands in the columns of a problem: Problems, or one sentence with file and row."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from basis_jax.config import DataSection
from basis_jax.data import sources
from basis_jax.data.encoding import EncodedProblems
from basis_jax.data.problem import Problem

CHARACTERS = st.characters(min_codepoint=0, max_codepoint=0x10FFFF)  # half of a character too
TEXTS = st.one_of(
    st.text(CHARACTERS, max_size=12),
    st.sampled_from(
        ["", " ", "$6$", "$$", "#### ", "#### 5", "\\boxed{", "\\boxed{5}", "nan", '["a"]', "['a']",
         '[{"role": "user", "content": "2+2?"}]', '[{"role": "user"}]', "[{'from': 'human'}]",
         '{"any of": 5}', '{"all of": ["4", "5"]}', "{}", "[[[", "\\(5\\)", "\ud800"]
    ),
)  # fmt: skip
KEYS = st.sampled_from(
    ["role", "content", "from", "value", "type", "text", "messages", "a", "b.c", "kind"]
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.floats(width=16), TEXTS,
    st.sampled_from(["user", "assistant", "system", "human", "gpt", "nobody"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(KEYS, TEXTS), inner, max_size=3),
        st.fixed_dictionaries({"role": inner, "content": inner}),
        st.fixed_dictionaries({"from": inner, "value": inner}),
    ),
    max_leaves=8,
)
ROWS = st.dictionaries(
    st.sampled_from(["problem", "answer", "kind", "answers_wanted", "is_multiple_answer"]), VALUES
)
LIKELY = st.fixed_dictionaries(
    {"problem": VALUES, "answer": VALUES}, optional={"kind": VALUES, "answers_wanted": VALUES}
)


def check(path, **options):
    """Load a file of one row; what comes is either right by its types or a sentence."""
    try:
        problems = sources.load_training(DataSection(path=str(path), **options))
    except ValueError as error:
        sentence = str(error)
        assert str(path) in sentence and "\n" not in sentence and len(sentence) < 2000
        assert any(f"{unit} 1" in sentence for unit in ("line", "row")), sentence
        sentence.encode()
        return
    (problem,) = problems
    assert isinstance(problem, Problem) and isinstance(problem.answer, str)
    texts = [problem.prompt] if isinstance(problem.prompt, str) else [t for _, t in problem.prompt]
    for text in (*texts, problem.answer, problem.kind):
        text.encode()
    if not isinstance(problem.prompt, str):
        assert len(problem.prompt) > 1 and problem.prompt[-1][0] != "assistant"
        assert problem.prompt[-1][1].strip()
    assert problem.answer.strip() == problem.answer
    assert 0 <= problem.uid < 2**63


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(row=st.one_of(ROWS, LIKELY), wanted=st.sampled_from(["any", "all"]))
def test_any_json_row_is_a_problem_or_a_sentence(folder, row, wanted):
    path = folder / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    check(path, answers_wanted=wanted)
    path = folder / "a.json"
    path.write_text(json.dumps([row], indent=1))
    check(path, answers_wanted=wanted)


def deeper(calls, work):
    return deeper(calls - 1, work) if calls else work()


def test_columns_of_any_depth_are_problems_or_a_sentence(folder):
    """The stack of the caller counts, too: what was read may be too deep to be hashed."""
    for depth in (*range(100, 900, 200), *range(900, 1000, 5)):
        path = folder / "deep.jsonl"
        row = '{"problem": "x", "answer": 4, "z": ' + "[" * depth + "]" * depth + "}\n"
        path.write_text(row * 2)
        try:
            problems = sources.load_training(DataSection(path=str(path)))
            tokens = np.ones((2, 1), np.int32)
            deeper(60, EncodedProblems(tuple(problems), tokens, tokens[:, 0], {}).fingerprint)
        except ValueError as error:
            assert "nested too deep" in str(error)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(text=st.text(max_size=30), suffix=st.sampled_from(["json", "jsonl", "csv"]))
def test_any_text_is_problems_or_a_sentence(folder, text, suffix):
    """A text as the last line, below a good one; nothing but a ValueError with the file's name."""
    path = folder / f"b.{suffix}"
    first = "problem,answer\n2+2?,4\n" if suffix == "csv" else '{"problem": "2+2?", "answer": 4}\n'
    path.write_bytes((first + text).encode())
    try:
        problems = sources.load_training(DataSection(path=str(path)))
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        assert "line " in str(error) or "row " in str(error)
    else:
        assert problems[0].answer == "4"


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(data=st.binary(max_size=60), suffix=st.sampled_from(["json", "csv", "jsonl.gz"]))
def test_any_bytes_are_problems_or_a_sentence(folder, data, suffix):
    path = folder / f"c.{suffix}"
    path.write_bytes(data)
    try:
        sources.load_training(DataSection(path=str(path)))
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
