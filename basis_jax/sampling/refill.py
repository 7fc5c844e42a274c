"""Any number of rows through a fixed number of slots, refilled as rows end.

The host decides between calls of a jitted decode; only which rows live and how long they are comes
back to it. No order depends on time: the same rows give the same calls.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, PyTree

from basis_jax.config import SamplingSection
from basis_jax.model import decoder
from basis_jax.model.decoder import KeyValues, ModelConfig
from basis_jax.model.decoding import CACHE_AXES, DecodeWeights, decode_weights, empty_cache, resized
from basis_jax.model.sharding import batch_shards, constrain, put_rows
from basis_jax.sampling.decode import Slots, decode, prefill, sample_with
from basis_jax.types import Prompts, Rollouts

LEAST = 16  # slots after halving, and prompt positions
ROOM = 64  # least cache positions
WORTH_IT = 32  # tokens: below, compiling costs more than rows that wait for the longest
SHARED = 32  # prefixes are shared in multiples of so many tokens: few programs


@functools.partial(jax.jit, static_argnames=("model_config", "rows", "length", "room"))
def empty_slots(model_config: ModelConfig, *, rows: int, length: int, room: int) -> Slots:
    nothing = jnp.zeros(rows, jnp.int32)
    return Slots(
        tokens=jnp.zeros((rows, length), jnp.int32),
        logprobs=jnp.zeros((rows, length), jnp.float32),
        prompt_lengths=nothing,
        lengths=nothing,
        alive=jnp.zeros(rows, bool),
        terminated=jnp.zeros(rows, bool),
        next_token=nothing,
        next_logprob=jnp.zeros(rows, jnp.float32),
        keys=jax.random.split(jax.random.key(0), rows),
        cache=empty_cache(model_config, rows, room),
    )


@functools.partial(jax.jit, static_argnames=("model_config", "sampling"), donate_argnames="slots")
def admit(
    params: PyTree,
    slots: Slots,
    prompts: Prompts,
    keys: Key[Array, " P"],
    *,
    into: Int[Array, "shards each"],
    prefix: KeyValues | None,
    model_config: ModelConfig,
    sampling: SamplingSection,
) -> Slots:
    """Prefill prompts and put them into the slots ``into``: the numbers within each device's own
    (beyond the last: nowhere), so that no cache travels between devices."""
    width = prompts.tokens.shape[1]
    new = prefill(
        params, model_config, prompts, keys, sampling=sampling, length=width, prefix=prefix
    )

    def put(old, row):
        inside = tuple(slice(0, size) for size in row.shape[1:])

        def on_device(old, row, into):
            return old.at[(into, *inside)].set(row, mode="drop")

        parts = by_device(old, into.shape[0]), by_device(row, into.shape[0])
        return jax.vmap(on_device)(*parts, into).reshape(old.shape)

    behind = ((0, 0), (0, slots.tokens.shape[1] - width))
    new = dataclasses.replace(
        new, tokens=jnp.pad(new.tokens, behind), logprobs=jnp.pad(new.logprobs, behind)
    )
    return laid_out(jax.tree.map(put, slots, new))


@functools.partial(
    jax.jit, static_argnames=("model_config", "sampling", "eos_ids"), donate_argnames="slots"
)
def advance(
    weights: DecodeWeights,
    slots: Slots,
    enough: Int[Array, ""],
    *,
    model_config: ModelConfig,
    sampling: SamplingSection,
    eos_ids: tuple[int, ...],
) -> Slots:
    slots = decode(weights, model_config, slots, sampling=sampling, eos_ids=eos_ids, enough=enough)
    return laid_out(slots)


@functools.partial(jax.jit, static_argnames="room")
def make_room(slots: Slots, *, room: int) -> Slots:
    """Slots whose cache has ``room`` positions."""
    return laid_out(dataclasses.replace(slots, cache=resized(slots.cache, room)))


@jax.jit
def chosen(slots: Slots, index: Int[Array, "shards each"]) -> Slots:
    """The slots of these numbers within each device's own."""

    def take(x):
        found = jax.vmap(lambda rows, at: rows[at])(by_device(x, index.shape[0]), index)
        return found.reshape((index.size, *x.shape[1:]))

    return laid_out(jax.tree.map(take, slots))


