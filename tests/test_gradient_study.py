"""The gradient study: sketches, moments of batches and their statistics, a tiny checkpoint."""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.flatten_util import ravel_pytree

from basis_jax import estimators
from studies import (
    gradient_files,
    gradient_pool,
    gradient_report,
    gradient_sketch,
    gradient_study,
)
from studies import gradient_measures as measures
from studies import gradient_methods as methods
from studies.gradient_methods import Method
from studies.gradient_pool import ESTIMATED, HELD_BACK, KEPT, SPARE, TABLE

RESULTS = Path(__file__).parent.parent / "results"


def make_pool(problems=6, width=9, seed=0, values=None):
    """A pool of random numbers; tokens and lengths are those of no model."""
    rng = np.random.default_rng(seed)
    size, others = (problems, KEPT), (problems, TABLE + SPARE)
    values = rng.random(problems) if values is None else values
    return gradient_pool.Pool(
        problems=np.arange(problems),
        tokens=rng.integers(3, tiny.TINY.vocab_size, (*size, width)).astype(np.int32),
        prompt_lengths=rng.integers(2, 4, problems).astype(np.int32),
        lengths=rng.integers(1, width - 3, size).astype(np.int32),
        rewards=(rng.random(size) < values[:, None]).astype(np.float32),
        score_norms=rng.random(size).astype(np.float32),
        surprises=rng.random(size).astype(np.float32),
        logprobs=-rng.random(size).astype(np.float32),
        other_rewards=(rng.random(others) < values[:, None]).astype(np.float32),
        other_score_norms=rng.random(others).astype(np.float32),
    )


