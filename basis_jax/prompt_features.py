"""What the reference policy makes of each prompt, in a few numbers: features for the value filter.

One prefill a problem, no rollout. The state h_i of the prompt's last token after half of the layers
and after all of them, each through the final norm, is projected on the leading principal directions
of the problem set and scaled to unit variance in each of them. Fixed once, at the start.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, PyTree

from basis_jax import model
from basis_jax.data import EncodedProblems
from basis_jax.model import ModelConfig
from basis_jax.sharding import batch_shards, put_rows
from basis_jax.types import Array

SAMPLE = 8192  # problems that the principal directions are taken from


def prompt_features(
    params: PyTree,
    architecture: ModelConfig,
    problems: EncodedProblems,
    *,
    mesh: Mesh,
    size: int = 32,
    rows_at_once: int = 64,
) -> Float[np.ndarray, "M {size}"]:
    """Features of all M problems, in their order; call under ``jax.set_mesh``.

    The directions come from the first ``SAMPLE`` problems, a random subset as uids are hashes; the
    others are projected batch by batch, so that 1 M problems need 4 ``size`` MB and one pass.
    """
    check_size(size, problems, architecture)
    count = len(problems.problems)
    rows = -(-min(rows_at_once, count) // batch_shards(mesh)) * batch_shards(mesh)

    def states(start: int) -> np.ndarray:
        index = np.minimum(np.arange(start, start + rows), count - 1)  # the last one fills up
        tokens, lengths = put_rows(mesh, (problems.tokens[index], problems.lengths[index]))
        return np.asarray(last_states(params, architecture, tokens, lengths))[: count - start]

    starts = range(0, count, rows)
    known = [states(start) for start in starts if start < SAMPLE]
    mean, directions = principal(np.concatenate(known)[:SAMPLE], size)
    features = [(part - mean) @ directions for part in known]
    features += [(states(start) - mean) @ directions for start in starts[len(known) :]]
    return np.concatenate(features).astype(np.float32)


def check_size(size: int, problems: EncodedProblems, architecture: ModelConfig) -> None:
    """Raise a ValueError where ``size`` exceeds the problems or the state's width."""
    count, width = len(problems.problems), 2 * architecture.embed
    if not 1 <= size <= min(count - 1, width):
        raise ValueError(
            f"estimator.features is {size} for {count} problems with states of {width} numbers; "
            f"give 1 to {min(count - 1, width)}"
        )


@functools.partial(jax.jit, static_argnames="config")
def last_states(
    params: PyTree, config: ModelConfig, tokens: Int[Array, "N P"], lengths: Int[Array, " N"]
) -> Float[Array, "N d"]:
    """Normed hidden states of the last prompt token after half and all layers, side by side."""
    half = max(1, config.layers // 2)
    parts = []
    for layers in (half, config.layers):
        cut = {**params, "layers": jax.tree.map(lambda x, k=layers: x[:k], params["layers"])}
        shallow = dataclasses.replace(config, layers=layers)
        hidden, _ = model.forward(cut, shallow, tokens)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        parts.append(last.astype(jnp.float32))
    return jnp.concatenate(parts, axis=1)


def principal(
    states: Float[np.ndarray, "M D"], size: int
) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D {size}"]]:
    """Mean, and directions with (states - mean) @ directions of unit variance; a direction that the
    states do not vary in gives zeros."""
    mean = states.mean(axis=0)
    centred = np.float64(states - mean)
    spread, vectors = np.linalg.eigh(centred.T @ centred / len(states))
    spread, vectors = spread[::-1][:size], vectors[:, ::-1][:, :size]
    scale = np.where(spread > 1e-9 * spread[0], 1 / np.sqrt(np.maximum(spread, 1e-30)), 0)
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(size)])
    return mean, np.float32(vectors * scale * signs)
