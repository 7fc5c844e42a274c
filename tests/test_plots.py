"""The curves picture shows the numbers of metrics.jsonl, for what the runs have."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

from basis_jax.runs import plots

ROOT = Path(__file__).parent.parent


def write_run(folder, rows):
    folder.mkdir(parents=True)
    lines = (json.dumps({"step": step, **row}) + "\n" for step, row in rows)
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, for a look at what it shows."""
    saved = []
    monkeypatch.setattr(plots, "_save", lambda figure, out: saved.append(figure) or out)
    return saved


def test_panels_are_those_that_any_run_has_and_lines_are_the_metrics(tmp_path, figures):
    rewards = [0.1, 0.4, None, 0.3]  # null: it was not finite
    one = write_run(tmp_path / "one", [(s, {"reward/mean": r}) for s, r in enumerate(rewards)])
    two = write_run(tmp_path / "two", [(5, {"reward/mean": 0.5, "policy/entropy": 2.0})])
    plots.draw([one, two], tmp_path / "curves.png")
    reward, entropy = figures[0].axes
    assert [axes.get_title("left") for axes in (reward, entropy)] == [
        "Reward of the rollouts",
        "Policy entropy",
    ]
    assert entropy.get_xlabel() == "step" and entropy.get_ylabel() == "nats per token"
    raw = reward.lines[0].get_xydata()
    np.testing.assert_array_equal(raw, [[0, 0.1], [1, 0.4], [3, 0.3]])
    legend = figures[0].legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]
    shown = [line.get_color() for line in reward.lines[1::2]]  # the smoothed ones
    assert shown == [line.get_color() for line in legend.get_lines()] == list(plots.COLORS[:2])


def test_held_out_accuracy_has_its_interval(tmp_path, figures):
    accuracy = {"eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.7}
    rows = [(0, accuracy), (1, {"reward/mean": 1.0}), (2, accuracy)]
    plots.draw([write_run(tmp_path / "run", rows)], tmp_path / "curves.png")
    (band,) = figures[0].axes[1].collections
    box = band.get_datalim(figures[0].axes[1].transData)
    np.testing.assert_allclose(box.extents, [0, 0.4, 2, 0.7])
    reward, held_out = figures[0].axes
    assert reward.get_xlim() == held_out.get_xlim()  # steps stand below one another
    assert [held_out.yaxis.get_major_formatter()(x, 0) for x in (0.54, 0.545)] == ["54%", "54.5%"]


def test_the_moving_average_keeps_a_line_and_halves_noise():
    """An odd window, centred and shortened at the ends: a constant stays itself up to the ends."""
    np.testing.assert_allclose(plots._smooth(np.full(200, 3.0)), 3.0)
    middle = slice(10, -10)
    line = np.arange(200.0)
    np.testing.assert_allclose(plots._smooth(line)[middle], line[middle])
    noise = np.random.default_rng(0).normal(size=200)
    assert plots._smooth(noise).std() < noise.std() / 2
    np.testing.assert_array_equal(plots._smooth(line[:10]), line[:10])  # too few to smooth


def test_more_runs_than_colours_have_lines_of_their_own(tmp_path, figures):
    rows = [(1, {"reward/mean": 1.0}), (2, {"reward/mean": 0.5})]
    runs = [write_run(tmp_path / str(number), rows) for number in range(10)]
    plots.draw(runs, tmp_path / "curves.png")
    lines = figures[0].axes[0].lines[1::2]  # the smoothed ones
    styles = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert len(set(styles)) == 10
    named = [(line.get_color(), line.get_linestyle()) for line in figures[0].legends[0].get_lines()]
    assert named == styles


def test_runs_of_the_same_name_are_told_apart(tmp_path, figures):
    runs = [write_run(tmp_path / part / "run", [(1, {"reward/mean": 1.0})]) for part in "ab"]
    plots.draw(runs, tmp_path / "curves.png")
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == [str(run) for run in runs]


def test_the_script_writes_a_picture_with_every_run_in_it(tmp_path):
    """`scripts/plot.py RUN RUN --out FILE` from another folder."""
    runs = [
        write_run(tmp_path / name, [(s, {"reward/mean": s * slope}) for s in range(9)])
        for name, slope in (("up", 0.1), ("down", -0.1))
    ]
    out = tmp_path / "new" / "both.png"
    command = [sys.executable, ROOT / "scripts" / "plot.py", *runs, "--out", out]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True, check=True)  # fmt: skip
    assert done.stdout == f"{out}\n"
    pixels = matplotlib.image.imread(out)[..., :3].reshape(-1, 3)
    for color in plots.COLORS[:2]:
        near = np.abs(pixels - matplotlib.colors.to_rgb(color)).max(axis=1) < 0.01
        assert near.sum() > 100


def test_errors_are_sentences(tmp_path):
    with pytest.raises(ValueError, match="no metrics.jsonl in .*missing; give the folder"):
        plots.draw([tmp_path / "missing"], tmp_path / "a.png")
    empty = write_run(tmp_path / "empty", [])
    with pytest.raises(ValueError, match="has no step yet; wait for the first one"):
        plots.draw([empty], tmp_path / "a.png")
    other = write_run(tmp_path / "other", [(1, {"time/sample_s": 1.0})])
    with pytest.raises(ValueError, match="none of the runs has a metric that is drawn"):
        plots.draw([other], tmp_path / "a.png")
    run = write_run(tmp_path / "run", [(1, {"reward/mean": 1.0})])
    with pytest.raises(ValueError, match=r"a.mp3 is of no known kind; end its name in .*png"):
        plots.draw([run], tmp_path / "a.mp3")
