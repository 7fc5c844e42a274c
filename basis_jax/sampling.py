"""Prefill and decode under jit: one rollout a row, each with its own noise.

The noise of token t of a rollout is a function of (seed, stream, step, problem, sample, t) alone:
batch size, row order and device count do not change a draw, and resume has nothing to restore.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from basis_jax import model
from basis_jax.config import SamplingSection
from basis_jax.model import ModelConfig
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
    rows, width = prompts.tokens.shape
    total = width + sampling.max_new_tokens
    cache = model.init_cache(config, rows, total)
    hidden, cache = model.forward(params, config, prompts.tokens, cache=cache)
    last = jnp.take_along_axis(hidden, (prompts.lengths - 1)[:, None, None], axis=1)[:, 0]
    tokens = jnp.pad(prompts.tokens, ((0, 0), (0, sampling.max_new_tokens)))
    inside = jnp.arange(total, dtype=jnp.int32)[None] < prompts.lengths[:, None]
    row = jnp.arange(rows, dtype=jnp.int32)

    def unfinished(carry):
        step, _, _, _, done, _, _ = carry
        return (step < sampling.max_new_tokens) & ~jnp.all(done)

    def decode(carry):
        step, tokens, logprobs, lengths, done, logits, cache = carry
        token_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
        token, logprob = draw(logits, token_keys, sampling)
        at = prompts.lengths + step
        tokens = tokens.at[row, at].set(jnp.where(done, 0, token))
        logprobs = logprobs.at[row, at].set(jnp.where(done, 0.0, logprob))
        lengths = lengths + (~done).astype(jnp.int32)
        done = done | is_in(token, eos_ids)
        hidden, cache = model.forward(
            params, config, token[:, None], positions=at[:, None], cache=cache
        )
        logits = model.logits(params, config, hidden[:, 0])
        return step + 1, tokens, logprobs, lengths, done, logits, cache

    start = (
        jnp.int32(0),
        jnp.where(inside, tokens, 0),
        jnp.zeros((rows, total), jnp.float32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, bool),
        model.logits(params, config, last),
        cache,
    )
    _, tokens, logprobs, lengths, done, _, _ = jax.lax.while_loop(unfinished, decode, start)
    return Rollouts(
        tokens=tokens,
        prompt_lengths=prompts.lengths,
        completion_lengths=lengths,
        sampler_logprobs=logprobs,
        terminated=done,
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
    """``sample`` for any number of rows, ``rows_at_once`` a call, gathered as host arrays.

    The last call is filled up with copies of its first row, so there is one compiled shape; the
    draws do not depend on the split. ``rows_at_once`` is rounded up to the batch's devices.
    """
    rows = prompts.tokens.shape[0]
    shards = batch_shards(mesh)
    rows_at_once = -(-min(rows_at_once, rows) // shards) * shards
    parts = []
    for start in range(0, rows, rows_at_once):
        index = np.arange(start, start + rows_at_once)
        index = np.where(index < rows, index, start)
        part = put_rows(mesh, jax.tree.map(lambda x, i=index: np.asarray(x)[i], prompts))
        part = sample(params, config, part, sampling=sampling, eos_ids=eos_ids, keys=keys[index])
        parts.append(jax.device_get(part))
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:rows], *parts)
