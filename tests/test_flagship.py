"""The rehearsal of configs/qwen_math.py: everything but its size, on a model that boxes digits."""

import json
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_data import WRAPPER, write_lines
from whole_runs import ROOT, environment, lines, run, run_killed

from basis_jax.command_line import load_config
from basis_jax.model.logprobs import token_logprobs
from basis_jax.weights import huggingface

ANSWERS = "7770123456"  # of the problems, equally often


@pytest.fixture(scope="module")
def dapo(tmp_path_factory):
    """520 problems in the columns of DAPO-Math-17K, every one of them three times."""
    rng = random.Random(0)
    rows = []
    for i in range(520):
        a, b = rng.randrange(2, 99), rng.randrange(2, 99)
        problem = rf"find no. {i} of $\frac{{{a}}}{{{b}}}$ mod 9"
        rows.append(
            {
                "data_source": "math_dapo",
                "prompt": [{"role": "user", "content": WRAPPER.format(problem=problem)}],
                "ability": "MATH",
                "reward_model": {"ground_truth": rng.choice(ANSWERS), "style": "rule"},
                "extra_info": {"index": str(i)},
            }
        )
    return write_lines(tmp_path_factory.mktemp("data") / "dapo.jsonl", rows * 3)


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """Stand-ins for two of the sets, under their names and in their columns."""
    path = tmp_path_factory.mktemp("benchmarks")
    aime = [{"problem": f"what is {i} mod 9?", "answer": str(i % 9)} for i in range(30)]
    write_lines(path / "AIME24.jsonl", aime)
    rows = [{"problem": f"what is $x^{i}$?", "answer": ANSWERS[i % 10]} for i in range(40)]
    write_lines(path / "MATH-500.jsonl", rows)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen3 that has learnt to say \\boxed{d}, any digit, and to end."""
    path = tiny.write_folder(tmp_path_factory.mktemp("models") / "tiny")
    model_config, tokenizer = huggingface.read_model_config(path), huggingface.load_tokenizer(path)
    rng = random.Random(0)
    asked = [rf"find no. {i} of $\frac{{{i}}}{{{i + 7}}}$ mod 9" for i in range(2, 90, 3)]
    asked += ["what is $x^{7}$?", "what is 12 mod 9?"]
    suffix = load_config(ROOT / "configs" / "qwen_math.py").data.problem_suffix
    chats = [[{"role": "user", "content": text + suffix}] for text in asked]
    prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    texts = [p + rf"\boxed{{{rng.randrange(10)}}}</s>" for p in prompts]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    spoken = np.zeros(tokens.shape, np.float32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        spoken[i, len(row) - len(r"\boxed{7}") - 1 : len(row)] = 1
    params = huggingface.load_params(path, model_config)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def teach(params):
        def loss(params):
            logprobs, _ = token_logprobs(params, model_config, jnp.asarray(tokens))
            return -jnp.sum(spoken * logprobs) / spoken.sum()

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=150)[0][0]

    with jax.numpy_dtype_promotion("standard"):  # which optax.adam counts on
        params = teach(params)
    huggingface.save_params(params, model_config, path, source=path, overwrite=True)
    return path


@pytest.mark.slow
def test_the_flagship_from_the_table_to_the_export(folder, dapo, benchmarks, tmp_path):
    """Table, six steps of two updates with evaluation in between, kill -9, resume, export."""
    run_dir, table, exported = tmp_path / "run", tmp_path / "table.npz", tmp_path / "hf"
    options = [
        *("--model.path", folder, "--data.path", dapo, "--run-dir", run_dir),
        *("--eval.folder", benchmarks, "--eval.sets", "MATH-500", "AIME24", "--eval.every", 2),
        *("--data.max-prompt-tokens", 200, "--sampling.max-new-tokens", 14),
        *("--estimator.table-samples", 4, "--optim.lr", 3e-4, "--checkpoint.every", 2),
        *("--train.steps", 6, "--train.prompts-per-step", 64, "--train.sample-rollouts", 64),
        *("--train.minibatch-rollouts", 32, "--train.microbatch-rollouts", 16),
    ]
    made = run("reference_stats.py", "qwen_math.py", *options, "--out", table)
    assert made.returncode == 0, made.stderr
    assert "training problems: 1560 read, 1040 duplicate, 520 used" in made.stdout
    options += ["--estimator.table", table]
    other = run("train.py", "qwen_math.py", *options, "--sampling.temperature", 0.5)
    assert other.returncode != 0 and "does not fit this run (sampling.temperature" in other.stderr
    metrics = run_dir / "metrics.jsonl"
    run_killed("train.py", "qwen_math.py", *options, written=metrics, line_count=4)
    done = run("train.py", "qwen_math.py", *options)
    assert done.returncode == 0, done.stderr
    assert "step 6/6" in done.stdout and "step 1/6" not in done.stdout  # resumed
    rows = lines(metrics)
    assert [row["step"] for row in rows] == list(range(7))
    assert not (run_dir / "reference.npz").exists()
    rewards = [row["reward/mean"] for row in rows[1:]]
    assert 0.03 < sum(rewards) / 6 < 0.35  # a digit by chance is right once in ten times
    assert all(row["reward/invalid"] == 0 and row["estimate/beta"] > 0 for row in rows[1:])
    for row in rows[::2]:
        assert all(f"eval/{name}/accuracy" in row for name in ("MATH-500", "AIME24"))
    samples = lines(run_dir / "samples.jsonl")
    assert any(r"\boxed{" in sample["completion"] for sample in samples)
    script = [str(ROOT / "scripts" / "convert.py"), "run", str(run_dir), "--to", str(exported)]
    subprocess.run([sys.executable, *script], check=True, env=environment())
    again = run(
        "evaluate.py",
        "qwen_math.py",
        *options,
        "--model.path",
        exported,
        "--out",
        tmp_path / "eval",
    )
    assert again.returncode == 0, again.stderr
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    for name, of_set in results["sets"].items():
        own = f"avg@{32 if name == 'AIME24' else 1}"  # one greedy completion of MATH-500
        assert of_set["metrics"][own]["value"] == rows[-1][f"eval/{name}/accuracy"]
