"""Soft values, ReMax, and token-level advantages: worked vectors and oracles."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference

from basis_jax import estimators
from basis_jax.estimators import critic
from basis_jax.estimators.optimal_value import soft_value

SINGLE = np.float32([1, 0, 1, 0, 0, 1])


def close(actual, expected, atol=2e-6):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def mask(*rows):
    return jnp.array([[c == "1" for c in row] for row in rows])


# ---------------------------------------------------------------------------- values of prompts
def test_soft_value_worked_vector():
    close(soft_value(jnp.float32([0, 1 / 8, 0.5, 1]), 0.5), [0, 0.293513, 0.71689, 1])
    close(soft_value(jnp.float32([0.25]), 0.0), 0.25)
    assert float(soft_value(jnp.float32([0.25]), 0.01)[0]) == pytest.approx(0.98614, abs=1e-5)
    with pytest.raises(ValueError, match="beta=-1"):
        soft_value(jnp.float32([0.5]), -1.0)


def test_a_star_po_subtracts_the_soft_value_and_reports_unknown_prompts():
    rewards, k, n = np.float32([1, 0, 1]), np.int32([0, 4, 0]), np.int32([8, 8, 0])
    e = estimators.a_star_po(rewards, k, n)
    close(e.values, [0, 0.71689, 0.71689])
    close(e.advantages, [1, -0.71689, 0.28311])
    close(e.info["fallback_share"], 1 / 3)


def test_remax_worked_vector():
    greedy = np.float32([1, 1, 0, 0, 1, 0])
    e = estimators.remax(SINGLE, greedy)
    close(e.advantages, [0, -1, 1, 0, -1, 1])
    junk = np.float32([np.nan, 1, 0, 0, 1, 0])
    close(estimators.remax(SINGLE, junk, valid=~np.isnan(junk)).advantages, e.advantages)


# ------------------------------------------------------------------------------ returns to go
KL = jnp.float32([[0.1, 0.2, 0.3, -0.1, 0, 0.1]])


def test_remax_with_kl_in_the_reward_in_verl_and_in_the_original():
    live = mask("111111")
    rewards = critic.terminal_rewards(jnp.float32([-1]), live) - 0.1 * KL
    close(critic.returns_to_go(rewards, live), [[-1.06, -1.05, -1.03, -1.0, -1.01, -1.01]])
    original = [[-0.745092, -0.793781, -0.844506, -0.847375, -0.9025, -0.96]]
    close(critic.remax_original(jnp.float32([-1]), KL, live), original)


def test_reinforce_pp_with_kl_in_the_reward():
    """Row 0: three tokens, KL .3 -.1 .2 at .1 gives .96 .99 .98; padding may hold anything."""
    live = mask("111000")
    kl = jnp.float32([[0.3, -0.1, 0.2, np.nan, 7, 7]])
    rewards = critic.terminal_rewards(jnp.float32([1]), live) - 0.1 * kl
    close(critic.returns_to_go(rewards, live), [[0.96, 0.99, 0.98, 0, 0, 0]])


@pytest.mark.parametrize(
    ("across", "expected"),
    [("skip", [0.729, 0.81, 0, 0, 0.9, 1]), ("count", [0.59049, 0.6561, 0, 0, 0.9, 1])],
)
def test_returns_cross_observations_of_a_multi_turn_rollout(across, expected):
    live = mask("110011")
    rewards = critic.terminal_rewards(jnp.float32([1]), live)
    close(critic.returns_to_go(rewards, live, discount=0.9, across=across), [expected])


# ------------------------------------------------------------------------------------- GAE
VALUES = jnp.float32([[0.5, 0.6, np.nan, 9, 0.7, 0.9]])


@pytest.mark.parametrize(
    ("across", "expected"),
    [
        ("skip", [0.433605, 0.36109, 0, 0, 0.28505, 0.1]),
        ("count", [0.32924, 0.250122, 0, 0, 0.28505, 0.1]),
    ],
)
def test_gae_worked_vectors(across, expected):
    live = mask("110011")
    rewards = critic.terminal_rewards(jnp.float32([1]), live)
    options = {"discount": 0.99, "trace_decay": 0.95, "across": across}
    advantages, returns = estimators.gae(rewards, VALUES, live, **options)
    close(advantages, [expected])
    close(returns, np.where(live, np.float32([expected]) + np.nan_to_num(VALUES), 0))


def test_gae_with_the_length_adaptive_trace_decay():
    """SAO, alpha 1.5, four tokens: lambda 1 - 1 / 6."""
    live = mask("110011")
    decay = critic.length_trace_decay(jnp.int32([4]), 1.5)
    close(decay, 0.833333)
    rewards = critic.terminal_rewards(jnp.float32([1]), live)
    advantages, _ = estimators.gae(rewards, VALUES, live, trace_decay=decay)
    close(advantages, [[0.380093, 0.336111, 0, 0, 0.283333, 0.1]])


def test_gae_without_discounts_is_the_reward_minus_the_value():
    live = mask("110011")
    rewards = critic.terminal_rewards(jnp.float32([1]), live)
    advantages, _ = estimators.gae(rewards, VALUES, live)
    close(advantages, np.where(live, 1 - np.nan_to_num(VALUES), 0))


@pytest.mark.parametrize("across", critic.ACROSS)
def test_gae_equals_the_oracle(across):
    rng = np.random.default_rng(0)
    live, values = rng.random((5, 9)) < 0.6, rng.normal(size=(5, 9))
    live[4] = False
    rewards = rng.normal(size=(5, 9))
    options = {"discount": 0.9, "trace_decay": 0.7, "across": across}
    advantages, _ = estimators.gae(
        *(jnp.asarray(x, jnp.float32) for x in (rewards, values)), jnp.asarray(live), **options
    )
    rows = zip(rewards, values, live, strict=True)
    close(advantages, [reference.gae(*row, **options) for row in rows], atol=1e-5)


def test_whitening_counts_every_true_token_once():
    x, live = jnp.float32([[1, 2, 99], [3, np.nan, 4]]), mask("110", "101")
    tokens = np.array([1, 2, 3, 4.0])
    expected = (tokens - 2.5) / np.sqrt(1.25)
    close(critic.whiten(x, live), [[expected[0], expected[1], 0], [expected[2], 0, expected[3]]])


# ----------------------------------------------------------------------------- steps and prefixes
def test_vineppo_worked_vector():
    values = jnp.float32([[1 / 3, 2 / 3, 8 / 9, 5]])
    steps, live = jnp.int32([[0, 0, 1, 1, 1, 2, 3]]), mask("1111110")
    advantages = estimators.vineppo(jnp.float32([1]), values, steps, live)
    close(advantages, [[0.333333, 0.333333, 0.222222, 0.222222, 0.222222, 0.111111, 0]])
    known = jnp.array([[True, True, False, False]])
    advantages = estimators.vineppo(jnp.float32([1]), values, steps, live, estimated=known)
    close(advantages, [[0.333333, 0.333333, 0.333333, 0.333333, 0.333333, 0, 0]])


def test_sr_ppo_credits_changes_of_the_success_probability():
    """q = 1 - (1 - P)^2 goes .19 -> .36 -> .75, then the outcome: 1 - .75 on every token."""
    live, prefix = mask("1010"), jnp.float32([[0.2, 9, 0.5, np.nan]])
    advantages = estimators.sr_ppo(jnp.float32([1]), prefix, jnp.float32([0.1]), live, k=2)
    close(advantages, [[0.17 + 0.25, 0, 0.39 + 0.25, 0]])
    trustless = estimators.sr_ppo(
        jnp.float32([1]), prefix, jnp.float32([0.1]), live, k=2, trust=0.0
    )
    close(trustless, [[0.17, 0, 0.39, 0]])


def test_misuse_is_a_sentence():
    with pytest.raises(ValueError, match="skip, count"):
        estimators.gae(KL, KL, mask("111111"), across="reset")