# -------------------------------------------------------------------------------------- sketches
def test_inner_products_of_sketches_are_unbiased_with_the_error_that_is_claimed():
    """200 hashes of 1,000 numbers into 64 buckets. The mean's error is beyond 5 claimed standard
    errors, or the spread above 1.3 times the claim, with probability below 1e-5."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 1000)).astype(np.float32) * rng.exponential(1, 1000).astype(np.float32)
    x[1] += 0.5 * x[0]
    exact = float(x[0] @ x[1])
    claim = np.sqrt(((x[0] @ x[0]) * (x[1] @ x[1]) + exact**2) / 64)
    found = []
    for seed in range(200):
        a, b = np.asarray(
            gradient_sketch.sketch(jnp.asarray(x), gradient_sketch.make_hash(1000, 64, seed))
        )
        found.append(float(a @ b))
    assert abs(np.mean(found) - exact) < 5 * claim / np.sqrt(200)
    assert 0.5 * claim < np.std(found) < 1.3 * claim


@pytest.fixture(scope="module")
def gradients():
    """(pool, scale, gradients of all its rows as the study takes them, the same by hand)."""
    pool, params = make_pool(3), tiny.params()
    pool.tokens[:, 5] = pool.tokens[:, 4]  # equal completions are computed once
    pool.lengths[:, 5] = pool.lengths[:, 4]
    flat, _ = ravel_pytree(params)
    scale = jnp.asarray(np.random.default_rng(1).random(flat.size).astype(np.float32))
    rows = [x.reshape(-1, x.shape[2]) for x in (pool.tokens, pool.masks)]
    old = gradient_sketch.logprobs_of(params, tiny.TINY, rows[0], temperature=1.0, rows=8) - 0.1
    hash = gradient_sketch.make_hash(flat.size, 64)
    make = gradient_sketch.make_gradients(tiny.TINY, hash, temperature=1.0, rows=4)
    found = make(params, scale, *rows, old)

    @jax.jit
    def by_hand(tokens, mask, old):
        def ratios(p):
            logp, _ = tiny.token_logprobs(p, tiny.TINY, tokens[None])
            return jnp.sum(jnp.where(mask, jnp.exp(logp[0] - old), 0))

        return ravel_pytree(jax.grad(ratios)(params))[0]

    exact = np.stack([np.asarray(by_hand(*row)) for row in zip(*rows, old, strict=True)])
    return pool, np.asarray(scale), found, exact, hash


@pytest.mark.slow
def test_norms_are_those_of_the_exact_gradients_in_both_metrics(gradients):
    _, scale, found, exact, _ = gradients
    np.testing.assert_allclose(found.norms[:, 0], (exact**2).sum(1), rtol=1e-4)
    np.testing.assert_allclose(found.norms[:, 1], ((exact * scale) ** 2).sum(1), rtol=1e-4)


@pytest.mark.slow
def test_sketches_are_linear_so_a_batch_gradient_is_a_sum_of_its_rollouts(gradients):
    """float16 keeps 3 digits of each bucket."""
    _, scale, found, exact, hash = gradients
    a = np.random.default_rng(2).normal(size=len(exact)).astype(np.float32)
    for m, rows in enumerate((exact, exact * scale)):
        whole = gradient_sketch.sketch(jnp.asarray((a @ rows)[None]), hash)[0]
        unit = found.sketches[:, m].astype(np.float32)
        total = (a * np.sqrt(found.norms[:, m])) @ unit
        np.testing.assert_allclose(total, whole, atol=3e-3 * np.abs(whole).max())


@pytest.mark.slow
def test_without_a_move_the_surrogate_has_the_gradient_of_log_p(gradients):
    """The ratio is exp(.1) here: sampled with log-probabilities .1 lower."""
    pool, _, _, exact, _ = gradients
    tokens, mask = pool.tokens[0, 0], pool.masks[0, 0]

    def log_p(p):
        return jnp.sum(jnp.where(mask, tiny.token_logprobs(p, tiny.TINY, tokens[None])[0][0], 0))

    score = ravel_pytree(jax.grad(log_p)(tiny.params()))[0]
    np.testing.assert_allclose(exact[0], np.exp(0.1) * score, atol=1e-4 * np.abs(score).max())


# --------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize("group_size", [1, 2, 4, 8])
def test_every_rollout_counts_equally_often_and_no_history_holds_it(group_size):
    draws = methods.draw_batches(0, 16, batch=16, group_size=group_size, replicates=8)
    counts = np.zeros((16, ESTIMATED), int)
    for ids, chosen in zip(draws.ids, draws.chosen, strict=True):
        assert all(len(set(row)) == len(row) for row in ids)
        seen = {p: set() for p in range(16)}
        for t in range(len(ids)):
            for p, rollouts in zip(ids[t], chosen[t], strict=True):
                assert not seen[p] & set(rollouts)
                seen[p] |= set(rollouts)
                counts[p, rollouts] += draws.counts[t]
    assert np.all(counts == group_size)
    assert np.sum(~draws.counts) == (methods.HISTORY if group_size == 1 else 0)


@pytest.mark.slow
def test_moments_are_those_of_the_estimators_own_updates():
    """The batch mean's and GRPO's, from one batch after another by hand."""
    pool = make_pool(8)
    told = pool.score_norms[:, :ESTIMATED]
    for name, group, scaled in (("batch_mean", 1, False), ("grpo", 2, True)):
        options = {"group_size": group} if group > 1 else {}
        made = estimators.make(name, **options)
        draws = methods.draw_batches(0, 8, batch=8, group_size=group, replicates=8)
        found = methods.run(Method(name, made, 0, group, scaled), draws, pool, told)
        mean, products = np.zeros((8, ESTIMATED)), np.zeros((8, ESTIMATED, ESTIMATED))
        for ids, chosen in zip(draws.ids, draws.chosen, strict=True):
            for t in np.flatnonzero(draws.counts):
                r = pool.rewards[ids[t, :, None], chosen[t]]
                if name == "grpo":
                    a = (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-6)
                else:
                    a = r - r.mean()
                for p, c, x in zip(ids[t], chosen[t], a / group, strict=True):
                    row = np.zeros(ESTIMATED)
                    row[c] = x
                    visits = 8
                    mean[p] += row / visits
                    products[p] += np.outer(row, row) / visits
        if name == "grpo":
            np.testing.assert_allclose(found.mean, mean, atol=2e-5)
            np.testing.assert_allclose(found.products, products, atol=2e-5)
        else:  # the mean of the others, times (N - 1) / N, is the mean of all
            np.testing.assert_allclose(found.mean * 7 / 8, mean, atol=1e-5)


def test_an_estimator_is_told_the_table_only_where_it_has_one_and_the_true_values_if_it_asks():
    pool = make_pool(8)
    told = pool.score_norms[:, :ESTIMATED]
    draws = methods.draw_batches(0, 8, batch=8, group_size=1, replicates=8)
    known = methods.knows()
    for method, b in (
        (Method("m", known), 0 * pool.successes),
        (Method("m", known, TABLE), pool.successes),
        (Method("m", known, told_values=True), pool.values),
    ):
        found = methods.run(method, draws, pool, told)
        left = pool.rewards[:, :ESTIMATED] - b[:, None]
        np.testing.assert_allclose(found.squares, left**2 / ESTIMATED, rtol=1e-5)


# ------------------------------------------------------------------------------------ statistics
def enumerated(used, rows, true, pairs):
    """E |g|^2 and E (g.t)^2 over all batches of two different problems with one rollout each."""
    lengths, ahead = [], []
    for p, q in pairs:
        for i, j in itertools.product(range(ESTIMATED), repeat=2):
            g = (used[p, i] * rows[p, i] + used[q, j] * rows[q, j]) / 2
            lengths.append(g @ g)
            ahead.append((g @ true) ** 2)
    return np.mean(lengths), np.mean(ahead)


def test_statistics_are_those_of_whole_batches(monkeypatch):
    """All 5 x 4 x 8 x 8 batches of two, the expectation over pairs of problems being exact; the
    true gradient is given from outside, so that its own estimate has no part in this."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5, ESTIMATED, 12)) + rng.normal(size=(5, 1, 12))
    used = rng.normal(size=(5, ESTIMATED))
    true = rng.normal(size=12)
    geometry = measures.Geometry(
        norms=np.concatenate([(rows**2).sum(2), np.ones((5, HELD_BACK))], 1),
        rows=rows.astype(np.float32),
        products=np.einsum("pib,pjb->pij", rows, rows),
        true=np.tile(true, (5, 1)).astype(np.float32),
        truth=np.full((5, 5), true @ true),
        along=np.stack([rows @ true] * 2),
    )
    found = methods.Moments(
        used / ESTIMATED, (used**2)[..., None] * np.eye(ESTIMATED) / ESTIMATED, used**2 / ESTIMATED
    )
    terms = measures.make_terms(found, geometry, group_size=1, scaled=True)
    monkeypatch.setattr(measures, "SIZES", (2,))
    told = measures.statistics(terms, np.ones((1, 5)))
    pairs = list(itertools.permutations(range(5), 2))
    length, ahead = enumerated(used, rows, true, pairs)
    updates = np.einsum("pi,pib->pb", used, rows) / ESTIMATED
    mean = np.mean([updates[p] @ updates[q] for p, q in pairs])
    forward = updates.mean(0) @ true
    exact_square = np.mean([(updates[p] @ true) * (updates[q] @ true) for p, q in pairs])
    ahead += (forward**2 - exact_square) / 2  # (EU.t)^2 is the square of the mean there
    np.testing.assert_allclose(told["cosine2_2"], ahead / (length * (true @ true)), rtol=1e-5)
    np.testing.assert_allclose(told["noise_share_2"], 1 - mean / length, rtol=1e-5)
    expected = np.mean((used**2) * (rows**2).sum(2))
    np.testing.assert_allclose(told["noise"], expected, rtol=1e-6)
    needed = (expected - mean) * (true @ true) / forward**2
    np.testing.assert_allclose(told["rollouts"], needed, rtol=1e-4)


