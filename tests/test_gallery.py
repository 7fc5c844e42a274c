"""studies/gallery.py: every algorithm has a line that works, and the page shows the same lines."""

import json
import shlex
from pathlib import Path

import pytest

from basis_jax.estimators import ESTIMATORS
from basis_jax.opening.ranges import check_ranges
from basis_jax.opening.rollout_plan import open_plan
from basis_jax.training.session import make_estimator
from studies import gallery

PAGE = Path(__file__).parent.parent / "docs" / "choosing-an-estimator.md"
NOT_ALGORITHMS = {"batch_mean", "ema", "spo_pp", "otb", "v05", "value_filter", "weighted_mean"}


@pytest.mark.parametrize("name", gallery.ALGORITHMS)
def test_every_algorithm_has_the_same_rollouts_a_step(name, tmp_path):
    config = gallery.config_of(name, str(tmp_path), steps=3)
    train = config.train
    assert train.prompts_per_step * config.sampling.group_size == gallery.ROLLOUTS
    assert config.train.steps == 3 and config.estimator.name in shlex.split(
        gallery.ALGORITHMS[name]
    )


@pytest.mark.parametrize("name", gallery.ALGORITHMS)
def test_no_algorithm_is_refused_before_its_run(name, tmp_path):
    """Its estimator has all the options that it needs, and its rollout plan fits it."""
    config = gallery.config_of(name, str(tmp_path), steps=3)
    estimator = make_estimator(config.estimator, config.sampling.group_size)
    check_ranges(config)
    open_plan(config, (300,), estimator)


def test_the_page_has_every_algorithm_with_its_line():
    text = PAGE.read_text()
    for name, line in gallery.ALGORITHMS.items():
        assert f"| {name.replace('*', chr(92) + '*')} | `{line}` |" in text


def test_every_estimator_of_a_published_algorithm_is_in_the_gallery():
    shown = {shlex.split(line)[1] for line in gallery.ALGORITHMS.values()}
    assert shown - {"value_filter+least_variance"} <= ESTIMATORS.keys()
    assert ESTIMATORS.keys() - shown <= NOT_ALGORITHMS


def run_all(names, tmp_path, monkeypatch, *, steps):
    arguments = ["gallery", "--out", str(tmp_path / "runs"), "--report", str(tmp_path / "report")]
    arguments += [
        "--steps",
        str(steps),
        "--only",
        *names,
        "--eval.size",
        "20",
        "--data.size",
        "300",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    gallery.main()
    found = json.loads((tmp_path / "report.json").read_text())["algorithms"]
    assert list(found) == list(names) and (tmp_path / "report.png").stat().st_size > 5000
    return found


@pytest.mark.slow
def test_three_of_them_run_and_the_same_command_repeats_nothing(tmp_path, monkeypatch):
    names = ["REBEL", "PPO with a critic", "V_0.5"]
    first = run_all(names, tmp_path, monkeypatch, steps=2)
    assert all(row["updates"] == 2 for row in first.values())
    monkeypatch.setattr(gallery, "train", None)
    assert run_all(names, tmp_path, monkeypatch, steps=2) == first


@pytest.mark.nightly
def test_all_of_them_run(tmp_path, monkeypatch):
    found = run_all(list(gallery.ALGORITHMS), tmp_path, monkeypatch, steps=3)
    assert all(row["updates"] == 3 for row in found.values())
