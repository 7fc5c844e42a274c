"""Gradients of log p(completion) over all parameters, one per rollout: exact norms and sketches.

A sketch is x -> sum over rows k of roll(s_k * x_k, o_k), x cut into rows of B entries, with random
signs s and offsets o: a count sketch into B buckets. It is linear. <sketch x, sketch y> has mean
<x, y> and a standard deviation of at most sqrt((|x|^2 |y|^2 + <x, y>^2) / B). So the sketches of
batch gradients and of true gradients, under any baseline, are sums of the rollouts' sketches.

Two metrics: ``sgd`` is g itself, ``adamw`` is g / (sqrt(v) + eps), v the mean of the squares of
the gradients of whole batches at the same parameters.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Int8, PyTree

from basis_jax.model import decoder
from basis_jax.model.decoder import ModelConfig
from basis_jax.pytree import pytree
from basis_jax.types import AnyArray

BUCKETS = 16_384
METRICS = ("sgd", "adamw")
WIDTH = 8  # rows are cut to multiples of this many tokens


@pytree
class Hash:
    """Signs of all parameters, padded to whole rows of B, and an offset for each row."""

    signs: Int8[AnyArray, "K B"]
    offsets: Int[AnyArray, " K"]


def make_hash(size: int, buckets: int = BUCKETS, seed: int = 0) -> Hash:
    """A random hash of ``size`` parameters into ``buckets``."""
    random = np.random.default_rng([seed, 6])
    rows = -(-size // buckets)
    signs = 2 * random.integers(0, 2, (rows, buckets), np.int8) - 1
    return Hash(signs=signs, offsets=random.integers(0, buckets, rows).astype(np.int32))


def sketch(x: Float[Array, "n D"], hash: Hash) -> Float[Array, "n B"]:
    """The sketch of every row of x."""
    signs, offsets = jnp.asarray(hash.signs), jnp.asarray(hash.offsets)
    buckets = signs.shape[1]
    whole = x.shape[1] // buckets  # rows of B without padding

    def add(k, total, part):
        return total + jnp.roll(part * signs[k].astype(x.dtype)[None], offsets[k], axis=1)

    def add_row(k, total):
        return add(k, total, jax.lax.dynamic_slice_in_dim(x, k * buckets, buckets, axis=1))

    total = jax.lax.fori_loop(0, whole, add_row, jnp.zeros((x.shape[0], buckets)))
    rest = x[:, whole * buckets :]
    if rest.shape[1]:
        total = add(whole, total, jnp.pad(rest, ((0, 0), (0, buckets - rest.shape[1]))))
    return total


def token_logprobs(
    params: PyTree, model_config: ModelConfig, tokens: Int[Array, "n T"], temperature: float
) -> Float[Array, "n T"]:
    """log p(token t | tokens before t), 0 for the first: the plain formula, all logits at once."""
    hidden, _ = decoder.forward(params, model_config, tokens)
    scaled = decoder.logits(params, model_config, hidden[:, :-1]) / temperature
    picked = jnp.take_along_axis(jax.nn.log_softmax(scaled, axis=-1), tokens[:, 1:, None], axis=2)
    return jnp.pad(picked[..., 0], ((0, 0), (1, 0)))


def surrogate(
    params: PyTree,
    model_config: ModelConfig,
    tokens: Int[Array, "n T"],
    mask: Bool[Array, "n T"],
    old: Float[Array, "n T"],
    *,
    temperature: float,
) -> Float[Array, " n"]:
    """sum over the completion of exp(log p - old), old the log-probabilities that sampled it.

    Multiplied by the advantage, it is PPO's objective without the clip. At the parameters that
    sampled, its gradient is that of log p(completion)."""
    logprobs = token_logprobs(params, model_config, tokens, temperature)
    return jnp.sum(jnp.where(mask, jnp.exp(logprobs - old), 0), axis=1)


@dataclass(frozen=True)
class Gradients:
    """Gradients of n rollouts by metric. ``sketches`` are those of gradients scaled to norm 1."""

    norms: Float[np.ndarray, "*n 2"]  # squared
    sketches: Float[np.ndarray, "*n 2 B"]


def make_gradients(
    model_config: ModelConfig, hash: Hash, *, temperature: float, rows: int
) -> Callable[..., Gradients]:
    """(params, scale [D], tokens [n T], mask, old) -> ``Gradients`` of the surrogate's rows.

    AdamW multiplies every entry by ``scale``. ``rows`` gradients exist at once. Equal rows are
    computed once.
    """

    def one(params, tokens, mask, old):
        value = functools.partial(surrogate, model_config=model_config, temperature=temperature)
        gradient = jax.grad(
            lambda p: value(p, tokens=tokens[None], mask=mask[None], old=old[None])[0]
        )(params)
        return ravel_pytree(gradient)[0]

    @jax.jit
    def several(params, scale, hash, rows):
        found = jax.vmap(one, in_axes=(None, 0, 0, 0))(params, *rows)
        both = (found, found * scale[None])
        norms = jnp.stack([jnp.sum(x**2, axis=1) for x in both], 1)
        sketches = jnp.stack([sketch(x, hash) for x in both], 1)
        unit = sketches / jnp.maximum(jnp.sqrt(norms), 1e-30)[..., None]
        return norms, unit.astype(jnp.float16)

    def gradients(params, scale, tokens, mask, old):
        _, first, back = np.unique(
            np.where(np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] > 0, tokens, -1),
            axis=0,
            return_index=True,
            return_inverse=True,
        )
        norms = np.zeros((len(first), 2), np.float32)
        sketches = np.zeros((len(first), 2, hash.signs.shape[1]), np.float16)
        for at, width in pieces(mask[first], rows):
            part = tuple(x[first[at], :width] for x in (tokens, mask, old))
            found = several(params, scale, hash, part)
            norms[at], sketches[at] = (np.asarray(x) for x in found)
        return Gradients(norms[back.ravel()], sketches[back.ravel()])

    return gradients


def pieces(
    mask: Bool[np.ndarray, "n T"], rows: int
) -> Iterator[tuple[Int[np.ndarray, " rows"], int]]:
    """Yield ``rows`` row numbers of similar length and a width that holds them. The last piece is
    filled with copies."""
    ends = mask.shape[1] - np.argmax(mask[:, ::-1], axis=1)
    order = np.argsort(ends, kind="stable")
    for start in range(0, len(order), rows):
        at = order[np.minimum(np.arange(start, start + rows), len(order) - 1)]
        yield at, min(mask.shape[1], -(-int(ends[at].max()) // WIDTH) * WIDTH)


def logprobs_of(
    params: PyTree,
    model_config: ModelConfig,
    tokens: Int[np.ndarray, "n T"],
    *,
    temperature: float,
    rows: int,
) -> Float[np.ndarray, "n T"]:
    """``token_logprobs`` of many rows, ``rows`` at a time."""
    score = jax.jit(token_logprobs, static_argnums=(1, 3))
    parts = []
    for start in range(0, len(tokens), rows):
        at = np.minimum(np.arange(start, start + rows), len(tokens) - 1)
        part = score(params, model_config, jnp.asarray(tokens[at]), temperature)
        parts.append(np.asarray(part)[: len(tokens) - start])
    return np.concatenate(parts)


def batch_gradients(
    params: PyTree,
    model_config: ModelConfig,
    batches: Int[np.ndarray, "K N"],
    *,
    tokens: Int[np.ndarray, "n T"],
    mask: Bool[np.ndarray, "n T"],
    old: Float[np.ndarray, "n T"],
    rewards: Float[np.ndarray, " n"],
    temperature: float,
) -> Iterator[Float[Array, " D"]]:
    """Yield the gradient of every batch of rows, averaged over tokens, with the batch's mean reward
    as baseline. This baseline is neutral: it is none of those that are compared."""

    @jax.jit
    def gradient(params, tokens, mask, old, rewards):
        def objective(p):
            scores = surrogate(p, model_config, tokens, mask, old, temperature=temperature)
            return jnp.sum((rewards - jnp.mean(rewards)) * scores) / jnp.sum(mask).astype(
                jnp.float32
            )

        return ravel_pytree(jax.grad(objective)(params))[0]

    for rows in batches:
        yield gradient(params, *(jnp.asarray(x[rows]) for x in (tokens, mask, old, rewards)))
