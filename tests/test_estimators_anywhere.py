"""Every estimator of the registry under jit, under vmap over seeds, with its rows over devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from basis_jax import estimators
from basis_jax.estimators import Signals

PROBLEMS, ROWS, GROUP = 40, 16, 4
OPTIONS = {"pass_at_k": {"k": 2}}


def make(name):
    options = dict(OPTIONS.get(name, {}))
    if "group_size" in estimators.option_names(name):
        options["group_size"] = GROUP
    return estimators.make(name, **options)


def one_seed(name, seed):
    """Offline counts, and the signals of two steps."""
    rng = np.random.default_rng(seed)
    trials = np.full(PROBLEMS, 8, np.float32)
    successes = rng.binomial(8, rng.random(PROBLEMS)).astype(np.float32)
    group = make(name).group_size
    steps = [
        Signals(
            rewards=jnp.asarray(rng.integers(0, 2, ROWS), jnp.float32),
            valid=jnp.asarray(np.arange(ROWS) != 5),
            problem_ids=jnp.asarray(
                np.repeat(rng.permutation(PROBLEMS)[: ROWS // group], group), jnp.int32
            ),
            lengths=jnp.asarray(rng.integers(1, 9, ROWS), jnp.int32),
            score_norms=jnp.asarray(rng.gamma(0.5, size=ROWS), jnp.float32),
            greedy_rewards=jnp.asarray(rng.integers(0, 2, ROWS), jnp.float32),
            start_values=jnp.asarray(rng.random(ROWS), jnp.float32),
            logprob_sum=jnp.asarray(-rng.gamma(2.0, size=ROWS), jnp.float32),
        )
        for _ in range(2)
    ]
    return jnp.asarray(successes), jnp.asarray(trials), steps


def two_steps(name):
    estimator = make(name)

    def run(successes, trials, steps):
        state = estimator.init(successes, trials)
        outcomes = []
        for signals in steps:
            state, estimate = estimator.update(state, signals)
            outcomes.append((estimate.advantages, estimate.values))
        return outcomes

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(estimators.ESTIMATORS))
def test_vmap_over_seeds_and_rows_over_devices_change_nothing(name):
    seeds = [one_seed(name, seed) for seed in range(3)]
    run = jax.jit(two_steps(name))
    alone = [run(*seed) for seed in seeds]
    assert any(np.asarray(advantages).any() for advantages, _ in alone[0])

    stacked = jax.jit(jax.vmap(two_steps(name)))(*jax.tree.map(lambda *x: jnp.stack(x), *seeds))
    expected = jax.tree.map(lambda *x: np.stack(x), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), stacked, expected)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    successes, trials, steps = seeds[0]
    split = jax.device_put(steps, NamedSharding(mesh, PartitionSpec("data")))
    assert len(split[0].rewards.sharding.device_set) == 4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        run(successes, trials, split),
        alone[0],
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(estimators.ESTIMATORS))
def test_a_step_without_a_valid_row_teaches_and_changes_nothing(name):
    """Advantages and values 0, every number finite; of the state only the clock may go on."""
    successes, trials, (signals, _) = one_seed(name, 0)
    none = dataclasses.replace(
        signals,
        rewards=jnp.full(ROWS, jnp.nan, jnp.float32),
        valid=jnp.zeros(ROWS, bool),
    )
    estimator = make(name)
    state = estimator.init(successes, trials)
    after, estimate = jax.jit(estimator.update)(state, none)
    assert not np.any(estimate.advantages) and not np.any(estimate.values)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after, estimate.info)))
    if name not in ("value_filter", "v05_filter"):  # whose uncertainty grows with the clock
        for path, old in jax.tree.leaves_with_path(state):
            if "step" not in jax.tree_util.keystr(path):
                new = dict(jax.tree.leaves_with_path(after))[path]
                np.testing.assert_array_equal(new, old, err_msg=jax.tree_util.keystr(path))
    else:
        np.testing.assert_allclose(after.own_mean, state.own_mean)
        np.testing.assert_allclose(after.mean, state.mean, atol=1e-6)
