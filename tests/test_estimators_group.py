"""Group estimators beyond RLOO and GRPO: worked vectors, oracles, groups with invalid rollouts."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from basis_jax import estimators
from basis_jax.estimators.shrinkage import fuse

GROUPS = np.float32([1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 0])  # three prompts, four rollouts each
LENGTHS = np.int32([3, 6, 5, 2, 4, 4, 3, 5, 6, 6, 2, 5])
REWARDS = st.lists(st.sampled_from([0.0, 1.0]), min_size=12, max_size=12)


def close(actual, expected, atol=2e-6):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


# --------------------------------------------------------------------------- worked vectors
def test_grpo_with_the_batch_sd_and_with_the_others_moments():
    batch = estimators.grpo(GROUPS, group_size=4, convention="trl_batch").advantages
    close(batch[:4], 0.97082 * np.array([1, -1, -1, 1]), atol=5e-6)
    nemo = estimators.grpo(GROUPS, group_size=4, convention="nemo").advantages
    a, b = 1.154699, -0.577349
    close(nemo, [a, -a, -a, a, 0, 0, 0, 0, b, b, 1, b])


def test_opo_weighs_the_baseline_by_length():
    e = estimators.opo(GROUPS, LENGTHS, group_size=4)
    b = -0.105263
    close(e.advantages, [0.6875, -0.3125, -0.3125, 0.6875, 0, 0, 0, 0, b, b, 0.894737, b])
    close(e.values[::4], [0.3125, 1, 0.105263])
    tokens = np.asarray(e.advantages) * LENGTHS
    close(tokens.reshape(3, 4).sum(1), 0, atol=1e-5)


def test_gpg_conventions_count_different_things():
    e = estimators.gpg(GROUPS, group_size=4)
    close(e.info["alpha"], 1.5)
    close(e.advantages, [0.75, -0.75, -0.75, 0.75, 0, 0, 0, 0, -0.375, -0.375, 1.125, -0.375])
    e = estimators.gpg(GROUPS, group_size=4, convention="verl")
    close(e.info["alpha"], 1.714286)
    close(e.advantages[0], 0.857143)
    signed = 2 * GROUPS - 1
    close(estimators.gpg(signed, group_size=4, convention="verl").info["alpha"], 1)
    close(estimators.gpg(np.ones_like(GROUPS), group_size=4).advantages, 0)


def test_reinforce_pp_baseline_recentres_by_tokens():
    e = estimators.reinforce_pp_baseline(GROUPS, LENGTHS, group_size=4)
    a, b, c = 1.859263, -1.175054, -0.416475
    close(e.advantages, [a, b, b, a, *[0.342104] * 4, c, c, 2.617842, c])
    e = estimators.reinforce_pp_baseline(GROUPS, LENGTHS, group_size=4, convention="verl")
    close(e.advantages[0], 1.840944)


def test_james_stein_worked_vectors():
    e = estimators.james_stein(GROUPS, group_size=4)
    first = [0.631313, -0.661616, -0.661616, 0.631313]
    last = [-0.444444, -0.444444, 0.8, -0.444444]
    close(e.advantages, [*first, *[0.343137] * 4, *last])
    close(e.info["shrinkage"], np.mean([0.121212, 0.54902, 0.266667]))
    code = estimators.james_stein(GROUPS, group_size=4, convention="code")
    close(code.info["shrinkage"], np.mean([0.181817, 0.82352, 0.399996]))


def test_pass_at_k_worked_vector():
    rewards = np.float32([1, 1, 0, 0, 0, 0, 0, 0])
    e = estimators.pass_at_k(rewards, group_size=8, k=4)
    close(e.values, 0.785714)
    close(e.advantages, [0.522232] * 2 + [-0.174077] * 6)


def test_best_of_group_worked_vector():
    rewards = np.float32([0.2, 1, 0.7, 0.7])
    close(estimators.best_of_group(rewards, group_size=4).advantages, [0, 0.3, 0, 0])
    scaled = estimators.best_of_group(rewards, group_size=4, scale=True)
    close(scaled.advantages, [0, 0.904531, 0, 0])


def test_ucpo_leans_to_the_unlikely_right_rollout():
    """Vector rows 0 and 3: mean log-probs .3 apart; the mass 2 x .866025 stays."""
    lengths = np.array([3, 6, 5, 2])
    sums = np.float32([-0.5, -0.1, -0.9, -0.8]) * lengths.astype(np.float32)
    e = estimators.ucpo(GROUPS[:4], sums, lengths, group_size=4)
    close(e.advantages, [0.840238, -0.866025, -0.866025, 0.891813], atol=5e-6)
    one_right = np.float32([1, 0, 0, 0])
    grpo = estimators.grpo(one_right, group_size=4, convention="oat").advantages
    close(estimators.ucpo(one_right, sums, lengths, group_size=4).advantages, grpo)


@pytest.mark.parametrize(
    ("mean", "prior", "count", "weight", "baseline"),
    [
        (0.0, 0.2, 4, 0, 0.2),
        (0.5, -0.6, 4, 0.793388, 0.272727),
        (-1.0, 0.9, 4, 0.930748, -0.868421),
        (-0.5, 0.9, 8, 0.936224, -0.410714),
        (0.25, -0.6, 8, 0.82699, 0.102941),
    ],
)
def test_v05_fuses_mean_and_prior(mean, prior, count, weight, baseline):
    actual = fuse(*(jnp.float32(x) for x in (mean, prior, count)), spread=1.0)
    close(actual, [weight, baseline], atol=5e-6)


def test_v05_takes_the_table_as_its_prior_on_the_scale_of_the_rewards():
    """p' = (2 + .5) / (8 + 1) = 5 / 18; with rewards -1, 1 everything is affine in it."""
    k, n = np.full(4, 2), np.full(4, 8)
    unit = estimators.v05(np.float32([1, 1, 1, 0]), k, n, group_size=4)
    signed = estimators.v05(np.float32([1, 1, 1, -1]), k, n, group_size=4, low=-1.0)
    close(2 * np.asarray(unit.values) - 1, signed.values)
    noise, gap = 1 / 16, (0.75 - 2.5 / 9) ** 2
    weight = (gap - noise) / gap
    close(unit.values, weight * 0.75 + (1 - weight) * 2.5 / 9)
    close(unit.info["prior_kept"], 0)


