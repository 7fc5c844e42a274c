"""Files survive a kill: one writer, replaced in one step, a torn last line left out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from basis_jax import files

ROOT = Path(__file__).parent.parent


def test_a_second_process_is_refused_and_told_what_to_do(tmp_path):
    hold = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from basis_jax import files
file = open({str(tmp_path / ".lock")!r}, "w")
files.lock(file, "here", "--out")
print("held", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with (tmp_path / ".lock").open("w") as file:
            with pytest.raises(ValueError, match="another process is writing to .*give another --"):
                files.lock(file, "here", "--out")
    finally:
        process.communicate("")
    with (tmp_path / ".lock").open("w") as file:
        files.lock(file, "here", "--out")  # the lock died with its process


def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.replace_file(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="results.json could not be written .No space left on dev"):
        files.replace_file(path, b"new")
    with path.with_suffix(".jsonl").open("ab") as file:
        with pytest.raises(ValueError, match="results.jsonl could not be written .No space left"):
            files.append_json_lines(file, [{"a": 1}])
    path.with_suffix(".jsonl").unlink()
    assert path.read_text() == "old"
    monkeypatch.undo()
    files.replace_file(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"] and path.read_text() == "new"


@pytest.mark.parametrize("torn", [b"", b'{"c', b'{"c": 3}'])
def test_lines_end_with_a_newline_or_are_left_out(tmp_path, torn):
    path = tmp_path / "lines.jsonl"
    with path.open("ab") as file:
        files.append_json_lines(file, [{"a": 1}, {"b": "\u2028\ud800"}])
    path.write_bytes(path.read_bytes() + torn)
    with path.open("rb") as file:
        lines = list(files.whole_lines(file))
    assert [line for line, _ in lines] == [b'{"a": 1}\n', '{"b": "\u2028\\ud800"}\n'.encode()]
    assert lines[-1][1] == path.stat().st_size - len(torn)


def test_json_that_is_no_object_is_named(tmp_path):
    path = tmp_path / "config.json"
    for content, sentence in [("[1]", "holds a JSON list"), ("{", "cannot be read as JSON")]:
        path.write_text(content)
        with pytest.raises(ValueError, match=f"config.json {sentence}"):
            files.read_json(path)


def test_digests_of_files_elsewhere_and_of_none_are_damage(tmp_path):
    (tmp_path / "a").write_text("x")
    files.seal(tmp_path)
    assert files.damage(tmp_path) is None
    for names, said in [("{}", "names no file"), ('{"../a": "0"}', "outside of the folder")]:
        (tmp_path / files.DIGESTS).write_text(names)
        assert said in files.damage(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "pipe is a pipe" in files.damage(tmp_path)


@pytest.mark.parametrize(
    "text, printed",
    [("a\n b", "a b"), ("\x1b[2J", "\\x1b[2J"), ("\ud800\u202e", "\\ud800\\u202e"), ("é", "é")],
)
def test_a_message_is_printable(text, printed):
    assert files.one_line(text) == printed


def test_a_long_message_keeps_its_ends():
    text = files.one_line("begins" + "\x00" * 10**6 + "ends")
    assert len(text) <= files.LONGEST and text.startswith("begins") and text.endswith("ends")
