"""Bytes that one device sends to others, by kind of collective, computed from formulas.

They are counted as in ``collectives``, which reads them from a compiled program.
"""

from jax.sharding import AbstractMesh, Mesh

from basis_jax.model import costs, lora
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.decoding import VOCAB_BLOCK
from basis_jax.model.sharding import batch_shards, groups, shards


def ring(size: int | float, devices: int) -> float:
    """Bytes sent by each of ``devices`` devices that gather or scatter ``size`` bytes."""
    return size * (devices - 1) / devices


def token_traffic(
    model_config: ModelConfig, mesh: Mesh | AbstractMesh, *, slots: int
) -> dict[str, float]:
    """One token in each slot.

    Over ``tensor``, there are two sums per layer and one for the embedding, and the draw exchanges
    the probabilities of the vocabulary's blocks (``sampling.draw``). Nothing is sent over the batch
    axes, because every device there has the weights.
    """
    c, tensor = model_config, shards(mesh, "heads")
    rows = slots / batch_shards(mesh)
    sums = (2 * c.layers + 1) * rows * c.embed * costs.compute_bytes(c)
    return _present(
        {
            "all-reduce": 2 * ring(sums, tensor),
            "all-gather": ring(rows * c.vocab_size / VOCAB_BLOCK * 4, tensor),
        }
    )


def microbatch_traffic(
    model_config: ModelConfig, mesh: Mesh | AbstractMesh, *, rows: int, width: int
) -> dict[str, float]:
    """One microbatch, all in the compute dtype.

    Over ``fsdp``, weights are gathered before the forward and before the backward pass, and the
    gradients of trained parameters are scattered. Over ``data``, these gradients are summed if
    ``sharding.by_data`` has no groups. Over ``tensor``, activations are summed twice per layer in
    each pass, and once more if the backward pass recomputes them.
    """
    c, tensor = model_config, shards(mesh, "heads")
    size, fsdp, data = costs.compute_bytes(c), mesh.shape["fsdp"], mesh.shape["data"]
    weights = size * costs.parameter_bytes(c, mesh, itemsize=1, gathered=True)
    trained = costs.parameter_bytes(c, mesh, itemsize=1, gathered=True, part=lora.trained) * size
    tokens = rows * width / batch_shards(mesh)
    sums = (4 + costs.recomputes(c)) * c.layers * tokens * c.embed * size
    gradients = 0.0 if groups(mesh) > 1 else 2 * ring(trained / fsdp, data)
    return _present(
        {
            "all-gather": 2 * ring(weights, fsdp),
            "reduce-scatter": ring(trained, fsdp),
            "all-reduce": 2 * ring(sums, tensor) + gradients,
        }
    )


def update_traffic(model_config: ModelConfig, mesh: Mesh | AbstractMesh) -> dict[str, float]:
    """One optimizer update after its microbatches: the groups' gradients in float32, and norms,
    which are not counted."""
    trained = costs.parameter_bytes(model_config, mesh, itemsize=4, part=lora.trained)
    return _present({"all-reduce": 2 * ring(trained, groups(mesh))})


def _present(found: dict[str, float]) -> dict[str, float]:
    return {kind: size for kind, size in found.items() if size}
