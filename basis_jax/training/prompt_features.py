"""Features of each prompt for the value filter, from the reference policy's hidden states.

They cost one prefill per problem through half of the layers, and no rollout. The hidden state of
the prompt's last token there goes through the final norm, is centred, and is projected on the
leading principal directions of the problem set. The features are computed once, at the start. On
SmolLM2's sums the middle layer predicted the values better than the last layer or both together,
and plain projections predicted them better than whitened ones.
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

SAMPLE = 8192  # number of problems that the principal directions are computed from


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

    The directions come from the first ``SAMPLE`` problems; this is a random subset, because uids
    are hashes. The other problems are projected batch by batch, so 1 M problems need one pass and
    4 ``size`` MB.
    """
    count = len(problems.problems)
    check_features(size, count, model_config.embed)
    rows = -(-min(rows_at_once, count) // batch_shards(mesh)) * batch_shards(mesh)

    def states(start: int) -> np.ndarray:
        index = np.minimum(np.arange(start, start + rows), count - 1)  # repeats the last row
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
    """Normalised hidden state of the last prompt token after half of the layers."""
    half = dataclasses.replace(model_config, layers=max(1, model_config.layers // 2))
    params = {**params, "layers": jax.tree.map(lambda x: x[: half.layers], params["layers"])}
    hidden, _ = decoder.forward(params, half, tokens)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return last.astype(jnp.float32)


def principal(
    states: Float[np.ndarray, "M D"], size: int
) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D {size}"]]:
    """Mean of the states, and their ``size`` leading principal directions as unit columns."""
    mean = states.mean(axis=0)
    centred = (states - mean).astype(np.float64)
    vectors = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :size]
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(size)])
    return mean, (vectors * signs).astype(np.float32)
