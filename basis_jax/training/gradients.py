"""The gradient of an update: summed over its microbatches in one donated buffer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from basis_jax.model.sharding import constrain
from basis_jax.types import Batch


def make_gradient_sum(
    objective: Callable[..., Any], axes: PyTree
) -> Callable[[PyTree, list[Batch]], tuple[PyTree, PyTree]]:
    """(params, microbatches) -> the objective's gradients, laid out by ``axes``, and its sums."""

    @jax.jit
    def zero(params, micro):
        _, aux = jax.eval_shape(objective, params, micro)
        gradients, aux = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, aux))
        return jax.tree.map(constrain, gradients, axes), aux

    @functools.partial(jax.jit, donate_argnums=0)
    def accumulate(total, params, micro):
        gradients, (sums, gap) = total
        refs = jax.tree.map(jax.new_ref, gradients)
        value, backward, (more, new_gap) = jax.vjp(
            lambda params: objective(params, micro), params, has_aux=True
        )
        add = backward.with_refs(refs)  # type: ignore[attr-defined]  # typed as a plain function
        add(jnp.ones_like(value))
        gradients = jax.tree.map(constrain, jax.tree.map(jax.freeze, refs), axes)
        return gradients, (jax.tree.map(jnp.add, sums, more), jnp.maximum(gap, new_gap))

    def gradient_sum(params: PyTree, micros: list[Batch]) -> tuple[PyTree, PyTree]:
        total = zero(params, micros[0])
        for micro in micros:
            total = accumulate(total, params, micro)
        return total

    return gradient_sum
