"""``basis-jax train --dry-run``: what a run needs, on devices that need not be present.

No weights and no data from the hub are read. The model's shape comes from a folder, a config.json,
or the table ``weights.known_models``.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh

from basis_jax.config import Config
from basis_jax.estimators import definition
from basis_jax.files import home, read_json
from basis_jax.model import costs, traffic
from basis_jax.model.chips import TPU_RESERVED, Chip, Topology, chip_of, read_topology
from basis_jax.model.decoder import ModelConfig, computed_in
from basis_jax.model.sharding import abstract_mesh, batch_shards, make_mesh, regrouped
from basis_jax.opening import checks, plan
from basis_jax.opening.forecast import described, problem_count, step_bounds, step_counts
from basis_jax.opening.plan import Request, as_options, gigabytes
from basis_jax.opening.rollout_plan import open_plan
from basis_jax.opening.rollout_setup import as_configured
from basis_jax.opening.sizes import with_sizes
from basis_jax.training import compiled_plan
from basis_jax.training.session import make_estimator
from basis_jax.weights import config_json, huggingface
from basis_jax.weights.known_models import KNOWN_MODELS

Report = Callable[[str], None]
QUARTER = 4  # a step is bounded for rows of full length, and of full length divided by this


def run(config: Config, topology: str, *, compiled: bool = False, report: Report = print) -> bool:
    """Print the plan of a run on ``topology`` (empty: the devices present); returns if it fits.

    Raises ValueError for an unknown topology or model, and for a config that is not valid.
    """
    target = read_target(topology)
    where, model_config = target.topology, shape_on(config, target, report)
    mesh = abstract_mesh(where.devices, **plan.axis_sizes(config))
    checks.check(config, model_config, mesh, platform=target.platform)
    estimator = make_estimator(config.estimator, config.sampling.group_size)
    sizes_of_sets = (config.train.prompts_per_step,) * (1 + len(config.data.more_sets))
    open_plan(config, sizes_of_sets, estimator)  # refuses what a run would refuse
    wanted: dict[str, Any] = {
        "prompt_width": config.data.max_prompt_tokens,
        "rows": config.train.prompts_per_step * config.sampling.group_size,
        "training": True,
    }
    config = with_sizes(
        config, model_config, mesh, memory=target.available, report=report, **wanted
    )
    request = Request(config, model_config, available=target.available, **wanted)
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    report(f"mesh: {sizes} on {where}, {gigabytes(target.available)} a device{target.note}")
    report_memory(request, mesh, report)
    report_traffic(request, mesh, report)
    for line in described(config):
        report(line)
    if where.chip.flops:
        report_time(request, mesh, where.chip, report)
    report_table(request, mesh, where.chip, report)
    if topology:
        report_smallest(request, where, report)
    if compiled:
        report_compiled(request, mesh, target, report)
    sentence = plan.refusal(request, mesh, note=target.note)
    report(f"does not fit: {sentence}" if sentence else "fits")
    return not sentence


@dataclass(frozen=True)
class Target:
    """Devices to plan for, and the bytes that programs may use on each."""

    topology: Topology
    available: int
    platform: str
    note: str = ""
    here: bool = False
    compute_capability: str = "8.0"  # of GPUs; all in ``CHIPS`` are Ampere or newer


def read_target(text: str) -> Target:
    """A topology by name, or the devices of this machine if the text is empty."""
    if not text:
        return present_devices()
    topology = read_topology(text)
    jax.config.update("jax_platforms", "cpu")  # allocates no GPU memory
    memory = topology.chip.memory
    if topology.chip.tpu:
        return Target(topology, memory - TPU_RESERVED, "tpu")
    share = f" for JAX ({checks.share_advice(os.environ)})"
    return Target(topology, checks.usable_memory(memory, os.environ), "gpu", share)


def present_devices() -> Target:
    devices = jax.devices()
    kind, memory = devices[0].device_kind, checks.device_memory(devices)
    sheet = chip_of(kind) or Chip(kind, memory, 0.0, 0.0, 0.0)
    return Target(
        Topology(sheet, (len(devices),)),
        memory,
        devices[0].platform,
        here=True,
        compute_capability=str(getattr(devices[0], "compute_capability", "")),
    )


def shape_on(config: Config, target: Target, report: Report) -> ModelConfig:
    """The model's shape with settings for these devices. Raises ValueError for unknown names."""
    checks.check_words(("model.compute_dtype", config.model.compute_dtype, checks.COMPUTE_DTYPES))
    return as_configured(model_shape(config, report), config.model, target)


def model_shape(config: Config, report: Report) -> ModelConfig:
    """The shape of ``model.path``. Its source is reported, and no weights are read."""
    section = config.model
    path = home(section.path)
    if section.path in KNOWN_MODELS:
        found, source = KNOWN_MODELS[section.path], "the package's table of known models"
    elif path.suffix == ".json" and path.is_file():
        found, source = config_json.parse(read_json(path)), str(path)
    elif path.is_dir() or section.path in huggingface.EMBEDDED:
        folder = huggingface.resolve_folder(section.path)
        found, source = huggingface.read_model_config(folder), f"{folder}/config.json"
    else:
        raise ValueError(
            f"the shape of model.path {section.path!r} is not known without the hub; give its "
            f"folder, its config.json or one of {', '.join(KNOWN_MODELS)}"
        )
    billions = costs.parameters(found) / 1e9
    report(f"model: {section.path}, {billions:.3g} B parameters (shape from {source})")
    return found


