"""Any number of rows through a fixed number of slots, refilled as rows end.

The host decides between calls of a jitted decode; only which rows live and how long they are comes
back to it. No order depends on time: the same rows give the same calls.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, PyTree

from basis_jax import model
from basis_jax.config import SamplingSection
from basis_jax.model import ModelConfig
from basis_jax.sampling import Slots, decode, prefill, sample
from basis_jax.sharding import batch_shards, constrain, put_rows
from basis_jax.types import Prompts, Rollouts

LEAST = 16  # slots after halving, and prompt positions
ROOM = 64  # least cache positions that a call decodes over
WORTH_IT = 32  # tokens: below, compiling costs more than rows that wait for the longest


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
    """The slots of these numbers, split over the mesh as the others were."""

    def take(path, x):
        if path[0].name == "cache":
            return constrain(x[:, index], model.CACHE_AXES)
        return constrain(x[index], ("batch",) + (None,) * (x.ndim - 1))

    return jax.tree.map_with_path(take, slots)


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

    Up to ``rows_at_once`` rows (rounded up to the batch's devices) are one call of ``sample``. More
    are decoded in that many slots, refilled as rows end, or call after call where completions are
    shorter than ``WORTH_IT`` tokens. The draws do not depend on it.
    """
    rows = prompts.tokens.shape[0]
    shards = batch_shards(mesh)
    size = -(-min(rows_at_once, rows) // shards) * shards
    if rows > size and sampling.max_new_tokens >= WORTH_IT:
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
    parts = []
    for start in range(0, rows, size):
        index = np.arange(start, start + size)
        index = np.where(index < rows, index, start)  # one shape: the last call has copies
        part = put_rows(mesh, jax.tree.map(lambda x, i=index: np.asarray(x)[i], prompts))
        part = sample(params, config, part, sampling=sampling, eos_ids=eos_ids, keys=keys[index])
        parts.append(jax.device_get(part))
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:rows], *parts)


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
    Memory a device: its slots' cache at full length, and once more the part of it in use, or while
    slots are halved the half.
    """
    prompts, shards = jax.tree.map(np.asarray, prompts), batch_shards(mesh)
    rows, width = prompts.tokens.shape
    length = width + sampling.max_new_tokens
    found = nothing_yet(prompts, length)
    slots = empty_slots(config, rows=size, length=length)
    owner = np.full(size, -1)  # the row in each slot; -1: free
    waiting = 0  # the first row that has had no slot yet
    while waiting < rows or np.any(owner >= 0):
        free = np.flatnonzero(owner < 0)[: rows - waiting]
        if free.size:
            new = np.arange(waiting, waiting + free.size)
            index, into = seats(new, free, size, shards)
            part = put_rows(mesh, take_prompts(prompts, index))
            slots = admit(params, slots, part, keys[index], into, config=config)
            owner[free], waiting = new, waiting + free.size
        halves = waiting == rows and size // 2 >= LEAST and size // 2 % shards == 0
        enough = size - -(-size // 8) if waiting < rows else size // 2 if halves else 0
        reached = (prompts.lengths + found.completion_lengths)[owner[owner >= 0]]
        slots = advance(
            params,
            slots,
            np.int32(min(enough, reached.size - 1)),
            config=config,
            sampling=sampling,
            eos_ids=eos_ids,
            room=min(length, round_up(int(reached.max()) + LEAST, ROOM)),
        )
        owner = collect(found, slots, owner)
        left = np.flatnonzero(owner >= 0)
        if halves and 0 < left.size <= size // 2:
            size //= 2
            index = np.append(left, np.flatnonzero(owner < 0))[:size]
            slots, owner = chosen(slots, index), owner[index]
    return found


def nothing_yet(prompts: Prompts, length: int) -> Rollouts:
    """Host arrays that the rollouts are written into."""
    rows = len(prompts.lengths)
    return Rollouts(
        tokens=np.zeros((rows, length), np.int32),
        prompt_lengths=prompts.lengths,
        completion_lengths=np.zeros(rows, np.int32),
        sampler_logprobs=np.zeros((rows, length), np.float32),
        terminated=np.zeros(rows, bool),
        problem_ids=prompts.problem_ids,
    )


def seats(new: np.ndarray, free: np.ndarray, size: int, shards: int) -> tuple[np.ndarray, ...]:
    """(rows to prefill, their slots): filled up, to few different counts, with copies whose slot is
    beyond the last."""
    eighth = -(-size // (8 * shards)) * shards
    count = min(round_up(new.size, eighth), size)
    into = np.append(free, np.full(count - new.size, size)).astype(np.int32)
    return np.resize(new, count), into


def take_prompts(prompts: Prompts, index: np.ndarray) -> Prompts:
    """Prompts of these rows, as wide as the longest needs, in few different widths."""
    part = jax.tree.map(lambda x: x[index], prompts)
    width = prompts.tokens.shape[1]
    wide = min(width, round_up(int(part.lengths.max()), max(LEAST, -(-width // 4))))
    return dataclasses.replace(part, tokens=part.tokens[:, :wide])


def collect(found: Rollouts, slots: Slots, owner: np.ndarray) -> np.ndarray:
    """Write what the slots hold of the rows that ended into ``found``; the owners that are left."""
    lengths, alive, terminated = jax.device_get((slots.lengths, slots.alive, slots.terminated))
    busy = owner >= 0
    found.completion_lengths[owner[busy]] = lengths[busy]
    ended = busy & ~alive
    if ended.any():
        tokens, logprobs = jax.device_get((slots.tokens, slots.logprobs))
        found.tokens[owner[ended]] = tokens[ended]
        found.sampler_logprobs[owner[ended]] = logprobs[ended]
        found.terminated[owner[ended]] = terminated[ended]
    return np.where(ended, -1, owner)


def round_up(number: int, least: int) -> int:
    """The smallest ``least`` times a power of two that is not below ``number``."""
    return least * 2 ** max(0, math.ceil(math.log2(number / least)))
