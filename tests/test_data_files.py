"""Files, folders and benchmarks: understood in every form, or refused with file and line."""

import bz2
import gzip
import json
import lzma
import time
import tracemalloc
from pathlib import Path

import pytest

from basis_jax.config import DataSection
from basis_jax.data import encoding, hub, sources, tables
from basis_jax.data.benchmarks import BENCHMARKS
from basis_jax.data.overlap import contradictions
from basis_jax.data.problem import Problem
from basis_jax.verify import make_verifier

HERE = Path(__file__).parent / "data"
LINE = '{"problem": "2 + 2 \u2014 ?", "answer": 4}\n'
TABLE = 'problem,answer\n"2 + 2 \u2014 ?",4\n'
EXPECTED = [Problem(prompt="2 + 2 \u2014 ?", answer="4")]


def load(path, **options):
    return sources.load_training(DataSection(path=str(path), **options))


def refused(path, *words, **options):
    with pytest.raises(ValueError) as raised:
        load(path, **options)
    sentence = str(raised.value)
    assert "\n" not in sentence and all(word in sentence for word in (str(path), *words)), sentence


@pytest.fixture
def no_hub(monkeypatch):
    """Fails where a name is given to ``datasets`` at all."""
    monkeypatch.setattr(hub, "found_rows", lambda *_, **__: pytest.fail("sent to a hub"))


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.jsonl", LINE.encode("utf-8-sig")),
        ("a.jsonl", (LINE.strip() + "\r\n").encode()),
        ("a.jsonl", LINE.encode("utf-16")),
        ("a.jsonl", b"\xff\xfe\0\0" + LINE.encode("utf-32-le")),
        ("a.json", b"\xef\xbb\xbf[" + LINE.encode() + b"]"),
        ("a.json", b"[" + LINE.encode() + b"]\r\n"),
        ("a.json", LINE.replace(",", ",\n").encode()),
        ("a.ndjson", LINE.encode()),
        ("a.JSONL", LINE.encode()),
        ("a.Json", LINE.encode()),
        ("a.jsonl.gz", gzip.compress(LINE.encode(), mtime=0)),
        ("a.JSONL.GZ", gzip.compress(LINE.encode("utf-8-sig"), mtime=0)),
        ("a.json", gzip.compress(LINE.encode(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINE.encode())),
        ("a.jsonl.xz", lzma.compress(LINE.encode())),
        ("a.csv", TABLE.encode()),
        ("a.CSV", TABLE.encode("utf-8-sig")),
        ("a.csv", TABLE.replace("\n", "\r\n").encode()),
        ("a.csv.gz", gzip.compress(TABLE.encode(), mtime=0)),
        ("a.tsv", TABLE.replace(",", "\t").encode()),
        ("a[1].jsonl", LINE.encode()),
    ],
)
def test_a_file_is_read_in_whatever_form_it_comes(tmp_path, no_hub, name, data):
    (tmp_path / name).write_bytes(data)
    assert load(tmp_path / name) == EXPECTED


def test_files_put_one_after_the_other_with_their_marks(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE.encode("utf-8-sig") * 2)
    assert load(tmp_path / "a.jsonl") == EXPECTED * 2


