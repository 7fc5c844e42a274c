"""Several processes on virtual CPU devices: what one finds out, all know; none waits forever."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import one_of_several
import pytest
import tiny
from whole_runs import lines, repeatable, small

from basis_jax import command_line
from basis_jax.processes import by_first, count, exchange, is_first, joined
from basis_jax.training.loop import train
from basis_jax.weights import huggingface

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
    said = [["\n".join(x for x in t.splitlines() if "Gloo" not in x) for t in ts] for ts in texts]
    return [(p.returncode, *text) for p, text in zip(started, said, strict=True)]


def worker(what, *more):
    script = ROOT / "tests" / "one_of_several.py"
    return finish(start(lambda port, number: [script, what, port, 2, number, *more]), timeout=300)


@pytest.mark.parametrize(
    "options, given",
    [
        (("2", "", "0"), "--coordinator (missing)"),
        (("2", "host:1", "2"), "--process-id 2"),
        (("two", "host:1", "0"), "--processes is two"),
        (("2", "host", "0"), "--coordinator host"),
        (("", "host:1", ""), "--processes is (missing)"),
    ],
)
def test_options_that_name_no_process_are_refused(options, given):
    with pytest.raises(ValueError, match=re.escape(given)), joined(*options):
        pass


def test_without_options_there_is_one_process():
    with joined("", "", ""), joined("1", "", "0"):
        assert (count(), is_first(), exchange(lambda: 3)) == (1, True, [3])
    with pytest.raises(ValueError, match="no number"):
        by_first(lambda: int("no number"))


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
def test_refilled_slots_give_the_same_tokens_in_two_processes_as_in_one():
    first, second = (json.loads(output.splitlines()[-1]) for _, output, _ in worker("sampled"))
    assert first == second
    alone = one_of_several.sampled()
    assert len({*alone["completion_lengths"]}) > 3
    logprobs = (found.pop("logprobs") for found in (first, alone))
    np.testing.assert_allclose(*logprobs, atol=1e-5)
    assert first == alone


@pytest.mark.slow
def test_the_first_process_decides_what_a_plan_asks_for():
    first, second = (json.loads(output.splitlines()[-1]) for _, output, _ in worker("planned"))
    assert first == second and first["problems"] == [0] and len(first["values"]) == 6


@pytest.mark.slow
def test_two_processes_export_split_parameters_bit_for_bit(tmp_path):
    outputs = [output for _, output, _ in worker("exported", tmp_path / "made")]
    alone = huggingface.save_params(tiny.params(), tiny.TINY, tmp_path / "alone")
    files = sorted(path.name for path in alone.iterdir())
    assert [json.loads(output.splitlines()[-1]) for output in outputs] == [files, files]
    for name in files:
        assert (alone / name).read_bytes() == (tmp_path / "made" / name).read_bytes()


@pytest.mark.slow
def test_a_verifier_that_times_out_in_one_process_leaves_one_estimator_state():
    """The owner's verdict holds in both; and an error of one verifier ends the step in both."""
    first, second = (json.loads(output.splitlines()[-1]) for _, output, _ in worker("verdicts"))
    assert first == second
    assert first["kinds"] == ["right", "timeout"] * 3
    assert len({*first["completions"]}) > 1 and len({*map(str, first["advantages"])}) > 1
    assert first["broken"] == "the verifier is gone"


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
    said = errors.splitlines()
    if how == "killed_first":  # XLA's client has words of its own, and may end the process first
        assert code and (said[-1] == sentence or "coordination" in errors.lower())
    else:
        assert (code, said) == (1, [sentence])
    assert time.monotonic() - began < 60 + 60  # those of a loaded machine


def together(script, arguments, **how):
    """A command in several processes."""

    def of_one(port, number):
        options = ["--processes", how.get("number_of", 2), "--coordinator", f"localhost:{port}"]
        options += ["--process-id", number, "--config", ROOT / "configs" / "quickstart.py"]
        return [ROOT / "scripts" / script, *options, *arguments]

    return start(of_one, **how)


def wait_for_lines(path, count, started):
    while all(p.poll() is None for p in started):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.05)


FSDP = {"mesh.fsdp": 4, "estimator.name": "value_filter", "estimator.features": 4}
FSDP |= {"estimator.table-samples": 1}
TENSOR = {"mesh.tensor": 2, "sampling.max-new-tokens": 33, "train.sample-rollouts": 4}
TENSOR |= {"estimator.name": "reinforce", "estimator.table-samples": 0}
LORA = {"mesh.fsdp": 2, "mesh.tensor": 2, "model.lora-rank": 2, "loss.kl-coef": 0.1}
LORA |= {"estimator.name": "spo", "estimator.table-samples": 0}


