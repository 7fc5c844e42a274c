"""AdamW's moments in bfloat16: rounded at random, so that they follow what float32 would hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from basis_jax.config import CheckpointSection, Config, OptimSection
from basis_jax.model import costs
from basis_jax.model.sharding import make_mesh
from basis_jax.opening.checks import check_words
from basis_jax.runs import checkpoint
from basis_jax.training.moments import round_at_random
from basis_jax.training.update import abstract_state, make_optimizer, make_state

HALF = OptimSection(lr=1e-3, moments_dtype="bfloat16", max_grad_norm=0.0)
WHOLE = dataclasses.replace(HALF, moments_dtype="float32")


@pytest.mark.parametrize("x", [1.00390625, -0.7251, 3.1e-30, 65000.123, 0.0])
def test_random_rounding_keeps_the_mean_and_moves_by_less_than_a_place(x):
    """False alarm: 6 standard errors of a mean of 2^16 draws, 2e-9 each."""
    x, count = np.float32(x), 2**16
    found = round_at_random(jnp.full(count, x), jax.random.key(1))
    assert found.dtype == jnp.bfloat16
    found = np.float64(found)
    place = 2.0 ** (np.floor(np.log2(abs(x))) - 7) if x else 0.0
    assert np.all(np.abs(found - x) < place) or np.all(found == x)
    assert abs(found.mean() - np.float64(x)) <= 6 * place / 2 / np.sqrt(count)


def test_what_is_not_finite_stays_so():
    found = round_at_random(jnp.asarray([jnp.nan, jnp.inf, -jnp.inf]), jax.random.key(0))
    assert np.isnan(found[0]) and found[1] == jnp.inf and found[2] == -jnp.inf


def moments_after(section, gradients, *, nearest=False):
    """Both moments in float64 after these gradients [steps, size], and the last change."""
    optimizer = make_optimizer(section, updates=1)
    params = jnp.zeros(gradients.shape[1])

    def step(state, gradient):
        changes, state = optimizer.update(gradient, state, params)
        if nearest:
            low = lambda x: x.astype(jnp.bfloat16).astype(x.dtype)  # noqa: E731
            state = jax.tree.map(lambda x: low(x) if x.ndim else x, state)
        return state, changes

    with jax.numpy_dtype_promotion("standard"):
        run = jax.jit(lambda g: jax.lax.scan(step, optimizer.init(params), g))
        state, changes = run(jnp.asarray(gradients))
    first, second = (optax.tree.get(state, name) for name in ("mu", "nu"))
    return np.float64(first), np.float64(second), np.float64(changes[-1])


def test_a_second_moment_that_falls_is_followed_where_rounding_to_nearest_stands_still():
    """After 200 gradients of 1 come 2000 of 0.1. The bound on the noise is that of the field's
    docstring, and the mean over 4096 numbers is within 6 standard errors: false alarm 2e-9."""
    gradients = np.ones((2200, 4096), np.float32)
    gradients[200:] = 0.1
    first, second, change = moments_after(HALF, gradients)
    exact_first, exact_second, exact_change = moments_after(WHOLE, gradients)
    *_, frozen, _ = moments_after(WHOLE, gradients[:, :1], nearest=True)
    assert frozen[0] > 3 * exact_second[0]
    for found, exact, bound in ((first, exact_first, 0.009), (second, exact_second, 0.087)):
        assert (found / exact).std() < bound
        assert abs((found / exact).mean() - 1) < 6 * bound / 64
    assert (change / exact_change).std() < 0.05 and abs((change / exact_change).mean() - 1) < 0.01


def test_the_same_update_rounds_in_the_same_way_and_another_in_another():
    gradients = np.full((3, 64), 0.3, np.float32)
    once, again = moments_after(HALF, gradients), moments_after(HALF, gradients)
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(np.unique(once[1])) == 2  # neighbours: numbers differ in how they are rounded


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 2)])
def test_a_checkpoint_gives_them_back_and_costs_count_them(sizes, tmp_path):
    mesh = make_mesh(
        data=1, fsdp=sizes[1], tensor=sizes[2], devices=jax.devices()[: np.prod(sizes)]
    )
    optimizer = make_optimizer(HALF, updates=9)
    like = abstract_state(optimizer, (), model_config=tiny.TINY, mesh=mesh)
    moments = [x for x in jax.tree.leaves(like.opt_state) if x.dtype == jnp.bfloat16]
    shares = sum(2 * int(np.prod(x.sharding.shard_shape(x.shape))) for x in moments)
    parts = costs.update_memory(tiny.TINY, mesh, rows=1, width=8, chunk=8, moment=2)
    assert shares == parts["moments"] == parts["weights"]
    with jax.set_mesh(mesh):
        layout = jax.tree.map(lambda x: x.sharding, like.params)
        params = jax.device_put(tiny.params(), layout)
        state = make_state(params, optimizer, (), model_config=tiny.TINY, mesh=mesh)
        filled = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state.opt_state)
        state = dataclasses.replace(state, opt_state=filled, step=state.step + 1)
        with checkpoint.open_checkpoints(tmp_path, CheckpointSection()) as checkpoints:
            checkpoint.save(checkpoints, state, dataclasses.asdict(Config(run_dir="")))
            restored = checkpoint.restore(checkpoints, like)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        np.testing.assert_array_equal(np.float32(a), np.float32(b))


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="optim.moments_dtype is 'float16'; allowed are"):
        check_words(("optim.moments_dtype", "float16", ("float32", "bfloat16")))
