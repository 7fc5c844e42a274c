"""What the reference policy makes of each prompt, in a few numbers: features for the value filter.

One prefill a problem through half of the layers, no rollout. The state h_i of the prompt's last
token there, through the final norm, is centred and projected on the leading principal directions of
the problem set. Fixed once, at the start. On SmolLM2's sums the middle of the model told more of
the values than its end or both, and plain projections more than whitened ones.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from basis_jax import processes
from basis_jax.data.encoding import EncodedProblems
from basis_jax.model import decoder
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.sharding import batch_shards, put_rows
from basis_jax.opening.checks import check_features

SAMPLE = 8192  # problems that the principal directions are taken from


def prompt_features(
    params: PyTree,
    model_config: ModelConfig,
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
    count = len(problems.problems)
    check_features(size, count, model_config.embed)
    rows = -(-min(rows_at_once, count) // batch_shards(mesh)) * batch_shards(mesh)

    def states(start: int) -> np.ndarray:
        index = np.minimum(np.arange(start, start + rows), count - 1)  # the last one fills up
        tokens, lengths = put_rows(mesh, (problems.tokens[index], problems.lengths[index]))
        found = middle_states(params, model_config, tokens, lengths)
        return processes.on_host(found)[: count - start]

    starts = range(0, count, rows)
    sampled = [states(start) for start in starts if start < SAMPLE]
    mean, directions = principal(np.concatenate(sampled)[:SAMPLE], size)
    features = [(part - mean) @ directions for part in sampled]
    features += [(states(start) - mean) @ directions for start in starts[len(sampled) :]]
    return np.concatenate(features).astype(np.float32)


@functools.partial(jax.jit, static_argnames="model_config")
def middle_states(
    params: PyTree, model_config: ModelConfig, tokens: Int[Array, "N P"], lengths: Int[Array, " N"]
) -> Float[Array, "N d"]:
    """Normed hidden state of the last prompt token after half of the layers."""
    half = dataclasses.replace(model_config, layers=max(1, model_config.layers // 2))
    params = {**params, "layers": jax.tree.map(lambda x: x[: half.layers], params["layers"])}
    hidden, _ = decoder.forward(params, half, tokens)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return last.astype(jnp.float32)


def principal(
    states: Float[np.ndarray, "M D"], size: int
) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D {size}"]]:
    """Mean of the states, and their ``size`` leading principal directions, as unit columns."""
    mean = states.mean(axis=0)
    centred = (states - mean).astype(np.float64)
    vectors = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :size]
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(size)])
    return mean, (vectors * signs).astype(np.float32)
