"""The gradient of an update, summed over its microbatches in one buffer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from basis_jax.model.sharding import constrain
from basis_jax.types import Batch

Total = tuple[PyTree, PyTree]
"""(gradients, (sums over tokens by name, a maximum)): what ``policy_objective`` gives, added up."""


def make_gradient_sum(
    objective: Callable[..., tuple[Array, Any]], axes: PyTree
) -> Callable[[PyTree, list[Batch]], Total]:
    """(parameters, microbatches) -> the summed gradients, and the sums and maximum beside them.

    Each shape of microbatch is a program, whose backward pass adds each layer's gradient to the
    donated sum as soon as it is known: there is one gradient, not a second of the microbatch. It
    is laid out as the parameters, whose logical axes are ``axes``.
    """

    @jax.jit
    def zero(params, micro):
        _, aux = jax.eval_shape(objective, params, micro)
        gradients, aux = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, aux))
        return jax.tree.map(constrain, gradients, axes), aux

    def accumulate(total, params, micro):
        gradients, (sums, largest) = total
        refs = jax.tree.map(jax.new_ref, gradients)
        value, backward, (more, other) = jax.vjp(
            lambda params: objective(params, micro), params, has_aux=True
        )
        add = backward.with_refs(refs)  # type: ignore[attr-defined]  # typed as a plain function
        add(jnp.ones_like(value))
        gradients = jax.tree.map(constrain, jax.tree.map(jax.freeze, refs), axes)
        return gradients, (jax.tree.map(jnp.add, sums, more), jnp.maximum(largest, other))

    accumulate_in_place = jax.jit(accumulate, donate_argnums=0)

    def gradient_sum(params: PyTree, micros: list[Batch]) -> Total:
        total = zero(params, micros[0])
        for micro in micros:
            total = accumulate_in_place(total, params, micro)
        return total

    return gradient_sum
