"""Masked reductions, and masks from lengths. Masked-out entries may have any value, also NaN."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def masked_sum(x: Float[Array, "*s"], mask: Bool[Array, "*s"]) -> Float[Array, ""]:
    """Sum of x where the mask is True."""
    return jnp.sum(jnp.where(mask, x, 0))


def masked_mean(x: Float[Array, "*s"], mask: Bool[Array, "*s"]) -> Float[Array, ""]:
    """Mean of x where the mask is True; 0 for an empty mask."""
    return masked_sum(x, mask) / jnp.maximum(jnp.sum(mask), 1).astype(x.dtype)


def masked_max(x: Float[Array, "*s"], mask: Bool[Array, "*s"]) -> Float[Array, ""]:
    """Maximum of x where the mask is True, for x >= 0; 0 for an empty mask."""
    return jnp.max(jnp.where(mask, x, 0))


def completion_mask(
    prompt_lengths: Int[Array, " N"], completion_lengths: Int[Array, " N"], width: int
) -> Bool[Array, "N {width}"]:
    """True on the tokens that the policy sampled: prompt_length <= t < prompt + completion."""
    position = jnp.arange(width, dtype=jnp.int32)[None, :]
    start = prompt_lengths[:, None]
    return (position >= start) & (position < start + completion_lengths[:, None])
