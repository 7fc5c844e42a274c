"""Estimators with memory: worked vectors, sequential oracles, duplicates, invalid rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from basis_jax import estimators
from basis_jax.estimators import Signals, history

SINGLE = np.float32([1, 0, 1, 0, 0, 1])  # six prompts, one rollout each
LENGTHS = np.int32([2, 6, 3, 5, 4, 1])
SUCCESSES, TRIALS = np.int32([0, 2, 4, 8, 6, 5]), np.full(6, 8, np.int32)
STATEFUL = ("ema", "spo", "spo_pp", "dbb", "kae", "value_filter")
THE_FILTER_SLOWLY = [*STATEFUL[:-1], pytest.param("value_filter", marks=pytest.mark.slow)]


def close(actual, expected, atol=2e-6):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def signals(rewards, ids, *, lengths=None, valid=None):
    n = len(rewards)
    return Signals(
        rewards=jnp.asarray(rewards, jnp.float32),
        valid=jnp.ones(n, bool) if valid is None else jnp.asarray(valid),
        problem_ids=jnp.asarray(ids, jnp.int32),
        lengths=jnp.full(n, 4, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32),
        score_norms=jnp.arange(1.0, n + 1),
        greedy_rewards=jnp.zeros(n),
        start_values=jnp.zeros(n),
        logprob_sum=jnp.zeros(n),
    )


def random_steps(seed, *, steps=12, rows=6, problems=4):
    rng = np.random.default_rng(seed)
    rewards = rng.integers(0, 2, (steps, rows)).astype(np.float32)
    return list(zip(rewards, rng.integers(0, problems, (steps, rows)), strict=True))


# --------------------------------------------------------------------------- worked vectors
def test_ema_uses_its_baseline_before_updating_it():
    baseline, e = estimators.ema(SINGLE, 0.3)
    close(e.advantages, [0.7, -0.3, 0.7, -0.3, -0.3, 0.7])
    close(baseline, 0.32)


def test_ema_starts_from_the_offline_rate():
    est = estimators.make("ema", rate=0.2)
    close(est.init(SUCCESSES, TRIALS), 25.5 / 49)
    state, e = est.update(est.init(0 * TRIALS, 0 * TRIALS), signals([1], [0]))
    close(e.advantages, 0.5)
    close(state, 0.6)


def test_spo_worked_vectors():
    divergence = jnp.float32([0, 0.002, 0.01, 0.02, 0.05, 0.3])
    state = history.spo_init(SUCCESSES, TRIALS)
    weights = [0.279061, 0.497903, 0.55, 0.279061, 0.497903, 0.537498]
    close(history.spo_weights(state), weights)
    batch = signals(SINGLE, range(6))
    _, raw = history.spo_update(state, batch, convention="none")
    values = [0.055556, 0.277778, 0.5, 0.944444, 0.722222, 0.611111]
    close(raw.values, values)
    close(raw.advantages, SINGLE - np.float32(values))
    state, e = history.spo_update(state, batch, divergence=divergence)
    normed = [1.290994, -0.347575, 0.695151, -1.241341, -0.943419, 0.54619]
    close(e.advantages, normed)
    close(history.spo_decay(divergence), [0.96, 0.96, 0.890899, 0.875, 0.875, 0.875])
    successes = [1.426667, 2.133333, 4.563595, 6.611111, 5.055556, 5.277778]
    close(state.successes, successes, atol=5e-6)


def test_spo_pp_standardises_by_tokens():
    est = estimators.make("spo_pp")
    batch = signals(SINGLE, range(6), lengths=LENGTHS)
    _, e = est.update(est.init(SUCCESSES, TRIALS), batch)
    expected = [1.877832, -0.024708, 1.185999, -1.062457, -0.716541, 1.013041]
    close(e.advantages, expected)
    close(np.sum(LENGTHS * np.asarray(e.advantages)), 0, atol=1e-4)
    _, sequence = estimators.make("spo").update(est.init(SUCCESSES, TRIALS), batch)
    residual = np.sum(LENGTHS * np.asarray(sequence.advantages)) / LENGTHS.sum()
    close(residual, -0.326295)


def visits(update, state, steps, *, until, problem=0):
    """Run updates 0..until-1; ``steps`` maps an update to the problem's reward in it."""
    nothing = signals([0], [problem], valid=[False])
    for now in range(until):
        batch = signals([steps[now]], [problem]) if now in steps else nothing
        state, _ = update(state, batch)
    return state


