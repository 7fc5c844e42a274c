"""Configs and overrides: every mistake is one sentence."""

import dataclasses
import fractions
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import jax
import pytest

from basis_jax import command_line
from basis_jax.config import Config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def parse(*arguments, config="configs/quickstart.py"):
    return command_line.parse("test", argv=["--config", str(ROOT / config), *arguments])[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds_and_says_its_command(path):
    config = command_line.load_config(path)
    assert isinstance(config, Config)
    spec = importlib.util.spec_from_file_location("c", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"--config configs/{path.name}" in module.__doc__
    assert config.run_dir == f"runs/{path.stem}"


def test_overrides_are_dotted_and_typed():
    config = parse("--optim.lr", "3e-6", "--train.steps=7", "--seed", "5", "--run-dir", "x")
    assert (config.optim.lr, config.train.steps, config.seed, config.run_dir) == (3e-6, 7, 5, "x")
    assert parse() == command_line.load_config(ROOT / "configs/quickstart.py")


def test_estimator_options_come_from_the_command_line_with_their_types():
    config = parse("--estimator.options", "rule", "published", "folds", "4")
    assert config.estimator.options == {"rule": "published", "folds": 4}


@pytest.mark.parametrize(
    ("argument", "near"),
    [
        ("--optim.learning-rate", "--optim."),
        ("--train.step", "--train.steps"),
        ("--lr", "--optim.lr"),
    ],
)
def test_an_unknown_field_is_named_with_near_ones(argument, near):
    with pytest.raises(ValueError, match=f"unknown config field {re.escape(argument)}") as raised:
        parse(argument, "1")
    assert near in str(raised.value)


def test_a_missing_config_file_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match="no config file .*quickstarts.py.*quickstart.py"):
        parse(config="configs/quickstarts.py")


def test_a_file_without_config_function_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    for text, words in [
        ("x = 1\n", "no attribute 'config'"),
        ("def config(:\n", "SyntaxError"),
        ("def config():\n    return 3\n", "returns a int"),
        ("def config():\n    return missing\n", "NameError"),
        ("def config():\n    return int('x')\n", "ValueError"),
    ]:
        (tmp_path / "empty.py").write_text(text)
        with pytest.raises(ValueError, match=words):
            command_line.load_config(tmp_path / "empty.py")


def test_an_option_as_a_field_is_told_how_to_be_given():
    for option in ("--estimator.options rule", "--data.chat-template-options enable_thinking"):
        with pytest.raises(ValueError, match=f"write {option} VALUE"):
            parse(option.replace(" ", "."), "published")


def test_options_of_the_chat_template_come_with_their_types():
    config = parse("--data.chat-template-options", "enable_thinking", "False", "depth", "4")
    assert config.data.chat_template_options == {"enable_thinking": False, "depth": 4}


def test_our_errors_end_a_script_with_their_sentence_and_others_keep_their_traceback(tmp_path):
    def ours():
        command_line.load_config(tmp_path / "none.py")

    def others():
        int("x")

    def unwritable():
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder").write_text("")

    with pytest.raises(SystemExit, match="error: no config file"):
        command_line.run(ours)
    with pytest.raises(SystemExit, match="error: .*Is a directory"):
        command_line.run(unwritable)
    with pytest.raises(ValueError, match="invalid literal"):
        command_line.run(others)


def library(error):
    """Something that makes a library raise on what a user gave."""

    def main():
        if error == "json":
            json.loads("{")
        elif error == "template":
            import jinja2

            jinja2.Template("{{ a + 1 }}").render(a="x")
        elif error == "long":
            fractions.Fraction("x" * 5000)
        elif error == "path":
            sysconfig.get_path("no such\nplace")

    return main


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("json", r"Expecting property name .* \(JSONDecodeError in json; --debug shows"),
        ("template", r"can only concatenate str .* \(TypeError in "),
        ("path", r"'no such.*place' \(KeyError in sysconfig; --debug shows the traceback\)"),
        ("long", r"Invalid literal for Fraction: 'xx.* \.\.\. \(ValueError in fractions; "),
    ],
)
def test_what_a_library_raises_is_one_sentence_and_a_traceback_with_debug(
    monkeypatch, error, sentence
):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "x"])
    with pytest.raises(SystemExit, match=f"^error: {sentence}") as raised:
        command_line.run(library(error))
    assert "\n" not in raised.value.code and len(raised.value.code) < 500
    monkeypatch.setattr(sys, "argv", ["train.py", "--debug", "--config", "x"])
    with pytest.raises(Exception) as raised:  # noqa: B017
        command_line.run(library(error))
    assert not isinstance(raised.value, SystemExit)
    assert sys.argv == ["train.py", "--config", "x"], "the command does not see the flag"


def test_errors_of_jax_are_one_sentence_though_its_frames_are_taken_out(tmp_path):
    with pytest.raises(ValueError) as raised:
        command_line.load_config(tmp_path / "none.py")
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile trying")
    sentence = command_line.one_sentence(error.with_traceback(raised.value.__traceback__))
    assert re.search(r"Out of memory while trying \(JaxRuntimeError in jax", sentence)


def test_debug_shows_the_traceback_of_our_own_errors_too(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train.py", "--debug"])
    with pytest.raises(ValueError, match="no config file"):
        command_line.run(lambda: command_line.load_config(tmp_path / "none.py"))


def test_ctrl_c_ends_a_command_without_a_traceback(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(interrupted)
    assert stopped.value.code == 130 and capsys.readouterr().err == "stopped by Ctrl-C\n"


def test_a_bug_of_this_package_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(command_line, "packaged_configs", lambda: None)
    with pytest.raises(TypeError):
        command_line.run(lambda: command_line.find_config("no such config"))


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(SystemExit, match="error: .*tyro.*; install it, or the extra"):
        command_line.run(lambda: parse())


def test_every_config_field_is_read_somewhere():
    """A field that nothing reads is a lie to the user."""
    sources = [p for p in (ROOT / "basis_jax").rglob("*.py") if p.name != "config.py"]
    text = "\n".join(p.read_text() for p in [*sources, *(ROOT / "scripts").glob("*.py")])
    whole_sections = {"mesh"}  # passed on as keyword arguments
    for section in dataclasses.fields(Config):
        value = getattr(command_line.load_config(CONFIGS[0]), section.name)
        if not dataclasses.is_dataclass(value) or section.name in whole_sections:
            assert re.search(rf"config\.{section.name}\b", text), section.name
            continue
        for field in dataclasses.fields(value):
            assert re.search(rf"\.{field.name}\b", text), f"{section.name}.{field.name}"


@pytest.mark.slow
def test_help_whose_reader_has_ended_says_nothing():
    command = (
        f"{shlex.quote(sys.executable)} scripts/train.py --help | true; exit ${{PIPESTATUS[0]}}"
    )
    ended = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize("name", ["train", "evaluate", "reference_stats"])
def test_the_help_lists_a_commands_own_options_and_keeps_the_lines_of_its_examples(name):
    run = subprocess.run(
        [sys.executable, f"scripts/{name}.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "100"},
        check=True,
    )
    command = importlib.import_module(f"basis_jax.commands.{name}")
    for option in ("config FILE", *command.OPTIONS, *getattr(command, "FLAGS", ()), "debug"):
        assert f"\n    --{option} " in run.stdout
    examples = [line for line in command.__doc__.splitlines() if line.startswith("    ")]
    assert len(examples) >= 2
    for line in examples:
        assert line in run.stdout.splitlines()
        assert "  " not in line.strip()  # two lines of the source have not become one
