"""Problem sets: every layout read, ids by content, nothing left out without being counted."""

import dataclasses
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers

from basis_jax.config import DataSection
from basis_jax.data import encoding, order, overlap, sources, tasks
from basis_jax.data.problem import Problem
from basis_jax.opening.checks import check_data
from basis_jax.training.session import report_overlap
from basis_jax.verify.notation import number

HERE = Path(__file__).parent / "data"
WRAPPER = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    '{problem}\n\nRemember to put your answer on its own line after "Answer:".'
)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, a beginning-of-text token around plain text, a small chat template."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {c: i for i, c in enumerate(["<s>", *sorted(alphabet)])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    fast.chat_template = TEMPLATE
    return fast


def load(path, **options):
    return sources.load_training(DataSection(path=str(path), **options))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain(count):
    return [Problem(prompt=f"problem {i}", answer=str(i)) for i in range(count)]


def test_dapo_rows_lose_their_chat_and_their_wrapper():
    problems = load(HERE / "dapo_layout.jsonl", problem_wrapper=WRAPPER)
    assert [p.answer for p in problems] == ["42", "3", "42", "14"]
    assert problems[1].prompt == "Find the remainder of $7^3$ divided by $10$."
    assert load(HERE / "dapo_layout.jsonl")[1].prompt.startswith("Solve the following")


def test_repeated_rows_are_one_object_and_one_problem(tokenizer):
    section = DataSection(path=str(HERE / "dapo_layout.jsonl"), max_prompt_tokens=1000)
    problems = sources.load_training(section)
    assert problems[0] is problems[2]
    encoded = encoding.encode_prompts(problems, section, tokenizer)
    assert (encoded.counts["read"], encoded.counts["duplicate"], encoded.counts["used"]) == (
        4,
        1,
        3,
    )


def test_math_answers_are_the_last_box_and_proofs_have_none(tokenizer):
    problems = load(HERE / "math_layout.jsonl")
    assert [p.answer for p in problems] == [r"3\sqrt{2}", r"\frac{1}{2}", ""]
    encoded = encoding.encode_prompts(problems, DataSection(max_prompt_tokens=200), tokenizer)
    assert encoded.counts["without text or answer"] == 1
    assert encoded.counts["used"] == 2


def test_gsm8k_answers_follow_the_hashes():
    problems = sources.load_held_out(str(HERE / "gsm8k_layout.jsonl"))
    assert [p.answer for p in problems] == ["1,350", "5"]
    assert problems[1].prompt.startswith("Tom has 9 pens")


@pytest.mark.skipif("GSM8K_FOLDER" not in os.environ, reason="set GSM8K_FOLDER to run it")
def test_every_real_gsm8k_answer_is_a_number():
    problems = load(Path(os.environ["GSM8K_FOLDER"]) / "test.jsonl")
    assert len(problems) == len({p.uid for p in problems}) == 1319
    assert all(number(p.answer) is not None for p in problems)


def test_columns_can_be_named_and_reach_inside(tmp_path):
    path = write_lines(tmp_path / "own.jsonl", [{"q": {"text": "2+2?"}, "a": [4]}])
    (problem,) = load(path, problem_field="q.text", answer_field="a")
    assert (problem.prompt, problem.answer) == ("2+2?", "4")


def test_a_benchmark_is_read_from_a_folder_by_its_name(tmp_path):
    write_lines(tmp_path / "AIME24.jsonl", [{"id": 60, "problem": "2+2?", "answer": "4"}])
    (problem,) = sources.load_held_out("AIME24", str(tmp_path))
    assert (problem.prompt, problem.answer) == ("2+2?", "4")
    rows = [{"question": "3+3?", "final_answer": ["$6$"], "solution": ["..."]}]
    write_lines(tmp_path / "OlympiadBench.jsonl", rows)
    (problem,) = sources.load_held_out("OlympiadBench", str(tmp_path))
    assert problem.answer == "6"


def test_a_missing_column_is_named_beside_those_that_are_there(tmp_path):
    path = write_lines(tmp_path / "own.jsonl", [{"q": "2+2?", "a": 4}])
    with pytest.raises(ValueError, match="no column 'reply' but q, a; .*--data.answer-field"):
        load(path, problem_field="q", answer_field="reply")
    with pytest.raises(ValueError, match="has the columns q, a; name those"):
        load(path)


def test_a_json_array_equals_json_lines(tmp_path):
    rows = [{"problem": f"{i}\u2028?", "answer": i} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    )
    assert load(tmp_path / "a.json") == load(tmp_path / "b.json")
    assert len(load(tmp_path / "a.json")) == 3