@pytest.mark.parametrize(
    ("window", "group", "single"),
    [
        (10, [0.701493, 0.850746, 0.701493, 0.701493], 0.72973),
        (5, [0.782609, 1, 0.782609, 0.782609], 1.0),
    ],
)
def test_kae_worked_vectors(window, group, single):
    """Step 20, rewards at steps 12..19, four rollouts 1 0 1 1 (or one) now."""
    est = estimators.make("kae", window=window)
    past = dict(zip([12, 13, 14, 15, 16, 18, 19], [0, 0, 1, 0, 1, 1, 1], strict=True))
    state = visits(jax.jit(est.update), est.init(np.zeros(1), np.zeros(1)), past, until=20)
    close(est.update(state, signals([1, 0, 1, 1], [0] * 4))[1].values, group)
    close(est.update(state, signals([1], [0]))[1].values, single)


def test_kae_without_history():
    """Leave-one-out mean of the group; a problem alone falls back to the batch's other rows."""
    est = estimators.make("kae")
    state = est.init(np.zeros(3), np.zeros(3))
    _, e = est.update(state, signals([1, 0, 1, 1, 0], [0, 0, 0, 0, 1]))
    close(e.values, [0.666667, 1, 0.666667, 0.666667, 0.75])
    close(e.info["fallback_share"], 0.2)


def test_dbb_puts_the_own_reward_into_its_mean():
    """Beta(1, 1), decay .5: one success gives 1.5 / 2; a second one 1.75 / 2."""
    est = estimators.make("dbb")
    state, e = est.update(est.init(np.zeros(2), np.zeros(2)), signals([1, 0], [0, 1]))
    close(e.values, [0.75, 0.25])
    close(e.advantages, [3**-0.5, -(3**-0.5)])
    _, e = est.update(state, signals([1], [0]))
    close(e.values, 0.875)
    _, plain = estimators.make("dbb", scale=False).update(state, signals([1], [0]))
    close(plain.advantages, 0.125)


# ----------------------------------------------------------------------------------- oracles
@pytest.mark.parametrize("decay", [0.875, 0.5])
def test_spo_equals_the_oracle_over_many_steps_with_duplicates(decay):
    steps, k, n = random_steps(0), [0, 2, 3, 0], [8, 8, 3, 0]
    est = estimators.make("spo", decay=decay, convention="none")
    state, update = est.init(np.int32(k), np.int32(n)), jax.jit(est.update)
    for (rewards, ids), expected in zip(steps, reference.spo(steps, k, n, decay), strict=True):
        state, e = update(state, signals(rewards, ids))
        close(e.advantages, expected, atol=1e-5)


@pytest.mark.parametrize("window", [1, 3])
def test_kae_equals_unbounded_histories_over_many_steps(window):
    steps = random_steps(1, problems=6)
    est = estimators.make("kae", window=window)
    state, update = est.init(np.zeros(6), np.zeros(6)), jax.jit(est.update)
    for (rewards, ids), expected in zip(steps, reference.kae(steps, window), strict=True):
        state, e = update(state, signals(rewards, ids))
        known = np.isfinite(expected)
        close(np.asarray(e.values)[known], np.array(expected)[known], atol=1e-5)
        close(e.info["fallback_share"], 1 - known.mean())


def test_spo_pp_evidence_does_not_depend_on_the_order_of_arrival():
    """a = decay^5 a_0 + decay^4 r_1 + decay^2 r_2 + r_3, however late rollouts 1 and 2 arrive."""
    start = history.spo_init(np.int32([4]), np.int32([8]))
    expected = 0.875**5 * start.successes + 0.875**4 * 1 + 0.875**2 * 0 + 1
    events = {1: 1.0, 3: 0.0, 5: 1.0}  # step whose policy wrote it -> reward
    for arrival in ({1: [1], 3: [3], 5: [5]}, {5: [5, 3, 1]}, {3: [1], 5: [3, 5]}):
        state = start
        for now in range(6):
            written = arrival.get(now, [])
            batch = signals([events[s] for s in written] or [0], [0] * max(1, len(written)))
            batch = batch if written else signals([0], [0], valid=[False])
            staleness = jnp.int32([now - s for s in written] or [0])
            state, _ = history.spo_pp_update(state, batch, staleness=staleness)
        close(state.successes, expected)


