"""Every value in a problem's columns is understood, or refused in a sentence with file and row."""

import json
import re

import pytest

from basis_jax.config import DataSection
from basis_jax.data import sources
from basis_jax.data.answers import several
from basis_jax.data.problem import Problem

USER = {"role": "user", "content": "2+2?"}
SYSTEM = {"role": "system", "content": "Think."}
ASSISTANT = {"role": "assistant", "content": "It is 4."}
CHAT = (("system", "Think."), ("user", "2+2?"))


def load_row(folder, row, **options):
    """The problem of a file's second line, below a good one."""
    path = folder / "own.jsonl"
    good = {"problem": "1+1?", "answer": "2"}
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    return sources.load_training(DataSection(path=str(path), **options))[1]


def refusal(folder, row, **options):
    with pytest.raises(ValueError) as raised:
        load_row(folder, row, **options)
    sentence = str(raised.value)
    assert sentence.startswith(f"{folder}/own.jsonl, line 2: ") and "\n" not in sentence
    assert sentence.encode()
    return sentence.removeprefix(f"{folder}/own.jsonl, line 2: ")


@pytest.mark.parametrize(
    "value, answer",
    [
        (43, "43"),
        (43.0, "43"),
        (-0.0, "0"),
        (2.5, "2.5"),
        (1e16, "1e+16"),
        (6.022e23, "6.022e+23"),
        (float("nan"), ""),
        (None, ""),
        ("", ""),
        (" \n", ""),
        ("nan", ""),
        ("null", ""),
        ("None", ""),  # as pandas' astype(str) writes it
        ("none", "none"),  # as a person does
        (r"$\frac{1}{2}$.", r"\frac{1}{2}"),
        ("$5.$", "5."),
        (True, "true"),
        (False, "false"),
        ("$6$", "6"),
        ("$$6$$", "6"),
        (r"\(6\)", "6"),
        (r"\[6\]", "6"),
        (" $ 6 $ ", "6"),
        ("$5$ and $6$", "$5$ and $6$"),
        (r"\$5", r"\$5"),
        (r"$5\$", r"$5\$"),
        ("so 3\n#### $7$", "7"),
        (r"it is \boxed{$7$}", "7"),
        ("no mark ####", ""),
        (r"\boxed{}", ""),
        (r"cut \boxed{5", ""),
        ([], ""),
        ([None, ""], ""),
        (["4"], "4"),
        ([[4]], "4"),
        ([4.0, None], "4"),
        (["4", "4"], "4"),
        (["$4$", "4.0", 5], '{"any of": ["4", "4.0", "5"]}'),
        ('["4"]', "4"),
        ('["4", "five"]', '{"any of": ["4", "five"]}'),
        ("['4', 'five']", '{"any of": ["4", "five"]}'),
        ("[1, 2]", "[1, 2]"),
        ("[1, 2)", "[1, 2)"),
        ('{"any of": ["4", "5"]}', '{"any of": ["4", "5"]}'),
    ],
)
def test_an_answer_is_one_text_and_empty_where_it_is_missing(tmp_path, value, answer):
    assert load_row(tmp_path, {"problem": "2+2?", "answer": value}).answer == answer


@pytest.mark.parametrize(
    "value, words",
    [
        (
            {"value": "4", "unit": "m"},
            "an object with value, unit; .*--data.answer-field answer.val",
        ),
        ([["4"], ["5"]], "a list of texts; give a text, a number, or a list"),
        ([{"a": 1}, "5"], "an object with a"),
        (float("inf"), "infinite"),
        (float(2**60), "lost its last digits; write it as a text"),
        ("\ud800", r"half of a character \(\\ud800, at position 0\)"),
        ('{"any of": 5}', "does not hold a list of texts"),
        ('{"all of": ["4", ""]}', "does not hold a list of texts"),
    ],
)
def test_what_is_no_answer_is_refused_with_its_line(tmp_path, value, words):
    assert re.search(words, refusal(tmp_path, {"problem": "2+2?", "answer": value}))


def test_of_several_answers_any_counts_or_all_where_a_field_says_so(tmp_path):
    row = {"problem": "x^2=9?", "answer": ["3", "-3"]}
    both = '{"all of": ["3", "-3"], "absolute": 0.0, "relative": 0.0}'
    assert (
        load_row(tmp_path, row).answer == '{"any of": ["3", "-3"]}' == several(["3", "-3"], "any")
    )
    assert (
        load_row(tmp_path, row, answers_wanted="all").answer == both == several(["3", "-3"], "all")
    )
    assert load_row(tmp_path, row | {"answers_wanted": "all"}).answer == both
    assert load_row(tmp_path, row | {"is_multiple_answer": True}).answer == both
    assert load_row(tmp_path, row | {"is_multiple_answer": False}).answer.startswith('{"any')
    alone = row | {"answer": ["3"], "answers_wanted": "all"}
    assert load_row(tmp_path, alone).answer == "3"
    assert "answers_wanted is 'both'; allowed are any, all" in refusal(
        tmp_path, row | {"answers_wanted": "both"}
    )
    with pytest.raises(ValueError, match="data.answers_wanted is 'both'; allowed are any, all"):
        load_row(tmp_path, row, answers_wanted="both")


