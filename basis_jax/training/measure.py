"""Which baseline the optimizer wants: inner products of an update's gradient (``Measurement``)."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from basis_jax.config import OptimSection
from basis_jax.types import Batch, Measurement

GradientSum = Callable[[PyTree, list[Batch]], tuple[PyTree, PyTree]]


def make_measure(
    gradient_sum: GradientSum, optim: OptimSection
) -> Callable[[PyTree, optax.OptState, list[Batch], PyTree], Measurement]:
    """(parameters, optimizer state before the update, its microbatches, its gradient G) ->
    ``Measurement``.

    ``gradient_sum`` is what made G; here it takes the gradient B with all advantages 1. That costs
    one more backward pass over the update's rollouts, and the memory of one more gradient.
    """

    def measure(params, opt_state, micros, gradient):
        ones = [replace(micro, advantages=jnp.ones_like(micro.advantages)) for micro in micros]
        noise, _ = gradient_sum(params, ones)
        nu, count = (
            optax.tree.get_all_with_path(opt_state, name)[0][1] for name in ("nu", "count")
        )
        return inner_products(gradient, noise, nu, count, optim)

    return measure


@jax.jit(static_argnames="optim")
def inner_products(
    gradient: PyTree, noise: PyTree, nu: PyTree, count: Array, optim: OptimSection
) -> Measurement:
    """sum s^2 G B and sum s^2 B^2, with s what AdamW multiplies a coordinate of the gradient with.

    s = 1 / (sqrt(v / (1 - b2^(t+1))) + eps). v = b2 nu + (1 - b2) c B^2 is the second moment that
    the update is about to have, except that c B^2, with c = |G|^2 / |B|^2 (G clipped), stands for
    G^2: v must not depend on which completions were right.
    """

    size = optax.tree.norm(gradient, squared=True)
    if optim.max_grad_norm:  # the moments are those of clipped gradients
        size = jnp.minimum(size, optim.max_grad_norm**2)
    scale = size / jnp.maximum(optax.tree.norm(noise, squared=True), 1e-30)
    unbiased = 1 - optim.b2 ** (count.astype(jnp.float32) + 1)

    def scaled(b: Array, nu: Array) -> Array:
        v = optim.b2 * nu.astype(jnp.float32) + (1 - optim.b2) * scale * b**2
        return b / (jnp.sqrt(v / unbiased) + optim.eps) ** 2

    by = jax.tree.map(scaled, noise, nu)
    return Measurement(product=optax.tree.vdot(gradient, by), square=optax.tree.vdot(noise, by))
