"""The files in examples/ run, and the pages that explain them show what stands in them."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from whole_runs import ROOT, environment, lines

from basis_jax import estimators
from basis_jax.runs.loggers import Run
from basis_jax.verify import make_verifier
from basis_jax.verify.verdicts import Submission

EXAMPLES = ROOT / "examples"
PAGES = [*sorted((ROOT / "docs").glob("own-*.md")), ROOT / "docs" / "rollout-plans.md"]


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rewards(reference, rows):
    with make_verifier(f"{EXAMPLES}/{reference}") as verifier:
        return [verdict.reward for verdict in verifier.judge(rows)]


def test_the_reward_pays_for_being_near():
    rows = [Submission(text, "7") for text in ("7", " 8 ", "3", "seven")]
    assert rewards("own_reward.py:reward", rows) == [1, 0.5, 0.2, 0]


def test_the_data_has_no_answers_and_its_columns_grade_it(tmp_path):
    example("own_data").write(tmp_path / "problems.jsonl", rows=5)
    made = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert len(made) == 5 and made[0].keys() == {"problem", "least", "most"}
    rows = [Submission(text, "", columns={"least": 4, "most": 6}) for text in ("4", "6", "7", "x")]
    assert rewards("own_data.py:reward", rows) == [1, 1, 0, 0]


def test_the_estimator_subtracts_the_median_of_valid_rewards():
    made = estimators.make(f"{EXAMPLES}/own_estimator.py:median", scale=2.0)
    signals = estimators.Signals(
        rewards=jnp.float32([0, 1, 5, jnp.nan]),
        valid=jnp.array([True, True, True, False]),
        problem_ids=jnp.arange(4),
        lengths=jnp.ones(4, jnp.int32),
    )
    counts = jnp.zeros(4, jnp.int32)
    _, found = made.update(made.init(counts, counts), signals)
    assert found.advantages.tolist() == [-2, 0, 8, 0]


def test_the_logger_keeps_what_was_logged_before_the_checkpoint(tmp_path):
    table = example("own_logger").Table
    first = table(Run(tmp_path, {}, 0))
    for step in range(4):
        first.log(step, {"reward/mean": step / 2} if step else {"eval/accuracy": 0.5})
    second = table(Run(tmp_path, {}, 3))
    second.log(3, {"reward/mean": 9.0})
    assert (tmp_path / "rewards.csv").read_text().split() == [
        "step,reward", "1,0.5", "2,1.0", "3,9.0",
    ]  # fmt: skip


def test_the_rewards_of_trls_documentation_give_what_it_says():
    """Its inputs and outputs of the two examples."""
    texts = [r" The solution is \boxed{2}.", r" The solution is \boxed{6}."]
    rows = [Submission(text, answer) for text, answer in zip(texts, ["2", "5"], strict=True)]
    assert rewards("trl_rewards.py:boxed", rows) == [1, 0]
    texts = [
        "<think>The sum of 1 and 2 is 3, times 4 is 12.</think><answer>(1 + 2) * 4 = 12</answer>",
        "The sum of 3 and 1 is 4, which we multiply by 2 to get 8. So (3 + 1) * 2 = 8.",
    ]
    assert rewards("trl_rewards.py:form", [Submission(text, "") for text in texts]) == [1, 0]


def code_lines(function):
    text = (EXAMPLES / "trl_rewards.py").read_text().split(f"def {function}")[1].split("\n\n\n")[0]
    return 2 + len([line for line in text.splitlines()[1:] if line.strip()])  # import and def too


def test_the_line_counts_of_the_page_are_those_of_the_file():
    table = (ROOT / "docs" / "own-reward.md").read_text()
    for row, function in (("the boxed answer", "boxed"), ("the completion has R1", "form")):
        counted = re.search(rf"\| {row}[^|]*\| \d+ \| (\d+) \|", table)[1]
        assert int(counted) == code_lines(function)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_what_stands_in_its_example(page):
    text = page.read_text()
    own = "own_plan" if page.stem == "rollout-plans" else page.stem.replace("-", "_")
    (name,) = {f"{own}.py"} & set(re.findall(r"examples/(\w+\.py)", text))
    file = (EXAMPLES / name).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks and all(block in file for block in blocks)
    for path in re.findall(r"\]\((?:\.\./)?([\w/.-]+)\)", text):
        assert (ROOT / path).exists() or (ROOT / "docs" / path).exists(), path


def test_ten_lines_are_enough_for_a_reward():
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs/own-reward.md").read_text(), re.DOTALL)
    assert len([line for line in block[1].splitlines() if line.strip()]) <= 10


FAST = {
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
"""A resumed run finds what the first one compiled."""


def run(tmp_path, *options):
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", "quickstart"]
    small = [
        *("--run-dir", tmp_path / "run", "--train.prompts-per-step", 8, "--eval.samples", 1),
        *("--train.minibatch-rollouts", 8, "--train.microbatch-rollouts", 8, "--eval.size", 8),
        *("--train.sample-rollouts", 8, "--checkpoint.every", 1, "--optim.schedule", "constant"),
        *("--data.path", tmp_path / "problems.jsonl", "--data.verifier", "own.py:reward"),
        *("--data.rewards", "overlong", 0.1, "--eval.sets", "task:number_words"),
        *("--eval.set-verifiers", "task:number_words", EXAMPLES / "own_reward.py:reward"),
        *("--estimator.name", f"{EXAMPLES}/own_estimator.py:median"),
        *("--train.loggers", f"{EXAMPLES}/own_logger.py:Table"),
    ]
    return subprocess.run(
        [*command, *map(str, small), *map(str, options)],
        capture_output=True,
        text=True,
        env=environment() | FAST | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")},
        cwd=tmp_path,
    )


@pytest.mark.slow
def test_a_run_with_all_of_them_is_resumed_and_names_a_reward_that_changed(tmp_path):
    """Own data without answers, reward, estimator and logger; then the reward's file changes."""
    example("own_data").write(tmp_path / "problems.jsonl", rows=100)
    own = tmp_path / "own.py"
    own.write_text((EXAMPLES / "own_data.py").read_text())
    for steps in (1, 2):
        done = run(tmp_path, "--train.steps", steps)
        assert done.returncode == 0, done.stderr
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    table = (tmp_path / "run" / "rewards.csv").read_text().split()
    assert table == ["step,reward", *(f"{r['step']},{r['reward/mean']}" for r in rows[1:])]
    for row in rows[1:]:
        total = row["rewards/reward"] + 0.1 * row["rewards/overlong"]
        assert abs(row["reward/mean"] - total) < 1e-6
        assert row["reward/accuracy"] == row["rewards/reward"] and row["reward/invalid"] == 0
    assert 0 < rows[0]["eval/accuracy"] < 1  # by the set's own verifier, in fractions
    own.write_text(own.read_text() + "\n")
    changed = run(tmp_path, "--train.steps", 3)
    assert changed.returncode != 0
    said = "the file of the reward function in data.verifier has changed since the run began"
    assert said in changed.stderr and Path(tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["estimators", "train_tiny"])
def test_the_notebooks_run_from_top_to_bottom(name, tmp_path):
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    settings = environment() | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=settings,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ("step 24/24" in shown) == (name == "train_tiny")
