"""scripts/train.py as a user runs it: one process, killed and resumed, and what it refuses."""

import random
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from whole_runs import (
    ROOT,
    command,
    environment,
    final_arrays,
    lines,
    repeatable,
    run,
    run_killed,
    small,
)

from basis_jax import command_line
from basis_jax.config import Config


@pytest.fixture(scope="module")
def reference_run(tiny_folder, dapo_file, tmp_path_factory):
    """Four steps without a break, of a config with two updates a step."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    arguments = small(tiny_folder, dapo_file, run_dir, **{"train.minibatch-rollouts": 4})
    done = run("train.py", "quickstart.py", *arguments)
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout


def assert_same_run(run_dir, expected):
    rows, expected_rows = (repeatable(lines(d / "metrics.jsonl")) for d in (run_dir, expected))
    assert rows == expected_rows
    assert lines(run_dir / "samples.jsonl") == lines(expected / "samples.jsonl")
    (step, found), (_, wanted) = final_arrays(run_dir), final_arrays(expected)
    assert step == 4 and found.keys() == wanted.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)


@pytest.mark.slow
def test_a_run_writes_its_records_and_says_where_they_are(reference_run):
    run_dir, output = reference_run
    rows = lines(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert "eval/accuracy" in rows[0] and "eval/accuracy" in rows[-1]
    for name in ("reward/mean", "sampler/logprob_gap_max", "estimate/beta", "policy/entropy"):
        assert all(name in row for row in rows[1:]), name
    assert all(row["sampler/logprob_gap_max"] < 1e-4 for row in rows[1:])
    compiled = [row["compile/programs"] for row in rows]
    assert compiled[1] > 0 and compiled[2:] == [0, 0, 0]
    for name in ("metrics.jsonl", "samples.jsonl", "curves.png", "checkpoints"):
        assert (run_dir / name).exists() and str(run_dir / name) in output
    first, *_, last = [line for line in output.splitlines() if not line.startswith("compiled")]
    assert first.startswith("training ") and first.endswith(f"run folder {run_dir} (new)")
    assert f"scripts/convert.py {run_dir} --to {run_dir}/model" in last
    assert "held-out accuracy" in output and "points, 95 % interval" in output


@pytest.mark.slow
@pytest.mark.parametrize("trial", [0, 1, 2])
def test_killed_at_any_moment_and_started_again_it_continues_bit_for_bit(
    reference_run, tiny_folder, dapo_file, tmp_path, trial
):
    """kill -9 at three random moments, then to the end: parameters, moments, metrics, samples."""
    rng = random.Random(trial)
    expected, _ = reference_run
    arguments = small(tiny_folder, dapo_file, tmp_path / "run", **{"train.minibatch-rollouts": 4})
    for _ in range(3):
        run_killed(
            *("train.py", "quickstart.py", *arguments),
            written=tmp_path / "run" / "metrics.jsonl",
            line_count=rng.randrange(0, 5),
            linger=rng.random() / 2,
        )
    done = run("train.py", "quickstart.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.slow
def test_prompt_features_need_no_rollouts_and_survive_a_kill(tiny_folder, dapo_file, tmp_path):
    """value_filter without any offline rollout: features in the table, beliefs in the state."""
    changes = {"estimator.name": "value_filter", "estimator.table-samples": 0}
    changes |= {"estimator.features": 4, "train.minibatch-rollouts": 4}
    whole, killed = (
        small(tiny_folder, dapo_file, tmp_path / n, **changes) for n in ("whole", "killed")
    )
    done = run("train.py", "quickstart.py", *whole)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "whole" / "reference.npz") as table:
        assert table["features"].shape == (42, 4) and not table["trials"].any()
    rng = random.Random(1)
    run_killed(
        *("train.py", "quickstart.py", *killed),
        written=tmp_path / "killed" / "metrics.jsonl",
        line_count=rng.randrange(0, 5),
        linger=rng.random() / 2,
    )
    done = run("train.py", "quickstart.py", *killed)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_a_finished_run_started_again_only_tells_its_result(reference_run, tiny_folder, dapo_file):
    """What the checkpoint holds is not made again: no reference table."""
    run_dir, output = reference_run
    (run_dir / "reference.npz").unlink()
    before = (run_dir / "metrics.jsonl").read_text()
    arguments = small(tiny_folder, dapo_file, run_dir, **{"train.minibatch-rollouts": 4})
    again = run("train.py", "quickstart.py", *arguments)
    assert again.returncode == 0, again.stderr
    assert (run_dir / "metrics.jsonl").read_text() == before
    assert output.splitlines()[-7:] == again.stdout.splitlines()[-7:]
    assert not (run_dir / "reference.npz").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_bit_for_bit(
    reference_run, tiny_folder, dapo_file, tmp_path, number
):
    arguments = small(tiny_folder, dapo_file, tmp_path / "run", **{"train.minibatch-rollouts": 4})
    arguments += ["--checkpoint.every", "100"]
    process = subprocess.Popen(
        command("train.py", "quickstart.py", *arguments),
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(lines(metrics)) > 1):
        time.sleep(0.01)
    process.send_signal(number)
    asked = time.monotonic()
    shown = process.communicate(timeout=60)[0]
    assert time.monotonic() - asked < 20
    last = lines(metrics)[-1]["step"]
    if last < 4:  # else it was done before the signal came
        assert process.returncode == 128 + number
        assert f"stopped by {number.name} with everything up to step {last} saved" in shown
        assert shown.splitlines()[-1].split()[0] == "python" and "--optim.lr" in shown
        assert (tmp_path / "run" / "checkpoints" / str(last)).is_dir()
        log = (tmp_path / "run" / "log.txt").read_text()
        assert f"stopped by {number.name}" in log.splitlines()[-1] and "Traceback" not in log
    done = run("train.py", "quickstart.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", reference_run[0])


@pytest.mark.slow
def test_another_config_in_the_same_run_folder_is_refused(reference_run, tiny_folder, dapo_file):
    run_dir, _ = reference_run
    arguments = small(tiny_folder, dapo_file, run_dir, **{"train.minibatch-rollouts": 4})
    refused = run("train.py", "quickstart.py", *arguments, "--optim.lr", "0.5")
    assert refused.returncode != 0
    assert refused.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "optim.lr" in refused.stderr and "0.5" in refused.stderr


def refusal(monkeypatch, *arguments):
    """The one sentence with which train.py, run in this process, refuses."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code


