"""Measure which baseline makes an update least noisy: the ``Measurement`` of its rollouts."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from basis_jax.config import OptimSection
from basis_jax.types import Batch, Measurement, TrainState

GradientSum = Callable[[PyTree, PyTree, list[Batch]], tuple[PyTree, PyTree]]
SEED = 9  # of the signs


def make_measure(
    gradient_sum: GradientSum, optim: OptimSection
) -> Callable[[TrainState, list[Batch]], Measurement]:
    """Make a function (state before an update, its microbatches) -> ``Measurement``.

    g_i is the gradient of the loss of rollout i at advantage 1, and e_i is a random sign. The
    measurement needs G = sum e_i A_i g_i and D = sum e_i g_i. ``gradient_sum`` computes them; its
    loss has no KL term. This costs two more backward passes over the update's rollouts, and the
    memory of one more gradient than the update needs.
    """

    def measure(state, micros):
        count, nu = (_moments(state.opt_state, name) for name in ("count", "nu"))
        signs = [signed(micro.advantages, micro.rows, count) for micro in micros]
        gradient, noise = (
            gradient_sum(
                state.params,
                state.frozen,
                [replace(micro, advantages=x[k]) for micro, x in zip(micros, signs, strict=True)],
            )[0]
            for k in range(2)
        )
        return inner_products(gradient, noise, nu, count, optim)

    return measure


@jax.jit
def signed(
    advantages: Float[Array, " N"], rows: Int[Array, " N"], count: Int[Array, ""]
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Advantages times random signs, and the signs.

    They are functions of the update's number ``count`` and of the row's number in the update,
    however the update is split. Invalid rows have signs too; their loss weights are 0.
    """
    key = jax.random.fold_in(jax.random.key(SEED), count)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    signs = jax.vmap(lambda key: jax.random.rademacher(key, (), jnp.float32))(keys)
    return signs * advantages, signs


def _moments(opt_state: PyTree, name: str) -> PyTree:
    """The part of AdamW's state that has this name."""
    return optax.tree.get_all_with_path(opt_state, name)[0][1]


@jax.jit(static_argnames="optim")
def inner_products(
    gradient: PyTree, noise: PyTree, nu: PyTree, count: Array, optim: OptimSection
) -> Measurement:
    """sum s^2 G D and sum s^2 D^2, where AdamW multiplies a coordinate of the gradient by s.

    s = 1 / (sqrt(v / (1 - b2^(t+1))) + eps), with v = b2 nu + (1 - b2) c D^2 and
    c = |G|^2 / |D|^2 (G clipped). In AdamW's own second moment, the square of the update's gradient
    stands in place of c D^2. It is replaced because v must not depend on which completions were
    right.
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
