"""Baselines of least gradient noise: score norms, the weighted mean, the map of values, metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from basis_jax import estimators
from basis_jax.config import SamplingSection
from basis_jax.estimators import Signals
from basis_jax.losses import AGGREGATIONS
from basis_jax.masked import completion_mask
from basis_jax.sampling.decode import sample
from basis_jax.sampling.draw import row_keys
from basis_jax.sampling.rollouts import Graded
from basis_jax.training.update import make_signals
from basis_jax.types import Rollouts

SIZE = 40
NOTHING = np.zeros(SIZE), np.zeros(SIZE)  # successes and trials: no offline table
RANDOM = np.random.default_rng(0)
REWARDS = RANDOM.integers(0, 2, SIZE).astype(np.float32)
NORMS = RANDOM.gamma(0.5, size=SIZE).astype(np.float32)


def signals(rewards=REWARDS, norms=NORMS, **changes):
    rows = len(rewards)
    made = Signals(
        rewards=jnp.asarray(rewards, jnp.float32),
        valid=jnp.ones(rows, bool),
        problem_ids=jnp.arange(rows, dtype=jnp.int32),
        lengths=jnp.ones(rows, jnp.int32),
        score_norms=jnp.asarray(norms, jnp.float32),
    )
    return dataclasses.replace(made, **changes)


def mapped(values):
    """``least_variance`` of an estimator that holds these values, whatever the rewards."""

    def update(state, signals):
        told = state[signals.problem_ids]
        return state, estimators.rows.estimate(signals.rewards - told, told, signals.valid)

    made = estimators.Estimator(
        lambda successes, trials: jnp.asarray(values, jnp.float32), update, False, False, 1
    )
    estimator = estimators.least_variance(made)
    return estimator, estimator.init(*NOTHING)


# ------------------------------------------------------------------------------- the score norms
@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_recorded_score_norms_are_those_of_the_models_distributions(temperature):
    """Per completion the sum over its tokens of |onehot - p|^2, from a full forward pass."""
    sampling = SamplingSection(max_new_tokens=7, temperature=temperature)
    prompts = tiny.prompts()
    ids = prompts.problem_ids
    keys = row_keys(0, "train", 0, problem_ids=ids, samples=jnp.zeros_like(ids))
    common = {"sampling": sampling, "eos_ids": (1, 2), "keys": keys}
    rollouts = sample(tiny.params(), tiny.TINY, prompts, **common)
    logits = tiny.next_token_logits(tiny.params(), tiny.TINY, rollouts.tokens)
    p = np.asarray(jax.nn.softmax(logits / temperature), np.float64)[:, :-1]
    onehot = np.eye(p.shape[-1])[np.asarray(rollouts.tokens)[:, 1:]]
    squares = np.sum((onehot - p) ** 2, axis=-1)
    width = rollouts.tokens.shape[1]
    mask = completion_mask(rollouts.prompt_lengths, rollouts.completion_lengths, width)
    expected = np.sum(np.where(np.asarray(mask)[:, 1:], squares, 0), axis=1)
    np.testing.assert_allclose(rollouts.score_norms, expected, rtol=1e-4)
    assert len(set(np.asarray(rollouts.completion_lengths).tolist())) > 2  # rows ended apart


def graded(lengths, logprobs=None, score_norms=8):
    """Rollouts behind prompts of one token."""
    rows, lengths = len(lengths), np.int32(lengths)
    rollouts = Rollouts(
        tokens=np.zeros((rows, 5), np.int32),
        prompt_lengths=np.ones(rows, np.int32),
        completion_lengths=lengths,
        sampler_logprobs=np.zeros((rows, 5), np.float32) if logprobs is None else logprobs,
        score_norms=np.full(rows, score_norms, np.float32),
        terminated=np.ones(rows, bool),
        problem_ids=np.arange(rows, dtype=np.int32),
    )
    texts, ones = [""] * rows, np.ones(rows, np.float32)
    return Graded(rollouts, texts, ones, ones > 0, texts, texts, 1.0, 0.0)


def test_a_sequence_mean_divides_score_norms_by_the_squared_length():
    data = graded(lengths=[1, 2, 4])
    made = {a: make_signals(data, aggregation=a, score_norms="logits") for a in AGGREGATIONS}
    assert made["token_mean"].score_norms.tolist() == [8, 8, 8]
    assert made["constant_length"].score_norms.tolist() == [8, 8, 8]
    assert made["sequence_mean"].score_norms.tolist() == [8, 2, 0.5]


def test_natural_score_norms_are_the_fisher_norms_of_the_tokens_scores():
    """s^T F^+ s with s = onehot - p and F = diag p - p p^T is 1 / p - 1; a probability near 0
    counts as .001."""
    p = np.array([0.5, 0.3, 0.2])
    fisher = np.linalg.pinv(np.diag(p) - np.outer(p, p))
    scores = np.eye(3) - p
    exact = np.einsum("ki,ij,kj->k", scores, fisher, scores)
    logprobs = np.zeros((2, 5), np.float32)
    logprobs[0, 1:4], logprobs[1, 1] = np.log(p), np.log(1e-7)
    data = graded(lengths=[3, 1], logprobs=logprobs)
    made = make_signals(data, aggregation="token_mean", score_norms="natural")
    np.testing.assert_allclose(made.score_norms, [exact.sum(), 1000], rtol=1e-4)


# ------------------------------------------------------------------------------ the weighted mean
def test_the_weighted_mean_leaves_the_own_row_out_and_joins_the_steps_before_by_effective_rows():
    """Two steps against sums in float64."""
    estimator = estimators.make("weighted_mean", memory=0.5)
    second = RANDOM.integers(0, 2, SIZE), RANDOM.gamma(0.5, size=SIZE)
    state, first_estimate = estimator.update(estimator.init(*NOTHING), signals())
    _, estimate = estimator.update(state, signals(*second))
    past = np.sum(NORMS * REWARDS) / np.sum(NORMS)
    past_rows = 0.5 * np.sum(NORMS) ** 2 / np.sum(NORMS**2)
    for i in range(SIZE):
        r, w = (np.delete(np.asarray(x, np.float64), i) for x in second)
        rows = np.sum(w) ** 2 / np.sum(w**2)
        expected = (rows * np.sum(w * r) / np.sum(w) + past_rows * past) / (rows + past_rows)
        np.testing.assert_allclose(estimate.baselines[i], expected, rtol=1e-5)
        np.testing.assert_allclose(estimate.values[i], r.mean(), rtol=1e-5)
        r, w = np.delete(REWARDS, i), np.delete(NORMS, i)
        np.testing.assert_allclose(first_estimate.baselines[i], np.average(r, weights=w), rtol=1e-5)


def test_equal_score_norms_give_the_plain_mean_of_the_others():
    estimator = estimators.make("weighted_mean")
    _, estimate = estimator.update(estimator.init(*NOTHING), signals(norms=np.full(SIZE, 3.0)))
    np.testing.assert_allclose(estimate.baselines, estimate.values, rtol=1e-6)


def test_a_group_baseline_weighted_by_score_norms():
    estimate = estimators.otb(REWARDS, NORMS, group_size=4)
    r, w = REWARDS.reshape(-1, 4), NORMS.reshape(-1, 4)
    expected = np.sum(w * r, 1) / np.sum(w, 1)
    np.testing.assert_allclose(estimate.baselines.reshape(-1, 4), expected[:, None] + 0 * r, 1e-5)
    np.testing.assert_allclose(estimate.advantages, REWARDS - estimate.baselines, atol=1e-6)
    np.testing.assert_allclose(estimate.values.reshape(-1, 4), r.mean(1)[:, None] + 0 * r, 1e-6)


# ----------------------------------------------------------------------------------- bad weights
@pytest.mark.slow
@pytest.mark.parametrize("name", ["weighted_mean", "batch_mean+least_variance"])
@pytest.mark.parametrize(
    "norms",
    [np.zeros(SIZE), np.full(SIZE, np.nan), np.full(SIZE, -1.0), np.where(REWARDS > 0, 0, 1)],
    ids=["zero", "nan", "negative", "only wrong ones"],
)
def test_score_norms_that_say_nothing_give_finite_baselines(name, norms):
    estimator = estimators.make(name)
    state, estimate = estimator.update(estimator.init(*NOTHING), signals(norms=norms))
    for x in jax.tree.leaves((state, estimate)):
        assert np.all(np.isfinite(x))
    assert np.all((estimate.baselines >= 0) & (estimate.baselines <= 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weighted_mean", "batch_mean+least_variance"])
@pytest.mark.parametrize("reward", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, SIZE])
def test_one_row_and_rewards_all_alike_are_defined(name, reward, rows):
    estimator = estimators.make(name)
    given = signals(rewards=np.full(rows, reward), norms=NORMS[:rows])
    _, estimate = estimator.update(estimator.init(*NOTHING), given)
    assert np.all(np.isfinite(estimate.advantages))
    if rows > 1:
        np.testing.assert_allclose(estimate.baselines, reward, atol=0.15)  # drawn to one half


@pytest.mark.parametrize("bad", [np.nan, np.inf, -5.0])
def test_a_bad_score_norm_is_that_of_a_row_without_influence(bad):
    for name in ("weighted_mean", "batch_mean+least_variance"):
        estimator = estimators.make(name)
        state = estimator.init(*NOTHING)
        update = jax.jit(estimator.update)
        spoilt = signals(norms=np.where(np.arange(SIZE) == 7, bad, NORMS))
        zero = signals(norms=np.where(np.arange(SIZE) == 7, 0, NORMS))
        np.testing.assert_array_equal(
            update(state, spoilt)[1].baselines, update(state, zero)[1].baselines
        )


@pytest.mark.parametrize("name", ["weighted_mean", "otb", "batch_mean+least_variance"])
def test_signals_without_score_norms_are_refused_by_name(name):
    group = {"group_size": 4} if name == "otb" else {}
    estimator = estimators.make(name, **group)
    with pytest.raises(ValueError, match="score_norms"):
        estimator.update(estimator.init(*NOTHING), signals(score_norms=None))


# ------------------------------------------------------------------------------ the map of values
def world(rows, ratio, *, seed=0, power=0.0):
    """Values, rewards, weights: wrong completions have ``ratio`` (odds of V)^power times the weight
    of right ones; the best baseline is V / (V + (1 - V) m0/m1)."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(0, 1.5, rows)
    values = 1 / (1 + np.exp(-logit))
    rewards = (rng.random(rows) < values).astype(np.float32)
    of_wrong = ratio * np.exp(power * logit)
    weights = np.where(rewards > 0, 1, of_wrong) * rng.gamma(2, 0.5, rows)
    return values, rewards, weights, values / (values + (1 - values) * of_wrong)


