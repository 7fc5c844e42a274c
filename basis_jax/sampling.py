"""Prefill and decode under jit: one rollout a row, each with its own noise.

The noise of token t of a rollout is a function of (seed, stream, step, problem, sample, t) alone:
batch size, row order and device count do not change a draw, and resume has nothing to restore.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from basis_jax import model
from basis_jax.config import SamplingSection
from basis_jax.model import ModelConfig
from basis_jax.pytree import pytree
from basis_jax.types import Prompts, Rollouts

STREAMS = ("train", "reference", "evaluate")


def check_trainable(sampling: SamplingSection) -> None:
    """Raise ValueError where rollouts would not come from the distribution that is trained."""
    if sampling.top_p < 1 or sampling.top_k > 0:
        raise ValueError(
            f"sampling.top_p = {sampling.top_p} and top_k = {sampling.top_k} truncate the "
            "distribution while the gradient is that of the full softmax; train with top_p 1 and "
            "top_k 0"
        )
    if sampling.temperature <= 0:
        raise ValueError(
            f"sampling.temperature is {sampling.temperature}; training needs one above 0"
        )


def row_keys(
    seed: int, stream: str, step: int, *, problem_ids: Int[Array, " N"], samples: Int[Array, " N"]
) -> Key[Array, " N"]:
    """One key a rollout from (seed, stream, step, problem, sample)."""
    key = jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream))
    return _row_keys(jax.random.fold_in(key, step), problem_ids, samples)


@jax.jit
def _row_keys(key, problem_ids, samples):
    fold = jax.vmap(lambda p, s: jax.random.fold_in(jax.random.fold_in(key, p), s))
    return fold(problem_ids, samples)


def truncate(logits: Float[Array, "N V"], *, top_k: int, top_p: float) -> Float[Array, "N V"]:
    """-inf outside the ``top_k`` likeliest tokens (0: all) and outside the nucleus: the smallest
    set of likeliest tokens whose probability reaches ``top_p``."""
    if top_k > 0:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        smallest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def draw(
    logits: Float[Array, "N V"], keys: Key[Array, " N"], sampling: SamplingSection
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """A token a row and the log-probability it was drawn with; temperature 0 takes the likeliest
    (its log-probability is that of temperature 1)."""
    if sampling.temperature == 0:
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        scaled = logits / sampling.temperature
        scaled = truncate(scaled, top_k=sampling.top_k, top_p=sampling.top_p)
        logprobs = jax.nn.log_softmax(scaled, axis=-1)
        tokens = jax.vmap(jax.random.categorical)(keys, logprobs).astype(jnp.int32)
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]


def is_in(tokens: Int[Array, " N"], ids: tuple[int, ...]) -> Bool[Array, " N"]:
    return functools.reduce(jnp.logical_or, [tokens == i for i in ids])


@pytree
class Slots:
    """Rows under way; one that has ended, or was never filled, is not ``alive``."""

    tokens: Int[Array, "S T"]
    logprobs: Float[Array, "S T"]
    prompt_lengths: Int[Array, " S"]
    lengths: Int[Array, " S"]  # completion tokens so far
    alive: Bool[Array, " S"]
    terminated: Bool[Array, " S"]
    logits: Float[Array, "S V"]  # of the next token
    keys: Key[Array, " S"]
    cache: model.Cache


def prefill(
    params: PyTree, config: ModelConfig, prompts: Prompts, keys: Key[Array, " N"], *, length: int
) -> Slots:
    """Prompts as rows of ``length`` positions, ready to decode."""
    rows, width = prompts.tokens.shape
    cache = model.init_cache(config, rows, length)
    hidden, cache = model.forward(params, config, prompts.tokens, cache=cache)
    last = jnp.take_along_axis(hidden, (prompts.lengths - 1)[:, None, None], axis=1)[:, 0]
    inside = jnp.arange(length, dtype=jnp.int32)[None] < prompts.lengths[:, None]
    tokens = jnp.pad(prompts.tokens, ((0, 0), (0, length - width)))
    return Slots(
        tokens=jnp.where(inside, tokens, 0),
        logprobs=jnp.zeros((rows, length), jnp.float32),
        prompt_lengths=prompts.lengths,
        lengths=jnp.zeros(rows, jnp.int32),
        alive=jnp.ones(rows, bool),
        terminated=jnp.zeros(rows, bool),
        logits=model.logits(params, config, last),
        keys=keys,
        cache=cache,
    )


def decode(
    params: PyTree,
    config: ModelConfig,
    slots: Slots,
    *,
    sampling: SamplingSection,
    eos_ids: tuple[int, ...],
    enough: Int[Array, ""] | int,
) -> Slots:
    """Extend the living rows until no more than ``enough`` live or one has filled the cache."""
    row = jnp.arange(slots.alive.size, dtype=jnp.int32)
    room, width = slots.cache.keys.shape[2], slots.tokens.shape[1]

    def unfinished(slots):
        reached = jnp.where(slots.alive, slots.prompt_lengths + slots.lengths, 0)
        return (jnp.sum(slots.alive) > enough) & jnp.all(reached < room)

    def extend(slots):
        token_keys = jax.vmap(jax.random.fold_in)(slots.keys, slots.lengths)
        token, logprob = draw(slots.logits, token_keys, sampling)
        at = slots.prompt_lengths + slots.lengths
        written = jnp.where(slots.alive, at, width)  # beyond the row: dropped
        ended = is_in(token, eos_ids)
        lengths = slots.lengths + slots.alive.astype(jnp.int32)
        hidden, cache = model.forward(
            params,
            config,
            token[:, None],
            positions=jnp.minimum(at, room - 1)[:, None],
            cache=slots.cache,
        )
        return dataclasses.replace(
            slots,
            tokens=slots.tokens.at[row, written].set(token, mode="drop"),
            logprobs=slots.logprobs.at[row, written].set(logprob, mode="drop"),
            lengths=lengths,
            alive=slots.alive & ~ended & (lengths < sampling.max_new_tokens),
            terminated=slots.terminated | (slots.alive & ended),
            logits=model.logits(params, config, hidden[:, 0]),
            cache=cache,
        )

    return jax.lax.while_loop(unfinished, extend, slots)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "eos_ids"))
def sample(
    params: PyTree,
    config: ModelConfig,
    prompts: Prompts,
    *,
    sampling: SamplingSection,
    eos_ids: tuple[int, ...],
    keys: Key[Array, " N"],
) -> Rollouts:
    """One completion a prompt: prefill, then decode until every row has ended.

    A row ends with its first token of ``eos_ids`` (kept, and counted in its length) or after
    ``max_new_tokens``. Cost grows with the longest row; rows that ended ride along unchanged.
    """
    length = prompts.tokens.shape[1] + sampling.max_new_tokens
    slots = prefill(params, config, prompts, keys, length=length)
    slots = decode(params, config, slots, sampling=sampling, eos_ids=eos_ids, enough=0)
    return Rollouts(
        tokens=slots.tokens,
        prompt_lengths=slots.prompt_lengths,
        completion_lengths=slots.lengths,
        sampler_logprobs=slots.logprobs,
        terminated=slots.terminated,
        problem_ids=prompts.problem_ids,
    )
