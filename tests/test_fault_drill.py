"""A small part of the fault drill: what is broken and resumed ends as the unbroken run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from studies.fault_calls import Recorder

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_torn_lines_and_damaged_checkpoints_end_as_the_unbroken_run(tmp_path):
    """The parts ``lines`` and ``files``, every ninth case; all parts run in ``make nightly``."""
    command = ["-m", "studies.fault_drill", "lines", "files", "--every", "9"]
    done = subprocess.run(
        [sys.executable, *command, "--work", tmp_path / "work", "--out", tmp_path / "out.json"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert {outcome for _, outcome, _ in found["lines"]} == {"same"}
    assert {outcome for _, outcome, _ in found["files"]} == {"said"} and len(found["files"]) > 2


def test_a_recorded_folder_is_put_back_as_it_was(tmp_path):
    """Every state once, whatever was replaced, appended to or removed since."""
    folder = tmp_path / "run"
    (folder / "a").mkdir(parents=True)
    recorder = Recorder(folder, tmp_path / "store")
    (folder / "a" / "x").write_text("one")
    recorder.record()
    recorder.record()
    with (folder / "a" / "x").open("a") as file:
        file.write(" two")
    recorder.record()
    (folder / "a" / "x").rename(folder / "y")
    recorder.record()
    assert len(recorder.states) == 3
    contents = []
    for state in recorder.states:
        recorder.put_back(state, tmp_path / "back")
        files = (p for p in sorted((tmp_path / "back").rglob("*")) if p.is_file())
        contents.append([(p.name, p.read_text()) for p in files])
    assert contents == [[("x", "one")], [("x", "one two")], [("y", "one two")]]