def fitted(rows, ratio, steps, **law):
    values = world(rows, ratio, **law)[0]
    estimator, state = mapped(values)
    update = jax.jit(estimator.update)
    for step in range(steps):
        rng = np.random.default_rng(step + 1)
        rewards = (rng.random(rows) < values).astype(np.float32)
        power = law.get("power", 0.0)
        of_wrong = ratio * (values / (1 - values)) ** power
        weights = np.where(rewards > 0, 1, of_wrong) * rng.gamma(2, 0.5, rows)
        state, estimate = update(state, signals(rewards, weights))
    return estimate, world(rows, ratio, **law)[3]


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.3, 1.0, 10.0])
def test_the_map_finds_the_tilt_of_a_world_whose_weights_have_one_ratio(ratio):
    """Slope 1 and tilt -log ratio, within 0.25: more than 4 standard errors of 4,000 effective
    rows or more; so the baselines are within 0.04 of the best ones."""
    estimate, best = fitted(3000, ratio, 4)
    assert abs(float(estimate.info["tilt"]) + np.log(ratio)) < 0.25
    assert abs(float(estimate.info["slope"]) - 1) < 0.15
    assert np.max(np.abs(estimate.baselines - best)) < 0.04


def test_where_the_ratio_grows_with_the_odds_the_map_is_the_constant():
    estimate, best = fitted(3000, 4.0, 4, power=1.0)
    assert float(estimate.info["slope"]) < 0.1
    np.testing.assert_allclose(best, 0.2, atol=1e-6)
    np.testing.assert_allclose(estimate.baselines, 0.2, atol=0.05)


