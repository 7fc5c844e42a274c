"""Policy objectives as weighted sums of per-token terms.

``jnp.sum(loss_weights * per_token)``: every denominator sits in ``loss_weights``, made once from
the whole update's mask, so microbatches and devices only add.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from basis_jax.types import Batch

AGGREGATIONS = ("token_mean", "sequence_mean", "constant_length")


def loss_weights(
    completion_mask: Bool[Array, "N T"], aggregation: str, *, max_length: int
) -> Float[Array, "N T"]:
    """Weight of every token; live rows are those with at least one token in the mask.

    ``token_mean`` (DAPO): 1 / tokens in the update. ``sequence_mean`` (GRPO): 1 / (live rows x
    the row's tokens). ``constant_length`` (Dr. GRPO): 1 / (live rows x ``max_length``).
    A mask without tokens gives zeros.
    """
    mask = completion_mask.astype(jnp.float32)
    lengths = jnp.sum(mask, axis=1, keepdims=True)
    rows = jnp.maximum(jnp.sum(lengths > 0), 1).astype(jnp.float32)
    if aggregation == "token_mean":
        return mask / jnp.maximum(jnp.sum(mask), 1.0)
    if aggregation == "sequence_mean":
        return mask / (rows * jnp.maximum(lengths, 1.0))
    if aggregation == "constant_length":
        return mask / (rows * max_length)
    raise ValueError(f"loss.aggregation is {aggregation!r}; allowed are {', '.join(AGGREGATIONS)}")


def ppo_loss(
    logprobs: Float[Array, "N T"], batch: Batch, *, clip_low: float, clip_high: float
) -> tuple[Float[Array, ""], Bool[Array, "N T"]]:
    """PPO-clip: sum of w max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)).

    rho = exp(logprobs - old_logprobs), the exponent held in [-20, 20] (Schulman et al. 2017).
    Without ``old_logprobs`` the update is strictly on-policy: rho is 1 in value and its gradient
    that of logprobs. Returns the loss and the tokens whose clipped branch was active.
    """
    old = jax.lax.stop_gradient(logprobs) if batch.old_logprobs is None else batch.old_logprobs
    log_ratio = jnp.where(batch.completion_mask, logprobs - old, 0.0)
    ratio = jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))
    advantages = batch.advantages[:, None]
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = jnp.sum(batch.loss_weights * jnp.maximum(plain, clipped))
    return loss, batch.completion_mask & (clipped > plain)