@pytest.mark.parametrize(
    ("what", "option"),
    [("Qwen/Qwen3-4B", "--model.path"), ("BytedTsinghua-SIA/DAPO-Math-17k", "--data.path")],
)
def test_the_flagship_says_in_one_sentence_what_cannot_be_reached(
    monkeypatch, tiny_folder, tmp_path, what, option
):
    short = ["--data.max-prompt-tokens", "128", "--sampling.max-new-tokens", "8"]
    overrides = ["--model.path", tiny_folder, *short] if option == "--data.path" else []
    config = ROOT / "configs" / "qwen_math.py"
    sentence = refusal(monkeypatch, config, "--run-dir", tmp_path / "run", *overrides)
    assert sentence.startswith("error: ") and what in sentence and option in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--estimator.name", "bassis"], "estimator.name: unknown estimator 'bassis'"),
        (["--estimator.name", "grpo"], "sampling.group_size is 1; give 2 or more"),
        (["--estimator.features", "4"], "basis takes no features"),
        (["--estimator.table-samples", "0"], "basis needs a reference table"),
        (
            ["--estimator.name", "value_filter", "--estimator.features", "60"],
            "estimator.features is 60 for 42 problems",
        ),
        (
            ["--estimator.options", "rul", "published"],
            "estimator.options: basis has no option 'rul'",
        ),
        (["--sampling.top-p", "0.9"], "sampling.top_p = 0.9 and sampling.top_k = 0"),
        (["--sampling.stop-tokens", "two"], "sampling.stop_tokens holds 'two'"),
        (
            ["--train.prompts-per-step=24", "--train.minibatch-rollouts=24"],  # on four devices
            "train.microbatch_rollouts x mesh.data x mesh.fsdp = 16; choose",
        ),
        (
            ["--train.prompts-per-step", "64", "--train.minibatch-rollouts", "64"],
            "train.prompts_per_step is 64 but there are 42",
        ),
        (["--data.max-prompt-tokens", "3"], "training problems: no problem is left"),
        (["--data.max-prompt-tokens", "400"], "the model has 256 positions"),
        (["--mesh.data", "3"], "mesh.data=3"),
        (["--data.verifier", "maths"], "data.verifier is 'maths'"),
        (
            ["--data.path", "task:sums"],
            "steps/long and gym/NAME (reasoning-gym); give another with",
        ),
        (["--run-dir", ""], "run_dir is empty; give a folder"),
        (["--data.path", ""], "--data.path is empty; give a"),
        (["--eval.sets", ""], "--eval.sets is empty; give a"),
        (["--data.prompt-format", "text", "--data.system-prompt", "x"], "for data.system_prompt"),
        (["--mesh.tensor", "-2"], "mesh.tensor is -2"),
        (["--optim.schedule", "step"], "optim.schedule is 'step'"),
        (["--loss.aggregation", "mean"], "loss.aggregation is 'mean'"),
        (["--loss.objective", "ppo"], "loss.objective is 'ppo'"),
        (["--loss.objective", "gspo"], "set it to sequence_mean"),
        (["--loss.dual-clip", "0.5"], "loss.dual_clip is 0.5"),
        (["--loss.sampler-cap", "-1"], "loss.sampler_cap is -1"),
        (["--model.remat", "some"], "model.remat is 'some'; allowed are none, dots, full"),
        (["--model.compute-dtype", "float8"], "model.compute_dtype is 'float8'; allowed are"),
        (["--train.steps", "0"], "train.steps is 0; give 1 or more"),
        (["--seed", "-1"], "seed is -1; give 0 to 4294967295"),
        (["--checkpoint.keep", "0"], "checkpoint.keep is 0; give 1 or more"),
        (["--loss.logprob-chunk", "0"], "loss.logprob_chunk is 0"),
        (["--train.sample-rollouts=-1"], "train.sample_rollouts is -1"),
        (["--eval.samples", "0"], "eval.samples is 0"),
        (["--sampling.max-new-tokens", "0"], "sampling.max_new_tokens is 0"),
        (["--optim.lr", "-1e-3"], "optim.lr is -0.001"),
        (["--eval.temperature", "-1"], "eval.temperature is -1"),
        (["--optim.learning-rate", "1"], "unknown config field --optim.learning-rate"),
    ],
)
def test_bad_settings_end_with_one_sentence(
    monkeypatch, tiny_folder, dapo_file, tmp_path, arguments, sentence
):
    overrides = small(tiny_folder, dapo_file, tmp_path / "run")
    said = refusal(monkeypatch, ROOT / "configs" / "quickstart.py", *overrides, *arguments)
    assert said.startswith("error: ") and sentence in said
    fields = command_line.field_names(Config(run_dir=""))
    assert any(name in said for name in fields if name != "seed" or "--seed" in arguments)
    assert not (tmp_path / "run").exists()
