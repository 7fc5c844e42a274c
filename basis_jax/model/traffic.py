"""What travels between devices, from formulas: bytes that one device sends, by kind of collective.

Counted as in ``collectives``, which reads the same from a compiled program.
"""

from jax.sharding import AbstractMesh, Mesh

from basis_jax.model import costs, lora
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.decoding import VOCAB_BLOCK
from basis_jax.model.sharding import batch_shards, shards


def ring(size: int | float, devices: int) -> float:
    """Sent by each of so many devices that gather or scatter ``size`` bytes."""
    return size * (devices - 1) / devices


def token_traffic(
    model_config: ModelConfig, mesh: Mesh | AbstractMesh, *, slots: int
) -> dict[str, float]:
    """One token in each slot: over ``tensor``, two sums a layer and one of the embedding, and for
    the draw the probabilities of the blocks of the vocabulary (``sampling.draw``). Nothing over the
    batch: every device has the weights."""
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
    """One microbatch, all in the compute dtype. Over ``fsdp``, weights are gathered before the
    forward and before the backward pass, and gradients of what is trained are scattered; over
    ``data``, these are summed; over ``tensor``, activations are summed twice a layer in either
    pass, and once more where the backward pass recomputes them."""
    c, tensor = model_config, shards(mesh, "heads")
    size, fsdp, data = costs.compute_bytes(c), mesh.shape["fsdp"], mesh.shape["data"]
    weights = size * costs.parameter_bytes(c, mesh, itemsize=1, gathered=True)
    trained = costs.parameter_bytes(c, mesh, itemsize=1, gathered=True, part=lora.trained) * size
    tokens = rows * width / batch_shards(mesh)
    sums = (4 + costs.recomputes(c)) * c.layers * tokens * c.embed * size
    return _present(
        {
            "all-gather": 2 * ring(weights, fsdp),
            "reduce-scatter": ring(trained, fsdp),
            "all-reduce": 2 * ring(sums, tensor) + 2 * ring(trained / fsdp, data),
        }
    )


def update_traffic(model_config: ModelConfig, mesh: Mesh | AbstractMesh) -> dict[str, float]:
    """One optimizer update, after its microbatches: nothing but norms."""
    return {}


def _present(found: dict[str, float]) -> dict[str, float]:
    return {kind: size for kind, size in found.items() if size}
