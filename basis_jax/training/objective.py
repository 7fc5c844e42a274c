"""The loss of a microbatch under the model, and the log-probabilities that it needs."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from basis_jax.config import LossSection
from basis_jax.corrections import sampler_weights
from basis_jax.losses import REGRESSIONS, kl_loss, policy_loss, regression_loss
from basis_jax.masked import masked_max, masked_sum
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.logprobs import token_scores
from basis_jax.types import Batch

Sums = dict[str, Float[Array, ""]]


def make_score(
    model_config: ModelConfig, *, loss: LossSection, temperature: float, microbatch: int
) -> Callable[[PyTree, Array, Array], Array]:
    """Make the jitted function (params, tokens [N T], mask [N T]) -> log-probabilities [N T].

    They are those of the trainer's policy for one microbatch, and 0 outside the mask.
    """
    score_micro = functools.partial(
        micro_scores, loss=loss, temperature=temperature, microbatch=microbatch
    )

    @jax.jit
    def score(params, tokens, mask):
        return score_micro(params, model_config, tokens, mask)[0]

    return score


def micro_scores(
    params: PyTree,
    model_config: ModelConfig,
    tokens: Int[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    loss: LossSection,
    temperature: float,
    microbatch: int,
) -> tuple[Float[Array, "N T"], Float[Array, "N T"], Float[Array, " N"]]:
    """``token_scores`` in chunks of microbatch x logprob_chunk tokens.

    A batch with more rows takes fewer positions at a time.
    """
    chunk = max(1, loss.logprob_chunk * microbatch // tokens.shape[0])
    return token_scores(
        params, model_config, tokens, mask=mask, temperature=temperature, chunk=chunk
    )


def policy_objective(
    params: PyTree,
    batch: Batch,
    *,
    model_config: ModelConfig,
    loss: LossSection,
    temperature: float,
    microbatch: int,
) -> tuple[Float[Array, ""], tuple[Sums, Float[Array, ""]]]:
    """The microbatch's share of the loss, its sums over tokens, and its largest log-prob gap."""
    mask = jnp.asarray(batch.completion_mask)
    logprobs, entropy, start_lse = micro_scores(
        params,
        model_config,
        jnp.asarray(batch.tokens),
        mask,
        loss=loss,
        temperature=temperature,
        microbatch=microbatch,
    )
    value, clipped, sums = main_loss(logprobs, start_lse, batch, loss)
    old = logprobs if batch.old_logprobs is None else jnp.asarray(batch.old_logprobs)
    gap = jnp.abs(old - batch.sampler_logprobs)
    sums |= {
        "tokens": jnp.sum(mask).astype(jnp.float32),
        "policy/loss": value,
        "policy/clip_fraction": jnp.sum(clipped).astype(jnp.float32),
        "policy/entropy": masked_sum(entropy, mask),
        "policy/kl_old": masked_sum(old - logprobs, mask),
        "sampler/logprob_gap_mean": masked_sum(gap, mask),
    }
    if loss.needs_reference:
        penalty, kl = kl_loss(logprobs, batch, loss.kl)
        value += loss.kl_coef * penalty
        sums |= {"policy/loss": value, "policy/kl_ref": jnp.sum(kl)}
    return value, jax.lax.stop_gradient((sums, masked_max(gap, mask)))


def main_loss(
    logprobs: Float[Array, "N T"], start_lse: Float[Array, " N"], batch: Batch, loss: LossSection
) -> tuple[Float[Array, ""], Bool[Array, "N T"], Sums]:
    """The loss without a KL term, the tokens that were clipped, and sums over tokens about the
    sampler's correction."""
    mask = jnp.asarray(batch.completion_mask)
    if loss.objective in REGRESSIONS:
        value, _ = regression_loss(
            logprobs, batch, loss.objective, beta=loss.beta, start_lse=start_lse
        )
        return value, jnp.zeros_like(mask), {}
    factors, sums = None, Sums()
    if loss.sampler_correction != "none":
        factors, sums = correction(logprobs, batch, loss)
    value, clipped = policy_loss(
        logprobs,
        batch,
        loss.objective,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        dual_clip=loss.dual_clip,
        factors=factors,
    )
    return value, clipped, sums


def correction(
    logprobs: Float[Array, "N T"], batch: Batch, loss: LossSection
) -> tuple[Float[Array, "N T"], Sums]:
    """The factor of every token's term, and its sums over tokens for the metrics."""
    mask, kind = jnp.asarray(batch.completion_mask), loss.sampler_correction
    factors = sampler_weights(logprobs, batch, kind, cap=loss.sampler_cap, floor=loss.sampler_floor)
    if kind == "mask":
        kept = jnp.broadcast_to(jnp.sum(batch.loss_weights, axis=1, keepdims=True) > 0, mask.shape)
        limited = ~kept
    elif kind == "icepop":
        limited = factors == 0
    else:
        unlimited = sampler_weights(logprobs, batch, kind, cap=jnp.inf)
        limited = factors < unlimited
    sums = {
        "sampler/weight_mean": masked_sum(factors, mask),
        "sampler/weight_limited": jnp.sum(mask & limited).astype(jnp.float32),
    }
    if batch.ais_alpha is not None:
        sums["sampler/ais_alpha"] = batch.ais_alpha * jnp.sum(mask).astype(jnp.float32)
    return factors, sums
