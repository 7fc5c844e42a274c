"""The gradient of an update, summed over its microbatches in one buffer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from basis_jax.model import lora
from basis_jax.model.sharding import constrain
from basis_jax.types import Batch

Total = tuple[PyTree, PyTree]
"""(gradients, (sums over tokens by name, a maximum)), each combined over the microbatches."""


def make_gradient_sum(
    objective: Callable[..., tuple[Array, Any]], axes: PyTree
) -> Callable[[PyTree, PyTree, list[Batch]], Total]:
    """Make a function (trained parameters, frozen ones or None, microbatches) -> ``Total``.

    ``objective`` gets the parameters as ``lora.whole`` combines them. One program is compiled per
    shape of microbatch. Its backward pass adds each layer's gradient to the donated sum as soon as
    it is known, so a microbatch needs no gradient buffer of its own. The sum has the layout of the
    trained parameters, whose logical axes are ``axes``.
    """

    def value_of(params, frozen, micro):
        return objective(lora.whole(frozen, params), micro)

    @jax.jit
    def zero(params, frozen, micro):
        _, aux = jax.eval_shape(value_of, params, frozen, micro)
        gradients, aux = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, aux))
        return jax.tree.map(constrain, gradients, axes), aux

    def accumulate(total, params, frozen, micro):
        gradients, (sums, largest) = total
        refs = jax.tree.map(jax.new_ref, gradients)
        value, backward, (more, other) = jax.vjp(
            lambda params: value_of(params, frozen, micro), params, has_aux=True
        )
        add = backward.with_refs(refs)  # type: ignore[attr-defined]  # typed as a plain function
        add(jnp.ones_like(value))
        gradients = jax.tree.map(constrain, jax.tree.map(jax.freeze, refs), axes)
        return gradients, (jax.tree.map(jnp.add, sums, more), jnp.maximum(largest, other))

    accumulate_in_place = jax.jit(accumulate, donate_argnums=0)

    def gradient_sum(params: PyTree, frozen: PyTree, micros: list[Batch]) -> Total:
        total = zero(params, frozen, micros[0])
        for micro in micros:
            total = accumulate_in_place(total, params, frozen, micro)
        return total

    return gradient_sum