@pytest.mark.slow
def test_values_that_fall_where_rewards_rise_are_not_used():
    """A slope below 0 is not allowed: the baselines are one constant a fold."""
    values, rewards, weights, _ = world(400, 1.0)
    estimator, state = mapped(1 - values)
    _, estimate = estimator.update(state, signals(rewards, weights))
    assert float(estimate.info["slope"]) == 0
    assert len(set(np.asarray(estimate.baselines).tolist())) <= 8


@pytest.mark.slow
def test_few_rows_draw_the_map_to_the_constant():
    """The slope of 24 rows is below that of 2,400 of the same world."""
    slopes = [float(fitted(rows, 1.0, 1, seed=3)[0].info["slope"]) for rows in (24, 2400)]
    assert slopes[0] < 0.8 * slopes[1]


@pytest.mark.slow
def test_the_values_stay_those_of_the_other_estimator():
    plain, wrapped = (estimators.make(f"spo{x}") for x in ("", "+least_variance"))
    counts = np.full(SIZE, 4), np.full(SIZE, 8)
    _, expected = plain.update(plain.init(*counts), signals())
    _, estimate = wrapped.update(wrapped.init(*counts), signals())
    np.testing.assert_array_equal(estimate.values, expected.values)
    np.testing.assert_allclose(estimate.advantages, REWARDS - estimate.baselines, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("grpo", {"group_size": 4}), ("reinforce_pp", {}), ("basis", {"rule": "published"})],
)
def test_an_estimator_that_has_seen_the_own_reward_is_refused(name, options):
    with pytest.raises(ValueError, match="least_variance got an estimator whose value"):
        estimators.make(f"{name}+least_variance", **options)