@pytest.mark.parametrize(
    "changes, devices",
    [
        pytest.param(FSDP, 2, marks=pytest.mark.slow, id="fsdp"),
        pytest.param(LORA, 2, marks=pytest.mark.slow, id="lora"),
        pytest.param(TENSOR, 1, marks=pytest.mark.nightly, id="tensor"),
    ],
)
def test_a_run_of_two_processes_that_is_stopped_and_goes_on_is_the_run_of_one(
    tiny_folder, dapo_file, tmp_path, changes, devices
):
    """Tokens equal, numbers to 1e-5. fsdp, with a table and features, and lora, with the base's KL:
    both are killed, and one with four devices goes on. tensor, whose slots are refilled: one is
    asked to stop, and both go on."""
    changes = changes | {"train.log-samples": 8, "train.steps": 3, "eval.size": 2}
    whole, parts = (
        small(tiny_folder, dapo_file, tmp_path / name, **changes) for name in ("whole", "parts")
    )
    started = together("train.py", parts, devices=devices)
    wait_for_lines(tmp_path / "parts" / "metrics.jsonl", 3, started)
    if "mesh.fsdp" in changes:
        for process in started:
            process.send_signal(signal.SIGKILL)
        assert [code for code, *_ in finish(started)] == [-signal.SIGKILL] * 2
    else:
        started[1].send_signal(signal.SIGTERM)
        (code, output, _), (other_code, other_output, _) = finish(started)
        assert (code, other_code, other_output) == (143, 143, "")
        assert "stopped by SIGTERM with everything up to step 2 saved" in output
        assert sum(1 for _ in (tmp_path / "parts" / "tensorboard").iterdir()) == 1
        assert [code for code, *_ in finish(together("train.py", parts, devices=devices))] == [0, 0]
    for arguments in (parts, whole):  # a finished run started again changes nothing
        config, _ = command_line.parse("", argv=["--config", "quickstart", *arguments])
        train(config, report=lambda _: None)
    for name in ("samples.jsonl", "metrics.jsonl"):
        rows, expected = (repeatable(lines(tmp_path / n / name)) for n in ("parts", "whole"))
        assert len(rows) == len(expected)
        for row, like in zip(rows, expected, strict=True):
            texts = {k: v for k, v in like.items() if not isinstance(v, float)}
            assert texts == {k: row[k] for k in texts}
            numbers = {k: v for k, v in like.items() if k not in texts}
            assert {k: row[k] for k in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-5)
    if changes["estimator.table-samples"]:
        table, like = (np.load(tmp_path / n / "reference.npz") for n in ("parts", "whole"))
        with table, like:
            assert np.array_equal(table["rewards"], like["rewards"])
            np.testing.assert_allclose(table["features"], like["features"], atol=1e-4)


@pytest.mark.nightly
def test_two_processes_evaluate_a_checkpoint_and_make_a_table_as_one_does(
    tiny_folder, dapo_file, tmp_path
):
    """The same completions, counts and features; every file by the first alone, once."""
    changes = {"estimator.name": "value_filter", "estimator.features": 3, "eval.samples": 2}
    changes |= {"data.size": 9, "estimator.table-samples": 2, "mesh.fsdp": 2, "train.steps": 1}
    arguments = small(tiny_folder, dapo_file, tmp_path / "run", **changes)
    config, _ = command_line.parse("", argv=["--config", "quickstart", *arguments])
    train(config, report=lambda _: None)
    outputs = {}
    for number_of in (2, 1):
        out = tmp_path / str(number_of)
        options = ["--checkpoint", tmp_path / "run", "--out", out]
        how = {"number_of": number_of, "devices": 2 // number_of}
        for script, own in (
            ("evaluate.py", options),
            ("reference_stats.py", ["--out", out / "table.npz"]),
        ):
            ended = finish(together(script, [*own, *arguments], **how))
            assert [code for code, *_ in ended] == [0] * number_of, ended
            assert not any(output for _, output, _ in ended[1:])
        outputs[number_of] = lines(out / "completions.jsonl")
        outputs[-number_of] = json.loads((out / "protocol.json").read_text())
    assert outputs[1] == outputs[2] and len(outputs[1]) == 16
    assert outputs[-1] == outputs[-2]
    table, like = (np.load(tmp_path / n / "table.npz") for n in ("2", "1"))
    with table, like:
        assert np.array_equal(table["rewards"], like["rewards"])
        np.testing.assert_allclose(table["features"], like["features"], atol=1e-4)
