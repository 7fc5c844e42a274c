"""Drawing a token a row, each row with noise of its own.

The noise of token t of a rollout is a function of (seed, stream, step, problem, sample, t) alone:
batch size, row order and device count do not change a draw, and resume has nothing to restore.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from basis_jax.config import SamplingSection

STREAMS = ("train", "reference", "evaluate")


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


class Drawn(NamedTuple):
    """A token a row, its log-probability, and the squared norm of its score in the logits:
    |onehot - p|^2 = 1 - 2 p(token) + sum_v p(v)^2 with p the distribution it was drawn from."""

    tokens: Int[Array, " N"]
    logprobs: Float[Array, " N"]
    score_norms: Float[Array, " N"]


def draw(logits: Float[Array, "V N"], keys: Key[Array, " N"], sampling: SamplingSection) -> Drawn:
    """A token a row; temperature 0 takes the likeliest (log-probability and score norm are then
    those of temperature 1).

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
    powers = jnp.exp(blocks - top[None])
    mass = jnp.sum(powers, axis=1)  # [blocks N]
    total = jnp.sum(mass, axis=0)
    collision = jnp.sum(powers**2, axis=(0, 1)) / total**2  # sum_v p(v)^2
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=0).astype(jnp.int32)
        return Drawn(tokens, -jnp.log(total), 1 - 2 / total + collision)
    noise = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = pick(mass.T, noise[:, 0])
    block_logits = jnp.take_along_axis(blocks, block[None, None], axis=0)[0].T - top.T
    within = pick(jnp.exp(block_logits), noise[:, 1])
    logprobs = jnp.take_along_axis(block_logits, within[:, None], axis=1)[:, 0] - jnp.log(total)
    score_norms = jnp.maximum(0, 1 - 2 * jnp.exp(logprobs) + collision)
    return Drawn(block * BLOCK + within, logprobs, score_norms)


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


def token_keys(keys: Key[Array, " N"], lengths: Int[Array, " N"]) -> Key[Array, " N"]:
    """The keys of the tokens that stand at ``lengths`` in the completions."""
    return jax.vmap(jax.random.fold_in)(keys, lengths)