# ------------------------------------------------------------------------------------ the metrics
def test_the_noise_report_is_the_weighted_squared_error_of_each_baseline():
    given = signals(valid=jnp.asarray(np.arange(SIZE) != 3))
    estimate = estimators.Estimate(
        advantages=jnp.zeros(SIZE),
        values=jnp.full(SIZE, 0.25),
        baselines=jnp.full(SIZE, 0.75),
        info={},
    )
    told = estimators.noise_report(given, estimate)
    r, w = (np.delete(x, 3).astype(np.float64) for x in (REWARDS, NORMS))
    mean = (r.sum() - r) / (r.size - 1)
    expected = {
        "noise_none": np.average(r**2, weights=w),
        "noise_mean": np.average((r - mean) ** 2, weights=w),
        "noise_values": np.average((r - 0.25) ** 2, weights=w),
        "noise_baselines": np.average((r - 0.75) ** 2, weights=w),
        "score_ratio": w[r == 0].mean() / w[r == 1].mean(),
        "effective_rows": w.sum() ** 2 / np.sum(w**2),
    }
    assert told.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(told[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("rewards", [np.zeros(4), np.ones(4)])
@pytest.mark.parametrize("norms", [np.zeros(4), np.ones(4)])
def test_the_noise_report_of_nothing_is_finite(rewards, norms):
    given = signals(rewards, norms)
    told = estimators.noise_report(given, estimators.reinforce(given.rewards))
    assert all(np.isfinite(x) for x in told.values())
    assert float(told["score_ratio"]) == 0
