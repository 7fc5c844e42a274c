"""Prefill and decode under jit: one rollout per row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from basis_jax.config import SamplingSection
from basis_jax.model import decoder
from basis_jax.model.decoder import KeyValues, ModelConfig
from basis_jax.model.decoding import (
    Cache,
    DecodeWeights,
    decode_step,
    decode_weights,
    filled_cache,
    output_logits,
    prompt_params,
)
from basis_jax.pytree import pytree
from basis_jax.sampling.draw import draw, is_in, token_keys
from basis_jax.types import Prompts, Rollouts


@pytree
class Slots:
    """Rows being decoded. A row that has ended, or was never filled, is not ``alive``."""

    tokens: Int[Array, "S T"]
    logprobs: Float[Array, "S T"]
    prompt_lengths: Int[Array, " S"]
    lengths: Int[Array, " S"]  # completion tokens so far
    alive: Bool[Array, " S"]
    terminated: Bool[Array, " S"]
    next_token: Int[Array, " S"]  # drawn, but not yet part of the row
    next_logprob: Float[Array, " S"]
    next_score_norm: Float[Array, " S"]
    score_norms: Float[Array, " S"]  # summed over the completion so far
    keys: Key[Array, " S"]
    cache: Cache


def prefill(
    params: PyTree,
    weights: DecodeWeights,
    model_config: ModelConfig,
    prompts: Prompts,
    keys: Key[Array, " N"],
    *,
    sampling: SamplingSection,
    length: int,
    prefix: KeyValues | None = None,
) -> Slots:
    """Prefill the prompts into rows of ``length`` positions, ready to decode.

    ``params``: see ``decoding.prompt_params``. ``prefix``: keys and values of the tokens that all
    prompts begin with; they are then not computed again.
    """
    tokens, lengths = jnp.asarray(prompts.tokens), jnp.asarray(prompts.lengths)
    begun = jnp.asarray(prompts.begun_lengths)
    rows, width = tokens.shape
    shared = 0 if prefix is None else prefix.keys.shape[2]
    params, reader = prompt_params(params, weights, model_config)
    hidden, kept = decoder.forward(params, reader, tokens[:, shared:], prefix=prefix, keep=True)
    assert kept is not None  # because keep is True
    if prefix is not None:
        kept = jax.tree.map(jax.vmap(decoder.prepend_prefix), prefix, kept)
    at = (lengths - 1 - shared)[:, None, None]
    last = jnp.take_along_axis(hidden, at, axis=1)[:, 0]
    inside = jnp.arange(length, dtype=jnp.int32)[None] < lengths[:, None]
    tokens = jnp.pad(tokens, ((0, 0), (0, length - width)))
    logits = output_logits(weights, model_config, last.T)
    first = draw(logits, token_keys(keys, begun), sampling)
    return Slots(
        tokens=jnp.where(inside, tokens, 0),
        logprobs=jnp.zeros((rows, length), jnp.float32),
        prompt_lengths=lengths - begun,
        lengths=begun,
        alive=jnp.ones(rows, bool),
        terminated=jnp.zeros(rows, bool),
        next_token=first.tokens,
        next_logprob=first.logprobs,
        next_score_norm=first.score_norms,
        score_norms=jnp.zeros(rows, jnp.float32),
        keys=keys,
        cache=filled_cache(kept, length, scanned=model_config.scan_decode),
    )


def decode_rows(
    weights: DecodeWeights,
    model_config: ModelConfig,
    slots: Slots,
    *,
    sampling: SamplingSection,
    eos_ids: tuple[int, ...],
    stop_at_alive: Int[Array, ""] | int,
) -> Slots:
    """Extend the rows that are alive until at most ``stop_at_alive`` of them are left, or until one
    of them has filled the cache."""
    row = jnp.arange(slots.alive.size, dtype=jnp.int32)
    cache_length, width = slots.cache.length, slots.tokens.shape[1]

    def unfinished(slots):
        reached = jnp.where(slots.alive, slots.prompt_lengths + slots.lengths, 0)
        return (jnp.sum(slots.alive) > stop_at_alive) & jnp.all(reached < cache_length)

    def extend(slots):
        token = slots.next_token
        at = slots.prompt_lengths + slots.lengths
        written = jnp.where(slots.alive, at, width)  # ended rows: beyond the row, so not written
        ended = is_in(token, eos_ids)
        lengths = slots.lengths + slots.alive.astype(jnp.int32)
        logits, cache = decode_step(
            weights, model_config, token, jnp.minimum(at, cache_length - 1), slots.cache
        )
        drawn = draw(logits, token_keys(slots.keys, lengths), sampling)
        return dataclasses.replace(
            slots,
            tokens=slots.tokens.at[row, written].set(token, mode="drop"),
            logprobs=slots.logprobs.at[row, written].set(slots.next_logprob, mode="drop"),
            lengths=lengths,
            alive=slots.alive & ~ended & (lengths < sampling.max_new_tokens),
            terminated=slots.terminated | (slots.alive & ended),
            next_token=drawn.tokens,
            next_logprob=drawn.logprobs,
            next_score_norm=drawn.score_norms,
            score_norms=slots.score_norms + jnp.where(slots.alive, slots.next_score_norm, 0),
            cache=cache,
        )

    return jax.lax.while_loop(unfinished, extend, slots)


def sample(
    params: PyTree,
    model_config: ModelConfig,
    prompts: Prompts,
    *,
    sampling: SamplingSection,
    eos_ids: tuple[int, ...],
    keys: Key[Array, " N"],
) -> Rollouts:
    """One completion per prompt: prefill, then decode until every row has ended.

    A row ends with its first token of ``eos_ids`` (kept, and counted in its length) or after
    ``max_new_tokens``; the tokens that a completion begins with count. The longest row determines
    the cost: rows that have ended are computed too, but stay unchanged.
    """
    weights = decode_weights(params, model_config)
    return sample_with(
        None if model_config.scan_decode else params,
        weights,
        prompts,
        keys,
        model_config=model_config,
        sampling=sampling,
        eos_ids=eos_ids,
    )


@functools.partial(jax.jit, static_argnames=("model_config", "sampling", "eos_ids"))
def sample_with(
    params: PyTree,
    weights: DecodeWeights,
    prompts: Prompts,
    keys: Key[Array, " N"],
    *,
    model_config: ModelConfig,
    sampling: SamplingSection,
    eos_ids: tuple[int, ...],
) -> Rollouts:
    length = prompts.row_length(sampling.max_new_tokens)
    slots = prefill(params, weights, model_config, prompts, keys, sampling=sampling, length=length)
    slots = decode_rows(
        weights, model_config, slots, sampling=sampling, eos_ids=eos_ids, stop_at_alive=0
    )
    return Rollouts(
        tokens=slots.tokens,
        prompt_lengths=slots.prompt_lengths,
        completion_lengths=slots.lengths,
        sampler_logprobs=slots.logprobs,
        score_norms=slots.score_norms,
        terminated=slots.terminated,
        problem_ids=prompts.problem_ids,
    )
