"""Whether a run fits its devices' memory, and which changes would make it fit."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from basis_jax.config import Config, TrainSection
from basis_jax.estimators import definition
from basis_jax.model import costs, lora
from basis_jax.model.chips import Topology, slice_shape
from basis_jax.model.decoder import ModelConfig, computed_in
from basis_jax.model.sharding import AXES, abstract_mesh, batch_shards
from basis_jax.sampling.refill import MIN_CACHE

MOST_DEVICES = 256  # larger topologies are not searched
REFERENCE = "the reference"


@dataclass(frozen=True)
class Need:
    """Bytes on one device, by part, in one phase of a run."""

    what: str
    parts: Mapping[str, int]
    advice: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def axis_sizes(config: Config) -> dict[str, Any]:
    """Sizes of the mesh's axes, as arguments of ``sharding.make_mesh``."""
    return {axis: getattr(config.mesh, axis) for axis in AXES}


def rollouts_per_pass(train: TrainSection, shards: int) -> int:
    """Rollouts per pass on all devices: ``train.microbatch_rollouts`` on each of the ``shards``
    that the batch is split over, and at most the rollouts of an update."""
    return min(train.microbatch_rollouts * shards, train.minibatch_rollouts)


def memory_needs(
    config: Config,
    model_config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    *,
    prompt_width: int,
    rows: int,
    training: bool = False,
) -> list[Need]:
    """Memory for sampling ``rows`` rollouts, and with ``training`` for the optimizer's moments and
    an update with rows of the maximum length. XLA's additional memory is not counted. On CPUs a run
    that exceeds this estimate cannot fit; a GPU may need one array of logits less."""
    train, length = config.train, prompt_width + config.sampling.max_new_tokens
    trained = costs.parameter_bytes(model_config, mesh, part=lora.trained)
    moment = jnp.dtype(config.optim.moments_dtype).itemsize
    moments = {"moments": trained * moment // 2} if training else {}
    reference = {REFERENCE: trained} if training and config.loss.needs_reference else {}
    branched = training and config.sampling.plan == "branch"  # prompts with most of a completion
    slots = train.sample_rollouts if branched else min(train.sample_rollouts, rows)
    sampler = computed_in(model_config, config.sampling.dtype)
    parts = costs.sampling_memory(
        sampler,
        mesh,
        slots=slots,
        length=length,
        width=length if branched else prompt_width,
        sample_tensor=config.mesh.sample_tensor,
    )
    fewer = "lower train.sample_rollouts or sampling.max_new_tokens, or raise mesh.fsdp, "
    fewer += "mesh.tensor or mesh.sample_tensor"
    sampling = f"sampling {slots} rollouts of {length} tokens at once"
    before = cache_before(length)
    beside = moments | reference
    needs = [Need(sampling, parts | beside, fewer)]
    if before < length:
        old = parts["key-value cache"] * before // length // cache_arrays(sampler)
        grown = {"an array of the cache before it grew": old, "prefill": 0}
        what = f"{sampling}, their cache grown from {before}"
        needs.append(Need(what, parts | grown | beside, fewer))
    if training:
        needs.append(update_need(config, model_config, mesh, length=length))
    return needs


def update_need(
    config: Config, model_config: ModelConfig, mesh: Mesh | AbstractMesh, *, length: int
) -> Need:
    """Memory for an update with rows of ``length`` tokens."""
    train, trained = config.train, costs.parameter_bytes(model_config, mesh, part=lora.trained)
    count = rollouts_per_pass(train, batch_shards(mesh))
    parts = costs.update_memory(
        model_config,
        mesh,
        rows=count,
        width=length,
        chunk=config.loss.logprob_chunk,
        moment=jnp.dtype(config.optim.moments_dtype).itemsize,
    )
    if config.loss.needs_reference:
        parts |= {REFERENCE: trained}
    if definition(config.estimator.name).learn is not None:
        parts |= {"a measurement's second gradient": trained}
    fewer = "train.microbatch_rollouts, " if train.microbatch_rollouts > 1 else ""
    remat = "" if model_config.remat == "full" else "set model.remat to full, "
    return Need(
        f"an update over microbatches of {count} rollouts of {length} tokens",
        parts,
        f"lower {fewer}loss.logprob_chunk or sampling.max_new_tokens, {remat}or raise "
        "mesh.fsdp or mesh.tensor",
    )


def cache_before(length: int) -> int:
    """Positions of the cache before it grows to ``length``."""
    doublings = math.log2(max(1.0, length / MIN_CACHE))
    return MIN_CACHE * 2 ** max(0, math.ceil(doublings) - 1)


def cache_arrays(model_config: ModelConfig) -> int:
    """Arrays of the sampler's cache. While it grows, one of them is held twice
    (``refill.resize_cache``)."""
    return 2 if model_config.scan_decode else 2 * model_config.layers


DECODING = ("weights laid out for decoding", "key-value cache", "logits")
"""Parts that the decoding program itself holds. The other parts are held outside of it."""


def program_bytes(needs: Sequence[Need]) -> dict[str, int]:
    """Bytes, by the formulas, of the programs that ``training.compiled_plan`` compiles."""
    sampling, _, update = needs
    return {
        "decoding": sum(sampling.parts[name] for name in DECODING),
        "update": update.total,
    }


@dataclass(frozen=True)
class Request:
    """The input of a plan: everything but the mesh."""

    config: Config
    model_config: ModelConfig
    prompt_width: int
    rows: int  # rollouts of a step
    available: int  # bytes of a device
    training: bool = True

    def with_changes(self, changes: Mapping[str, int | str]) -> "Request":
        """The request with other values of config fields, given by dotted name."""
        config, model_config = self.config, self.model_config
        for name, value in changes.items():
            section, field = name.split(".")
            changed = replace(getattr(config, section), **{field: value})
            config = replace(config, **{section: changed})
            if name == "model.remat":
                model_config = replace(model_config, remat=str(value))
        return replace(self, config=config, model_config=model_config)

    def needs(self, mesh: Mesh | AbstractMesh) -> list[Need]:
        return memory_needs(
            self.config,
            self.model_config,
            mesh,
            prompt_width=self.prompt_width,
            rows=self.rows,
            training=self.training,
        )

    def fits(self, mesh: Mesh | AbstractMesh) -> bool:
        return all(need.total <= self.available for need in self.needs(mesh))


def nearest_plan(request: Request, devices: int) -> dict[str, int | str] | None:
    """The smallest change of the config with which it fits ``devices`` devices, or None.

    Changes are another mesh, smaller microbatches, fewer rollouts decoded at once, and more
    recomputation.
    """
    tried = sorted(_variants(request, devices), key=lambda variant: variant[0])
    for _, sizes, changes in tried:
        changed = request.with_changes(changes)
        if changed.fits(abstract_mesh(devices, **sizes)):
            mesh = {f"mesh.{name}": size for name, size in sizes.items()}
            wanted = axis_sizes(request.config)
            if sizes == _sizes(wanted, devices):
                mesh = {}
            return mesh | changes
    return None


def smallest_topology(request: Request, topology: Topology) -> tuple[Topology, dict] | None:
    """The smallest number of chips of this kind that the config fits, and the changes it needs."""
    for exponent in range(int(math.log2(MOST_DEVICES)) + 1):
        found = nearest_plan(request, 2**exponent)
        if found is not None:
            return Topology(topology.chip, slice_shape(topology.chip, 2**exponent)), found
    return None


def _sizes(wanted: Mapping[str, int], devices: int) -> dict[str, int] | None:
    try:
        return dict(abstract_mesh(devices, **wanted).shape)
    except ValueError:
        return None


def _variants(
    request: Request, devices: int
) -> Iterator[tuple[tuple[float, ...], dict[str, int], dict[str, int | str]]]:
    """(distance, mesh sizes, other changes) of every plan that divides the batch and the model."""
    config, train = request.config, request.config.train
    wanted = _sizes(axis_sizes(config), devices)
    remats = dict.fromkeys([request.model_config.remat, "full"])
    for sizes in _meshes(request.model_config, devices):
        batch = sizes["data"] * sizes["fsdp"]
        if config.mesh.sample_tensor > 1 and devices % config.mesh.sample_tensor:
            continue
        for micro, slots, remat in itertools.product(
            _halves(train.microbatch_rollouts), _halves(train.sample_rollouts), remats
        ):
            of_pass = min(micro * batch, train.minibatch_rollouts)
            if slots % batch or train.minibatch_rollouts % of_pass or of_pass % batch:
                continue
            changes: dict[str, int | str] = {}
            if micro != train.microbatch_rollouts:
                changes["train.microbatch_rollouts"] = micro
            if slots != train.sample_rollouts:
                changes["train.sample_rollouts"] = slots
            if remat != request.model_config.remat:
                changes["model.remat"] = remat
            halvings = math.log2(train.microbatch_rollouts / micro)
            halvings += math.log2(train.sample_rollouts / slots)
            distance = (halvings + len(changes) + (sizes != wanted), sizes["tensor"], sizes["data"])
            yield distance, sizes, changes


def _meshes(model_config: ModelConfig, devices: int) -> Iterator[dict[str, int]]:
    c = model_config
    for fsdp, tensor in itertools.product(_divisors(devices), repeat=2):
        if devices % (fsdp * tensor) or c.embed % fsdp:
            continue
        if not any(size % tensor for size in (c.heads, c.kv_heads, c.mlp, c.vocab_size)):
            yield {"data": devices // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _halves(number: int) -> list[int]:
    """The number, its half, its quarter and so on, as long as they are integers."""
    found = [number]
    while found[-1] > 1 and found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return found


def as_options(changes: Mapping[str, int | str]) -> str:
    """The changes as options, such as ``--mesh.fsdp 4 --train.microbatch-rollouts 8``."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())


def refusal(request: Request, mesh: Mesh | AbstractMesh, *, note: str = "") -> str:
    """If the request does not fit: one sentence with the bytes by part, the memory available, and a
    plan that would fit. Empty if it fits."""
    for need in request.needs(mesh):
        if need.total <= request.available:
            continue
        parts = sorted(need.parts.items(), key=lambda part: -part[1])
        named = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts if size)
        nearest = nearest_plan(request, mesh.size)
        fits = f"fits with {as_options(nearest)}" if nearest else "no smaller batch fits either"
        return (
            f"{need.what} needs {gigabytes(need.total)} a device ({named}) and there are "
            f"{gigabytes(request.available)}{note}; {need.advice} ({fits})"
        )
    return ""


def gigabytes(size: int | float) -> str:
    return f"{size / 1e9:.3g} GB"