def test_narrow_floats_have_the_digits_that_were_written(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    rows = {"problem": ["a", "b", "c"], "answer": [0.1, 43.0, None]}
    made = datasets.Dataset.from_dict(rows).cast_column("answer", datasets.Value("float32"))
    made.to_parquet(tmp_path / "a.parquet")
    assert [p.answer for p in load(tmp_path / "a.parquet")] == ["0.1", "43", ""]


def test_a_sentence_stays_short_where_there_are_many_columns(tmp_path):
    rows = {str(i): i for i in range(5000)}
    (tmp_path / "a.json").write_text(json.dumps([rows]))
    refused(tmp_path / "a.json", "row 1: the row has the columns 0, 1, 2", "28, 29, ...;")
    (tmp_path / "a.json").write_text(json.dumps({"problem": rows, "answer": rows}))
    refused(tmp_path / "a.json", "line 1: the problem is an object with 0, 1", "28, 29, ...;")


@pytest.mark.parametrize("name", ["a.PARQUET", "a[1].parquet"])
def test_a_parquet_file_of_any_name(tmp_path, name):
    import datasets

    datasets.disable_progress_bars()
    rows = {"problem": ["2 + 2 \u2014 ?", "b", None], "answer": [4.0, None, 7.0]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / name)
    assert [(p.prompt, p.answer) for p in load(tmp_path / name)] == [
        ("2 + 2 \u2014 ?", "4"),
        ("b", ""),
        ("", "7"),
    ]


def test_columns_of_images_are_not_decoded(tmp_path):
    """Decoding needs a package of its own; here the bytes are no image at all."""
    import datasets

    rows = {"problem": ["2+2?"], "answer": [["4"]], "picture": [b"no picture"]}
    made = datasets.Dataset.from_dict(rows)
    made = made.cast_column("picture", datasets.Image())
    made.save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved") == [Problem(prompt="2+2?", answer="4")]


def test_csv_cells_that_are_empty_floats_and_chats(tmp_path):
    import pandas

    chat = [{"role": "user", "content": 'say "2+2",\nplease'}]
    frame = pandas.DataFrame(
        {
            "problem": ["a", "b", "c", None, chat],
            "answer": [43, None, 2.5, 7, 1],
        }
    )
    frame.to_csv(tmp_path / "a.csv")
    assert [(p.prompt, p.answer) for p in load(tmp_path / "a.csv")] == [
        ("a", "43"),
        ("b", ""),
        ("c", "2.5"),
        ("", "7"),
        ('say "2+2",\nplease', "1"),
    ]
    (tmp_path / "b.csv").write_text("problem,answer\nx," + "9" * 200_000 + "\n")
    assert len(load(tmp_path / "b.csv")[0].answer) == 200_000  # longer than csv's own limit
    row = "\"2+2?\",\"{'ground_truth': '4', 'style': 'rule'}\""
    (tmp_path / "n.csv").write_text("problem,answer\np,NA\nq,n/a\nr,NaCl\n")
    assert [p.answer for p in load(tmp_path / "n.csv")] == ["", "", "NaCl"]
    (tmp_path / "c.csv").write_text("prompt,reward_model\n" + row + "\n")
    assert load(tmp_path / "c.csv") == [Problem(prompt="2+2?", answer="4")]


def test_a_broken_line_is_called_by_its_number(tmp_path):
    good = LINE * 999
    (tmp_path / "a.jsonl").write_text(good + '{"problem": 1\n' + LINE)
    refused(tmp_path / "a.jsonl", "line 1000: no whole JSON object (Expecting", "one object a line")
    (tmp_path / "a.jsonl").write_text(good + "5\n")
    refused(tmp_path / "a.jsonl", "line 1000: no object with named columns")
    (tmp_path / "a.jsonl").write_text(good + '{"problem": "x", "answer": {"a": 1}}\n')
    refused(tmp_path / "a.jsonl", "line 1000: the answer is an object with a;")
    (tmp_path / "a.json").write_text("[\n" + LINE.strip() + ",\n" + LINE + '{"problem" 1}]')
    refused(tmp_path / "a.json", "row 3 (line 4): no JSON array of whole objects (Expecting ")
    (tmp_path / "a.json").write_text(f"[{LINE}, 5]")
    refused(tmp_path / "a.json", "row 2: no object with named columns")
    (tmp_path / "a.csv").write_text('problem,answer\n"a\nb",1\nc\n')
    refused(tmp_path / "a.csv", "line 4: 1 cells under 2 column names")
    (tmp_path / "a.csv").write_text('problem,answer\na,1\n"b,2\nc,3\n')
    refused(tmp_path / "a.csv", "line 3: no CSV (unexpected end of data)")
    (tmp_path / "a.csv").write_text("problem,answer,answer\na,1,2\n")
    refused(tmp_path / "a.csv", "line 1: two columns are called 'answer'")
    (tmp_path / "a.csv").write_bytes("problem,answer\né,1\n".encode("latin-1"))
    refused(tmp_path / "a.csv", "line 2: not UTF-8 text")


@pytest.mark.parametrize(
    "value, words", [("9" * 5000, "too many digits"), ("[" * 200_000, "nested too deep")]
)
def test_json_that_python_does_not_take_is_a_broken_line(tmp_path, value, words):
    (tmp_path / "a.jsonl").write_text(LINE + '{"problem": "x", "answer": ' + value + "}\n")
    refused(tmp_path / "a.jsonl", "line 2: ", words)
    (tmp_path / "a.json").write_text(f'[{LINE}, {{"problem": "x", "answer": {value}}}]')
    refused(tmp_path / "a.json", "row 2 (line 2): ", words)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_key_that_is_there_twice_is_refused(tmp_path, name):
    rows = '{"problem": "x", "answer": 1, "answer": 2}'
    text = {"a.json": f"[{rows}]", "a.csv": "answer,problem, answer\n1,x,2\n"}.get(name, rows)
    (tmp_path / name).write_text(text)
    refused(tmp_path / name, "'answer'")


def test_a_table_of_very_many_columns_is_read_in_time(tmp_path):
    names = ",".join(f"c{i}" for i in range(100_000))
    (tmp_path / "a.csv").write_text(f"problem,answer,{names}\n2+2?,4,{'1,' * 99_999}1\n")
    started = time.thread_time()
    assert load(tmp_path / "a.csv") == [Problem(prompt="2+2?", answer="4")]
    assert time.thread_time() - started < 5  # comparing each name with each takes minutes


def test_a_small_compressed_file_needs_little_memory(tmp_path):
    """Not that of the largest that is allowed."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINE.encode(), mtime=0))
    tracemalloc.start()
    load(tmp_path / "a.jsonl.gz")
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()


def test_a_folder_of_text_files_is_read_as_its_files_are(tmp_path):
    """Without a guess at types, which takes zeros and digits away."""
    (tmp_path / "train.csv").write_text("problem,answer\na,007\nb,0.1234567890123456789\n")
    assert [p.answer for p in load(tmp_path)] == ["007", "0.1234567890123456789"]
    (tmp_path / "train.csv").unlink()
    (tmp_path / "train.jsonl").write_text(LINE + '{"problem": "b", "answer": "2020-01-01"}\n')
    assert [p.answer for p in load(tmp_path)] == ["4", "2020-01-01"]


@pytest.mark.parametrize(
    ("split", "answers"),
    [
        ("train[:1]", ["007"]),
        ("train[1:]", ["08", "1e3"]),
        ("train[:67%]", ["007", "08"]),
        ("train[2:]+test", ["1e3", "00"]),
    ],
)
def test_a_slice_of_a_folder_is_read_as_the_whole_is(tmp_path, split, answers):
    (tmp_path / "train.csv").write_text("problem,answer\na,007\nb,08\nc,1e3\n")
    (tmp_path / "test.csv").write_text("problem,answer\nd,00\n")
    assert [p.answer for p in load(tmp_path, split=split)] == answers


def test_a_folder_may_be_a_link_and_hold_links(tmp_path):
    """The hub's cache is made of them."""
    (tmp_path / "file").write_text(LINE)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").symlink_to("../file")
    (tmp_path / "link").symlink_to("set")
    assert load(tmp_path / "set") == load(tmp_path / "link") == EXPECTED


def test_a_folder_may_have_subsets_and_options_of_another_reader(tmp_path):
    (tmp_path / "a.csv").write_text("problem;answer\n2+2?;4\n")
    (tmp_path / "b.csv").write_text("problem,answer\n3+3?,6\n")
    configs = ["{config_name: a, data_files: a.csv, sep: ;}", "{config_name: b, data_files: b.csv}"]
    (tmp_path / "README.md").write_text("---\nconfigs:\n- " + "\n- ".join(configs) + "\n---\n")
    assert load(f"{tmp_path}:a") == [Problem(prompt="2+2?", answer="4")]
    assert load(f"{tmp_path}:b") == [Problem(prompt="3+3?", answer="6")]
    with pytest.raises(ValueError, match="Config name is missing"):
        load(tmp_path)


def test_classes_have_their_names_and_narrow_floats_in_lists_their_digits(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    kinds = {
        "problem": datasets.Value("string"),
        "answer": datasets.ClassLabel(names=["A", "B"]),
        "listed": datasets.List(datasets.Value("float32")),
    }
    rows = {"problem": ["a", "b"], "answer": [1, None], "listed": [[0.1, None], None]}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    made.save_to_disk(tmp_path / "saved")
    problems = load(tmp_path / "saved")
    assert [p.answer for p in problems] == ["B", ""]
    assert [p.columns["listed"] for p in problems] == [[0.1, None], None]


def test_a_local_name_is_never_sent_to_a_hub(tmp_path, no_hub, monkeypatch):
    for name in ("problems", "a.txt", "a.zst"):
        (tmp_path / name).write_text(LINE)
        refused(tmp_path / name, "of an unknown kind; give a .json", "--data.path")
    (tmp_path / "a.jsonl").write_text(LINE)
    refused(f"{tmp_path}/a.jsonl:main", "asks a file for a subset")
    monkeypatch.chdir(tmp_path)
    Path("owner").mkdir()
    Path("owner/set").write_text(LINE)
    refused("owner/set", "of an unknown kind")
    for missing in (
        "a.csv",
        "b.JSONL",
        "c.ndjson.gz",
        "./owner/none",
        "a/b/c",
        "/no/folder",
        "~/no",
    ):
        with pytest.raises(ValueError, match="there is no file"):
            load(missing)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(LINE.encode(), mtime=0)[:-9])
    refused(tmp_path / "cut.jsonl.gz", "cannot read", "; give another")


def test_a_folder_whose_load_fails_shows_the_cause(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(folder, "doesn't contain any data files", "--data.path")
    (folder / "train.jsonl").write_text(LINE * 4 + "{broken\n" + LINE)
    refused(folder, "train.jsonl, line 5: no whole JSON object", "--data.path")
    (folder / "train.jsonl").unlink()
    (folder / "train.parquet").write_bytes(b"no parquet at all, but long enough")
    refused(folder, "magic bytes")
    made = datasets.Dataset.from_dict({"problem": ["2+2?"], "answer": ["4"]})
    datasets.DatasetDict(train=made).save_to_disk(tmp_path / "saved")
    refused(tmp_path / "saved", "it has the splits train", split="test")


def test_a_cause_is_the_last_error_behind_the_first():
    try:
        try:
            raise OSError("disk full\nsecond line")
        except OSError as error:
            raise ValueError("An error occurred while generating the dataset") from error
    except ValueError as error:
        assert hub.causes(error) == "An error occurred while generating the dataset: disk full"


def held_out(path, **options):
    return sources.load_held_out(str(path), "", DataSection(**options))


def test_held_out_files_have_the_columns_that_the_flags_name(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"q": "2+2?", "target": 4, "question": "3+3?", "answer": 6}\n')
    own, recognised = Problem(prompt="2+2?", answer="4"), Problem(prompt="3+3?", answer="6")
    assert held_out(path, problem_field="q", answer_field="target") == [own]
    assert held_out(path) == [recognised]
    assert held_out(path, problem_field="other", answer_field="another") == [recognised]
    assert held_out(path, answer_field="target")[0].answer == "4"
    assert held_out(path, problem_field="q")[0] == Problem(prompt="2+2?", answer="6")
    path.write_text('{"q": "<2+2?>", "target": [4, 5]}\n')
    options = {"problem_field": "q", "answer_field": "target", "problem_wrapper": "<{problem}>"}
    (problem,) = held_out(path, answers_wanted="all", **options)
    assert problem.prompt == "2+2?" and problem.answer.startswith('{"all of": ["4", "5"]')
    with pytest.raises(ValueError, match="own.jsonl, line 1: the row has the columns q, target; "):
        held_out(path, problem_field="q", answer_field="other")


def within(absolute, relative, *answers):
    return json.dumps({"all of": answers, "absolute": absolute, "relative": relative})


@pytest.mark.parametrize(
    "name, answers",
    [
        ("MATH-500", [r"\frac{1}{4}", "(1,2)"]),
        ("AIME24", ["007"]),
        ("AIME25", ["7"]),
        ("AMC23", ["10", "13.5"]),
        ("HMMT25", ["1", r"\sqrt{2}"]),
        ("Minerva", [within(1e-8, 1e-5, x) for x in ("9", "2", "3.15576e7")]),
        (
            "OlympiadBench",
            [
                within(1.01 * 1e-8, 0.0, "3"),
                within(1.01 * 1e-8, 0.0, "3", "-3"),
                within(1.01 * 0.01, 0.0, "0.452"),
            ],
        ),
        ("GSM8K", ["1,350"]),
    ],
)
def test_every_benchmark_is_read_in_its_layout(name, answers):
    """The columns of tests/data/benchmarks are those of the sets on the hub."""
    named = {"problem_field": "id", "answer_field": "level"}  # flags are for the user's own files
    problems = sources.load_held_out(name, str(HERE / "benchmarks"), DataSection(**named))
    assert [p.answer for p in problems] == answers
    assert all(isinstance(p.prompt, str) and p.prompt for p in problems)
    row = json.loads((HERE / "benchmarks" / f"{name}.jsonl").read_text().splitlines()[0])
    assert {BENCHMARKS[name].problem_field, BENCHMARKS[name].answer_field} <= row.keys()


@pytest.mark.parametrize(
    "name, row, right, wrong",
    [
        ("Minerva", 0, ["9", "9.00008"], ["9.0002", "8"]),
        ("Minerva", 2, ["31557600", r"3.15578 \times 10^{7}"], ["3.1561e7"]),
        ("OlympiadBench", 0, ["3", "3.000000005"], ["3.0001"]),
        ("OlympiadBench", 1, ["-3, 3", "3.000000005, -3"], ["3", "3.0001, -3"]),
        ("OlympiadBench", 2, ["0.452", "0.46", "0.442"], ["0.463", "0.441"]),
    ],
)
def test_numbers_may_differ_as_far_as_the_set_says(name, row, right, wrong):
    problem = sources.load_held_out(name, str(HERE / "benchmarks"))[row]
    with make_verifier("math", workers=1) as verifier:
        for answers, reward in ((right, 1), (wrong, 0)):
            boxes = [f"\\boxed{{{answer}}}" for answer in answers]
            verdicts = verifier.grade(boxes, [problem.answer] * len(boxes))
            assert [(v.reward, v.valid) for v in verdicts] == [(reward, True)] * len(boxes)


@pytest.mark.parametrize("error", ["small", -1, "nan", "1e-2; 1e-3", [0.1]])
def test_an_error_that_is_no_number_is_refused_with_its_row(tmp_path, error):
    row = {"question": "2+2?", "final_answer": ["4"], "error": error}
    (tmp_path / "OlympiadBench.jsonl").write_text(json.dumps(row))
    if error == "nan":  # as a data frame writes what is missing
        (problem,) = sources.load_held_out("OlympiadBench", str(tmp_path))
        assert problem.answer == within(1.01 * 1e-8, 0.0, "4")
        return
    with pytest.raises(ValueError, match="OlympiadBench.jsonl, line 1: the error of the answer is"):
        sources.load_held_out("OlympiadBench", str(tmp_path))


def test_hub_ids_splits_and_columns_are_those_of_the_dataset_cards():
    assert {
        name: (s.path, s.split, s.problem_field, s.answer_field) for name, s in BENCHMARKS.items()
    } == {
        "MATH-500": ("HuggingFaceH4/MATH-500", "test", "problem", "answer"),
        "AIME24": ("HuggingFaceH4/aime_2024", "train", "problem", "answer"),
        "AIME25": ("math-ai/aime25", "test", "problem", "answer"),
        "AMC23": ("math-ai/amc23", "test", "question", "answer"),
        "HMMT25": ("MathArena/hmmt_feb_2025", "train", "problem", "answer"),
        "Minerva": ("math-ai/minervamath", "test", "question", "answer"),
        "OlympiadBench": ("math-ai/olympiadbench", "test", "question", "final_answer"),
        "GSM8K": ("openai/gsm8k:main", "test", "question", "answer"),
    }


def test_a_benchmarks_stand_in_may_have_another_form_and_other_columns(tmp_path):
    (tmp_path / "AIME25.CSV").write_text("question,answer\n2+2?,4.0\n")
    assert sources.load_held_out("AIME25", str(tmp_path)) == [Problem(prompt="2+2?", answer="4")]
    (tmp_path / "AIME24.json").write_text('[{"q": "2+2?", "a": 4}]')
    section = DataSection(problem_field="q", answer_field="a")
    (problem,) = sources.load_held_out("AIME24", str(tmp_path), section)
    assert problem == Problem(prompt="2+2?", answer="4")
    with pytest.raises(ValueError, match="eval.folder is .*none, which is no folder"):
        sources.load_held_out("AIME24", str(tmp_path / "none"))


def test_a_prompt_with_two_answers_is_reported():
    class Tokenizer:
        bos_token_id = eos_token_id = None

        def __call__(self, texts, add_special_tokens):
            return {"input_ids": [[1]] * len(texts)}

    problems = [
        Problem(prompt="2+2?", answer="4"),
        Problem(prompt="2+2?", answer="5"),
        Problem(prompt="2+2?", answer="6"),
        Problem(prompt="1+1?", answer="Two"),
        Problem(prompt="1+1?", answer="two "),
        Problem(prompt=(("user", "a"), ("user", "b")), answer="1"),
        Problem(prompt=(("user", "a"), ("user", "b")), answer="2"),
    ]
    assert contradictions(problems) == [
        (problems[0], problems[1]),
        (problems[5], problems[6]),
    ]
    told = []
    section = DataSection(prompt_format="text")
    encoding.encode_and_report(
        "own", problems[:5], section, Tokenizer(), size=0, report=told.append
    )
    assert told[0] == "own problems: 5 read, 5 used" and len(told) == 2
    assert told[1].startswith("warning: 1 prompts of the own problems have different answers in")
    assert "'2+2?'" in told[1]
    told.clear()
    encoding.encode_and_report(
        "own", problems[3:5], section, Tokenizer(), size=0, report=told.append
    )
    assert len(told) == 1


def test_a_chat_that_the_template_refuses_is_one_sentence():
    class Tokenizer:
        chat_template = "{{ messages }}"

        def apply_chat_template(self, chat, **_):
            raise TypeError("roles must\nalternate")

    problem = Problem(prompt=(("user", "a"), ("user", "b")), answer="1")
    with pytest.raises(
        ValueError, match="refuses the problem 'b' with the roles user, user .roles "
    ):
        encoding.encode_prompts([problem], DataSection(), Tokenizer())


def test_long_files_are_read_line_by_line_of_their_own(tmp_path):
    """U+2028 and other separators inside a JSON string end no line."""
    row = json.dumps({"problem": "a\u2028b\x85c", "answer": "1"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(row + "\n" + row + "\n")
    unit, rows = tables.read_table(tmp_path / "a.jsonl")
    assert unit == "line" and [number for number, _ in rows] == [1, 2]
