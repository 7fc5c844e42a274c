"""What every estimator of the registry promises: ids out of range, NaN rewards, ranges of options
and rewards, baselines without the own reward, and a step whose cost does not grow with M."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from basis_jax import estimators
from basis_jax.estimators import Signals

pytestmark = pytest.mark.slow  # every estimator, every option: minutes

NAMES = sorted(estimators.ESTIMATORS)
M, ROWS, GROUP = 7, 12, 4
SUCCESSES, TRIALS = np.int32([0, 2, 4, 8, 6, 5, 0]), np.int32([8, 8, 8, 8, 8, 8, 0])
RANGED = (
    *("a_star_po", "basis", "dbb", "measured_mean", "spo", "spo_pp", "v05", "v05_filter"),
    "value_filter",
    "weighted_mean",
)


def make(name, **options):
    if "group_size" in estimators.option_names(name):
        options = {"group_size": GROUP} | options
    if name == "pass_at_k":
        options = {"k": 2} | options
    return estimators.make(name, **options)


def signals(seed=0, **changes):
    rng = np.random.default_rng(seed)
    made = Signals(
        rewards=jnp.asarray(rng.integers(0, 2, ROWS), jnp.float32),
        valid=jnp.ones(ROWS, bool),
        problem_ids=jnp.asarray(np.repeat(rng.integers(0, M, ROWS // GROUP), GROUP), jnp.int32),
        lengths=jnp.asarray(rng.integers(1, 9, ROWS), jnp.int32),
        score_norms=jnp.asarray(rng.gamma(0.5, size=ROWS), jnp.float32),
        logprob_sum=jnp.asarray(-rng.random(ROWS), jnp.float32),
        start_values=jnp.asarray(rng.random(ROWS), jnp.float32),
        greedy_rewards=jnp.asarray(rng.integers(0, 2, ROWS), jnp.float32),
    )
    return dataclasses.replace(made, **{k: jnp.asarray(v) for k, v in changes.items()})


def started(name, **options):
    """The estimator after one step."""
    estimator = make(name, **options)
    state, _ = estimator.update(estimator.init(SUCCESSES, TRIALS), signals(1))
    return estimator, state


def assert_same(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------- ids that do not exist
@pytest.mark.parametrize("outside", [M, -1, -M - 1, 10**6])
@pytest.mark.parametrize("name", NAMES)
def test_an_id_out_of_range_reads_nan_writes_nothing_and_is_invalid_for_the_others(name, outside):
    """Where ids are read at all; for the others they say nothing."""
    estimator, state = started(name)
    ids = np.array(signals().problem_ids)
    ids[:GROUP] = outside
    after, e = estimator.update(state, signals(problem_ids=ids))
    reads = {"problem_ids", "table"} & set(estimators.definition(name).needs)
    if not reads:
        assert_same((after, e), estimator.update(state, signals()))
        return
    assert np.isnan(e.values[:GROUP]).all() and np.isnan(e.advantages[:GROUP]).all()
    expected_state, expected = estimator.update(state, signals(valid=np.arange(ROWS) >= GROUP))
    assert_same(after, expected_state)
    np.testing.assert_array_equal(e.values[GROUP:], expected.values[GROUP:])
    np.testing.assert_array_equal(e.advantages[GROUP:], expected.advantages[GROUP:])
    assert np.isfinite(e.advantages[GROUP:]).all()


def test_sums_over_problems_leave_out_ids_that_do_not_exist():
    ids = jnp.arange(ROWS) - 1
    sums = estimators.problem_sums(jnp.arange(1.0, ROWS + 1), signals(problem_ids=ids), 3)
    assert sums.tolist() == [2, 3, 4]


# ------------------------------------------------------------------------------------ NaN rewards
@pytest.mark.parametrize("junk", [np.nan, np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_nan_reward_in_a_valid_row_counts_as_invalid_and_is_reported(name, junk):
    estimator, state = started(name)
    rewards = np.where(np.arange(ROWS) == 2, junk, signals().rewards).astype(np.float32)
    after, e = jax.jit(estimator.update)(state, signals(rewards=rewards))
    expected = jax.jit(estimator.update)(state, signals(valid=np.arange(ROWS) != 2))
    assert e.info.pop("nan_share") == np.float32(1 / ROWS)
    assert expected[1].info.pop("nan_share") == 0
    assert_same((after, e), expected)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after, e)))


def test_the_functions_of_the_library_report_nan_rewards_too():
    baseline, e = estimators.ema(np.float32([1, np.nan, 0]), 0.3)
    assert float(baseline) == pytest.approx(0.32) and float(e.info["nan_share"]) == np.float32(
        1 / 3
    )
    assert e.advantages[1] == 0
    e = estimators.remax(np.float32([1, 1]), np.float32([np.nan, 0]))
    assert e.advantages.tolist() == [0, 1]


def test_an_own_estimator_gets_no_nan_reward():
    def total(state, signals):
        rewards = jnp.where(signals.valid, signals.rewards, 0)
        return state + jnp.sum(rewards), estimators.reinforce(signals.rewards)

    own = estimators.Definition(total, lambda k, n: jnp.float32(0), needs=("rewards", "valid"))
    rewards = np.where(np.arange(ROWS) == 2, np.nan, 1).astype(np.float32)
    state, e = estimators.make(own).update(jnp.float32(0), signals(rewards=rewards))
    assert float(state) == ROWS - 1 and float(e.info["nan_share"]) == np.float32(1 / ROWS)
    assert e.advantages.tolist() == [1, 1, 0] + [1] * (ROWS - 3)


# ------------------------------------------------------------------------------ ranges of options
OPTIONS = [(name, option) for name in NAMES for option in sorted(estimators.option_names(name))]
ALLOWED = {("low", -1)}  # rewards of -1 and 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1, -1.0, "3", "x", [], [[1.0]], 1j])
@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_every_option_has_a_range(name, option, value):
    """Also that of a value which another one would do."""
    if (option, value if isinstance(value, (int, float)) else None) in ALLOWED:
        assert make(name, **{option: value})
        return
    if option == "features" and value == [[1.0]]:
        return
    with pytest.raises(ValueError, match=option):
        make(name, **{option: value})


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("basis", {"betas": np.float32([])}, "betas"),
        ("basis", {"betas": np.float32([1, np.nan])}, r"betas=nan at \[1\]"),
        ("basis", {"betas": np.float32([0, 1])}, r"betas=0.0 at \[0\]; .* above 0"),
        ("basis", {"folds": 8.0}, "folds=8.0; give a whole number of at least 3"),
        ("basis", {"folds": True}, "folds=True"),
        ("value_filter", {"features": np.float32([[1, 2], [np.nan, 3]])}, r"nan at \[1, 0\]"),
        ("value_filter", {"features": np.ones(3, np.float32)}, r"ndarray of shape \(3,\)"),
        ("value_filter", {"low": 1.0, "high": 1.0}, "low=1.0, high=1.0; low must be below high"),
        ("value_filter", {"own_variance": 0.0}, "own_variance=0.0; give a finite number above 0"),
        ("value_filter", {"own_variance": 1e-60}, "own_variance"),  # 0 as float32
        ("ema", {"rate": 1.5}, "rate=1.5; give a finite number of at least 0 and of at most 1"),
        ("ema", {"rate": True}, "rate=True"),
        ("dbb", {"scale": 1}, "scale=1; give True or False"),
        ("spo", {"decay": 1.0}, "spo got decay=1.0"),
        ("grpo", {"group_size": 2.5}, "group_size=2.5"),
        ("pass_at_k", {"k": 5}, "k=5 for group_size=4"),
    ],
)
def test_an_option_out_of_its_range_is_a_sentence(name, options, words):
    with pytest.raises(ValueError, match=words) as refused:
        make(name, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, "3"])
def test_the_functions_that_no_name_makes_have_ranges_too(value):
    x, mask = jnp.ones((1, 3)), jnp.ones((1, 3), bool)
    one, e = jnp.ones(1), estimators
    calls = [
        lambda: e.gae(x, x, mask, discount=value),
        lambda: e.gae(x, x, mask, trace_decay=value),
        lambda: e.gae(x, x, mask, across=value),
        lambda: e.returns_to_go(x, mask, discount=value),
        lambda: e.length_trace_decay(jnp.int32([3]), value),
        lambda: e.remax_original(one, x, mask, discount=value),
        lambda: e.remax_original(one, x, mask, kl_coef=value),
        lambda: e.sr_ppo(one, x, one, mask, k=value),
        lambda: e.whiten(x, mask, convention=value),
        lambda: e.ucpo(np.ones(4), np.ones(4), np.ones(4), group_size=4, weight=value),
        lambda: e.ucpo(np.ones(4), np.ones(4), np.ones(4), group_size=value),
        lambda: e.soft_value(one, value),
        lambda: e.fuse(one, one, one, spread=value),
        lambda: e.spo_decay(one, half=value),
        lambda: e.spo_decay(one, least=value),
        lambda: e.spo_decay(one, most=value),
    ]
    if value != -1.0:
        calls.append(lambda: e.sr_ppo(one, x, one, mask, trust=value))
    for number, call in enumerate(calls):
        with pytest.raises(ValueError):
            call()
            raise AssertionError(number)


# ------------------------------------------------------------------------------ ranges of rewards
@pytest.mark.parametrize("name", RANGED)
def test_a_concrete_reward_out_of_its_range_is_refused_and_a_traced_one_is_the_nearest(name):
    estimator, state = started(name)
    beyond = signals(rewards=np.where(np.arange(ROWS) == 3, 3, signals().rewards))
    with pytest.raises(ValueError, match=f"{name} got the reward 3 in row 3.* between 0 and 1"):
        estimator.update(state, beyond)
    invalid = dataclasses.replace(beyond, valid=jnp.arange(ROWS) != 3)
    estimator.update(state, invalid)
    nearest = signals(rewards=np.where(np.arange(ROWS) == 3, 1, signals().rewards))
    update = jax.jit(estimator.update)
    (after, e), (expected_state, expected) = update(state, beyond), update(state, nearest)
    assert_same((after, e.values), (expected_state, expected.values))
    assert np.isfinite(e.advantages).all()


@pytest.mark.parametrize("name", RANGED)
def test_rewards_of_another_range_give_the_values_of_that_range(name):
    """[-1, 3] is an affine image of [0, 1]; beta scales as the rewards do."""
    scaled = {"convention": "none"} if name in ("spo", "spo_pp") else {}
    scaled |= {"scale": False} if name == "dbb" else {}
    beta = {"beta": 0.5} if name == "a_star_po" else {}
    wide_beta = {"beta": 2.0} if name == "a_star_po" else {}
    wide = make(name, low=-1.0, high=3.0, **scaled, **wide_beta)
    unit, state = started(name, **scaled, **beta)
    rewards = np.asarray(signals().rewards)
    _, a = unit.update(state, signals())
    after, b = wide.update(state, signals(rewards=4 * rewards - 1))
    np.testing.assert_allclose(b.values, 4 * np.asarray(a.values) - 1, atol=2e-5)
    np.testing.assert_allclose(b.advantages, 4 * np.asarray(a.advantages), atol=2e-5)
    with pytest.raises(ValueError, match="low must be below high"):
        make(name, low=1.0)


@pytest.mark.parametrize("function", ["pass_at_k", "ucpo"])
def test_where_rewards_are_zero_or_one_another_one_is_refused(function):
    more = (
        {"k": 2}
        if function == "pass_at_k"
        else {
            "logprob_sum": np.float32([-1, -1]),
            "lengths": np.int32([1, 1]),
        }
    )
    with pytest.raises(ValueError, match=f"{function} got the reward -1 in row 1"):
        getattr(estimators, function)(np.float32([1, -1]), group_size=2, **more)


# ---------------------------------------------------------------------------- the own reward
UNBIASED = {
    **{
        n: {}
        for n in ("a_star_po", "basis", "batch_mean", "ema", "james_stein", "kae", "measured_mean")
    },
    **{n: {} for n in ("reinforce", "remax", "rloo", "spo", "spo_pp", "v05_filter")},
    **{n: {} for n in ("value_filter", "weighted_mean")},
    **{f"{n}+least_variance": {} for n in ("basis", "rloo", "spo", "value_filter")},
    "grpo": {"convention": "nemo"},
}


@pytest.mark.parametrize("name", UNBIASED)
def test_not_one_bit_of_a_baseline_depends_on_the_own_completion(name):
    """Whatever replaces completion i (a fractional reward, its score norm and length), b_i stays;
    several rows a problem. Where score norms are used, b_j of another row moves with them."""
    size, group = 72, 6
    rng = np.random.default_rng(0)
    options = dict(UNBIASED[name])
    if "group_size" in estimators.option_names(name):
        options["group_size"] = group
    estimator = estimators.make(name, **options)
    state, update = estimator.init(SUCCESSES, TRIALS), jax.jit(estimator.update)
    valid = jnp.asarray(np.arange(size) % 11 != 5)
    ids = jnp.asarray(np.repeat(rng.integers(0, M, size // group), group), jnp.int32)
    lengths, norms = rng.integers(1, 9, size), rng.gamma(0.3, size=size)

    def step(state, rewards, *, lengths=lengths, norms=norms):
        batch = Signals(
            rewards=jnp.asarray(rewards, jnp.float32),
            valid=valid,
            problem_ids=ids,
            lengths=jnp.asarray(lengths, jnp.int32),
            score_norms=jnp.asarray(norms, jnp.float32),
            logprob_sum=jnp.asarray(-norms, jnp.float32),
            greedy_rewards=jnp.asarray(ids % 2, jnp.float32),
        )
        return update(state, batch)

    state, _ = step(state, rng.random(size))
    rewards = np.clip(rng.random(size).astype(np.float32), 0, 1 - 3e-5)
    before = step(state, rewards)[1]
    moved = False
    for i in range(0, size, 3):
        for new in (0.0, 1.0, 0.1, rng.random(), rewards[i] + 3e-5):
            own = np.arange(size) == i
            changed = np.where(own, np.float32(new), rewards)
            others = {"norms": np.where(own, 9 * new, norms), "lengths": np.where(own, 99, lengths)}
            after = step(state, changed, **others)[1]
            for field in ("values", "baselines"):
                assert getattr(after, field)[i] == getattr(before, field)[i], (field, i, new)
            moved |= bool(np.any(np.asarray(after.baselines != before.baselines)[valid]))
    assert moved or name in (
        "a_star_po",
        "ema",
        "measured_mean",
        "reinforce",
        "remax",
        "spo",
        "spo_pp",
    )


# ------------------------------------------------------------------------------ cost and buffers
def compiled(name, problems):
    """The step with a donated state over so many problems."""
    estimator = make(name)
    counts = jax.ShapeDtypeStruct((problems,), np.float32)
    given = {}
    if name.startswith(("value_filter", "v05_filter")):
        given["features"] = jax.ShapeDtypeStruct((problems, 3), np.float32)
    if name == "basis":
        given["reference_rewards"] = jax.ShapeDtypeStruct((problems, 5), np.float32)
    state = jax.eval_shape(estimator.init, counts, counts, **given)
    return jax.jit(estimator.update, donate_argnums=0).lower(state, signals()).compile()


@pytest.mark.parametrize("name", [*NAMES, "value_filter+least_variance"])
def test_a_step_over_a_million_problems_costs_what_one_over_a_thousand_does(name):
    """As compiled: the same scratch memory, new outputs and operations; the state is in place."""

    def costs(program):
        memory = program.memory_analysis()
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        flops = program.cost_analysis().get("flops", 0)
        return memory.temp_size_in_bytes, new, flops

    assert costs(compiled(name, 1000)) == costs(compiled(name, 1_000_000))


@pytest.mark.parametrize("name", ["dbb", "kae", "spo"])
def test_no_two_arrays_of_a_first_state_are_one_buffer(name):
    """Each is donated by the training step."""
    estimator = make(name)
    update = jax.jit(estimator.update, donate_argnums=0)
    state = estimator.init(SUCCESSES, TRIALS)
    update(state, signals())
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
