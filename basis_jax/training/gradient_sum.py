"""The gradient of an update, summed over its microbatches in one buffer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from basis_jax.model import lora
from basis_jax.model.sharding import by_data, constrain, groups, is_axes
from basis_jax.types import Batch

Total = tuple[PyTree, PyTree]
"""(gradients, (sums over tokens by name, a maximum)), each combined over the microbatches."""


def make_gradient_sum(
    objective: Callable[..., tuple[Array, Any]], axes: PyTree
) -> Callable[[PyTree, PyTree, list[Batch]], Total]:
    """Make a function (trained parameters, frozen ones or None, microbatches) -> ``Total``.

    ``objective`` gets the parameters as ``lora.whole`` combines them. One program is compiled per
    shape of microbatch. Its backward pass adds each layer's gradient to the donated sum as soon as
    it is known, so a microbatch needs no gradient buffer of its own. Each group of devices of the
    mesh's axis ``data`` has a partial sum, with the layout of the trained parameters, whose logical
    axes are ``axes``. The groups' sums are added once, after the last microbatch.
    """

    def value_of(params, frozen, micro):
        return objective(lora.whole(frozen, params), micro)

    def in_groups(axes):
        return jax.tree.map(lambda names: ("group", *names), axes, is_leaf=is_axes)

    @jax.jit
    def zero(params, frozen, micro):
        _, aux = jax.eval_shape(value_of, params, frozen, micro)
        gradients, aux = jax.tree.map(
            lambda x: jnp.zeros((groups(), *x.shape), x.dtype), (params, aux)
        )
        return jax.tree.map(constrain, gradients, in_groups(axes)), aux

    def accumulate(total, params, frozen, micro):
        """On one group's rows; its partial sums have a first axis of size 1."""
        gradients, (sums, largest) = jax.tree.map(lambda x: x[0], total)
        refs = jax.tree.map(jax.new_ref, gradients)
        value, backward, (more, other) = jax.vjp(
            lambda params: value_of(params, frozen, micro), params, has_aux=True
        )
        add = backward.with_refs(refs)  # type: ignore[attr-defined]  # typed as a plain function
        add(jnp.ones_like(value))
        gradients = jax.tree.map(constrain, jax.tree.map(jax.freeze, refs), axes)
        aux = (jax.tree.map(jnp.add, sums, more), jnp.maximum(largest, other))
        return jax.tree.map(lambda x: x[None], (gradients, aux))

    def accumulate_by_group(total, params, frozen, micro):
        return by_data(accumulate, (True, False, False, True))(total, params, frozen, micro)

    accumulate_in_place = jax.jit(accumulate_by_group, donate_argnums=0)

    @functools.partial(jax.jit, donate_argnums=0)
    def summed(total):
        gradients, (sums, largest) = total
        gradients, sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), (gradients, sums))
        return jax.tree.map(constrain, gradients, axes), (sums, jnp.max(largest))

    def gradient_sum(params: PyTree, frozen: PyTree, micros: list[Batch]) -> Total:
        total = zero(params, frozen, micros[0])
        for micro in micros:
            total = accumulate_in_place(total, params, frozen, micro)
        return summed(total)

    return gradient_sum
