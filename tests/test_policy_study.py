"""studies/policy_study.py: areas, cuts, intervals by hand; what is trained is not trained again."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from basis_jax.config import Config
from studies import policy_study
from studies.policy_plan import Run

ROOT = Path(__file__).parent.parent


def planned(out, *arguments):
    config = str(ROOT / "configs" / "quickstart.py")
    options, overrides = policy_study.parse(["--config", config, "--out", str(out), *arguments])
    return policy_study.plan(options, overrides)


def write_run(run, lengths, accuracy, *, trials=None):
    """A run folder as scripts/train.py leaves it, evaluated every ``eval.every`` steps."""
    run.folder.mkdir(parents=True)
    every = run.config.eval.every
    rows = [{"step": 0, "eval/accuracy": accuracy[0]}]
    for step, length in enumerate(lengths, 1):
        row = {"step": step, "completion/length_mean": length}
        row |= {"time/sample_s": 1.0, "time/verify_s": 0.5, "time/update_s": 2.5}
        rows.append(row | ({"eval/accuracy": accuracy[step // every]} if step % every == 0 else {}))
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {"config": dataclasses.asdict(run.config), "starts": []}
    (run.folder / "config.json").write_text(json.dumps(record))
    if trials is not None:
        np.savez(run.folder / "reference.npz", trials=np.array(trials))


@pytest.fixture
def trained(monkeypatch):
    """Folders of the runs that the study starts; none is."""
    started = []
    monkeypatch.setattr(policy_study, "train", lambda run, out: started.append(run.folder))
    return started


# ------------------------------------------------------------------------------------------ plan
def test_runs_without_a_table_take_the_steps_that_the_largest_table_costs(tmp_path):
    """16 or 8 rollouts of 256 problems are 32 or 16 steps of 128 rollouts."""
    steps = {r.method: r.config.train.steps for r in planned(tmp_path, "--seeds", "1")}
    tables = {"basis_published": 48, "basis_robust": 48, "value_filter_n8": 64}
    assert steps == {name: tables.get(name, 80) for name in policy_study.METHODS}


def test_every_method_has_the_same_rollouts_in_one_update_a_step(tmp_path):
    for run in planned(tmp_path, "--seeds", "1"):
        train = run.config.train
        assert run.rollouts_per_step == train.minibatch_rollouts == 128
        assert train.prompts_per_step == (16 if run.method in ("grpo", "rloo") else 128)


def test_an_override_reaches_every_run(tmp_path):
    runs = planned(tmp_path, "--seeds", "1", "--optim.lr", "0.25")
    assert {run.config.optim.lr for run in runs} == {0.25}


# ------------------------------------------------------------------------------------------ runs
def test_a_finished_run_is_not_run_again_and_one_short_of_steps_is(tmp_path, trained):
    arguments = ("--seeds", "2", "--methods", "spo", "--steps", "8", "--table-samples", "0")
    whole, short = planned(tmp_path, *arguments)
    write_run(whole, [2.0] * 8, [0.5, 0.6])
    write_run(short, [2.0] * 7, [0.5])
    policy_study.run_all([whole, short], str(tmp_path))
    assert trained == [short.folder]


def test_a_longer_study_runs_on_and_other_settings_are_refused(tmp_path, trained):
    arguments = ("--seeds", "1", "--methods", "spo", "--table-samples", "0", "--steps")
    (run,) = planned(tmp_path, *arguments, "8")
    write_run(run, [2.0] * 8, [0.5, 0.6])
    policy_study.run_all(planned(tmp_path, *arguments, "16"), str(tmp_path))
    assert trained == [run.folder]
    with pytest.raises(SystemExit, match="other settings"):
        policy_study.run_all(planned(tmp_path, *arguments, "8", "--optim.lr", "1"), str(tmp_path))


# ------------------------------------------------------------------------------------ statistics
def test_area_is_the_mean_height_flat_before_the_first_point_and_cut_inside_a_piece():
    """0.4 on [0, 10], then up to 0.8 at 30; cut at 20, where it is 0.6: (4 + 5) / 20."""
    x, y = np.array([10.0, 30.0]), np.array([0.4, 0.8])
    assert policy_study.area(x, y, 20) == pytest.approx(0.45)
    assert policy_study.area(x, y, 30) == pytest.approx((4 + 12) / 30)
    assert policy_study.area(np.array([0.0, 2, 4]), np.array([0, 1, 0.5]), 4) == pytest.approx(
        (1 + 1.5) / 4
    )


def test_tokens_count_the_table_at_the_first_steps_length_and_seconds_leave_out_a_slow_step(
    tmp_path,
):
    (run,) = planned(
        tmp_path,
        *("--seeds", "1", "--methods", "basis_robust", "--steps", "4", "--eval.every", "2"),
    )
    write_run(run, [2.0, 3.0, 3.0, 4.0], [0.4, 0.5, 0.7], trials=[16, 15])
    text = (run.folder / "metrics.jsonl").read_text()
    (run.folder / "metrics.jsonl").write_text(text.replace("2.5", "99", 1))  # compiles
    curve = policy_study.read_curve(run)
    assert curve.table_tokens == 31 * 2
    assert curve.tokens.tolist() == [62, 62 + 128 * 5, 62 + 128 * 12]
    assert curve.steps.tolist() == [0, 2, 4] and curve.accuracy.tolist() == [0.4, 0.5, 0.7]
    assert curve.seconds == pytest.approx(4 * 4.0 + 31 / 128)


def test_equal_tokens_are_the_most_that_all_runs_reach_and_both_are_read_there(tmp_path):
    arguments = ("--seeds", "1", "--eval.every", "4", "--steps", "4", "--problems", "128")
    methods = ("--methods", "spo", "basis_robust", "--table-samples", "4")
    late, early = planned(tmp_path, *arguments, *methods)[::-1]
    assert (late.config.train.steps, early.config.train.steps) == (4, 8)
    write_run(late, [2.0] * 4, [0.4, 0.8], trials=[4] * 128)
    write_run(early, [3.0] * 8, [0.4, 0.6, 0.9])
    curves = {run.method: [policy_study.read_curve(run)] for run in (late, early)}
    cut = policy_study.equal_tokens(curves)
    assert cut == 128 * 4 * (2 + 2)  # the early run reaches 128 * 8 * 3
    found = policy_study.compare(curves, "tokens", cut)["methods"]
    assert found["basis_robust"]["accuracy"]["mean"] == pytest.approx(0.8)
    assert found["spo"]["accuracy"]["mean"] == pytest.approx(0.6 + 0.3 / 3)  # a third of a piece
    assert found["basis_robust"]["area"]["mean"] == pytest.approx((0.4 + 0.6) / 2)


def test_intervals_are_students_t():
    """Mean 3, sd sqrt(2.5) of 5 values: t = 2.776445 (4 degrees); of 2 values t = tan(.475 pi)."""
    found = policy_study.summary([1, 2, 3, 4, 5])
    half = 2.7764451 * np.sqrt(2.5 / 5)
    np.testing.assert_allclose(list(found.values()), [3, 3 - half, 3 + half], rtol=1e-6)
    found = policy_study.summary([0, 2])
    half = np.tan(0.475 * np.pi)
    np.testing.assert_allclose(list(found.values()), [1, 1 - half, 1 + half], rtol=1e-6)
    assert policy_study.summary([0.5]) == {"mean": 0.5, "low": None, "high": None}


def test_differences_to_the_reference_are_paired_by_seed():
    """Seeds differ by far more than methods: unpaired, the interval would not leave out 0."""
    steps = np.array([0, 8])

    def curves(*ends):
        run = Run("any", 0, Config(run_dir=""), ())
        values = dict(run=run, steps=steps, tokens=steps, table_tokens=0.0, seconds=1.0)
        return [policy_study.Curve(**values, accuracy=np.array([0.2, end])) for end in ends]

    both = {"spo": curves(0.51, 0.72, 0.93), "basis_robust": curves(0.5, 0.7, 0.9)}
    found = policy_study.compare(both, "steps", 8)["methods"]
    difference = found["spo"]["accuracy minus basis_robust"]
    half = 4.3026527 * 0.01 / np.sqrt(3)  # t of 2 degrees, sd of .01, .02, .03
    np.testing.assert_allclose(list(difference.values()), [0.02, 0.02 - half, 0.02 + half])
    assert found["spo"]["area minus basis_robust"]["mean"] == pytest.approx(0.01)
    assert "accuracy minus basis_robust" not in found["basis_robust"]
