"""Roofline model: the least time for decoding and for an update, from a chip's data sheet.

It is the longest of the times for computing, reading memory and sending, each at its peak rate and
overlapping with the others. This is a lower bound: kernels reach only a part of each peak, and
times that cannot overlap add up.
"""

from dataclasses import dataclass

from jax.sharding import AbstractMesh, Mesh

from basis_jax.model import costs, lora, traffic
from basis_jax.model.chips import Chip
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.sharding import batch_shards, shards


@dataclass(frozen=True)
class Bound:
    """Seconds that computing, reading memory and sending take."""

    compute: float
    memory: float
    sending: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.sending)

    @property
    def by(self) -> str:
        return max(vars(self), key=lambda name: vars(self)[name])

    def times(self, number: int | float) -> "Bound":
        return Bound(*(number * x for x in vars(self).values()))

    def plus(self, other: "Bound") -> "Bound":
        return Bound(
            *(x + y for x, y in zip(vars(self).values(), vars(other).values(), strict=True))
        )


def token_bound(
    model_config: ModelConfig, mesh: Mesh | AbstractMesh, chip: Chip, *, slots: int, context: int
) -> Bound:
    """One token in each of ``slots`` slots.

    Weights are divided over ``tensor`` only, so every device reads its copy. The cache is divided
    over the batch, too.
    """
    rows, tensor = -(-slots // batch_shards(mesh)), shards(mesh, "heads")
    work = costs.decode_step(model_config, rows=rows, context=context)
    sent = traffic.token_traffic(model_config, mesh, slots=slots)
    return Bound(
        work.flops / tensor / chip.flops,
        work.bytes / tensor / chip.bandwidth,
        sum(sent.values()) / chip.interconnect,
    )


def prefill_bound(
    model_config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    chip: Chip,
    *,
    rows: int,
    width: int,
    outputs: int = 1,
) -> Bound:
    """One forward pass, as in ``costs.prefill``. Only computing is counted."""
    work = costs.prefill(model_config, rows=rows, width=width, outputs=outputs)
    return Bound(work.flops / mesh.size / chip.flops, 0.0, 0.0)


def update_bound(
    model_config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    chip: Chip,
    *,
    rows: int,
    width: int,
    microbatch: int,
    gradients: float = 1.0,
) -> Bound:
    """One optimizer update over ``rows`` rows of ``width`` tokens.

    ``gradients``: how many gradients of these rows are computed for it, those of measurements
    included."""
    work = costs.update(model_config, rows=rows, width=width)
    passes = gradients * -(-rows // microbatch)
    layers, output = model_config.layers, costs.output_products(model_config)
    weights = layers * costs.layer_products(model_config) + output
    reads = 4 if model_config.lora is None else 3  # frozen weights have no gradient
    read = passes * reads * weights * costs.compute_bytes(model_config) / shards(mesh, "heads")
    read += 7 * costs.parameter_bytes(model_config, mesh, part=lora.trained)
    sent = traffic.microbatch_traffic(model_config, mesh, rows=microbatch, width=width)
    reduced = traffic.update_traffic(model_config, mesh)
    travels = passes * sum(sent.values()) + gradients * sum(reduced.values())
    return Bound(
        gradients * work.flops / mesh.size / chip.flops,
        read / chip.bandwidth,
        travels / chip.interconnect,
    )
