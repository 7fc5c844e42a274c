"""The offline table: exact counts, nothing counted twice, refused where it does not fit."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from basis_jax.config import DataSection, EstimatorSection, SamplingSection
from basis_jax.data.encoding import EncodedProblems
from basis_jax.data.problem import Problem
from basis_jax.model.sharding import make_mesh
from basis_jax.opening import rollout_plan
from basis_jax.sampling.rollouts import RolloutSetup, completion_texts, roll_out
from basis_jax.training import reference_table, session
from basis_jax.training.session import make_estimator
from basis_jax.training.update import make_estimate, reward_metrics
from basis_jax.types import Estimate
from basis_jax.verify.verdicts import Verdict, Verifier
from configs import quickstart

SAMPLING = SamplingSection(max_new_tokens=3)
SIZE = 5
CONFIG = quickstart.config()


class Numbers:
    """A tokenizer whose text is the token numbers."""

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


class EvenLength(Verifier):
    """Right when the completion has an even number of tokens; it fails on the last problem."""

    def grade(self, completions, answers):
        verdicts = []
        for completion, answer in zip(completions, answers, strict=True):
            right, failed = len(completion.split()) % 2 == 0, answer == str(SIZE - 1)
            kind = "failure" if failed else "right" if right else "wrong"
            verdicts.append(Verdict(float(right), not failed, "", kind))
        return verdicts


@pytest.fixture(scope="module")
def problems():
    prompts = tiny.prompts(rows=SIZE)
    return EncodedProblems(
        problems=tuple(Problem(prompt=f"p{i}", answer=str(i)) for i in range(SIZE)),
        tokens=np.asarray(prompts.tokens),
        lengths=np.asarray(prompts.lengths),
        counts={},
    )


@pytest.fixture(scope="module")
def setup():
    return RolloutSetup(
        model_config=tiny.TINY,
        mesh=make_mesh(devices=jax.devices()[:1]),
        tokenizer=Numbers(),
        eos_ids=tuple(range(3, 12)),
        verifier=EvenLength(),
        seed=0,
        rows_at_once=4,
    )


@pytest.fixture(scope="module")
def origin(setup):
    return reference_table.table_origin(
        setup, model_fingerprint="abc", sampling=SAMPLING, data=DataSection(verifier="even")
    )


def build(path, setup, problems, origin, **changes):
    options = {"samples": 6, "sampling": SAMPLING, "origin": origin, "path": path} | changes
    return reference_table.build(tiny.params(), setup, problems, **options)


def rolled_out(setup, problems, ids, samples, sampling=SAMPLING):
    return roll_out(
        tiny.params(),
        setup,
        problems,
        ids=ids,
        samples=samples.astype(np.int32),
        sampling=sampling,
        stream="reference",
        step=0,
    )


def test_counts_are_those_of_the_rollouts_and_failures_are_no_trials(
    setup, problems, origin, tmp_path
):
    table = build(tmp_path / "t.npz", setup, problems, origin)
    ids = np.repeat(np.arange(SIZE, dtype=np.int32), 6)
    graded = rolled_out(setup, problems, ids, np.tile(np.arange(6), SIZE))
    successes = [int(graded.rewards[ids == i].sum()) for i in range(SIZE)]
    assert table.successes.tolist() == successes and sum(successes) > 0
    assert table.trials.tolist() == [6, 6, 6, 6, 0]


class Fractional(EvenLength):
    """A quarter of the completion's number of tokens, at most 1; it fails on the last problem."""

    def grade(self, completions, answers):
        return [
            Verdict(min(len(c.split()) / 4, 1.0), a != str(SIZE - 1), "")
            for c, a in zip(completions, answers, strict=True)
        ]