@pytest.mark.parametrize("text", ['{"problem": 1', "[1, 2]", '"a"\n'])
def test_a_broken_json_file_is_one_sentence(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json"):
        load(tmp_path / "a.json")


def test_parquet_and_saved_folders_equal_json_lines(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    expected = load(HERE / "dapo_layout.jsonl")
    rows = [json.loads(line) for line in (HERE / "dapo_layout.jsonl").read_text().splitlines()]
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(tmp_path / "dapo.parquet")
    assert load(tmp_path / "dapo.parquet") == expected
    made.save_to_disk(tmp_path / "one")
    assert load(tmp_path / "one") == expected
    datasets.DatasetDict(held=made).save_to_disk(tmp_path / "splits")
    assert load(tmp_path / "splits", split="held") == expected
    with pytest.raises(ValueError, match="split 'train'"):
        load(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dapo.parquet").rename(tmp_path / "folder" / "train.parquet")
    assert load(tmp_path / "folder") == expected


def test_an_unreachable_hub_is_one_sentence_with_what_to_do():
    """The suite runs with HF_HUB_OFFLINE=1, so no connection is tried."""
    with pytest.raises(ValueError, match="BytedTsinghua-SIA/DAPO-Math-17k.*--data.path") as raised:
        load("BytedTsinghua-SIA/DAPO-Math-17k")
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="HuggingFaceH4/MATH-500.*--eval.sets"):
        sources.load_held_out("MATH-500")


@pytest.mark.parametrize("path", ["no/such/file.jsonl", "no_such.parquet", "./no/such/folder"])
def test_a_missing_file_is_one_sentence(path):
    with pytest.raises(ValueError, match=r"--data\.path"):
        load(path)


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no problems"):
        load(tmp_path / "a.jsonl")


def test_uids_are_63_bits_of_content_and_the_order_of_rows_is_theirs(tokenizer):
    problems = plain(50)
    shuffled = random.Random(0).sample(problems, 50)
    section = DataSection()
    first = encoding.encode_prompts(problems, section, tokenizer)
    second = encoding.encode_prompts(shuffled, section, tokenizer)
    assert first.problems == second.problems and (first.tokens == second.tokens).all()
    uids = [p.uid for p in first.problems]
    assert uids == sorted(uids) and 0 <= uids[0] and 2**60 < uids[-1] < 2**63
    other = dataclasses.replace(problems[0], answer="no")
    assert other.uid != problems[0].uid
    assert dataclasses.replace(problems[0], kind="k").uid == problems[0].uid
    assert Problem(prompt="a", answer="b").uid == 1921464036242858060  # tables and trackers hold it


def test_long_prompts_are_left_out_and_counted_never_cut(tokenizer):
    problems = [*plain(12), Problem(prompt="x" * 100, answer="1")]
    encoded = encoding.encode_prompts(problems, DataSection(), tokenizer)
    assert encoded.counts == {
        "read": 13,
        "duplicate": 0,
        "without text or answer": 0,
        "too long": 1,
        "not asked for": 0,
        "used": 12,
    }
    assert encoded.tokens.shape[1] == encoded.lengths.max() <= 64
    with pytest.raises(ValueError, match="13 too long.*max_prompt_tokens is 5 .* 26 tokens"):
        encoding.encode_prompts(problems, DataSection(max_prompt_tokens=5), tokenizer)


def test_size_keeps_the_first_of_those_that_fit(tokenizer):
    everything = encoding.encode_prompts(plain(20), DataSection(), tokenizer)
    some = encoding.encode_prompts(plain(20), DataSection(), tokenizer, size=7)
    assert some.problems == everything.problems[:7]
    assert some.counts["not asked for"] == 13


def text_of(encoded, row, tokenizer):
    return tokenizer.decode(encoded.tokens[row, : encoded.lengths[row]])


def test_a_chat_prompt_is_the_template_around_prefix_problem_and_suffix(tokenizer):
    section = DataSection(
        system_prompt="Be brief.", problem_prefix="Q: ", problem_suffix=" Box it.",
        max_prompt_tokens=200,
    )  # fmt: skip
    encoded = encoding.encode_prompts([Problem(prompt="2+2?", answer="4")], section, tokenizer)
    expected = "<system>Be brief.<user>Q: 2+2? Box it.<assistant>"
    assert text_of(encoded, 0, tokenizer) == expected
    (ids,) = tokenizer.apply_chat_template(
        [[{"role": "system", "content": "Be brief."},
          {"role": "user", "content": "Q: 2+2? Box it."}]],
        add_generation_prompt=True,
    )["input_ids"]  # fmt: skip
    assert ids == encoded.tokens[0].tolist()


def test_a_chat_of_several_messages_stays_one(tokenizer, tmp_path):
    chat = [("user", "hi"), ("assistant", "hello"), ("user", "2+2?")]
    row = {"prompt": [{"role": r, "content": c} for r, c in chat], "answer": "4"}
    path = write_lines(tmp_path / "a.jsonl", [row])
    problems = load(path, problem_field="prompt", answer_field="answer")
    section = DataSection(problem_suffix="!")
    encoded = encoding.encode_prompts(problems, section, tokenizer)
    assert text_of(encoded, 0, tokenizer) == "<user>hi<assistant>hello<user>2+2?!<assistant>"
    with pytest.raises(ValueError, match="'text' has no place for"):
        encoding.encode_prompts(problems, DataSection(prompt_format="text"), tokenizer)


def test_plain_text_has_the_tokenizers_own_special_tokens_and_no_template(tokenizer):
    section = DataSection(prompt_format="text", problem_suffix=" =")
    encoded = encoding.encode_prompts([Problem(prompt="2 + 2", answer="4")], section, tokenizer)
    assert encoded.tokens[0].tolist() == [0, *tokenizer.encode("2 + 2 =", add_special_tokens=False)]


def test_wrong_settings_are_sentences(tokenizer):
    with pytest.raises(ValueError, match="prompt_format is 'txt'; allowed are chat, text"):
        check_data(DataSection(prompt_format="txt"))
    with pytest.raises(ValueError, match="write {problem}"):
        check_data(DataSection(problem_wrapper="Solve: "))
    with pytest.raises(ValueError, match="unknown task 'sums'; allowed are arithmetic"):
        load("task:sums")


def test_held_out_problems_that_repeat_a_training_text_are_found():
    """13 words in a row, whatever their case and punctuation; shorter texts as a whole."""
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    training = [
        Problem(prompt=f"Here is {words} and more", answer="1"),
        Problem(prompt=(("system", "think"), ("user", "7 + 4 = ?")), answer="11"),
        Problem(prompt="what is  2 * 3", answer="6"),
    ]
    held_out = [
        Problem(prompt=f"Now: {words.upper()}, then", answer="2"),
        Problem(prompt=words.removesuffix(" thirteen") + " fourteen of them", answer="3"),
        Problem(prompt="think 7 + 4 = ?", answer="11"),
        Problem(prompt="think 7 - 4 = ?", answer="3"),
        Problem(prompt="What is 2 * 3", answer="6"),
        Problem(prompt="What is 2 * 3 + 1", answer="7"),
    ]
    found = [(a, b) for a, b, _ in overlap.overlapping(held_out, training)]
    assert found == [(held_out[i], training[j]) for i, j in ((0, 0), (2, 1), (4, 2))]
    assert overlap.overlapping(held_out, training)[0][2] == words
    template = [Problem(prompt=f"{words} is {i}", answer="1") for i in range(11)]
    assert overlap.overlapping(template[:1], template[1:])
    assert not overlap.overlapping([Problem(prompt=f"{words} or 99", answer="1")], template)


def encoded(*prompts):
    """A set of these problems; its tokens do not matter."""
    made = tuple(Problem(prompt=p, answer="1") for p in prompts)
    size = len(made)
    return encoding.EncodedProblems(
        made, np.zeros((size, 1), np.int32), np.ones(size, np.int32), {}
    )


def test_evaluating_on_training_rows_is_one_warning():
    told = []
    training = encoded("two plus two", "three plus three")
    report_overlap(training, {"same": training}, told.append)
    assert told == ["warning: 2 held-out problems of same are also training problems"]
    told.clear()
    report_overlap(training, {"both": encoded("two plus two", "Three  plus three")}, told.append)
    (line,) = told
    assert line.startswith(
        "warning: 1 held-out problems of both are also training problems, and 1 others share 13 "
    )
    assert "'three plus three'" in line


def test_a_run_tells_of_every_set_that_repeats_training_problems():
    told = []
    report_overlap(
        encoded("two plus two", "six", "seven"),
        {"a": encoded("Two plus two", "eight"), "b": encoded("nine"), "c": encoded("six")},
        told.append,
    )
    assert [line.split(",")[0] for line in told] == [
        "warning: 1 of 2 held-out problems of a share 13 words in a row",
        "warning: 1 held-out problems of c are also training problems",
    ]
    assert "'two plus two'" in told[0]


def test_a_task_is_read_by_name():
    found = load("task:arithmetic"), sources.load_held_out("task:arithmetic")
    assert found == tuple(tasks.problems("arithmetic", held_out=h) for h in (False, True))


def test_an_epoch_visits_no_problem_twice_and_the_position_is_one_integer():
    visits = [order.batch_indices(3, step, batch_size=4, size=14) for step in range(6)]
    first, second = np.concatenate(visits[:3]), np.concatenate(visits[3:])
    assert len(set(first)) == len(set(second)) == 12
    assert first.tolist() != second.tolist()
    assert first.tolist() == np.random.default_rng([3, 0]).permutation(14)[:12].tolist()
    assert second.tolist() == np.random.default_rng([3, 1]).permutation(14)[:12].tolist()
    assert visits[0].tolist() != order.batch_indices(4, 0, batch_size=4, size=14).tolist()


def test_a_batch_larger_than_the_data_set_is_an_error():
    with pytest.raises(ValueError, match="prompts_per_step is 15 but there are 14"):
        order.batch_indices(0, 0, batch_size=15, size=14)
