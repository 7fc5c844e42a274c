"""An optimizer's moments in half the memory: bfloat16, rounded at random."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree


def kept_in_bfloat16(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer with its float32 state kept in bfloat16, rounded at random after each update.

    Rounding to nearest would freeze a second moment: b2 = 0.999 changes it by at most 0.1 %
    downwards, and half of bfloat16's last place is 0.2 to 0.4 %. Random rounding keeps the mean;
    the random numbers are a function of the number of updates, so a resumed run draws the same.
    """

    def init(params):
        return _map_floats(lambda x: x.astype(jnp.bfloat16), optimizer.init(params))

    def update(gradients, state, params=None):
        state = _map_floats(lambda x: x.astype(jnp.float32), state)
        changes, state = optimizer.update(gradients, state, params)
        count = optax.tree.get_all_with_path(state, "count")[0][1]
        key = jax.random.fold_in(jax.random.key(0), count)
        numbers = iter(range(len(jax.tree.leaves(state))))
        return changes, _map_floats(
            lambda x: round_at_random(x, jax.random.fold_in(key, next(numbers))), state
        )

    return optax.GradientTransformation(init, update)


def _map_floats(function: Callable[[Array], Array], state: PyTree) -> PyTree:
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: function(x) if floating(x) else x, state)


def round_at_random(x: Float[Array, "*s"], key: Key[Array, ""]) -> Float[Array, "*s"]:
    """x in bfloat16, one of its two neighbours there, so that the mean is x.

    bfloat16 is the upper half of float32's bits: random bits are added to the lower half.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    kept = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), kept, x).astype(jnp.bfloat16)
