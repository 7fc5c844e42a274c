"""Every estimator of the registry under jit, under vmap over seeds, with its rows over devices."""

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
