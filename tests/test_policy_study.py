"""studies/policy_study.py: what is run next, intervals by hand, what is done is not done again."""

import json
from pathlib import Path

import numpy as np
import pytest

from studies import noise_and_accuracy, policy_plan, policy_report, policy_runs, policy_study
from studies.policy_plan import (
    EMBEDDED,
    METHODS,
    POWERS,
    REFERENCE,
    REGIMES,
    ROLLOUTS,
    SEEDS,
    TUNING_SEEDS,
    Job,
    config_of,
    jobs_of,
    powers_of,
    tuning,
)
from studies.policy_statistics import area, half_width, summary

FIRST, SECOND = TUNING_SEEDS
ROOT = Path(__file__).parent.parent
KINDS = ("gradient", "policy")


def tuned(best, powers=POWERS):
    """Accuracies of both tuning seeds at all powers, the best one where it is wanted."""
    return {(p, s): 0.5 - 0.01 * abs(p - best) for p in powers for s in TUNING_SEEDS}


# ------------------------------------------------------------------------------------------ plan
def test_every_method_has_the_same_rollouts_the_tables_counted(tmp_path):
    """Steps times rollouts a step, and the offline rollouts of all training problems."""
    totals = set()
    for method in METHODS:
        config = config_of(Job("free", method, -8, 0), str(tmp_path))
        rows = config.train.prompts_per_step * config.sampling.group_size
        assert rows == config.train.minibatch_rollouts == ROLLOUTS
        table = config.estimator.table_samples * config.data.size
        totals.add(config.train.steps * rows + table)
    assert len(totals) == 1


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_run_in_its_regimes(method, tmp_path):
    for regime in METHODS[method].regimes:
        config = config_of(Job(regime, method, -8, 0), str(tmp_path))
        task = f"task:steps/{regime}" if regime in EMBEDDED else "task:arithmetic"
        assert config.data.path == task == config.eval.sets[0]
        assert config.estimator.name == METHODS[method].estimator


def test_three_methods_train_smollm2_with_equal_rollouts(tmp_path):
    """Its rates are smaller than those of the embedded models, and found again in the folder."""
    methods = [name for name, method in METHODS.items() if "smollm2" in method.regimes]
    assert methods == ["none", "value_filter", "measured_mean"]
    jobs = jobs_of("smollm2", {name: {} for name in METHODS})
    assert {job.method for job in jobs} == set(methods)
    assert {job.power for job in jobs} == set(powers_of("smollm2"))
    configs = [config_of(job, str(tmp_path)) for job in jobs]
    assert {config.model.path for config in configs} == {"models/smollm2"}
    assert len({c.train.steps * c.train.minibatch_rollouts for c in configs}) == 1
    lowest = Job("smollm2", "none", min(powers_of("smollm2")) - policy_plan.WIDER, FIRST)
    folder = tmp_path / lowest.name
    folder.mkdir(parents=True)
    (folder / "final.json").write_text('{"accuracy": 0.25}')
    found = policy_runs.found_in(str(tmp_path), "smollm2")
    assert found["none"] == {(lowest.power, FIRST): 0.25}


def test_no_two_jobs_share_a_folder():
    jobs = [Job(r, m, p, s) for r in REGIMES for m in METHODS for p in (-9, -8) for s in (0, FIRST)]
    assert len({job.name for job in jobs}) == len(jobs)


# ---------------------------------------------------------------------------------------- tuning
def test_the_second_tuning_seed_is_run_at_the_better_half_of_the_rates():
    found = {(p, FIRST): 0.1 * k for k, p in enumerate(POWERS)}
    assert tuning({}) == (None, [(p, FIRST) for p in POWERS])
    assert tuning(found) == (None, [(p, SECOND) for p in POWERS[:1:-1]])


def test_a_grid_of_three_rates_is_tuned_in_the_same_way():
    few = powers_of("hard")
    found = {(p, FIRST): 0.1 * k for k, p in enumerate(few)}
    assert tuning({}, few) == (None, [(p, FIRST) for p in few])
    assert tuning(found, few) == (None, [(p, SECOND) for p in few[:0:-1]])
    assert tuning(tuned(few[-1], few), few) == (None, [(few[-1] + 1, FIRST)])


def test_the_best_rate_is_that_of_both_seeds_together():
    found = tuned(POWERS[2])
    found[POWERS[1], FIRST] += 0.05  # lucky in one seed
    found[POWERS[1], SECOND] -= 0.05
    assert tuning(found) == (POWERS[2], [])


@pytest.mark.parametrize("end", [0, -1])
def test_a_best_rate_at_an_end_of_the_grid_widens_it_until_it_is_inside(end):
    beyond = POWERS[end] + (1 if end else -1)
    found = tuned(POWERS[end])
    assert tuning(found) == (None, [(beyond, FIRST)])
    found[beyond, FIRST] = 0.49
    assert tuning(found) == (None, [(beyond, SECOND)])
    found[beyond, SECOND] = 0.49
    assert tuning(found) == (POWERS[end], [])


def test_the_grid_is_not_widened_forever():
    powers = range(POWERS[0] - policy_plan.WIDER, POWERS[-1] + 1)
    assert tuning(tuned(-99, powers)) == (powers[0], [])


