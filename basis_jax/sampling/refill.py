"""Decode any number of rows in a fixed number of slots, which are refilled as rows end.

The host assigns rows between calls of a jitted decode. For this it reads only which rows are alive
and how long they are. Nothing depends on time: the same rows give the same calls.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int, Key, PyTree

from basis_jax import processes
from basis_jax.config import SamplingSection
from basis_jax.model import decoder
from basis_jax.model.decoder import KeyValues, ModelConfig
from basis_jax.model.decoding import (
    DecodeWeights,
    cache_axes,
    decode_weights,
    empty_cache,
    prompt_params,
    resized,
)
from basis_jax.model.sharding import batch_shards, constrain, named_tree, put_rows
from basis_jax.sampling.decode import Slots, decode_rows, prefill, sample_with
from basis_jax.sampling.places import prefill_groups, round_robin
from basis_jax.types import Prompts, Rollouts

MIN_SLOTS = 16  # slots are not halved below this number
MIN_WIDTH = 16  # positions of a prefill
MIN_HEADROOM = 16  # free cache positions after the longest row when decoding starts
MIN_CACHE = 64  # positions of the cache
MIN_REFILL_TOKENS = 32  # for shorter completions, compiling costs more than waiting for the longest
PREFIX_MULTIPLE = 32  # the shared prefix is a multiple of this many tokens, for few programs

ArrayT = TypeVar("ArrayT", Array, np.ndarray)


@functools.partial(jax.jit, static_argnames=("model_config", "rows", "length", "cache_length"))
def empty_slots(model_config: ModelConfig, *, rows: int, length: int, cache_length: int) -> Slots:
    zeros = jnp.zeros(rows, jnp.int32)
    return Slots(
        tokens=jnp.zeros((rows, length), jnp.int32),
        logprobs=jnp.zeros((rows, length), jnp.float32),
        prompt_lengths=zeros,
        lengths=zeros,
        alive=jnp.zeros(rows, bool),
        terminated=jnp.zeros(rows, bool),
        next_token=zeros,
        next_logprob=jnp.zeros(rows, jnp.float32),
        next_score_norm=jnp.zeros(rows, jnp.float32),
        score_norms=jnp.zeros(rows, jnp.float32),
        keys=jax.random.split(jax.random.key(0), rows),
        cache=empty_cache(model_config, rows, cache_length),
    )


@functools.partial(jax.jit, static_argnames=("model_config", "sampling"), donate_argnames="slots")
def admit(
    params: PyTree,
    weights: DecodeWeights,
    slots: Slots,
    prompts: Prompts,
    keys: Key[Array, " P"],
    *,
    into: Int[Array, "shards each"],
    prefix: KeyValues | None,
    model_config: ModelConfig,
    sampling: SamplingSection,
) -> Slots:
    """Prefill prompts and put them into the slots ``into``.

    Each device counts its own slots from 0, so no cache is sent between devices. A row whose number
    is beyond the last slot is discarded.
    """
    width = prompts.tokens.shape[1]
    new = prefill(
        params,
        weights,
        model_config,
        prompts,
        keys,
        sampling=sampling,
        length=width,
        prefix=prefix,
    )

    def put(old, row):
        inside = tuple(slice(0, size) for size in row.shape[1:])

        def on_device(old, row, into):
            return old.at[(into, *inside)].set(row, mode="drop")

        parts = by_device(old, into.shape[0]), by_device(row, into.shape[0])
        return jax.vmap(on_device)(*parts, into).reshape(old.shape)

    padding = ((0, 0), (0, slots.tokens.shape[1] - width))
    new = dataclasses.replace(
        new, tokens=jnp.pad(new.tokens, padding), logprobs=jnp.pad(new.logprobs, padding)
    )
    return constrain_slots(map_rows(put, slots, new))


@functools.partial(
    jax.jit, static_argnames=("model_config", "sampling", "eos_ids"), donate_argnames="slots"
)
def advance(
    weights: DecodeWeights,
    slots: Slots,
    stop_at_alive: Int[Array, ""],
    *,
    model_config: ModelConfig,
    sampling: SamplingSection,
    eos_ids: tuple[int, ...],
) -> Slots:
    slots = decode_rows(
        weights,
        model_config,
        slots,
        sampling=sampling,
        eos_ids=eos_ids,
        stop_at_alive=stop_at_alive,
    )
    return constrain_slots(slots)


def resize_cache(slots: Slots, *, cache_length: int) -> Slots:
    """The slots with a cache of ``cache_length`` positions.

    The arrays of the old cache are replaced and deleted one after the other, so that two whole
    caches are never in memory. Do not use the old slots afterwards.
    """

    def resize(path, x):
        fitted = resized(x, path[0].name, cache_length)
        x.delete()
        return fitted

    return dataclasses.replace(slots, cache=jax.tree.map_with_path(resize, slots.cache))


@jax.jit
def select_slots(slots: Slots, index: Int[Array, "shards each"]) -> Slots:
    """The slots with these numbers; each device counts its own slots from 0."""

    def take(x):
        taken = jax.vmap(lambda rows, at: rows[at])(by_device(x, index.shape[0]), index)
        return taken.reshape((index.size, *x.shape[1:]))

    return constrain_slots(map_rows(take, slots))


def by_device(x: ArrayT, shards: int) -> ArrayT:
    """[rows ...] -> [shards, rows per shard, ...]."""
    return x.reshape((shards, x.shape[0] // shards, *x.shape[1:]))


def map_rows(function: Callable[..., Array], *slots: Slots) -> Slots:
    """Apply ``function`` to each array of the slots, with the rows as first axis. A stacked cache
    is handled layer by layer."""

    def apply(path, *arrays):
        stacked = path[0].name == "cache" and len(path) == 2
        return (jax.vmap(function) if stacked else function)(*arrays)

    return jax.tree.map_with_path(apply, *slots)


def constrain_slots(slots: Slots) -> Slots:
    """Fix the slots' layout on the mesh, so that every call uses the same program."""

    def pin(path, x):
        of_cache = path[0].name == "cache"
        axes = cache_axes(path[1].name, x) if of_cache else ("batch",) + (None,) * (x.ndim - 1)
        return constrain(x, axes)

    return jax.tree.map_with_path(pin, slots)


