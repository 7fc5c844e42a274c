"""Estimators other than BASIS: worked vectors, oracles, and the trainer's face of all of them."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from basis_jax import estimators
from basis_jax.estimators import Signals

SINGLE = np.float32([1, 0, 1, 0, 0, 1])  # six prompts, one rollout each
SINGLE_LENGTHS = np.int32([2, 6, 3, 5, 4, 1])
GROUPS = np.float32([1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 0])  # three prompts, four rollouts each
GROUP_LENGTHS = np.int32([3, 6, 5, 2, 4, 4, 3, 5, 6, 6, 2, 5])


def close(actual, expected, atol=2e-6):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


# --------------------------------------------------------------------------- worked vectors
def test_reinforce_has_no_baseline():
    e = estimators.reinforce(SINGLE)
    close(e.advantages, [1, 0, 1, 0, 0, 1])
    close(e.values, 0)
    assert e.info["zero_share"] == 0.5


def test_batch_mean_with_and_without_the_own_reward():
    sign = np.where(SINGLE > 0, 1, -1)
    close(estimators.batch_mean(SINGLE, leave_one_out=False).advantages, 0.5 * sign)
    close(estimators.batch_mean(SINGLE).advantages, 0.6 * sign)
    close(estimators.batch_mean(SINGLE).values, reference.leave_one_out_mean(SINGLE))


@pytest.mark.parametrize(
    ("convention", "success", "failure"),
    [
        ("openrlhf", 1.581139, -0.632456),
        ("verl", 1.543033, -0.617213),
        ("sequence", 0.912871, -0.912871),
    ],
)
def test_reinforce_pp_conventions(convention, success, failure):
    e = estimators.reinforce_pp(SINGLE, SINGLE_LENGTHS, convention=convention)
    close(e.advantages, np.where(SINGLE > 0, success, failure))
    close(e.values, 0.5 if convention == "sequence" else 0.285714)


def test_rloo_worked_vector():
    a, b = 0.666667, -0.333333
    expected = [a, -a, -a, a, 0, 0, 0, 0, b, b, 1, b]
    close(estimators.rloo(GROUPS, group_size=4).advantages, expected)


@pytest.mark.parametrize(
    ("convention", "first", "last"),
    [
        ("verl", 0.866024, [-0.499999, -0.499999, 1.499997, -0.499999]),
        ("trl", 0.865875, [-0.4999, -0.4999, 1.4997, -0.4999]),
        ("openrlhf", 0.866025, [-0.5, -0.5, 1.5, -0.5]),
    ],
)
def test_grpo_conventions(convention, first, last):
    e = estimators.grpo(GROUPS, group_size=4, convention=convention)
    close(e.advantages, [first, -first, -first, first, 0, 0, 0, 0, *last])
    close(e.info["degenerate_share"], 1 / 3)


def test_dr_grpo_worked_vector():
    expected = [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0, -0.25, -0.25, 0.75, -0.25]
    close(estimators.dr_grpo(GROUPS, group_size=4).advantages, expected)


# ----------------------------------------------------------------------------------- oracles
REWARDS = st.lists(st.sampled_from([0.0, 0.3, 1.0, -1.0]), min_size=12, max_size=12)
MASKS = st.lists(st.booleans(), min_size=12, max_size=12)
CONVENTIONS = ["openrlhf", "verl", "spo_pp", "sequence"]


@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(max_examples=30, deadline=None)
@given(rewards=REWARDS, valid=MASKS, lengths=st.lists(st.integers(1, 9), min_size=12, max_size=12))
def test_reinforce_pp_whitens_the_list_of_all_tokens(convention, rewards, valid, lengths):
    valid = np.array(valid)
    rewards, lengths = np.float32(rewards), np.int32(lengths)
    e = estimators.reinforce_pp(
        np.where(valid, rewards, np.nan), lengths, valid=valid, convention=convention
    )
    live = rewards[valid].tolist()
    same = len(set(live)) < 2
    expected = np.zeros(12)
    if live and not same:
        expected[valid] = reference.reinforce_pp(live, lengths[valid], convention)
    np.testing.assert_allclose(e.advantages, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(rewards=REWARDS, valid=MASKS)
def test_groups_ignore_invalid_rollouts_and_agree_with_the_oracle(rewards, valid):
    """A group is its valid rollouts; with fewer than two of them its advantages are 0."""
    valid, rewards = np.array(valid), np.float32(rewards)
    given_rewards = np.where(valid, rewards, np.nan)
    options = {"group_size": 4, "valid": valid}
    loo = estimators.rloo(given_rewards, **options).advantages
    scaled = estimators.grpo(given_rewards, **options).advantages
    centred = estimators.dr_grpo(given_rewards, **options).advantages
    for rows in np.arange(12).reshape(3, 4):
        live = rows[valid[rows]]
        r = rewards[live].astype(np.float64)
        close(np.asarray(loo)[rows[~valid[rows]]], 0)
        if len(live) < 2:
            for x in (loo, scaled, centred):
                close(np.asarray(x)[rows], 0)
            continue
        close(np.asarray(loo)[live], r - reference.leave_one_out_mean(r))
        close(np.asarray(scaled)[live], reference.grpo(r, 1e-4), atol=1e-5)
        close(np.asarray(centred)[live], r - r.mean())


@pytest.mark.parametrize("reward", [0.1, 0.7, 1.0])
def test_equal_rewards_give_exactly_zero_not_amplified_rounding(reward):
    rewards, lengths = np.full(12, reward, np.float32), GROUP_LENGTHS
    for convention in CONVENTIONS:
        e = estimators.reinforce_pp(rewards, lengths, convention=convention)
        np.testing.assert_array_equal(e.advantages, 0)
        assert e.info["zero_share"] == 1
    np.testing.assert_array_equal(estimators.grpo(rewards, group_size=4).advantages, 0)


def test_a_single_row_or_token_has_no_signal():
    for convention in CONVENTIONS:
        e = estimators.reinforce_pp(np.float32([1]), np.int32([1]), convention=convention)
        close(e.advantages, 0)


def test_rloo_baseline_ignores_the_own_reward():
    before = estimators.rloo(GROUPS, group_size=4).values
    for i in range(12):
        flipped = GROUPS.copy()
        flipped[i] = 1 - flipped[i]
        assert estimators.rloo(flipped, group_size=4).values[i] == before[i]


# -------------------------------------------------------------------------------- the registry
def signals(rewards, ids, *, lengths=None, valid=None):
    n = len(rewards)
    return Signals(
        rewards=jnp.asarray(rewards, jnp.float32),
        valid=jnp.ones(n, bool) if valid is None else jnp.asarray(valid),
        problem_ids=jnp.asarray(ids, jnp.int32),
        lengths=jnp.full(n, 4, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32),
        score_norms=jnp.arange(1.0, n + 1),
    )


def test_basis_update_looks_its_problems_up_in_the_table():
    successes, trials = np.int32([1, 8, 3, 0, 5]), np.int32([8, 8, 8, 8, 8])
    est = estimators.make("basis")
    assert est.needs_table and est.takes_table and est.group_size == 1
    ids = np.int32([4, 0, 2])
    state, e = jax.jit(est.update)(est.init(successes, trials), signals([1, 0, 1], ids))
    expected = estimators.basis(np.float32([1, 0, 1]), successes[ids], trials[ids])
    close(e.advantages, expected.advantages)
    np.testing.assert_array_equal(state.successes, successes)


def test_a_table_is_made_only_for_those_that_start_from_it():
    names = ("basis", "v05", "spo", "value_filter", "kae", "reinforce")
    made = [estimators.make(n, **({"group_size": 2} if n == "v05" else {})) for n in names]
    assert [e.needs_table for e in made] == [True, True, False, False, False, False]
    assert [e.takes_table for e in made] == [True, True, True, True, False, False]


def test_stateless_estimators_are_lifted():
    est = estimators.make("reinforce_pp", convention="verl")
    state, e = est.update(
        est.init(SINGLE, SINGLE), signals(SINGLE, range(6), lengths=SINGLE_LENGTHS)
    )
    assert state == () and not est.takes_table
    close(e.advantages, np.where(SINGLE > 0, 1.543033, -0.617213))
    assert estimators.make("rloo", group_size=4).group_size == 4


def test_misuse_of_make_is_a_sentence_that_names_the_near_ones():
    for name, options, words in [
        ("bassis", {}, "did you mean basis"),
        ("nothing_like_it", {}, "allowed: .*rloo"),
        ("basis", {"fold": 4}, "did you mean folds"),
        ("reinforce", {"beta": 4}, "allowed: none"),
        ("basis", {"rule": "paper"}, "robust, published"),
        ("rloo", {}, "needs the option 'group_size'"),
        ("grpo", {"group_size": 1}, "group_size=1"),
        ("grpo", {"group_size": 4, "convention": "x"}, "trl, trl_batch, verl"),
    ]:
        with pytest.raises(ValueError, match=words):
            estimators.make(name, **options)


def test_impossible_tables_are_refused_with_the_problem_named():
    with pytest.raises(ValueError, match="problem 1 has 9 successes in 8 trials"):
        estimators.make("basis").init(np.int32([1, 9]), np.int32([8, 8]))


def test_incomplete_groups_are_refused():
    with pytest.raises(ValueError, match="whole groups"):
        estimators.rloo(GROUPS, group_size=5)


def test_the_library_loads_no_language_model_code_and_refuses_unequal_lengths():
    """In a fresh process, without the test suite's shape checks: ValueError, not a broadcast."""
    program = """
import sys
import numpy as np
from basis_jax import estimators
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"flax", "optax", "orbax", "transformers", "datasets", "sympy"}, loaded
assert not {"basis_jax.model", "basis_jax.config", "basis_jax.model.sharding"} & set(sys.modules)
r = np.float32([1, 0])
assert estimators.rloo(r, group_size=2).advantages.tolist() == [1, -1]
for call in (
    lambda: estimators.basis(r, r[:1], r),
    lambda: estimators.basis(r, r, r, valid=np.array([True])),
    lambda: estimators.reinforce_pp(r[:, None], r[:, None]),
    lambda: estimators.make("basis").init(r, r[:1]),
    lambda: estimators.make("basis").init(r, r, reference_rewards=np.ones((3, 4))),
    lambda: estimators.make("value_filter", features=np.ones((5, 2))).init(r, r),
):
    try:
        call()
    except ValueError as error:
        assert "one length" in str(error) or "one row per problem" in str(error), error
    else:
        raise AssertionError("accepted")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
