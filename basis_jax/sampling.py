"""Prefill and decode under jit: one rollout a row, each with its own noise.

The noise of token t of a rollout is a function of (seed, stream, step, problem, sample, t) alone:
batch size, row order and device count do not change a draw, and resume has nothing to restore.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from basis_jax import model
from basis_jax.config import SamplingSection
from basis_jax.model import ModelConfig
from basis_jax.pytree import pytree
from basis_jax.sharding import batch_shards, put_rows
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


def sample_rows(
    params: PyTree,
    config: ModelConfig,
    prompts: Prompts,
    *,
    sampling: SamplingSection,
    eos_ids: tuple[int, ...],
    keys: Key[Array, " N"],
    mesh: Mesh,
    rows_at_once: int,
) -> Rollouts:
    """A completion for any number of prompts, as host arrays.

    Up to ``rows_at_once`` rows (rounded up to the batch's devices) are one call of ``sample``; more
    are decoded in that many slots, refilled as rows end. The draws do not depend on it.
    """
    rows = prompts.tokens.shape[0]
    shards = batch_shards(mesh)
    size = -(-min(rows_at_once, rows) // shards) * shards
    if rows > size:
        return refill(
            params,
            config,
            prompts,
            sampling=sampling,
            eos_ids=eos_ids,
            keys=keys,
            mesh=mesh,
            size=size,
        )
    index = np.arange(size) % rows  # the last rows are copies
    part = put_rows(mesh, jax.tree.map(lambda x: np.asarray(x)[index], prompts))
    part = sample(params, config, part, sampling=sampling, eos_ids=eos_ids, keys=keys[index])
    return jax.tree.map(lambda x: x[:rows], jax.device_get(part))


# ---------------------------------------------------------------------------------------- refilling
LEAST = 16  # slots after halving, and prompt positions
ROOM = 64  # least cache positions that a call decodes over


@functools.partial(jax.jit, static_argnames=("config", "rows", "length"))
def empty_slots(config: ModelConfig, *, rows: int, length: int) -> Slots:
    nothing = jnp.zeros(rows, jnp.int32)
    return Slots(
        tokens=jnp.zeros((rows, length), jnp.int32),
        logprobs=jnp.zeros((rows, length), jnp.float32),
        prompt_lengths=nothing,
        lengths=nothing,
        alive=jnp.zeros(rows, bool),
        terminated=jnp.zeros(rows, bool),
        logits=jnp.zeros((rows, config.vocab_size), jnp.float32),
        keys=jax.random.split(jax.random.key(0), rows),
        cache=model.init_cache(config, rows, length),
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="slots")
def admit(
    params: PyTree,
    slots: Slots,
    prompts: Prompts,
    keys: Key[Array, " P"],
    into: Int[Array, " P"],
    *,
    config: ModelConfig,
) -> Slots:
    """Prefill prompts and put them into the slots ``into`` (beyond the last: nowhere)."""
    width = prompts.tokens.shape[1]
    new = prefill(params, config, prompts, keys, length=width)

    def put(path, old, row):
        if path[0].name == "cache":
            return old.at[:, into, :width].set(row, mode="drop")
        if old.ndim == 2 and path[0].name != "logits":
            row = jnp.pad(row, ((0, 0), (0, old.shape[1] - width)))
        return old.at[into].set(row, mode="drop")

    return jax.tree.map_with_path(put, slots, new)


@functools.partial(
    jax.jit,
    static_argnames=("config", "sampling", "eos_ids", "room"),
    donate_argnames="slots",
)
def advance(
    params: PyTree,
    slots: Slots,
    enough: Int[Array, ""],
    *,
    config: ModelConfig,
    sampling: SamplingSection,
    eos_ids: tuple[int, ...],
    room: int,
) -> Slots:
    """``decode`` over the first ``room`` positions of the cache."""
    cache = slots.cache
    part = jax.tree.map(lambda x: x[:, :, :room], cache)
    slots = dataclasses.replace(slots, cache=part)
    slots = decode(params, config, slots, sampling=sampling, eos_ids=eos_ids, enough=enough)
    whole = jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_slice(x, y, (0,) * 5), cache, slots.cache
    )
    return dataclasses.replace(slots, cache=whole)


@jax.jit
def chosen(slots: Slots, index: Int[Array, " K"]) -> Slots:
    """The slots of these numbers."""

    def take(path, x):
        return x[:, index] if path[0].name == "cache" else x[index]

    return jax.tree.map_with_path(take, slots)


def refill(
    params: PyTree,
    config: ModelConfig,
    prompts: Prompts,
    *,
    sampling: SamplingSection,
    eos_ids: tuple[int, ...],
    keys: Key[Array, " N"],
    mesh: Mesh,
    size: int,
) -> Rollouts:
    """``sample`` in ``size`` slots: rows that ended leave, prompts that wait take their places.

    A call of ``advance`` ends when an eighth of its slots is free (while prompts wait), when half
    are (afterwards: the rest moves into half as many slots), or when a row has filled the part of
    the cache in use. So few shapes occur, whatever the lengths: a prefill has an eighth, a quarter,
    half or all of the slots and a quarter, half or all of the width (12 programs at most); the part
    of the cache grows in powers of two from ``ROOM``, the slots are halved down to ``LEAST``.
    Memory: the cache of all slots at full length, and a copy of the part in use.
    """
    prompts = jax.tree.map(np.asarray, prompts)
    rows, width = prompts.tokens.shape
    length, shards = width + sampling.max_new_tokens, batch_shards(mesh)
    found = Rollouts(
        tokens=np.zeros((rows, length), np.int32),
        prompt_lengths=prompts.lengths,
        completion_lengths=np.zeros(rows, np.int32),
        sampler_logprobs=np.zeros((rows, length), np.float32),
        terminated=np.zeros(rows, bool),
        problem_ids=prompts.problem_ids,
    )
    slots = empty_slots(config, rows=size, length=length)
    owner = np.full(size, -1)  # the row in each slot
    waiting = 0  # the first row that has no slot yet
    while True:
        free = np.flatnonzero(owner < 0)[: rows - waiting]
        if free.size:
            new = np.arange(waiting, waiting + free.size)
            count = min(round_up(free.size, -(-size // (8 * shards)) * shards), size)
            index = np.resize(new, count)  # filled up with copies, which go nowhere
            into = np.append(free, np.full(count - free.size, size)).astype(np.int32)
            wide = min(width, round_up(int(prompts.lengths[new].max()), max(LEAST, -(-width // 4))))
            part = jax.tree.map(lambda x, i=index: x[i], prompts)
            part = dataclasses.replace(part, tokens=part.tokens[:, :wide])
            slots = admit(params, slots, put_rows(mesh, part), keys[index], into, config=config)
            owner[free], waiting = new, waiting + free.size
        living = owner >= 0
        reached = prompts.lengths + found.completion_lengths
        room = min(length, round_up(int(reached[owner[living]].max()) + LEAST, ROOM))
        halves = size // 2 >= LEAST and size // 2 % shards == 0
        enough = size - -(-size // 8) if waiting < rows else size // 2 if halves else 0
        slots = advance(
            params,
            slots,
            np.int32(min(enough, living.sum() - 1)),
            config=config,
            sampling=sampling,
            eos_ids=eos_ids,
            room=room,
        )
        lengths, alive, terminated = jax.device_get((slots.lengths, slots.alive, slots.terminated))
        found.completion_lengths[owner[living]] = lengths[living]
        ended = living & ~alive
        if ended.any():
            tokens, logprobs = jax.device_get((slots.tokens, slots.logprobs))
            found.tokens[owner[ended]] = tokens[ended]
            found.sampler_logprobs[owner[ended]] = logprobs[ended]
            found.terminated[owner[ended]] = terminated[ended]
            owner[ended] = -1
        left = np.flatnonzero(owner >= 0)
        if waiting == rows and not left.size:
            return found
        if waiting == rows and halves and left.size <= size // 2:
            size //= 2
            index = np.append(left, np.flatnonzero(owner < 0))[:size]
            slots, owner = chosen(slots, index), owner[index]


def round_up(number: int, least: int) -> int:
    """The smallest ``least`` times a power of two that is not below ``number``."""
    return least * 2 ** max(0, math.ceil(math.log2(number / least)))
