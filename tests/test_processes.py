"""Several processes on virtual CPU devices: what one finds out, all know; none waits forever."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SILENT = "error: a process ended without a word; its own output may say why"


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(arguments, *, number_of=2, devices=2):
    """The processes of ``arguments(port, number of this one)``."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments(port, number))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"JAX_PLATFORMS": "cpu"},
        )
        for number in range(number_of)
    ]


def finish(started, timeout=300):
    """(exit code, output, errors) of each; all are killed where one does not end."""
    try:
        texts = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *text) for p, text in zip(started, texts, strict=True)]


def worker(what):
    script = ROOT / "tests" / "one_of_several.py"
    return finish(start(lambda port, number: [script, what, port, 2, number]), timeout=60)


@pytest.mark.slow
def test_values_of_one_process_reach_all_and_errors_too():
    found = [json.loads(output.splitlines()[-1]) for _, output, _ in worker("values")]
    assert [f.pop("owned") for f in found] == [[0, 2, 4], [1, 3]]
    assert found[0] == found[1]
    assert found[0] == {
        "exchanged": "111",
        "by_first": {"text": "\ud800 first", "process": 0},
        "largest": 1,
        "rows_here": 4,
        "whole": True,
        "raised": "ZeroDivisionError: integer division or modulo by zero",
        "refused": "invalid literal for int() with base 10: 'no number'",
        "differs": "b is 0 in process 0 and 1 in process 1; start all processes by the same "
        "command, from the same version and files",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, survivor, sentence",
    [
        ("failing", 0, "error: the model's folder is gone (process 1)"),
        ("failing_first", 1, "error: the model's folder is gone (process 0)"),
        ("killed", 0, SILENT + " (process 1)"),
        ("killed_first", 1, SILENT + " (process 0)"),
    ],
)
def test_the_end_of_one_process_ends_the_other_with_one_sentence(how, survivor, sentence):
    began = time.monotonic()
    code, _, errors = worker(how)[survivor]
    said = [line for line in errors.splitlines() if "Gloo" not in line]
    if how == "killed_first":  # XLA's client has words of its own for that
        said = said[-1:] if code else []
    else:
        assert code == 1
    assert said == [sentence]
    assert time.monotonic() - began < 45