@pytest.mark.parametrize(
    "value, prompt",
    [
        (" 2+2? ", "2+2?"),
        ("", ""),
        (" \n", ""),
        (None, ""),
        (float("nan"), ""),
        ([], ""),
        (["2+2?"], "2+2?"),
        (USER, "2+2?"),
        ([USER], "2+2?"),
        ([SYSTEM, USER], CHAT),
        ([USER, ASSISTANT], "2+2?"),
        ([SYSTEM, USER, ASSISTANT], CHAT),
        ([USER, ASSISTANT, USER], (("user", "2+2?"), ("assistant", "It is 4."), ("user", "2+2?"))),
        ({"messages": [SYSTEM, USER]}, CHAT),
        ({"role": ["system", "user"], "content": ["Think.", "2+2?"]}, CHAT),
        ([{"from": "human", "value": "2+2?"}], "2+2?"),
        ([{"from": "system", "value": "Think."}, {"from": "human", "value": "2+2?"},
          {"from": "gpt", "value": "4"}], CHAT),
        ([{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}], "2+2?"),
        ([{"role": "user", "content": [{"type": "text", "text": "2+2?", "image": None}, "3?"]}],
         "2+2?\n3?"),
        ([{"role": "user", "content": None}], ""),
        ([SYSTEM, {"role": "user", "content": " "}], ""),
        (json.dumps([USER]), "2+2?"),
        (json.dumps([SYSTEM, USER]), CHAT),
        (str([SYSTEM, USER]), CHAT),
        (json.dumps({"messages": [USER, ASSISTANT]}), "2+2?"),
        ("[1, 2] is what?", "[1, 2] is what?"),
        ('{"role"} is a set', '{"role"} is a set'),
    ],
)  # fmt: skip
def test_a_problem_is_a_text_or_a_chat_however_it_is_written(tmp_path, value, prompt):
    assert load_row(tmp_path, {"problem": value, "answer": "4"}).prompt == prompt


@pytest.mark.parametrize(
    "value, words",
    [
        (5, "the problem is a number"),
        (True, "the problem is the boolean true"),
        (["2+2?", "3+3?"], "the problem is a list of texts; give one text, or a chat"),
        ([1, 2], "the problem is a list of numbers"),
        ([[USER]], "the problem is a list of lists"),
        ([USER, "2+2?"], "the problem is a mixed list"),
        ({"text": "2+2?"}, "an object with text; name one of its parts"),
        ([{"role": "user"}], "message 1 of the chat is an object with role; a message has"),
        ([SYSTEM, {"role": "nobody", "content": "x"}], "message 2 of the chat has the role"),
        ([ASSISTANT], "no message of a user"),
        ([SYSTEM], "no message of a user"),
        ([USER, SYSTEM], "ends with a message of the role system"),
        ([{"role": "user", "content": 5}], "a content that is a number"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]}],
         "a part of the type image_url; only texts can be read"),
        ("2+2? \ud800", r"half of a character (\ud800, at position 5)"),
        ([{"role": "user", "content": "\udfff"}], r"half of a character (\udfff, at position 0)"),
        ("[{'role': 'user', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]",
         "looks like a chat but is not JSON"),
    ],
)  # fmt: skip
def test_what_is_no_problem_is_refused_with_its_line(tmp_path, value, words):
    assert words in refusal(tmp_path, {"problem": value, "answer": "4"})


def test_uids_of_ordinary_problems_are_what_they_always_were(tmp_path):
    """Tables of earlier runs hold them; the numbers are those of commit 41ae9ff."""
    rows = [
        {"problem": " Add 1 and 2. ", "answer": 3},
        {"problem": [SYSTEM, USER], "answer": "\\frac{1}{2}"},
        {"problem": [USER], "answer": [4]},
        {"problem": "é?", "answer": "x \\boxed{\\text{é}}"},
        {"problem": "2.5?", "answer": 2.5},
        {"problem": "true?", "answer": True},
    ]
    assert [load_row(tmp_path, row).uid for row in rows] == [
        6324346341145426367,
        2813104868755708778,
        272915562880554768,
        7628194930003489544,
        1009805585488150009,
        1848312372851888279,
    ]


def test_a_dot_in_a_columns_name_and_one_that_reaches_inside(tmp_path):
    flat = {"in.problem": "2+2?", "in.answer": 4}
    named = {"problem_field": "in.problem", "answer_field": "in.answer"}
    path = tmp_path / "flat.jsonl"
    for row in (flat, {"in": {"problem": "2+2?", "answer": 4}},
                {"in.problem": "2+2?", "in": {"answer": 4}}):  # fmt: skip
        path.write_text(json.dumps(row))
        (problem,) = sources.load_training(DataSection(path=str(path), **named))
        assert problem == Problem(prompt="2+2?", answer="4")
    path.write_text(json.dumps({"a.b": {"c": {"d": "2+2?"}}, "in.answer": 4}))
    named["problem_field"] = "a.b.c.d"
    assert sources.load_training(DataSection(path=str(path), **named))[0].prompt == "2+2?"
    path.write_text(json.dumps({"prompt": [USER], "reward_model.ground_truth": "4"}))
    assert sources.load_training(DataSection(path=str(path)))[0].answer == "4"
    path.write_text(json.dumps({"prompt": [USER], "reward_model": None}))
    assert sources.load_training(DataSection(path=str(path)))[0].answer == ""


def test_the_first_row_without_a_column_is_named(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"problem": "1?", "answer": "1"}] * 6 + [{"problem": "2?"}, {}]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="own.jsonl, line 13: .*no column 'answer' but problem; "):
        sources.load_training(DataSection(path=str(path)))