# ----------------------------------------------------------------------------------- oracles
@settings(max_examples=30, deadline=None)
@given(rewards=REWARDS)
def test_groups_agree_with_the_oracles(rewards):
    r = np.float32(rewards)
    groups = r.reshape(3, 4).astype(float)
    nemo = estimators.grpo(r, group_size=4, convention="nemo").advantages
    close(nemo, np.concatenate([reference.nemo_grpo(g) for g in groups]), atol=1e-5)
    for convention in ("paper", "code"):
        e = estimators.james_stein(r, group_size=4, convention=convention)
        expected = np.concatenate(reference.james_stein(groups, convention))
        close(e.advantages, expected, atol=1e-5)
    for k in (1, 2, 4):
        e = estimators.pass_at_k(r, group_size=4, k=k)
        close(e.advantages, np.concatenate([reference.pass_at_k(g, k) for g in groups]), atol=1e-5)


FUNCTIONS = {
    "rloo": lambda r, **x: estimators.rloo(r, group_size=4, **x),
    "grpo": lambda r, **x: estimators.grpo(r, group_size=4, **x),
    "nemo": lambda r, **x: estimators.grpo(r, group_size=4, convention="nemo", **x),
    "trl_batch": lambda r, **x: estimators.grpo(r, group_size=4, convention="trl_batch", **x),
    "opo": lambda r, **x: estimators.opo(r, np.ones(len(r)), group_size=4, **x),
    "gpg": lambda r, **x: estimators.gpg(r, group_size=4, **x),
    "reinforce_pp_baseline": lambda r, **x: estimators.reinforce_pp_baseline(
        r, np.ones(len(r)), group_size=4, **x
    ),
    "james_stein": lambda r, **x: estimators.james_stein(r, group_size=4, **x),
    "pass_at_k": lambda r, **x: estimators.pass_at_k(r, group_size=4, k=2, **x),
    "best_of_group": lambda r, **x: estimators.best_of_group(r, group_size=4, **x),
    "ucpo": lambda r, **x: estimators.ucpo(
        r, -np.ones(len(r), np.float32), np.ones(len(r)), group_size=4, **x
    ),
    "v05": lambda r, **x: estimators.v05(r, np.ones(len(r)), np.full(len(r), 3), group_size=4, **x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_prompt_without_a_valid_rollout_changes_nothing_for_the_others(name):
    """As if it were not in the batch, whatever it holds; its own advantages are 0."""
    function = FUNCTIONS[name]
    rewards = np.concatenate([GROUPS[:4], np.float32([np.nan] * 4), GROUPS[4:]])
    valid = np.isfinite(rewards)
    e, expected = function(rewards, valid=valid), function(GROUPS)
    close(np.asarray(e.advantages)[valid], expected.advantages)
    close(np.asarray(e.advantages)[~valid], 0)
    for key, value in expected.info.items():
        if key != "shrinkage":
            close(e.info[key], value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_invalid_rollout_may_hold_anything(name):
    valid = np.arange(12) != 2
    results = [
        FUNCTIONS[name](np.where(valid, GROUPS, junk).astype(np.float32), valid=valid).advantages
        for junk in (0.0, 1.0, np.nan, np.inf)
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    assert results[0][2] == 0


@pytest.mark.parametrize("name", ["rloo", "james_stein", "nemo"])
def test_unbiased_group_baselines_ignore_the_own_reward(name):
    before = FUNCTIONS[name](GROUPS).values
    for i in range(12):
        flipped = GROUPS.copy()
        flipped[i] = 1 - flipped[i]
        assert FUNCTIONS[name](flipped).values[i] == before[i]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_permuting_the_rollouts_of_a_prompt_permutes_its_advantages(name):
    order = np.int32([2, 0, 3, 1, 5, 4, 7, 6, 10, 11, 8, 9])
    close(FUNCTIONS[name](GROUPS[order]).advantages, FUNCTIONS[name](GROUPS).advantages[order])


def test_misuse_is_a_sentence():
    for call, words in [
        (lambda: estimators.pass_at_k(GROUPS, group_size=4, k=5), "k=5 for group_size=4"),
        (lambda: estimators.gpg(GROUPS, group_size=4, convention="x"), "authors, verl"),
        (lambda: estimators.james_stein(GROUPS, group_size=4, convention="x"), "paper, code"),
        (lambda: estimators.opo(GROUPS, LENGTHS, group_size=1), "group_size=1"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
