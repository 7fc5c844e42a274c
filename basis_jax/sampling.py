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
from basis_jax.decoding import Cache, DecodeWeights, decode_step, decode_weights, filled_cache
from basis_jax.model import KeyValues, ModelConfig
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


BLOCK = 128  # tokens whose probability is summed before one of them is looked for


def draw(
    logits: Float[Array, "V N"], keys: Key[Array, " N"], sampling: SamplingSection
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """A token a row and the log-probability it was drawn with; temperature 0 takes the likeliest
    (its log-probability is that of temperature 1).

    The distribution function is inverted twice, with a uniform number each: for a block of
    ``BLOCK`` tokens, then for a token of it. That costs one exponential a token; noise of its own
    for every token (Gumbel) took more time than the output layer on a CPU.
    """
    logits = logits / (sampling.temperature or 1.0)
    if sampling.temperature and (sampling.top_k > 0 or sampling.top_p < 1):
        logits = truncate(logits.T, top_k=sampling.top_k, top_p=sampling.top_p).T
    rows = logits.shape[1]
    logits = jnp.pad(logits, ((0, -logits.shape[0] % BLOCK), (0, 0)), constant_values=-jnp.inf)
    blocks = logits.reshape(-1, BLOCK, rows)
    top = jnp.max(logits, axis=0, keepdims=True)
    mass = jnp.sum(jnp.exp(blocks - top[None]), axis=1)  # [blocks N]
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=0).astype(jnp.int32)
        return tokens, -jnp.log(jnp.sum(mass, axis=0))
    noise = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = pick(mass.T, noise[:, 0])
    near = jnp.take_along_axis(blocks, block[None, None], axis=0)[0].T - top.T
    within = pick(jnp.exp(near), noise[:, 1])
    logprobs = jnp.take_along_axis(near, within[:, None], axis=1)[:, 0]
    return block * BLOCK + within, logprobs - jnp.log(jnp.sum(mass, axis=0))


def pick(weights: Float[Array, "N B"], noise: Float[Array, " N"]) -> Int[Array, " N"]:
    """The first index whose cumulated weight exceeds noise x the total; never one of weight 0.

    Cumulated sums in float32 need not rise where weights are tiny: where rounding leaves no such
    index, the largest weight is taken.
    """
    cumulated = jnp.cumsum(weights, axis=1)
    reached = (cumulated > noise[:, None] * cumulated[:, -1:]) & (weights > 0)
    first, largest = jnp.argmax(reached, axis=1), jnp.argmax(weights, axis=1)
    return jnp.where(jnp.any(reached, axis=1), first, largest).astype(jnp.int32)


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
    next_token: Int[Array, " S"]  # drawn, not yet part of the row
    next_logprob: Float[Array, " S"]
    keys: Key[Array, " S"]
    cache: Cache


def prefill(
    params: PyTree,
    config: ModelConfig,
    prompts: Prompts,
    keys: Key[Array, " N"],
    *,
    sampling: SamplingSection,
    length: int,
    prefix: KeyValues | None = None,
) -> Slots:
    """Prompts as rows of ``length`` positions, ready to decode. ``prefix``: keys and values of the
    tokens that all prompts begin with, which are then not computed again."""
    rows, width = prompts.tokens.shape
    shared = 0 if prefix is None else prefix.keys.shape[2]
    hidden, kept = model.forward(
        params, config, prompts.tokens[:, shared:], prefix=prefix, keep=True
    )
    if prefix is not None:
        kept = jax.tree.map(jax.vmap(model.after), prefix, kept)
    at = (prompts.lengths - 1 - shared)[:, None, None]
    last = jnp.take_along_axis(hidden, at, axis=1)[:, 0]
    inside = jnp.arange(length, dtype=jnp.int32)[None] < prompts.lengths[:, None]
    tokens = jnp.pad(prompts.tokens, ((0, 0), (0, length - width)))
    nothing = jnp.zeros(rows, jnp.int32)
    first = draw(model.logits(params, config, last).T, token_keys(keys, nothing), sampling)
    return Slots(
        tokens=jnp.where(inside, tokens, 0),
        logprobs=jnp.zeros((rows, length), jnp.float32),
        prompt_lengths=prompts.lengths,
        lengths=nothing,
        alive=jnp.ones(rows, bool),
        terminated=jnp.zeros(rows, bool),
        next_token=first[0],
        next_logprob=first[1],
        keys=keys,
        cache=filled_cache(kept, length),
    )


def token_keys(keys: Key[Array, " N"], lengths: Int[Array, " N"]) -> Key[Array, " N"]:
    """The keys of the tokens that stand at ``lengths`` in the completions."""
    return jax.vmap(jax.random.fold_in)(keys, lengths)


def decode(
    weights: DecodeWeights,
    config: ModelConfig,
    slots: Slots,
    *,
    sampling: SamplingSection,
    eos_ids: tuple[int, ...],
    enough: Int[Array, ""] | int,
) -> Slots:
    """Extend the living rows until no more than ``enough`` live or one has filled the cache."""
    row = jnp.arange(slots.alive.size, dtype=jnp.int32)
    room, width = slots.cache.length, slots.tokens.shape[1]

    def unfinished(slots):
        reached = jnp.where(slots.alive, slots.prompt_lengths + slots.lengths, 0)
        return (jnp.sum(slots.alive) > enough) & jnp.all(reached < room)

    def extend(slots):
        token = slots.next_token
        at = slots.prompt_lengths + slots.lengths
        written = jnp.where(slots.alive, at, width)  # beyond the row: dropped
        ended = is_in(token, eos_ids)
        lengths = slots.lengths + slots.alive.astype(jnp.int32)
        logits, cache = decode_step(weights, config, token, jnp.minimum(at, room - 1), slots.cache)
        next_token, next_logprob = draw(logits, token_keys(slots.keys, lengths), sampling)
        return dataclasses.replace(
            slots,
            tokens=slots.tokens.at[row, written].set(token, mode="drop"),
            logprobs=slots.logprobs.at[row, written].set(slots.next_logprob, mode="drop"),
            lengths=lengths,
            alive=slots.alive & ~ended & (lengths < sampling.max_new_tokens),
            terminated=slots.terminated | (slots.alive & ended),
            next_token=next_token,
            next_logprob=next_logprob,
            cache=cache,
        )

    return jax.lax.while_loop(unfinished, extend, slots)


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
    weights = decode_weights(params, config)
    return sample_with(
        params, weights, prompts, keys, config=config, sampling=sampling, eos_ids=eos_ids
    )


@functools.partial(jax.jit, static_argnames=("config", "sampling", "eos_ids"))
def sample_with(params, weights, prompts, keys, *, config, sampling, eos_ids) -> Rollouts:
    length = prompts.tokens.shape[1] + sampling.max_new_tokens
    slots = prefill(params, config, prompts, keys, sampling=sampling, length=length)
    slots = decode(weights, config, slots, sampling=sampling, eos_ids=eos_ids, enough=0)
    return Rollouts(
        tokens=slots.tokens,
        prompt_lengths=slots.prompt_lengths,
        completion_lengths=slots.lengths,
        sampler_logprobs=slots.logprobs,
        terminated=slots.terminated,
        problem_ids=prompts.problem_ids,
    )