@functools.partial(jax.jit, static_argnames="model_config")
def read_prefix(
    params: PyTree, weights: DecodeWeights, tokens: Int[Array, "N P"], *, model_config: ModelConfig
) -> KeyValues:
    """Keys and values of the first row."""
    params, reader = prompt_params(params, weights, model_config)
    _, kept = decoder.forward(params, reader, tokens, keep=True)
    return jax.tree.map(lambda x: x[:, :1], kept)


def shared_prefix(prompts: Prompts) -> int:
    """Number of tokens that all prompts begin with, rounded down to a multiple of
    ``PREFIX_MULTIPLE``. At least one token of every prompt is not part of the prefix."""
    tokens = prompts.tokens[:, : int(prompts.lengths.min()) - 1]
    alike = np.all(tokens == tokens[:1], axis=0)
    return int(np.argmin(np.append(alike, False))) // PREFIX_MULTIPLE * PREFIX_MULTIPLE


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
    any_number: bool = False,
    on_ended: Callable[[Rollouts, np.ndarray], None] | None = None,
) -> Rollouts:
    """Complete any number of prompts on ``mesh``; returns host arrays.

    The parameters may be on another mesh of the same devices. At most ``rows_at_once`` rows
    (rounded up to a multiple of the batch's devices) are decoded at once, in slots that are
    refilled as rows end. If completions have fewer than ``MIN_REFILL_TOKENS`` tokens, ``sample`` is
    called for one batch after another instead; the draws are the same. ``on_ended(rollouts, rows)``
    is called with the numbers of completed rows while the device works on the others.
    ``any_number``: the number of slots is rounded up to ``MIN_SLOTS`` times a power of two.
    """
    model_config = decoder.computed_in(model_config, sampling.dtype)
    prompts, shards = jax.tree.map(np.asarray, prompts), batch_shards(mesh)
    rows = len(prompts.lengths)
    size = min(rows_at_once, round_up(rows, MIN_SLOTS) if any_number else rows)
    size = -(-size // shards) * shards
    rollouts = empty_rollouts(prompts, prompts.row_length(sampling.max_new_tokens))
    common = {"sampling": sampling, "eos_ids": eos_ids, "keys": keys, "mesh": mesh, "size": size}
    method = refill if sampling.max_new_tokens >= MIN_REFILL_TOKENS else by_batches
    with jax.set_mesh(mesh):
        weights = decode_weights(params, model_config)
        params = params_on(mesh, params, model_config)
        for rows in method(params, weights, model_config, prompts, rollouts, **common):
            if on_ended is not None:
                on_ended(rollouts, rows)
    return rollouts


def params_on(mesh: Mesh, params: PyTree, model_config: ModelConfig) -> PyTree:
    """The parameters for prefills, moved to ``mesh`` if they are on another one. None if prefills
    read only the decode weights."""
    if model_config.scan_decode:
        return None
    lying = params["embedding"].sharding
    if isinstance(lying, NamedSharding) and lying.mesh.shape != mesh.shape:
        return jax.device_put(params, named_tree(mesh, decoder.param_axes(model_config)))
    return params


def by_batches(
    params, weights, model_config, prompts, rollouts, *, sampling, eos_ids, keys, mesh, size
):
    """Call ``sample`` for ``size`` rows at a time; yield the rows written into ``rollouts``."""
    rows, under_way = len(prompts.lengths), []
    fixed = {"model_config": model_config, "sampling": sampling, "eos_ids": eos_ids}
    for start in range(0, rows, size):
        index = np.arange(start, start + size)
        index = np.where(index < rows, index, start)  # copies in the last call keep the shape
        part = put_rows(mesh, jax.tree.map(lambda x, i=index: x[i], prompts))
        part = sample_with(params, weights, part, keys[index], **fixed)
        part = processes.gathered(part)  # starts before the next batch does
        under_way.append((np.arange(start, min(start + size, rows)), part))
        if len(under_way) == 2:  # the next batch runs before the host reads this one
            yield store_batch(rollouts, *under_way.pop(0))
    yield store_batch(rollouts, *under_way.pop())


def store_batch(rollouts: Rollouts, rows: np.ndarray, part: Rollouts) -> np.ndarray:
    """Write a batch of finished rows into ``rollouts``; returns the rows."""

    def write(whole, new):
        whole[rows] = new[: rows.size]

    jax.tree.map(write, rollouts, processes.on_host(part))
    return rows


def refill(
    params, weights, model_config, prompts, rollouts, *, sampling, eos_ids, keys, mesh, size
):
    """Sample in ``size`` slots: waiting prompts take the slots of rows that have ended.

    Yields the rows written into ``rollouts``. A call of ``advance`` ends when a row has filled the
    cache, or when enough slots are free: an eighth while prompts wait, afterwards half. In the
    latter case the other rows move into half as many slots.

    So few shapes occur, whatever the lengths. The cache grows in powers of two from ``MIN_CACHE``
    and is cut when half is enough. The slots are halved down to ``MIN_SLOTS``. A prefill has one of
    two numbers of rows (``prefill_groups``), and a quarter, half or all of the width. There is one
    program of ``advance`` for each (slots, cache length) that occurs, and at most 6 of ``admit``
    for each of them: at most 60 with 512 slots and 32,768 tokens. Most of them are compiled in the
    first step.

    Each device has its own slots, so rows are not sent between devices. Memory per device: a copy
    of the weights; the slots' cache at the length in use; tokens and log-probabilities at full
    length.
    """
    shards, waiting = batch_shards(mesh), 0  # the first row without a slot so far
    rows, length = rollouts.tokens.shape
    prefix = common_prefix(params, weights, model_config, prompts, mesh)
    slots = empty_slots(model_config, rows=size, length=length, cache_length=min(length, MIN_CACHE))
    fixed = {"model_config": model_config, "sampling": sampling}
    owner = np.full(size, -1)  # the row in each slot; -1: free
    while waiting < rows or np.any(owner >= 0):
        free = round_robin(np.flatnonzero(owner < 0), size // shards)[: rows - waiting]
        new = np.arange(waiting, waiting + free.size)
        owner[free], waiting = new, waiting + free.size
        reached = (rollouts.prompt_lengths + rollouts.completion_lengths)[owner[owner >= 0]]
        cache_length = min(length, round_up(int(reached.max()) + MIN_HEADROOM, MIN_CACHE))
        if cache_length > slots.cache.length or 2 * cache_length <= slots.cache.length:
            slots = resize_cache(slots, cache_length=cache_length)
        for index, into in prefill_groups(new, free, size, shards):
            part = put_rows(mesh, take_prompts(prompts, index, slots.cache.length))
            slots = admit(
                params, weights, slots, part, keys[index], into=into, prefix=prefix, **fixed
            )
        halves = waiting == rows and size // 2 >= MIN_SLOTS and size // 2 % shards == 0
        stop_at_alive = size - -(-size // 8) if waiting < rows else size // 2 if halves else 0
        stop_at_alive = np.int32(min(stop_at_alive, reached.size - 1))
        slots = advance(weights, slots, stop_at_alive, eos_ids=eos_ids, **fixed)
        ended = store_ended(rollouts, slots, owner)
        if ended.any():
            yield owner[ended]
        owner = np.where(ended, -1, owner)
        if halves and np.any(owner >= 0):
            slots, owner = halve_slots(slots, owner, shards)
            size = owner.size


def common_prefix(
    params: PyTree, weights: DecodeWeights, model_config: ModelConfig, prompts: Prompts, mesh: Mesh
) -> KeyValues | None:
    """Keys and values of the tokens that all prompts begin with, computed once.

    None if these tokens are too few, or if attention uses NVIDIA's kernel, which takes no prefix.
    """
    shared = shared_prefix(prompts) if model_config.attention != "cudnn" else 0
    if not shared:
        return None
    tokens = np.repeat(prompts.tokens[:1, :shared], batch_shards(mesh), axis=0)
    return read_prefix(params, weights, put_rows(mesh, tokens), model_config=model_config)


def halve_slots(slots: Slots, owner: np.ndarray, shards: int) -> tuple[Slots, np.ndarray]:
    """Half of each device's slots, with their owners, if all busy ones fit; else unchanged."""
    kept = np.argsort(by_device(owner < 0, shards), axis=1, kind="stable")
    kept = kept[:, : owner.size // shards // 2]  # busy slots come first
    staying = np.take_along_axis(by_device(owner, shards), kept, axis=1).ravel()
    if np.sum(staying >= 0) < np.sum(owner >= 0):
        return slots, owner
    return select_slots(slots, kept), staying


def empty_rollouts(prompts: Prompts, length: int) -> Rollouts:
    """Empty host arrays for the rollouts."""
    rows = len(prompts.lengths)
    return Rollouts(
        tokens=np.zeros((rows, length), np.int32),
        prompt_lengths=prompts.lengths - prompts.begun_lengths,
        completion_lengths=prompts.begun_lengths.copy(),
        sampler_logprobs=np.zeros((rows, length), np.float32),
        score_norms=np.zeros(rows, np.float32),
        terminated=np.zeros(rows, bool),
        problem_ids=prompts.problem_ids.copy(),
    )


def take_prompts(prompts: Prompts, index: np.ndarray, cache_length: int) -> Prompts:
    """The prompts of these rows, cut to the smallest of a few widths that holds the longest."""
    part = jax.tree.map(lambda x: x[index], prompts)
    full_width = min(cache_length, prompts.tokens.shape[1])
    width = min(full_width, round_up(int(part.lengths.max()), max(MIN_WIDTH, -(-full_width // 4))))
    return dataclasses.replace(part, tokens=part.tokens[:, :width])


def store_ended(rollouts: Rollouts, slots: Slots, owner: np.ndarray) -> np.ndarray:
    """Write rows that have ended into ``rollouts``; returns which slots they were in."""
    told = slots.lengths, slots.alive, slots.terminated, slots.score_norms
    lengths, alive, terminated, score_norms = processes.on_host(told)
    busy = owner >= 0
    rollouts.completion_lengths[owner[busy]] = lengths[busy]
    ended = busy & ~alive
    if ended.any():
        tokens, logprobs = processes.on_host((slots.tokens, slots.logprobs))
        rollouts.tokens[owner[ended]] = tokens[ended]
        rollouts.sampler_logprobs[owner[ended]] = logprobs[ended]
        rollouts.terminated[owner[ended]] = terminated[ended]
        rollouts.score_norms[owner[ended]] = score_norms[ended]
    return ended


def round_up(number: int, unit: int) -> int:
    """The smallest product of ``unit`` and a power of two that is at least ``number``."""
    return unit * 2 ** max(0, math.ceil(math.log2(number / unit)))