def report_memory(request: Request, mesh: AbstractMesh, report: Report) -> None:
    for need in request.needs(mesh):
        share = need.total / request.available
        report(f"{need.what}: {gigabytes(need.total)} a device ({share:.0%})")
        for name, size in need.parts.items():
            if size:
                report(f"    {name:32} {gigabytes(size):>9}")


def report_traffic(request: Request, mesh: AbstractMesh, report: Report) -> None:
    """Report the bytes that one device sends, from formulas."""
    config, model_config = request.config, request.model_config
    sampler = computed_in(model_config, config.sampling.dtype)
    width = request.prompt_width + config.sampling.max_new_tokens
    train, sampling_mesh = config.train, regrouped(mesh, config.mesh.sample_tensor)
    found = {
        "token": traffic.token_traffic(sampler, sampling_mesh, slots=train.sample_rollouts),
        "microbatch": traffic.microbatch_traffic(
            model_config, mesh, rows=plan.rollouts_per_pass(train, batch_shards(mesh)), width=width
        ),
        "update": traffic.update_traffic(model_config, mesh),
    }
    if mesh.size > 1:
        report("sent by a device (formulas):")
        for per, kinds in found.items():
            report(f"    each {per:15} {kinds_text(kinds)}")


def kinds_text(kinds: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {size_text(size)}" for kind, size in kinds.items()) or "nothing"


def size_text(size: int | float) -> str:
    return gigabytes(size) if size >= 1e9 else f"{size / 1e6:.3g} MB"


def report_time(request: Request, mesh: AbstractMesh, chip: Chip, report: Report) -> None:
    """Report the least time of a step, for rows of full length and of a quarter of it."""
    config, lengths = request.config, (request.prompt_width, request.config.sampling.max_new_tokens)
    flops = 0
    report("a step takes at least (data sheet; kernels reach a part of it):")
    for part in (1, QUARTER):
        prompt, new = (max(1, length // part) for length in lengths)
        step = step_bounds(config, request.model_config, mesh, chip, prompt=prompt, new=new)
        flops = flops or step.flops
        report(
            f"    {step.seconds:9.1f} s with prompts of {prompt} and completions of {new} tokens: "
            f"sampling {step.sample_seconds:.1f} s (by {step.sampling.by}), forward passes "
            f"{step.passes.seconds:.1f} s, updates {step.update.seconds:.1f} s (by "
            f"{step.update.by})"
        )
    report(f"    {flops:.3g} FLOPs a step at full length")


def report_table(request: Request, mesh: AbstractMesh, chip: Chip, report: Report) -> None:
    """Report the cost of the offline table as configured, with 8 rollouts per problem, and with
    none."""
    config = request.config
    section, problems = config.estimator, problem_count(config)
    if section.table:
        report(f"reference table: {section.table}, already made")
        return
    declared = definition(section.name)
    takes = bool({"table", "reference_rewards", "features"} & {*declared.provided})
    if not (takes and section.table_samples):
        report("reference table: none")
        return
    if problems is None:
        report("reference table: not counted, as only the hub knows how many problems there are")
        return
    step = step_counts(config).completions
    for samples in dict.fromkeys((section.table_samples, 8)):
        rollouts = problems * samples
        report(
            f"reference table of {samples} rollouts per problem: {rollouts:,} rollouts, as many as "
            f"{rollouts / step:,.0f} steps of sampling; the run itself has {config.train.steps}"
        )
    report(
        "reference table of 0: no rollouts, with an estimator that needs none, such as "
        "--estimator.name value_filter --estimator.table-samples 0"
    )


def report_smallest(request: Request, where: Topology, report: Report) -> None:
    found = plan.smallest_topology(request, where)
    if found is None:
        report(f"no slice of up to {plan.MOST_DEVICES} {where.chip.name} fits")
        return
    smallest, changes = found
    report(f"the smallest that fits: {smallest} with {as_options(changes) or 'this config'}")


def report_compiled(request: Request, mesh: AbstractMesh, target: Target, report: Report) -> None:
    """Report the compiler's figures for the two largest programs."""
    config, model_config = request.config, request.model_config
    width = {"prompt_width": request.prompt_width}
    if target.here:
        here = make_mesh(**plan.axis_sizes(config))
        found = compiled_plan.programs(config, model_config, here, **width)
    elif target.platform == "tpu":
        found = compiled_plan.compile_for(target.topology, config, model_config, **width)
    else:
        raise ValueError(
            f"--compile cannot compile for {target.topology}: there is a compiler for absent TPUs, "
            "not for absent GPUs; leave it out, or run on that machine without --topology"
        )
    formulas = plan.program_bytes(request.needs(mesh))
    for name, program in found.items():
        held = f"{gigabytes(program['held'])} a device"
        report(f"compiled {name}: {held}; the formulas say {gigabytes(formulas[name])}")
        loop = "each token" if name == "decoding" else "in loops of unknown length"
        for when, key in (("once", "once"), (loop, "each_loop")):
            if mesh.size > 1 and program.get(key):
                report(f"    sent {when}: {kinds_text(program[key])}")