# --------------------------------------------------------------------------------------- testing
def all_found(tests, powers=None):
    found = {}
    for name in METHODS:
        found[name] = dict(tuned(-8))
        found[name] |= {(-8, seed): a for seed, a in enumerate(tests.get(name, [0.5] * SEEDS))}
    return found


def test_a_method_is_tested_as_soon_as_its_own_rate_is_known():
    found = {name: {} for name in METHODS} | {"none": tuned(-8)}
    tests = [job for job in jobs_of("hard", found) if not job.tuning]
    assert tests == [Job("hard", "none", -8, seed) for seed in range(SEEDS)]


def test_seeds_are_added_where_the_interval_is_wide_and_to_the_reference_too():
    """Equal differences need no more; differences that vary by 10 points do."""
    assert jobs_of("free", all_found({})) == []
    noisy = {"none": [0.4, 0.6, 0.4, 0.6, 0.5]}
    assert jobs_of("free", all_found(noisy)) == [
        Job("free", "none", -8, SEEDS),
        Job("free", REFERENCE, -8, SEEDS),
    ]


def test_seeds_are_not_added_beyond_the_most():
    noisy = {name: [0.4, 0.6] * (policy_plan.MOST_SEEDS // 2) for name in METHODS}
    noisy[REFERENCE] = [0.5] * policy_plan.MOST_SEEDS
    assert jobs_of("free", all_found(noisy)) == []


# ------------------------------------------------------------------------------------------ runs
@pytest.fixture
def done(monkeypatch):
    """Jobs that are done, in order; each writes the file of a finished run."""
    jobs = []

    def do(job, out, overrides):
        jobs.append(job)
        folder = policy_runs.Path(out, job.name)
        folder.mkdir(parents=True)
        (folder / policy_runs.FINAL).write_text(json.dumps({"accuracy": 0.5 - abs(job.power + 7)}))

    monkeypatch.setattr(policy_runs, "do", do)
    return jobs


def test_all_runs_of_a_regime_are_done_once(tmp_path, done):
    out = str(tmp_path)
    policy_runs.work(out, ["hard"], (), lambda line: None, known={})
    methods = [m for m in METHODS if "hard" in METHODS[m].regimes]
    assert len(done) == len(set(done)) == len(methods) * (len(powers_of("hard")) + 2 + SEEDS)
    policy_runs.work(out, ["hard"], (), lambda line: None, known={})
    assert len(done) == len(set(done))
    assert policy_runs.found_in(out, "hard")["none"][-7, 0] == 0.5


def test_the_runs_of_an_earlier_report_are_neither_run_nor_lost(tmp_path, done, monkeypatch):
    """The report, its second tuning seeds and its test seeds stand for folders that are gone."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    policy_runs.work(first, ["hard"], (), lambda line: None, known={})
    keep = {"steps": [0, 48], "accuracy": [0.25, 0.5], "kl": [0.0, 1.0], "entropy": [2.0, 1.0]}
    curve = {**keep, "greedy": [0.5, 0.5], "seconds": 1.5, "tokens": 2.5}
    whole = {"accuracy": 0.5, "greedy": 0.625, "pass@8": 0.75, "cooler": {"0.5": 0.875}}
    for path in Path(first).glob("hard/*/*/seed_?/final.json"):
        path.write_text(json.dumps(whole | {"accuracy": 0.5 + int(path.parent.name[5:]) / 64}))
    Path(first, "hard", "start.json").write_text(json.dumps(whole))
    monkeypatch.setattr(policy_report, "curve", lambda folder: curve)
    policy_report.write(first, ["hard"], tmp_path / "one")
    one = json.loads((tmp_path / "one.json").read_text())

    known = one["regimes"]
    assert policy_runs.found_in(second, "hard", known["hard"]) == policy_runs.found_in(
        first, "hard"
    )
    del done[:]
    policy_runs.work(second, ["hard"], (), lambda line: None, known=known)
    assert done == []
    policy_report.write(second, ["hard"], tmp_path / "two", one)
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["regimes"] == known
    assert two["earlier"] == [{"command": one["command"], "commit": one["commit"]}]


def test_a_run_that_another_process_has_claimed_is_left_to_it(tmp_path, done, monkeypatch):
    taken = Job("hard", "none", powers_of("hard")[0], FIRST)

    def lock(file, what, option):
        if taken.name.replace("/", "+") in what:
            raise ValueError("another process is writing there")

    monkeypatch.setattr(policy_runs, "lock", lock)
    policy_runs.work(str(tmp_path), ["hard"], (), lambda line: None, known={})
    assert done and taken not in done
    assert not [job for job in done if job.method == "none" and not job.tuning]  # it has to wait


# ------------------------------------------------------------------------------------ statistics
def test_area_is_the_mean_height_flat_before_the_first_point_and_cut_inside_a_piece():
    """0.4 on [0, 10], then up to 0.8 at 30; cut at 20, where it is 0.6: (4 + 5) / 20."""
    x, y = np.array([10.0, 30.0]), np.array([0.4, 0.8])
    assert area(x, y, 20) == pytest.approx(0.45)
    assert area(x, y, 30) == pytest.approx((4 + 12) / 30)
    assert area(np.array([0.0, 2, 4]), np.array([0, 1, 0.5]), 4) == pytest.approx((1 + 1.5) / 4)


def test_intervals_are_students_t():
    """Mean 3, sd sqrt(2.5) of 5 values: t = 2.776445 (4 degrees); of 2 values t = tan(.475 pi)."""
    found = summary([1, 2, 3, 4, 5])
    half = 2.7764451 * np.sqrt(2.5 / 5)
    np.testing.assert_allclose(list(found.values()), [3, 3 - half, 3 + half], rtol=1e-6)
    assert half_width([1, 2, 3, 4, 5]) == pytest.approx(half)
    found = summary([0, 2])
    half = np.tan(0.475 * np.pi)
    np.testing.assert_allclose(list(found.values()), [1, 1 - half, 1 + half], rtol=1e-6)
    assert summary([0.5]) == {"mean": 0.5, "low": None, "high": None}


def test_differences_to_the_reference_are_paired_by_seed():
    """Seeds differ by far more than methods: unpaired, the interval would not leave out 0. A seed
    that only one of the two has counts for neither."""

    def method(seeds, accuracy):
        measures = dict.fromkeys(policy_report.COMPARED, accuracy)
        return {"seeds": seeds, "per seed": measures, "mean": {}}

    methods = {
        REFERENCE: method([0, 1, 2], [0.5, 0.7, 0.9]),
        "none": method([0, 1, 2, 3], [0.51, 0.72, 0.93, 0.1]),
    }
    policy_report.add_differences(methods)
    half = 4.3026527 * 0.01 / np.sqrt(3)  # t of 2 degrees, sd of .01, .02, .03
    found = methods["none"]["mean"][f"accuracy minus {REFERENCE}"]
    np.testing.assert_allclose(list(found.values()), [0.02, 0.02 - half, 0.02 + half])
    assert methods["none"]["mean"].keys() == {
        f"{kind} minus {REFERENCE}" for kind in policy_report.COMPARED
    }
    assert not methods[REFERENCE]["mean"]


def test_a_step_without_an_update_has_the_kl_of_the_step_before(tmp_path):
    rows = [
        {"step": step, "completion/length_mean": 5.0, "eval/accuracy": 0.5, **more}
        for step, more in enumerate([{}, {"policy/kl_ref": 0.25, "policy/entropy": 2.0}, {}])
    ]
    for row in rows:
        row |= {f"estimate/noise_{name}": 1.0 for name in ("none", "mean", "values", "baselines")}
        row |= {"eval/greedy_accuracy": 0.5}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = policy_report.curve(tmp_path)
    assert found["kl"] == [0.0, 0.25, 0.25] and found["entropy"] == [None, 2.0, 2.0]


def test_noise_and_accuracy_are_ranked_as_the_pages_say():
    reports = [json.loads((ROOT / "results" / f"{n}_study.json").read_text()) for n in KINDS]
    found = noise_and_accuracy.both(*reports)
    paths = {n: ROOT / "docs" / f"{n}.md" for n in ("results", "baselines")}
    pages = {n: " ".join(path.read_text().split()) for n, path in paths.items()}
    for regime, both in found.items():
        assert both.noise.keys() == both.accuracy.keys()
        assert both.noise["measured_mean"] <= (1.005 if regime == "smollm2" else 1)
        for name, page in pages.items():
            said = f"−{abs(both.correlation):.2f} in `{regime}`".replace("−0.", "−.")
            assert said in page, (name, said)


# ---------------------------------------------------------------------------------------- in small
@pytest.mark.nightly
def test_the_whole_study_in_small_runs_and_reports(tmp_path, monkeypatch, capsys):
    """Two methods, one regime, two rates, a few steps; then nothing is left to run."""
    monkeypatch.setattr(policy_plan, "POWERS", (-9, -8))
    monkeypatch.setattr(policy_plan, "WIDER", 0)
    monkeypatch.setattr(policy_plan, "SEEDS", 2)
    monkeypatch.setattr(policy_plan, "MOST_SEEDS", 2)
    for name in METHODS.keys() - {"weighted_mean", REFERENCE}:
        monkeypatch.setitem(METHODS, name, METHODS[name]._replace(regimes=()))
    arguments = ["--out", str(tmp_path / "runs"), "--report", str(tmp_path / "report")]
    small = ["--train.steps", "2", "--eval.every", "1", "--eval.size", "8", "--eval.samples", "1"]
    command = ["policy_study", *arguments, "--regimes", "free", *small]
    monkeypatch.setattr("sys.argv", command)
    policy_study.main()
    report = json.loads((tmp_path / "report.json").read_text())
    found = report["regimes"]["free"]["methods"]
    assert found.keys() == {"weighted_mean", REFERENCE}
    assert len(found["weighted_mean"]["per seed"]["accuracy"]) == 2
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert "weighted_mean" in capsys.readouterr().out
    monkeypatch.setattr("studies.policy_runs.do", None)  # nothing is left to do
    policy_study.main()