def test_the_table_keeps_every_reward(setup, problems, origin, tmp_path):
    """0/1 rewards: the counts are whole and say all. Fractional ones: the counts are their sums."""
    binary = build(tmp_path / "b.npz", setup, problems, origin)
    assert not binary.fractional and binary.successes.dtype == np.int32
    assert np.nansum(binary.rewards, 1).tolist() == binary.successes.tolist()
    path = tmp_path / "t.npz"
    table = build(path, dataclasses.replace(setup, verifier=Fractional()), problems, origin)
    assert table.fractional and table.rewards.shape == (SIZE, 6)
    np.testing.assert_allclose(table.successes, np.nansum(table.rewards, 1))
    assert table.trials.tolist() == [6, 6, 6, 6, 0] and np.isnan(table.rewards[4]).all()
    read = reference_table.load(path)
    np.testing.assert_array_equal(read.rewards, table.rewards)
    part = reference_table.rows_for(read, problems, origin, path)
    np.testing.assert_array_equal(part.rewards, table.rewards)
    ids = np.repeat(np.arange(SIZE, dtype=np.int32), 6)
    graded = roll_out(
        tiny.params(),
        dataclasses.replace(setup, verifier=Fractional()),
        problems,
        ids=ids,
        samples=np.tile(np.arange(6), SIZE).astype(np.int32),
        sampling=SAMPLING,
        stream="reference",
        step=0,
    )
    assert table.rewards[:4].ravel().tolist() == graded.rewards[:24].tolist()
    assert 0 < np.mean(table.rewards[:4] % 1 > 0)


@pytest.mark.parametrize("reward", [np.nan, np.inf, -np.inf, 1e300])
def test_a_reward_that_is_not_finite_is_no_trial_and_no_reward(
    setup, problems, origin, tmp_path, reward
):
    """Row 1 of every rollout: the rows beside it are as they were."""

    class Odd(EvenLength):
        def grade(self, completions, answers):
            verdicts = super().grade(completions, answers)
            odd = Verdict(reward, True, "", "right")
            return [odd if a == "1" else v for v, a in zip(verdicts, answers, strict=True)]

    odd = dataclasses.replace(setup, verifier=Odd())
    ids = np.arange(SIZE, dtype=np.int32)
    graded, before = (rolled_out(s, problems, ids, 0 * ids) for s in (odd, setup))
    assert graded.valid.tolist() == [True, False, True, True, False]
    assert (graded.rewards[1], graded.kinds[1]) == (0, "failure")
    assert graded.reasons[1].startswith("the verifier's reward is ")
    others = [0, 2, 3, 4]
    assert graded.rewards[others].tolist() == before.rewards[others].tolist()
    zeros = jax.numpy.zeros(SIZE)
    estimate = Estimate(advantages=zeros, values=zeros, baselines=zeros, info={})
    metrics = reward_metrics(graded, estimate)
    assert metrics["reward/invalid"] == pytest.approx(0.4) == metrics["verify/failure"]
    assert metrics["reward/mean"] == before.rewards[[0, 2, 3]].mean()
    table = build(tmp_path / "t.npz", odd, problems, origin)
    assert table.trials.tolist() == [6, 0, 6, 6, 0] and table.successes[1] == 0


def test_reference_rollouts_without_a_verdict_are_reported(setup, problems, origin, tmp_path):
    """They are no trials: they would make a problem look hard that nothing is known of."""
    path, said = tmp_path / "t.npz", []
    run = session_with(setup, problems, path, "basis")
    fits = {"model_fingerprint": "abc", "sampling": CONFIG.sampling, "data": CONFIG.data}
    build(path, setup, problems, reference_table.table_origin(setup, **fits))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.huggingface, "fingerprint", lambda folder: "abc")
        session.reference_table(run, None, path, said.append)
    assert said == [
        "warning: 6 of 30 reference rollouts could not be graded and are left out of the pass "
        "rates, so that 1 of 5 problems have none; look at the right answers and at data.verifier"
    ]
    whole = dataclasses.replace(reference_table.load(path), trials=np.full(SIZE, 6))
    assert reference_table.ungraded_warning(whole) == ""


def without_rewards(path):
    """The file as an older version wrote it."""
    with np.load(path) as file:
        fields = {name: file[name] for name in file.files if name != "rewards"}
    np.savez(path, **fields)


