"""Draw one token per row, with random numbers of its own for each row.

The random numbers of token t of a rollout are a function of (seed, stream, step, problem, sample,
t) only. Batch size, row order and device count do not change a draw, and a resumed run has no
random state to restore.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from basis_jax.config import SamplingSection
from basis_jax.model.decoding import VOCAB_BLOCK
from basis_jax.model.sharding import by_shard, first_index, gathered, highest, split_over, summed

STREAMS = ("train", "reference", "evaluate")


def row_keys(
    seed: int, stream: str, step: int, *, problem_ids: Int[Array, " N"], samples: Int[Array, " N"]
) -> Key[Array, " N"]:
    """One key per rollout from (seed, stream, step, problem, sample)."""
    key = jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream))
    return _row_keys(jax.random.fold_in(key, step), problem_ids, samples)


@jax.jit
def _row_keys(key, problem_ids, samples):
    fold = jax.vmap(lambda p, s: jax.random.fold_in(jax.random.fold_in(key, p), s))
    return fold(problem_ids, samples)


def truncate(logits: Float[Array, "N V"], *, top_k: int, top_p: float) -> Float[Array, "N V"]:
    """The logits, -inf outside the ``top_k`` likeliest tokens (0: all) and outside the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probability reaches ``top_p``.
    """
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


class Drawn(NamedTuple):
    """One token per row, its log-probability, and the squared norm of its score in the logits.

    That norm is |onehot - p|^2 = 1 - 2 p(token) + sum_v p(v)^2, where p is the distribution that
    the token was drawn from.
    """

    tokens: Int[Array, " N"]
    logprobs: Float[Array, " N"]
    score_norms: Float[Array, " N"]


def draw(logits: Float[Array, "V N"], keys: Key[Array, " N"], sampling: SamplingSection) -> Drawn:
    """Draw one token per row. Temperature 0 takes the likeliest token, with the log-probability and
    score norm of temperature 1.

    The distribution function is inverted twice, each time with a uniform number: first for a block
    of ``VOCAB_BLOCK`` tokens, then for a token in it. This costs one exponential per token of the
    vocabulary. Gumbel noise for every token took more time than the output layer on a CPU. If the
    vocabulary is split over devices, they exchange the probabilities of the blocks and one block's
    logits per row, and draw with the same random numbers as a single device. ``top_k`` and
    ``top_p`` gather all logits.
    """
    logits = logits / (sampling.temperature or 1.0)
    if sampling.temperature and (sampling.top_k > 0 or sampling.top_p < 1):
        logits = truncate(logits.T, top_k=sampling.top_k, top_p=sampling.top_p).T
    padding = -logits.shape[0] % (VOCAB_BLOCK * split_over("vocab"))
    logits = jnp.pad(logits, ((0, padding), (0, 0)), constant_values=-jnp.inf)
    noise = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    method = take_likeliest if sampling.temperature == 0 else draw_from_shard
    inputs, outputs = (("vocab", "batch"), ("batch", None)), (("batch",),) * 3
    return Drawn(*by_shard(method, inputs, outputs)(logits, noise))


def draw_from_shard(logits: Float[Array, "v N"], noise: Float[Array, "N 2"]) -> tuple[Array, ...]:
    """``Drawn`` from the whole vocabulary, of which this device has v tokens."""
    blocks = logits.reshape(-1, VOCAB_BLOCK, logits.shape[1])
    top, mass, total, collision = masses(blocks)
    block = pick(mass.T, noise[:, 0])
    own = block - first_index(blocks.shape[0], "vocab")
    at = jnp.clip(own, 0, blocks.shape[0] - 1)
    block_logits = jnp.take_along_axis(blocks, at[None, None], axis=0)[0].T - top[:, None]
    block_logits = summed(jnp.where((own == at)[:, None], block_logits, 0), "vocab")
    within = pick(jnp.exp(block_logits), noise[:, 1])
    logprobs = jnp.take_along_axis(block_logits, within[:, None], axis=1)[:, 0] - jnp.log(total)
    score_norms = jnp.maximum(0, 1 - 2 * jnp.exp(logprobs) + collision)
    return block * VOCAB_BLOCK + within, logprobs, score_norms


def take_likeliest(logits: Float[Array, "v N"], _: Float[Array, "N 2"]) -> tuple[Array, ...]:
    """``Drawn`` for the likeliest token; of several, the first."""
    top, _, total, collision = masses(logits.reshape(-1, VOCAB_BLOCK, logits.shape[1]))
    token = jnp.argmax(logits, axis=0).astype(jnp.int32) + first_index(logits.shape[0], "vocab")
    token = jnp.where(jnp.max(logits, axis=0) == top, token, jnp.iinfo(jnp.int32).max)
    return -highest(-token, "vocab"), -jnp.log(total), 1 - 2 / total + collision


def masses(
    blocks: Float[Array, "B b N"],
) -> tuple[Float[Array, " N"], Float[Array, "A N"], Float[Array, " N"], Float[Array, " N"]]:
    """The largest logit, the sum of exp(logit - largest) over each block of the vocabulary, the
    same sum over the whole vocabulary, and the sum of squared probabilities."""
    top = highest(jnp.max(blocks, axis=(0, 1)), "vocab")
    powers = jnp.exp(blocks - top[None, None])
    mass = gathered(jnp.sum(powers, axis=1), "vocab")
    total = jnp.sum(mass, axis=0)
    return top, mass, total, summed(jnp.sum(powers**2, axis=(0, 1)), "vocab") / total**2


def pick(weights: Float[Array, "N B"], noise: Float[Array, " N"]) -> Int[Array, " N"]:
    """The first index whose cumulative weight exceeds noise x total; never one of weight 0.

    Tiny weights may not change a cumulative sum in float32. If rounding leaves no such index, the
    largest weight is taken.
    """
    cumulated = jnp.cumsum(weights, axis=1)
    reached = (cumulated > noise[:, None] * cumulated[:, -1:]) & (weights > 0)
    first, largest = jnp.argmax(reached, axis=1), jnp.argmax(weights, axis=1)
    return jnp.where(jnp.any(reached, axis=1), first, largest).astype(jnp.int32)


def is_in(tokens: Int[Array, " N"], ids: tuple[int, ...]) -> Bool[Array, " N"]:
    return functools.reduce(jnp.logical_or, [tokens == i for i in ids])


def token_keys(keys: Key[Array, " N"], lengths: Int[Array, " N"]) -> Key[Array, " N"]:
    """The keys of the tokens at positions ``lengths`` of the completions."""
    return jax.vmap(jax.random.fold_in)(keys, lengths)