def test_means_over_pairs_leave_out_a_problem_with_itself_however_often_it_is_drawn():
    x = np.random.default_rng(0).normal(size=(4, 4))
    counts = np.array([[1.0, 1, 1, 1], [2, 0, 1, 1]])
    drawn = [[0, 1, 2, 3], [0, 0, 2, 3]]
    for value, sample in zip(measures.over_pairs(x, counts), drawn, strict=True):
        pairs = [(p, q) for p, q in itertools.permutations(sample, 2) if p != q]
        assert value == pytest.approx(np.mean([x[p, q] for p, q in pairs]))


def test_the_squared_signal_has_no_bias():
    """Where the true gradient is 0 the mean of |G|^2 over 300 pools is within 5 standard errors of
    0 (false alarm 6e-7), though every single gradient is far from 0."""
    found = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        pool = make_pool(4, seed=seed)
        sketches = rng.normal(size=(4, KEPT - 1, 8))
        norms = (sketches**2).sum(2)
        sketches /= np.sqrt(norms)[..., None]
        geometry = measures.make_geometry(norms, sketches, pool)
        found.append(measures.over_pairs(geometry.truth, np.ones((1, 4)))[0])
    assert abs(np.mean(found)) < 5 * np.std(found) / np.sqrt(300)


def test_oracles_are_ordered_and_find_the_best_constant():
    """On the rollouts that they are made from, and with 400 problems on others too."""
    pool = make_pool(400, values=np.random.default_rng(3).beta(1, 1, 400))
    r = pool.rewards[:, :-1]
    norms = np.where(r > 0.5, 1.0, 3.0) * np.random.default_rng(4).exponential(1, r.shape)
    known = measures.oracles(pool, norms)
    held = slice(ESTIMATED, ESTIMATED + HELD_BACK)
    constant = (norms * r)[:, held].sum() / norms[:, held].sum()
    np.testing.assert_allclose(known["best constant"], constant)
    w, y = norms[:, :ESTIMATED], r[:, :ESTIMATED]
    noise = {name: np.mean(w * (y - b[:, None]) ** 2) for name, b in known.items()}
    assert noise["best map of the value"] < 0.8 * noise["best constant"]
    assert noise["best per prompt"] < 1.02 * noise["best map of the value"]


def test_unreachable_problems_have_no_reward_anywhere():
    pool = make_pool(6)
    lost = np.arange(6) < 3
    left = pool.unreachable(lost)
    assert not left.rewards[:3].any() and not left.successes[:3].any() and not left.values[:3].any()
    np.testing.assert_array_equal(left.rewards[3:], pool.rewards[3:])