def test_a_table_of_an_older_version_is_read_and_finished(setup, problems, origin, tmp_path):
    path = tmp_path / "t.npz"
    whole = build(path, setup, problems, origin)
    without_rewards(path)
    old = reference_table.load(path)
    assert old.rewards is None and not old.fractional
    assert old.successes.tolist() == whole.successes.tolist()
    empty = dataclasses.replace(
        old, successes=0 * old.successes, trials=0 * old.trials, position=0, rewards=None
    )
    reference_table.save(empty, path)
    assert build(path, setup, problems, origin).successes.tolist() == whole.successes.tolist()
    reference_table.save(empty, path)
    with pytest.raises(ValueError, match="begun by an older version cannot keep"):
        build(path, dataclasses.replace(setup, verifier=Fractional()), problems, origin)


def session_with(setup, problems, path, name):
    section = EstimatorSection(name=name, table=str(path))
    config = dataclasses.replace(CONFIG, estimator=section)
    estimator = make_estimator(section, group_size=1)
    plan = rollout_plan.open_plan(config, problems.sizes, estimator)
    return session.Session(config, path.parent, setup, estimator, problems, {}, plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["basis", "spo", "dbb", "value_filter"])
@pytest.mark.parametrize("verifier", [EvenLength(), Fractional()], ids=["binary", "fractional"])
def test_a_run_starts_from_the_rewards_where_the_counts_do_not_say_all(
    setup, problems, origin, tmp_path, monkeypatch, name, verifier
):
    """A checkpoint is restored into the shapes of that state; its arrays may be donated."""
    path = tmp_path / "t.npz"
    setup = dataclasses.replace(setup, verifier=verifier)
    table = build(path, setup, problems, origin)
    run = session_with(setup, problems, path, name)
    monkeypatch.setattr(session, "reference_table", lambda *args: table)
    state = session.first_estimator_state(run, None, path)

    def kinds(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert kinds(session.estimator_state_shapes(run)) == kinds(state)
    if name == "basis" and table.fractional:
        np.testing.assert_array_equal(state.rewards, table.rewards)
    elif name == "basis":
        assert state.rewards is None and isinstance(verifier, EvenLength)
    graded = rolled_out(setup, problems, np.int32([1, 2]), np.int32([0, 0]))
    step = make_estimate(run.estimator)
    after, _ = step(state, graded)
    after, e = step(after, graded)
    assert np.isfinite(e.values).all()
    assert all(x.is_deleted() for x in jax.tree.leaves(state))


@pytest.mark.slow
def test_verdicts_belong_to_their_rows_whatever_order_they_end_in(setup, problems):
    """Graded part by part beside the sampler: as if all were graded in order afterwards."""
    ids = np.tile(np.arange(SIZE, dtype=np.int32), 8)
    limit = SamplingSection(max_new_tokens=40)
    graded = rolled_out(setup, problems, ids, np.repeat(np.arange(8), SIZE), limit)
    texts = completion_texts(graded.rollouts, Numbers())
    verdicts = EvenLength().grade(texts, [str(i) for i in ids])
    assert graded.completions == texts and len(set(texts)) > 20
    assert graded.valid.tolist() == [v.valid for v in verdicts]
    assert graded.rewards[graded.valid].tolist() == [v.reward for v in verdicts if v.valid]
    assert 5 < graded.rewards.sum() < 30


def test_a_verifier_that_breaks_stops_the_run(setup, problems):
    class Broken(Verifier):
        def grade(self, completions, answers):
            raise OSError("the verifier is gone")

    broken = dataclasses.replace(setup, verifier=Broken())
    ids = np.arange(SIZE, dtype=np.int32)
    with pytest.raises(OSError, match="is gone"):
        rolled_out(broken, problems, ids, ids)


def test_an_interrupted_table_is_finished_with_the_same_counts(
    setup, problems, origin, tmp_path, monkeypatch
):
    whole = build(tmp_path / "whole.npz", setup, problems, origin)
    monkeypatch.setattr(reference_table, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(reference_table, "ROWS_PER_SLOT", 1)
    done = []

    def stop(text):
        done.append(text)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "part.npz", setup, problems, origin, report=stop)
    assert reference_table.load(tmp_path / "part.npz").position == 12
    resumed = build(tmp_path / "part.npz", setup, problems, origin, report=done.append)
    assert len(done) == 3 + 5  # the remaining 18 rollouts, 4 at a time
    np.testing.assert_array_equal(resumed.successes, whole.successes)
    np.testing.assert_array_equal(resumed.trials, whole.trials)


def test_counts_follow_the_problems_and_not_their_rows(setup, problems, origin, tmp_path):
    path = tmp_path / "t.npz"
    table = build(path, setup, problems, origin, features=2)
    rows = np.array([3, 0, 2])
    part = EncodedProblems(
        problems=tuple(problems.problems[i] for i in rows),
        tokens=problems.tokens[rows],
        lengths=problems.lengths[rows],
        counts={},
    )
    read = reference_table.rows_for(reference_table.load(path), part, origin, path)
    assert read.successes.tolist() == table.successes[rows].tolist()
    assert read.trials.tolist() == table.trials[rows].tolist()
    np.testing.assert_array_equal(read.rewards, table.rewards[rows])
    assert read.features.tolist() == table.features[rows].tolist() and read.features.any()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "other"}, "does not fit this run \\(model 'abc', run 'other'"),
        ({"temperature": 0.5}, "temperature 1.0, run 0.5"),
        ({"verifier": "math"}, "verifier 'even', run 'math'"),
        ({"max_new_tokens": 4}, "max_new_tokens 3, run 4"),
    ],
)
def test_a_table_made_otherwise_is_refused(setup, problems, origin, tmp_path, change, sentence):
    path = tmp_path / "t.npz"
    table = build(path, setup, problems, origin, samples=1)
    with pytest.raises(ValueError, match=sentence):
        reference_table.rows_for(table, problems, origin | change, path)