def test_a_problem_unseen_for_a_thousand_steps_keeps_its_value():
    est = estimators.make("spo_pp")
    state = visits(jax.jit(est.update), est.init(np.int32([6]), np.int32([8])), {}, until=1000)
    _, e = est.update(state, signals([1], [0]))
    close(e.values, 6.5 / 9)


# --------------------------------------------------------------------------------- invariances
def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", THE_FILTER_SLOWLY)
def test_invalid_rows_change_neither_state_nor_the_others(name):
    """The same state and values as without them, whatever they hold."""
    est = estimators.make(name)
    start = est.init(SUCCESSES, TRIALS)
    state, e = est.update(start, signals([1, 0, 1], [0, 3, 5]))
    with_junk = signals(
        [np.nan, 1, 0, np.inf, 1], [0, 0, 3, 4, 5], valid=[False, True, True, False, True]
    )
    junk_state, junk = est.update(start, with_junk)
    for a, b in zip(leaves(state), leaves(junk_state), strict=True):
        close(b, a)
    close(np.asarray(junk.values)[[1, 2, 4]], e.values)
    close(np.asarray(junk.advantages)[[0, 3]], 0)


@pytest.mark.parametrize("name", THE_FILTER_SLOWLY)
def test_the_order_of_rows_does_not_matter_duplicates_included(name):
    """Row numbers decide only the folds of the value filter: rows are swapped within a fold."""
    options = {"folds": 2} if name == "value_filter" else {}
    est = estimators.make(name, **options)
    start = est.init(SUCCESSES, TRIALS)
    rewards, ids = np.float32([1, 0, 0, 1, 1, 0]), np.int32([2, 2, 4, 2, 0, 4])
    order = np.array([4, 3, 0, 5, 2, 1])
    state, e = est.update(start, signals(rewards, ids))
    shuffled_state, shuffled = est.update(start, signals(rewards[order], ids[order]))
    for a, b in zip(leaves(state), leaves(shuffled_state), strict=True):
        close(b, a, atol=1e-5)
    close(shuffled.advantages, np.asarray(e.advantages)[order], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in STATEFUL if name != "dbb"])
def test_flipping_a_reward_leaves_its_own_value_exactly_unchanged(name):
    est = estimators.make(name)
    update = jax.jit(est.update)
    ids = np.int32([0, 1, 2, 2, 4, 5, 1, 2])
    rewards = np.float32([1, 0, 1, 0, 0, 1, 1, 1])
    state, _ = update(est.init(SUCCESSES, TRIALS), signals(rewards[::-1], ids))
    before = update(state, signals(rewards, ids))[1].values
    for i in range(8):
        flipped = np.where(np.arange(8) == i, 1 - rewards, rewards)
        assert update(state, signals(flipped, ids))[1].values[i] == before[i]


@pytest.mark.parametrize("name", sorted(estimators.ESTIMATORS))
def test_every_estimator_has_a_pure_jittable_step(name):
    """jit equals eager, the state keeps its structure, shapes and types, and nothing is NaN."""
    options = {"group_size": 2} if "group_size" in estimators.option_names(name) else {}
    options |= {"k": 2} if name == "pass_at_k" else {}
    est = estimators.make(name, **options)
    state = est.init(SUCCESSES, TRIALS)
    batch = signals(SINGLE, [0, 0, 1, 1, 4, 4], lengths=LENGTHS)
    new, e = est.update(state, batch)
    compiled_state, compiled = jax.jit(est.update)(state, batch)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, new, compiled_state)]
    assert shapes[0] == shapes[1] == shapes[2]
    for a, b in zip(leaves((new, e)), leaves((compiled_state, compiled)), strict=True):
        close(b, a, atol=1e-5)
        assert np.all(np.isfinite(a))
    close(0, np.mean(np.asarray(e.advantages) == 0) - float(e.info["zero_share"]))


def test_what_signals_do_not_carry_is_said():
    with pytest.raises(ValueError, match="sr_ppo needs a critic's prefix values"):
        estimators.make("sr_ppo")
    with pytest.raises(ValueError, match="decay=1.0"):
        estimators.make("spo", decay=1.0)
    with pytest.raises(ValueError, match="window=0"):
        estimators.make("kae", window=0)