# ----------------------------------------------------------------------------------- a checkpoint
@pytest.mark.slow
def test_a_tiny_checkpoint_is_measured_resumed_and_compared(tmp_path, monkeypatch, capsys):
    """Interrupted pieces are measured again with the same numbers, others are left alone."""
    folder = tiny.write_folder(tmp_path / "model")
    problems = [{"problem": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]
    (tmp_path / "p.json").write_text(json.dumps(problems))
    (tmp_path / "c.py").write_text(
        "from basis_jax.config import *\n"
        "def config():\n"
        f"    return Config(run_dir='', model=ModelSection(path={str(folder)!r}),\n"
        f"        data=DataSection(path={str(tmp_path / 'p.json')!r}, prompt_format='text'),\n"
        "        sampling=SamplingSection(max_new_tokens=2), train=TrainSection(\n"
        "        prompts_per_step=8, minibatch_rollouts=8, microbatch_rollouts=8),\n"
        f"        estimator=EstimatorSection(name='reinforce'),\n"
        f"        eval=EvalSection(sets=({str(tmp_path / 'p.json')!r},)))\n"
    )
    monkeypatch.setattr(gradient_study, "BUCKETS", 64)
    monkeypatch.setattr(gradient_study, "CHUNK", 8)
    out = tmp_path / "m"
    command = ["study", "measure", "--config", str(tmp_path / "c.py"), "--folder", str(out)]
    command += ["--problems", "16", "--batch", "8"]
    monkeypatch.setattr(sys, "argv", command)
    gradient_study.main()
    first, second = (np.load(out / f"gradients_first_{n:05d}.npz") for n in (0, 8))
    kept = (out / "gradients_first_00000.npz").stat().st_mtime_ns
    (out / "gradients_first_00008.npz").unlink()
    gradient_study.main()
    assert (out / "gradients_first_00000.npz").stat().st_mtime_ns == kept
    again = np.load(out / "gradients_first_00008.npz")
    np.testing.assert_array_equal(again["norms"], second["norms"])
    assert np.any(first["norms"] != second["norms"])
    monkeypatch.setattr(sys, "argv", [*command[:-1], "4"])
    with pytest.raises(ValueError, match="another batch"):
        gradient_study.main()
    about, pool, measured = gradient_study.load(out)
    rewards = (np.arange(pool.rewards.size).reshape(pool.rewards.shape) % 3 == 0).astype(np.float32)
    pool = dataclasses.replace(pool, rewards=rewards)  # a random model is never right
    monkeypatch.setattr(gradient_study, "load", lambda _: (about, pool, measured))
    monkeypatch.setattr(sys, "argv", ["study", "compare", str(out), "--out", str(tmp_path / "r")])
    gradient_study.main()
    content = json.loads((tmp_path / "r.json").read_text())
    rows = content["parts"][0]["rows"]
    lines = capsys.readouterr().out.splitlines()
    for row in rows:
        if row["told"] == "free" and row["method"] == "batch mean":
            line = next(x for x in lines if x.startswith("batch mean"))
            assert f"{row['first sgd']['noise'][0]:.4g}" in line
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_a_report_that_is_read_and_written_is_the_same(tmp_path):
    """The rows of other checkpoints go on from one report to the next (``--known``)."""
    whole = json.loads((RESULTS / "gradient_study.json").read_text())
    whole["parts"] = whole["parts"][:1]
    (tmp_path / "old.json").write_text(json.dumps(whole))
    parts = gradient_files.read(tmp_path / "old.json")
    gradient_files.write(tmp_path / "new", parts, {"commit": "c"})
    assert json.loads((tmp_path / "new.json").read_text())["parts"] == whole["parts"]


def test_compare_replaces_a_part_of_the_known_report_and_keeps_the_others(tmp_path, monkeypatch):
    made = []
    part = gradient_report.Part
    known = [part(name, {}, [], {}) for name in ("free", "long")]
    monkeypatch.setattr(gradient_study, "load", lambda folder: ({}, None, {}))
    monkeypatch.setattr(
        gradient_report, "make_part", lambda name, *_: part(name, {"new": 1}, [], {})
    )
    monkeypatch.setattr(gradient_report, "table", lambda part: "")
    monkeypatch.setattr(gradient_files, "read", lambda path: known)
    monkeypatch.setattr(gradient_files, "write", lambda out, parts, _: made.extend(parts))
    gradient_study.compare(["runs/long", "runs/hard", "--known", str(tmp_path / "old.json")])
    assert [(p.name, p.about) for p in made] == [
        ("free", {}),
        ("long", {"new": 1}),
        ("hard", {"new": 1}),
    ]