def test_other_prompts_or_problems_and_unfinished_tables_are_refused(
    setup, problems, origin, tmp_path
):
    path = tmp_path / "t.npz"
    table = build(path, setup, problems, origin, samples=1)
    tokens = problems.tokens.copy()
    tokens[1, 0] += 1
    with pytest.raises(ValueError, match="lacks 1 of the run's 5 problems"):
        reference_table.rows_for(table, dataclasses.replace(problems, tokens=tokens), origin, path)
    others = dataclasses.replace(
        problems, problems=tuple(Problem(prompt=f"q{i}", answer="") for i in range(SIZE))
    )
    with pytest.raises(ValueError, match="lacks 5 of the run's 5 problems"):
        reference_table.rows_for(table, others, origin, path)
    unfinished = dataclasses.replace(table, position=3)
    with pytest.raises(ValueError, match="unfinished \\(3 of 5 rollouts\\)"):
        reference_table.rows_for(unfinished, problems, origin, path)
    with pytest.raises(ValueError, match="another model, sampling setting or problem set"):
        build(path, setup, others, origin, samples=1)


def test_a_table_of_another_place_of_the_answer_is_refused(setup, problems, tmp_path):
    """Both ways: made with the place and used without it, and the other way round."""
    path = tmp_path / "t.npz"
    origins = [
        reference_table.table_origin(
            setup,
            model_fingerprint="abc",
            sampling=SAMPLING,
            data=DataSection(verifier="math", answer_mode=mode),
        )
        for mode in ("", "boxed")
    ]
    for ours, other in (origins, origins[::-1]):
        table = build(tmp_path / ours["verifier"], setup, problems, ours, samples=1)
        reference_table.rows_for(table, problems, ours, path)
        with pytest.raises(ValueError, match="verifier 'math.*, run 'math"):
            reference_table.rows_for(table, problems, other, path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no reference table at .*none.npz"):
        reference_table.load(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not a table")
    with pytest.raises(ValueError, match="bad.npz is not a reference table"):
        reference_table.load(tmp_path / "bad.npz")


def test_features_alone_need_no_rollouts_and_are_made_once(
    setup, problems, origin, tmp_path, monkeypatch
):
    path = tmp_path / "t.npz"
    monkeypatch.setattr(reference_table, "roll_out", None)
    table = build(path, setup, problems, origin, samples=0, features=3)
    assert table.features.shape == (SIZE, 3) and not table.trials.any()
    monkeypatch.setattr(reference_table, "prompt_features", None)
    again = build(path, setup, problems, origin, samples=0, features=3)
    assert np.array_equal(again.features, table.features)