def by_device(x, shards: int):
    """[rows ...] -> [shards, rows of one, ...]."""
    return x.reshape((shards, x.shape[0] // shards, *x.shape[1:]))


def laid_out(slots: Slots) -> Slots:
    """Split over the mesh in one way, whichever call they come from: one program serves them."""

    def lay(path, x):
        of_cache = path[0].name == "cache"
        axes = CACHE_AXES[path[1].name] if of_cache else ("batch",) + (None,) * (x.ndim - 1)
        return constrain(x, axes)

    return jax.tree.map_with_path(lay, slots)


@functools.partial(jax.jit, static_argnames="model_config")
def read_prefix(
    params: PyTree, tokens: Int[Array, "N P"], *, model_config: ModelConfig
) -> KeyValues:
    """Keys and values of the first row."""
    _, kept = decoder.forward(params, model_config, tokens, keep=True)
    return jax.tree.map(lambda x: x[:, :1], kept)


def shared_prefix(prompts: Prompts) -> int:
    """How many tokens all prompts begin with, in multiples of ``SHARED``; one or more is left."""
    first, shortest = prompts.tokens[:1], int(prompts.lengths.min())
    alike = np.all(prompts.tokens == first, axis=0)[: shortest - 1]
    return int(np.argmin(np.append(alike, False))) // SHARED * SHARED


def sample_rows(
    params: PyTree,
    model_config: ModelConfig,
    prompts: Prompts,
    *,
    sampling: SamplingSection,
    eos_ids: tuple[int, ...],
    keys: Key[Array, " N"],
    mesh: Mesh,
    rows_at_once: int,
    ended: Callable[[Rollouts, np.ndarray], None] | None = None,
) -> Rollouts:
    """A completion for any number of prompts, as host arrays.

    At most ``rows_at_once`` rows (rounded up to the batch's devices) are decoded at once, in slots
    that are refilled as rows end; completions shorter than ``WORTH_IT`` tokens go call after call
    of ``sample`` instead. The draws do not depend on it. ``ended(rollouts, rows)`` is called with
    the numbers of rows that are complete, while the device goes on with others.
    """
    model_config = decoder.computed_in(model_config, sampling.dtype)
    prompts, shards = jax.tree.map(np.asarray, prompts), batch_shards(mesh)
    size = -(-min(rows_at_once, len(prompts.lengths)) // shards) * shards
    found = nothing_yet(prompts, prompts.tokens.shape[1] + sampling.max_new_tokens)
    common = {"sampling": sampling, "eos_ids": eos_ids, "keys": keys, "mesh": mesh, "size": size}
    way = refill if sampling.max_new_tokens >= WORTH_IT else by_batches
    for rows in way(params, model_config, prompts, found, **common):
        if ended is not None:
            ended(found, rows)
    return found


def by_batches(params, model_config, prompts, found, *, sampling, eos_ids, keys, mesh, size):
    """``sample`` for ``size`` rows after the other; yields the rows that have been written."""
    rows, under_way = len(prompts.lengths), []
    weights = decode_weights(params, model_config)
    for start in range(0, rows, size):
        index = np.arange(start, start + size)
        index = np.where(index < rows, index, start)  # one shape: the last call has copies
        part = put_rows(mesh, jax.tree.map(lambda x, i=index: x[i], prompts))
        given = {"model_config": model_config, "sampling": sampling, "eos_ids": eos_ids}
        part = sample_with(params, weights, part, keys[index], **given)
        under_way.append((np.arange(start, min(start + size, rows)), part))
        if len(under_way) == 2:  # the device has the next before the host looks at this one
            yield fetch(found, *under_way.pop(0))
    yield fetch(found, *under_way.pop())


def fetch(found: Rollouts, rows: np.ndarray, part: Rollouts) -> np.ndarray:
    """Write a batch of finished rows into ``found``; which rows they are."""

    def write(whole, new):
        whole[rows] = new[: rows.size]

    jax.tree.map(write, found, jax.device_get(part))
    return rows


def refill(params, model_config, prompts, found, *, sampling, eos_ids, keys, mesh, size):
    """``sample`` in ``size`` slots: rows that ended leave, prompts that wait take their places.
    Yields the rows that have been written into ``found``.

    A call of ``advance`` ends when an eighth of its slots is free (while prompts wait), when half
    are (afterwards: the rest moves into half as many slots), or when a row has filled the cache.
    So few shapes occur, whatever the lengths: the cache grows in powers of two from ``ROOM`` and is
    cut when half would do, the slots are halved down to ``LEAST``, and a prefill has one of two
    counts (``seats``) and a quarter, half or all of the width. Programs: one of ``advance`` for
    each (slots, room) that occurs, at most 6 of ``admit`` for each of them; 512 slots and 32,768
    tokens: 60 at the very most, and a step has seen most of them when it ends.
    What all prompts begin with is read once (with plain attention: NVIDIA's kernel has no prefix).
    Each device has its own slots: rows do not travel.
    Memory a device: a copy of the weights; the slots' cache at the length in use, and once more
    while it grows; tokens and log-probabilities at full length.
    """
    shards, waiting = batch_shards(mesh), 0  # the first row that has had no slot yet
    rows, length = found.tokens.shape
    weights, prefix = decode_weights(params, model_config), None
    shared = shared_prefix(prompts) if model_config.attention == "plain" else 0
    if shared:
        tokens = put_rows(mesh, np.repeat(prompts.tokens[:1, :shared], shards, axis=0))
        prefix = read_prefix(params, tokens, model_config=model_config)
    slots = empty_slots(model_config, rows=size, length=length, room=min(length, ROOM))
    owner = np.full(size, -1)  # the row in each slot; -1: free
    while waiting < rows or np.any(owner >= 0):
        free = in_turn(np.flatnonzero(owner < 0), size // shards)[: rows - waiting]
        new = np.arange(waiting, waiting + free.size)
        owner[free], waiting = new, waiting + free.size
        reached = (prompts.lengths + found.completion_lengths)[owner[owner >= 0]]
        room = min(length, round_up(int(reached.max()) + LEAST, ROOM))
        if room > slots.cache.length or 2 * room <= slots.cache.length:
            slots = make_room(slots, room=room)
        for index, into in seats(new, free, size, shards):
            part = put_rows(mesh, take_prompts(prompts, index, slots.cache.length))
            given = {
                "into": into,
                "prefix": prefix,
                "model_config": model_config,
                "sampling": sampling,
            }
            slots = admit(params, slots, part, keys[index], **given)
        halves = waiting == rows and size // 2 >= LEAST and size // 2 % shards == 0
        enough = size - -(-size // 8) if waiting < rows else size // 2 if halves else 0
        slots = advance(
            weights,
            slots,
            np.int32(min(enough, reached.size - 1)),
            model_config=model_config,
            sampling=sampling,
            eos_ids=eos_ids,
        )
        ended = collect(found, slots, owner)
        if ended.any():
            yield owner[ended]
        owner = np.where(ended, -1, owner)
        if halves and np.any(owner >= 0):
            kept = np.argsort(by_device(owner < 0, shards), axis=1, kind="stable")
            kept = kept[:, : size // shards // 2]  # the busy ones first
            staying = np.take_along_axis(by_device(owner, shards), kept, axis=1).ravel()
            if np.sum(staying >= 0) == np.sum(owner >= 0):
                slots, owner, size = chosen(slots, kept), staying, size // 2


def nothing_yet(prompts: Prompts, length: int) -> Rollouts:
    """Host arrays that the rollouts are written into."""
    rows = len(prompts.lengths)
    return Rollouts(
        tokens=np.zeros((rows, length), np.int32),
        prompt_lengths=prompts.lengths.copy(),
        completion_lengths=np.zeros(rows, np.int32),
        sampler_logprobs=np.zeros((rows, length), np.float32),
        terminated=np.zeros(rows, bool),
        problem_ids=prompts.problem_ids.copy(),
    )


def in_turn(free: np.ndarray, each: int) -> np.ndarray:
    """Free slots, one of every device (which has ``each``) after the other."""
    device = free // each
    return free[np.lexsort((device, rank_on_device(device)))]


def rank_on_device(device: np.ndarray) -> np.ndarray:
    """The how-manieth each one is of those with the same number."""
    order = np.argsort(device, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size) - np.searchsorted(device[order], device[order])
    return rank


def seats(new: np.ndarray, free: np.ndarray, size: int, shards: int):
    """Yield (rows to prefill [shards x each], their slots within each device's own [shards, each]).

    A prefill has an eighth or a quarter of the slots: what it holds at once is bounded, and rows
    that wait for few free slots cost few. It is filled up with copies of a row whose slot is
    beyond the last.
    """
    each = size // shards
    most = -(-each // 4)
    device, within = free // each, free % each
    rank = rank_on_device(device)
    for start in range(0, int(rank.max(initial=-1)) + 1, most):
        now = (rank >= start) & (rank < start + most)
        needed = int(rank[now].max()) + 1 - start
        count = most if needed > -(-most // 2) else -(-most // 2)
        index, into = np.full((shards, count), new[now][0]), np.full((shards, count), each)
        index[device[now], rank[now] - start] = new[now]
        into[device[now], rank[now] - start] = within[now]
        yield index.ravel(), into.astype(np.int32)


def take_prompts(prompts: Prompts, index: np.ndarray, room: int) -> Prompts:
    """Prompts of these rows, as wide as the longest needs, in few different widths."""
    part = jax.tree.map(lambda x: x[index], prompts)
    width = min(room, prompts.tokens.shape[1])
    wide = min(width, round_up(int(part.lengths.max()), max(LEAST, -(-width // 4))))
    return dataclasses.replace(part, tokens=part.tokens[:, :wide])


def collect(found: Rollouts, slots: Slots, owner: np.ndarray) -> np.ndarray:
    """Write what the slots hold of the rows that ended into ``found``; which slots these are."""
    lengths, alive, terminated = jax.device_get((slots.lengths, slots.alive, slots.terminated))
    busy = owner >= 0
    found.completion_lengths[owner[busy]] = lengths[busy]
    ended = busy & ~alive
    if ended.any():
        tokens, logprobs = jax.device_get((slots.tokens, slots.logprobs))
        found.tokens[owner[ended]] = tokens[ended]
        found.sampler_logprobs[owner[ended]] = logprobs[ended]
        found.terminated[owner[ended]] = terminated[ended]
    return ended


def round_up(number: int, least: int) -> int:
    """The smallest ``least`` times a power of two that is not below ``number``."""
    return least * 2 ** max(0, math.ceil(math.log2(number / least)))
