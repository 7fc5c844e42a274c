"""What some losses need of a whole update before its gradient, summed over its microbatches."""

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from basis_jax.config import LossSection
from basis_jax.corrections import ais_alpha, ais_sums, kept_rows, sampler_gap
from basis_jax.losses import regression_loss, token_advantages
from basis_jax.model import lora
from basis_jax.model.decoder import ModelConfig
from basis_jax.training.objective import make_score
from basis_jax.types import Batch, TrainState

Sums = dict[str, Array]


def make_first_pass(
    model_config: ModelConfig,
    *,
    loss: LossSection,
    temperature: float,
    microbatch: int,
    group_size: int,
    rollouts: int,
) -> Callable[[TrainState, list[Batch]], list[Batch]]:
    """Make a function (state, microbatches of an update) -> the same with what the loss needs.

    - ``rebel``: ``row_offsets``, minus the mean residual of the rows of a prompt, wherever they
      are in the update. A prompt's rows are ``group_size`` adjacent ones of its ``rollouts``.
    - ``ais``: ``ais_alpha``.
    - ``mask``: the loss weights without the rows that are left out, also in the denominators.

    Other losses need nothing. Log-probabilities that are not known yet cost a forward pass.
    """
    kind = "rebel" if loss.objective == "rebel" else loss.sampler_correction
    if kind not in PASSES:
        return lambda state, micros: micros
    sums_of, finish = (functools.partial(function, loss) for function in PASSES[kind])
    if kind == "rebel":
        sums_of = functools.partial(sums_of, group_size, -(-rollouts // group_size))
        finish = functools.partial(finish, group_size)

    score = make_score(model_config, loss=loss, temperature=temperature, microbatch=microbatch)

    @jax.jit
    def add(total: Sums | None, logprobs: Array, micro: Batch) -> Sums:
        more = sums_of(logprobs, micro)
        return more if total is None else jax.tree.map(jnp.add, total, more)

    finish_jitted = jax.jit(finish)

    def first_pass(state: TrainState, micros: list[Batch]) -> list[Batch]:
        total, scored, policy = None, [], lora.whole(state.frozen, state.params)
        for micro in micros:
            old = micro.old_logprobs
            if kind == "rebel" and old is None:  # log-ratios are 0 whatever the policy
                scored.append(jnp.zeros_like(micro.sampler_logprobs))
            elif kind == "rebel" or old is None:
                tokens, mask = jnp.asarray(micro.tokens), jnp.asarray(micro.completion_mask)
                scored.append(score(policy, tokens, mask))
            else:
                scored.append(jnp.asarray(old))
            total = add(total, scored[-1], micro)
        return [finish_jitted(total, *of) for of in zip(scored, micros, strict=True)]

    return first_pass


def rebel_sums(
    loss: LossSection,
    group_size: int,
    groups: int,
    logprobs: Float[Array, "N T"],
    micro: Batch,
) -> Sums:
    """The sum of the residuals and the number of live rows, by prompt of the update."""
    _, residuals = regression_loss(logprobs, micro, loss.objective, beta=loss.beta)
    live = (jnp.sum(micro.loss_weights, axis=1) > 0).astype(jnp.float32)
    index, zeros = jnp.asarray(micro.rows) // group_size, jnp.zeros(groups, jnp.float32)
    return {
        "residuals": zeros.at[index].add(live * residuals),
        "rows": zeros.at[index].add(live),
    }


def finish_rebel(
    loss: LossSection, group_size: int, sums: Sums, logprobs: Float[Array, "N T"], micro: Batch
) -> Batch:
    means = sums["residuals"] / jnp.maximum(sums["rows"], 1.0)
    return replace(micro, row_offsets=-means[jnp.asarray(micro.rows) // group_size])


def sums_for_ais(loss: LossSection, logprobs: Float[Array, "N T"], micro: Batch) -> Sums:
    gap, mask = sampler_gap(logprobs, micro), jnp.asarray(micro.completion_mask)
    return ais_sums(gap, token_advantages(micro), mask, cap=loss.sampler_cap)


def finish_ais(loss: LossSection, sums: Sums, logprobs: Float[Array, "N T"], micro: Batch) -> Batch:
    alpha = ais_alpha(
        sums, mismatch=loss.ais_mismatch, variance=loss.ais_variance, beta=loss.ais_beta
    )
    return replace(micro, ais_alpha=alpha)


def kept(loss: LossSection, logprobs: Float[Array, "N T"], micro: Batch) -> Bool[Array, " N"]:
    gap, mask = sampler_gap(logprobs, micro), jnp.asarray(micro.completion_mask)
    return kept_rows(gap, mask, floor=loss.sampler_floor, cap=loss.sampler_cap)


def mask_sums(loss: LossSection, logprobs: Float[Array, "N T"], micro: Batch) -> Sums:
    """What the loss's denominators count, of all rows and of those that are kept: tokens for
    ``token_mean``, else rows."""
    lengths = jnp.sum(micro.completion_mask, axis=1).astype(jnp.float32)
    counted = lengths if loss.aggregation == "token_mean" else (lengths > 0).astype(jnp.float32)
    of_kept = jnp.where(kept(loss, logprobs, micro), counted, 0.0)
    return {"all": jnp.sum(counted), "kept": jnp.sum(of_kept)}


def finish_mask(
    loss: LossSection, sums: Sums, logprobs: Float[Array, "N T"], micro: Batch
) -> Batch:
    scale = sums["all"] / jnp.maximum(sums["kept"], 1.0)
    kept_weights = jnp.where(kept(loss, logprobs, micro)[:, None], micro.loss_weights, 0.0)
    return replace(micro, loss_weights=kept_weights * scale)


PASSES: dict[str, tuple[Callable, Callable]] = {
    "rebel": (rebel_sums, finish_rebel),
    "ais": (sums_for_ais, finish_ais),
    "mask": (mask_sums, finish_mask),
}
"""For each loss: the sums over a microbatch, and the function that uses those of the update."""
