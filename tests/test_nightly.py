"""What takes minutes or needs a package registry: ``make nightly``."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.nightly


def python(*arguments, cwd, **environment):
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_wheel_trains_the_quickstart_in_an_empty_folder(tmp_path):
    """Built, unpacked apart from this source tree, and run there by its command."""
    python("-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path / "dist", ROOT, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    python("-m", "pip", "install", "--no-deps", "-q", "--target", site, wheel, cwd=tmp_path)
    empty.mkdir()
    command = "import sys; from basis_jax.commands import main; sys.argv[0] = 'basis-jax'; main()"
    run = [
        "-c",
        command,
        "train",
        "--config",
        "quickstart",
        "--train.steps",
        "2",
        "--eval.size",
        "20",
    ]
    shown = python(*run, "--data.size", "512", cwd=empty, PYTHONPATH=str(site))
    assert "(steps 0 and 2; bootstrap" in shown
    written = json.loads((empty / "runs" / "quickstart" / "config.json").read_text())
    assert written["starts"][0]["commit"] is None  # it is not run from this repository


def test_the_quickstart_learns_what_its_config_says(tmp_path):
    shown = python(
        "scripts/train.py",
        "--config",
        "configs/quickstart.py",
        "--run-dir",
        tmp_path / "run",
        cwd=ROOT,
    )
    (said,) = re.findall(r"held-out accuracy ([0-9.]+)% -> ([0-9.]+)% ", shown)
    before, after = map(float, said)
    assert 40 < before < 55 and after > 75


def test_the_value_study_finds_its_order_on_the_papers_problems(tmp_path):
    """200 batches of 64: below the batch mean, near fresh groups of 8, as in the paper's figure."""
    small = "--batches 200 --runs 1 --long-problems 512 --long-batch 128 --long-epochs 2"
    small += " --trials 64 --groups 1 8"
    out = ["--out", tmp_path / "study"]
    python("-m", "studies.value_study", "simulate", *small.split(), *out, cwd=ROOT)
    rows = json.loads((tmp_path / "study.json").read_text())["parts"][0]["rows"]
    error = {(row["estimator"], row["G"]): row["slices"]["all"]["mse"] for row in rows}
    basis, batch_mean = error["basis robust", 1], error["reinforce_pp", 1]
    assert basis < 0.5 * batch_mean and basis < 1.5 * error["grpo group mean", 8]
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_whatever_breaks_a_run_it_ends_as_the_unbroken_one(tmp_path):
    """The whole fault drill, with 100 random kills."""
    shown = python("-m", "studies.fault_drill", "--work", tmp_path, cwd=ROOT, PYTHONPATH=str(ROOT))
    assert "kills: 100 cases, 100 same" in shown
