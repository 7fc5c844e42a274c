"""``basis-jax COMMAND`` and ``scripts/COMMAND.py``: the same functions, and what they say."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_watch import graded

from basis_jax import command_line, commands
from basis_jax.commands import evaluate, generate, reference_stats, train
from basis_jax.config import Config, DataSection, EvalSection, ModelSection, OptimSection
from basis_jax.data.problem import Problem
from basis_jax.model.sharding import make_mesh
from basis_jax.runs import checkpoint
from basis_jax.training import reference_table
from basis_jax.training.reference_table import ReferenceTable
from basis_jax.training.update import make_optimizer, make_state
from basis_jax.weights import huggingface

ROOT = Path(__file__).parent.parent
NAMES = list(commands.COMMANDS)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["basis-jax", *map(str, arguments)])
    commands.main()


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_command_it_says_what_there_is(monkeypatch, capsys, arguments):
    run(monkeypatch, *arguments)
    shown = capsys.readouterr().out
    assert all(f"basis-jax {name} " in shown for name in NAMES)
    assert all(path.stem in shown for path in (ROOT / "configs").glob("*.py"))


def test_an_unknown_command_is_refused_with_a_near_one(monkeypatch):
    with pytest.raises(SystemExit, match="error: unknown command trian; did you mean train?"):
        run(monkeypatch, "trian")


@pytest.mark.parametrize("name", NAMES)
def test_help_needs_nothing_else(monkeypatch, capsys, name):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, name, "--help")
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert f"usage: basis-jax {name}" in shown and f"basis-jax {name} " in shown.split("usage")[1]
    assert "--debug" in shown


@pytest.mark.parametrize("name", NAMES)
def test_without_arguments_a_command_says_what_it_needs(monkeypatch, capsys, name):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, name)
    assert stopped.value.code
    said = str(stopped.value.code) + capsys.readouterr().err
    assert "--config" in said or "RUN" in said or "{run, gguf}" in said


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_a_script_that_calls_it(name):
    stem = name.replace("-", "_")
    script = (ROOT / "scripts" / f"{stem}.py").read_text()
    assert f"from basis_jax.commands import {stem}\n" in script
    assert script.rstrip().endswith(f"command_line.run({stem}.main)")
    assert callable(importlib.import_module(f"basis_jax.commands.{stem}").main)
    assert {p.stem for p in (ROOT / "scripts").glob("*.py")} == {n.replace("-", "_") for n in NAMES}


def test_a_packaged_config_has_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    by_name = command_line.load_config("quickstart")
    assert by_name == command_line.load_config(ROOT / "configs" / "quickstart.py")
    (tmp_path / "quickstart").write_text("def config():\n    return 3\n")
    with pytest.raises(ValueError, match="returns a int"):  # a file of that name comes first
        command_line.load_config("quickstart")


def test_a_wheel_finds_its_configs_inside_the_package(monkeypatch, tmp_path):
    (tmp_path / "basis_jax" / "configs").mkdir(parents=True)
    (tmp_path / "basis_jax" / "configs" / "mine.py").write_text("")
    monkeypatch.setattr(command_line, "__file__", str(tmp_path / "basis_jax" / "command_line.py"))
    assert list(command_line.packaged_configs()) == ["mine"]


@pytest.fixture(scope="module")
def run_folder(tiny_folder, tmp_path_factory):
    """A run with one checkpoint, of a model that adds digits by chance."""
    problems = tmp_path_factory.mktemp("data") / "sums.jsonl"
    problems.write_text('{"problem": "what is 2 + 3?", "answer": "5"}\n')
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    config = Config(
        run_dir=str(run_dir),
        model=ModelSection(path=str(tiny_folder)),
        data=DataSection(path=str(problems), verifier="exact", max_prompt_tokens=4),
        eval=EvalSection(sets=()),
    )
    model_config = huggingface.read_model_config(tiny_folder)
    state = make_state(
        huggingface.load_params(tiny_folder, model_config),
        make_optimizer(OptimSection(), updates=1),
        (),
        model_config=model_config,
        mesh=make_mesh(devices=jax.devices()[:1]),
    )
    with checkpoint.open_checkpoints(run_dir, config.checkpoint) as checkpoints:
        checkpoint.save(checkpoints, state, dataclasses.asdict(config))
    return run_dir


def test_generate_shows_samples_their_log_probs_and_the_value(monkeypatch, capsys, run_folder):
    seen = []
    roll_out = generate.roll_out
    monkeypatch.setattr(
        generate, "roll_out", lambda *a, **k: seen.append(roll_out(*a, **k)) or seen[0]
    )
    run(monkeypatch, "generate", run_folder, " what is 2 + 3? ", "--samples", "3")
    lines = capsys.readouterr().out.splitlines()
    graded = seen[0]
    newest = run_folder / "checkpoints" / "0"
    assert lines[0] == (f"3 samples of {newest} at temperature 1, for the prompt: what is 2 + 3?")
    assert len(lines) == 5
    logprobs = np.asarray(graded.rollouts.sampler_logprobs).sum(1)
    for i, line in enumerate(lines[1:4]):
        assert f"log-prob {logprobs[i]:.2f}, {graded.rollouts.completion_lengths[i]} tok" in line
        assert ("right (" in line) == bool(graded.rewards[i])
    assert lines[4] == f"right answer: 5; value: {int(graded.rewards.sum())} of 3 samples right"


BEFORE = {"a": 0.5, "a_low": 0.46, "a_high": 0.53}
AFTER = {"a": 0.6, "a_low": 0.57, "a_high": 0.64}


def test_what_was_gained_has_an_interval():
    """0.1 - sqrt(0.03^2 + 0.03^2) to 0.1 + sqrt(0.04^2 + 0.04^2)."""
    assert train.gain("accuracy", "a", BEFORE, AFTER) == (
        "accuracy 50.0% -> 60.0% (+10.0 points, 95 % interval +5.8 to +15.7)"
    )


def test_a_run_ends_with_commands_to_paste(monkeypatch, tmp_path):
    """They keep the run's own arguments, and the way in which it was started."""
    long = {"problem": "p" * 100}
    rows = [long, {"problem": [["user", "hi"]]}, {"problem": "what is it?"}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--config", "quickstart", "--run-dir", str(tmp_path), "--data.prefix", "a b"]
    monkeypatch.setattr(sys, "argv", ["basis-jax train", *arguments])
    evaluate_, generate_, convert = train.next_commands(tmp_path, held_out=True)
    given = f"--config quickstart --run-dir {tmp_path} --data.prefix 'a b'"
    out = f"--checkpoint {tmp_path} --out {tmp_path}/evaluation"
    assert evaluate_ == f"basis-jax evaluate {given} {out}"
    assert generate_ == f"basis-jax generate {tmp_path} 'what is it?'"
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", *arguments])
    generate_, convert = train.next_commands(tmp_path, held_out=False)
    assert convert == f"python scripts/convert.py {tmp_path} --to {tmp_path}/model"


def test_an_option_is_left_out_with_its_value(monkeypatch):
    words = ["x", "--out", "a", "--checkpoint=b", "--eval.size", "3", "--checkpoint", "c"]
    monkeypatch.setattr(sys, "argv", words)
    assert command_line.arguments_without("--out", "--checkpoint") == ["--eval.size", "3"]


def test_evaluate_and_reference_stats_say_first_what_they_will_do(tmp_path):
    eval_section = EvalSection(sets=("a", "b"), samples=4, set_samples={"b": 8})
    config = Config(
        run_dir="", model=ModelSection(path="M"), data=DataSection(path="d"), eval=eval_section
    )
    assert evaluate.announcement(config, "", tmp_path) == (
        "evaluating M on a (4 completions of each problem at temperature 1), b (8 completions of "
        f"each problem at temperature 1); results go to {tmp_path} (new)"
    )
    (tmp_path / "completions.jsonl").touch()
    assert evaluate.announcement(config, "run", tmp_path).endswith(f"{tmp_path} (continued)")
    samples = config.estimator.table_samples
    assert reference_stats.announcement(config, tmp_path / "t.npz") == (
        f"making the reference table of M on d: {samples} completions of each problem; file "
        f"{tmp_path}/t.npz (new)"
    )


LEVELS = "def reward(completions, level): return [float(x) for x in level]\n"


@pytest.fixture
def two_verifiers(tmp_path):
    """A config whose training set is graded by a function of a column, its held-out set exactly."""
    (tmp_path / "levels.py").write_text(LEVELS)
    for name, rows in {"train": '{"problem": "a", "level": 3}', "test": TEST_ROW}.items():
        (tmp_path / f"{name}.jsonl").write_text(rows + "\n")
    own, test = f"{tmp_path / 'levels.py'}:reward", str(tmp_path / "test.jsonl")
    data = DataSection(path=str(tmp_path / "train.jsonl"), verifier=own)
    return Config(run_dir="", data=data, eval=EvalSection((test,), set_verifiers={test: "exact"}))


TEST_ROW = '{"problem": "b", "answer": "7"}'


def test_generate_grades_a_problem_as_its_set_is_graded(two_verifiers):
    """With the columns that the verifier reads; an answer that is given replaces the problem's."""
    config = two_verifiers
    problem, section = generate.find_problem(config, "a", None)
    assert problem.columns == {"level": 3} and section.verifier == config.data.verifier
    problem, section = generate.find_problem(config, "b", None)
    assert problem.answer == "7" and section.verifier == "exact"
    assert generate.find_problem(config, "b", "8")[0].answer == "8"
    problem, section = generate.find_problem(config, "c", None)
    assert problem is None and section.verifier == "exact"
    with pytest.raises(ValueError, match="reward asks for the columns level, which only the run's"):
        generate.find_problem(config, "c", "8")


def test_generate_says_why_samples_are_not_graded(two_verifiers, tmp_path, capsys):
    (tmp_path / "levels.py").unlink()
    assert generate.find_problem(two_verifiers, "a", None)[0] is None
    assert "note: samples are not graded: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="levels.py"):
        generate.find_problem(two_verifiers, "a", "8")


def table(rewards):
    """A reference table of these rewards, a row each problem; NaN is no verdict."""
    rewards = np.float32(rewards)
    sums = np.nansum(rewards, axis=1)
    return ReferenceTable(
        successes=sums.astype(np.int32) if np.all(sums == np.floor(sums)) else sums,
        trials=np.sum(~np.isnan(rewards), axis=1).astype(np.int32),
        uids=np.array([Problem(prompt=f"p{i}", answer="5").uid for i in range(len(rewards))]),
        prompt_hashes=np.zeros(len(rewards), np.uint64),
        features=np.zeros((len(rewards), 0), np.float32),
        made_by={"samples": rewards.shape[1]},
        position=rewards.size,
        rewards=rewards,
    )


FRACTIONAL = [[0.25, 0.5, np.nan], [0, 0, 0], [1, 1, 1], [np.nan] * 3]
BINARY = [[1, 0, np.nan], [0, 0, 0], [1, 1, 1], [np.nan] * 3]


@pytest.mark.parametrize(
    ("rewards", "before", "now", "summary"),
    [
        (
            FRACTIONAL,
            ["mean reward 0.375 of 2", "mean reward 0.000 of 3", "mean reward 1.000 of 3"],
            "value: mean reward 0.750 of 2 samples",
            "mean reward mean 0.458, sd 0.412; never above 0 33.3%, always 1 33.3%",
        ),
        (
            BINARY,
            ["1 of 2", "0 of 3", "3 of 3"],
            "value: 1 of 2 samples right",
            "pass rate mean 0.500, sd 0.408; never solved 33.3%, always solved 33.3%",
        ),
    ],
    ids=["fractional", "binary"],
)
def test_fractional_rewards_are_told_as_means(tmp_path, capsys, rewards, before, now, summary):
    """No count of right ones is made up; what was never graded is no failure."""
    reference_table.save(table(rewards), tmp_path / "reference.npz")
    reference_stats.print_summary(reference_table.load(tmp_path / "reference.npz"))
    assert capsys.readouterr().out == f"3 problems, 8 graded rollouts: {summary}\n"
    sampled = np.float32([0.5, 1, 0] if rewards is FRACTIONAL else [0, 1, 1])
    rollouts = graded(sampled, [True, True, False])
    for i, told in enumerate([*before, None]):
        problem = Problem(prompt=f"p{i}", answer="5")
        line = generate.value_line(rollouts, problem, tmp_path / "checkpoints" / "3")
        assert line == f"right answer: 5; {now}" + (f"; before training {told}" if told else "")


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_convert_refuses_a_size_of_files_that_is_none(monkeypatch, tmp_path, size):
    with pytest.raises(SystemExit, match=f"error: --shard-gb is {size}; give a number above 0"):
        run(monkeypatch, "convert", "run", tmp_path, "--to", tmp_path / "x", f"--shard-gb={size}")


def test_generate_says_no_verdict_where_no_answer_is_known(monkeypatch, capsys, run_folder):
    run(monkeypatch, "generate", run_folder, "what is 2 + 4?~", "--temperature", "0")
    shown = capsys.readouterr().out
    assert "warning: 1 tokens of the prompt are unknown" in shown
    assert "value" not in shown and "right" not in shown and shown.count("log-prob") == 4


def test_generate_refuses_a_prompt_or_a_number_that_makes_no_sense(monkeypatch, run_folder):
    for arguments in (["x", "--samples", "0"], [" "]):
        with pytest.raises(SystemExit, match="error: --samples is .* give 1 or more"):
            run(monkeypatch, "generate", run_folder, *arguments)
    for option, field in (("--temperature", "sampling.temperature"), ("--seed", "seed")):
        with pytest.raises(SystemExit, match=f"error: {field} is (nan|-1); give 0"):
            value = "nan" if option == "--temperature" else "-1"
            run(monkeypatch, "generate", run_folder, "x", f"{option}={value}")
    with pytest.raises(SystemExit, match="error: .*holds no checkpoint"):
        run(monkeypatch, "generate", run_folder / "checkpoints" / "state", "x")
