"""Checks of a config that need no weights."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from jax.sharding import AbstractMesh, Mesh

from basis_jax.config import (
    Config,
    DataSection,
    SamplingSection,
    WatchSection,
)
from basis_jax.corrections import CORRECTIONS
from basis_jax.data.benchmarks import BENCHMARKS
from basis_jax.data.encoding import FORMATS
from basis_jax.data.tasks import GYM
from basis_jax.losses import AGGREGATIONS, KL_FORMS, OBJECTIVES, REGRESSIONS
from basis_jax.model.attention import KINDS, fits_cudnn
from basis_jax.model.decoder import REMAT, ModelConfig
from basis_jax.model.sharding import batch_shards, check_divides, regrouped
from basis_jax.opening import plan
from basis_jax.opening.plan import rollouts_per_pass
from basis_jax.opening.ranges import check_ranges
from basis_jax.references import FORMS
from basis_jax.verify import VERIFIERS, extraction_mode, is_own
from basis_jax.verify.rewards import READY_MADE

WARNINGS = tuple(field.name for field in dataclasses.fields(WatchSection))
SCHEDULES = ("constant", "linear", "cosine")
SCORE_NORMS = ("logits", "natural")
ADDED_REWARDS = (*READY_MADE, *(name for name in VERIFIERS if name != "gym"))
COMPUTE_DTYPES = ("float32", "bfloat16")
TARGETS = {"a_star_po": "a_star_po", "rebel": "reinforce", "tbrm": "reinforce"}
"""The estimator whose advantages a regression is defined for: r - V*, and the reward itself."""
GPU_SHARE = 0.75
"""Share of a GPU's memory that JAX allocates at its start, unless the environment sets another."""
SHARE_VARIABLES = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)  # the newer name first
ALLOCATOR_VARIABLE = "XLA_PYTHON_CLIENT_ALLOCATOR"


def check(
    config: Config, model_config: ModelConfig, mesh: Mesh | AbstractMesh, *, platform: str = ""
) -> None:
    """Raise ValueError for unknown names and sizes that do not divide, before weights are read.

    ``platform``: the platform of devices that are not present.
    """
    train, group = config.train, config.sampling.group_size
    check_ranges(config)
    check_trainable(config.sampling)
    check_words(*(("train.abort_on", name, WARNINGS) for name in config.train.abort_on))
    check_data(config.data)
    check_words(
        ("optim.schedule", config.optim.schedule, SCHEDULES),
        ("optim.moments_dtype", config.optim.moments_dtype, COMPUTE_DTYPES),
        ("estimator.score_norms", config.estimator.score_norms, SCORE_NORMS),
        ("loss.aggregation", config.loss.aggregation, AGGREGATIONS),
        ("loss.objective", config.loss.objective, OBJECTIVES),
        ("loss.kl", config.loss.kl, KL_FORMS),
        ("loss.sampler_correction", config.loss.sampler_correction, CORRECTIONS),
    )
    check_model(config, model_config, platform or platform_of(mesh))
    check_loss(config)
    check_scorers(config.data.verifier, (config.data.path,))
    check_sets(config)
    check_fit(config, model_config, mesh)
    rollouts = train.prompts_per_step * group
    shards = batch_shards(mesh)
    for larger, smaller, given in (
        (
            "train.prompts_per_step x sampling.group_size: rollouts per step",
            "train.minibatch_rollouts",
            (rollouts, train.minibatch_rollouts),
        ),
        (
            "train.minibatch_rollouts",
            "the batch's devices, mesh.data x mesh.fsdp",
            (train.minibatch_rollouts, shards),
        ),
        (
            "train.minibatch_rollouts",
            "train.microbatch_rollouts" + (" x mesh.data x mesh.fsdp" if shards > 1 else ""),
            (train.minibatch_rollouts, rollouts_per_pass(train, shards) or shards),
        ),
    ):
        larger_mesh = ", or raise mesh.tensor, which does not split the batch" * ("mesh" in smaller)
        if min(given) < 1 or given[0] % given[1]:
            raise ValueError(
                f"{larger} = {given[0]} is not a multiple of {smaller} = {given[1]}; "
                f"choose sizes that divide{larger_mesh}"
            )


def check_words(*fields: tuple[str, str, Sequence[str]]) -> None:
    """Raise ValueError for the first (name, value, allowed) whose value is not allowed."""
    for name, value, allowed in fields:
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    assert isinstance(mesh, Mesh)  # an AbstractMesh has no platform
    return mesh.devices.ravel()[0].platform


def check_model(config: Config, model_config: ModelConfig, platform: str) -> None:
    """Raise ValueError for a dtype or kernel that this platform or model does not support."""
    section = config.model
    check_words(
        ("model.compute_dtype", section.compute_dtype, COMPUTE_DTYPES),
        ("sampling.dtype", config.sampling.dtype or COMPUTE_DTYPES[0], COMPUTE_DTYPES),
        ("model.decode_layers", section.decode_layers, ("auto", "scanned", "unrolled")),
        ("model.remat", section.remat, tuple(REMAT)),
        ("model.attention", section.attention, ("auto", *KINDS)),
    )
    size = model_config.head_dim
    fits = platform == "gpu" and fits_cudnn(section.compute_dtype, size)
    if section.attention == "cudnn" and not fits:
        raise ValueError(
            "model.attention cudnn needs NVIDIA GPUs, model.compute_dtype bfloat16 and a head size "
            f"that is a multiple of 8 and at most 128, and this is {platform} with "
            f"{section.compute_dtype} and heads of size {size}; use auto"
        )
    if section.attention == "splash" and platform != "tpu":
        raise ValueError(f"model.attention splash needs TPUs and this is {platform}; use auto")


def check_scorers(verifier: str, paths: Sequence[str]) -> None:
    """Raise ValueError unless exactly the problems of reasoning-gym have the verifier ``gym``."""
    for path in paths:
        if path.startswith("task:" + GYM) != (verifier == "gym"):
            raise ValueError(
                f"data.verifier is {verifier!r} for the problems of {path!r} (data.path or "
                "eval.sets); those of task:gym/... need the verifier 'gym', and no others can have "
                "it"
            )


def check_sets(config: Config) -> None:
    """Raise ValueError for settings of an unknown set, and for a set that cannot be graded.

    Settings of benchmarks that are not evaluated are allowed, because a command line may leave out
    sets of a config.
    """
    section = config.eval
    for field in ("set_samples", "set_temperatures", "set_verifiers"):
        for name in getattr(section, field):
            if name not in section.sets and name not in BENCHMARKS:
                raise ValueError(
                    f"eval.{field} names {name!r}, which is neither among eval.sets "
                    f"({', '.join(section.sets) or 'none'}) nor a benchmark "
                    f"({', '.join(BENCHMARKS)}); give the name of a set"
                )
    for name in section.sets:
        check_scorers(config.held_out_data(name).verifier, (name,))


def check_evaluation(config: Config, model_config: ModelConfig, mesh: Mesh) -> None:
    """Raise ValueError for settings that cannot be evaluated and a model that does not fit."""
    check_ranges(config)
    check_data(config.data)
    check_model(config, model_config, platform_of(mesh))
    section = config.eval
    if not section.sets:
        raise ValueError("eval.sets is empty; name at least one set with --eval.sets")
    for name in section.sets:
        samples = section.samples_of(name)
        if section.temperature_of(name) == 0 and samples > 1:
            own = f" of {name}" if name in section.set_temperatures | section.set_samples else ""
            raise ValueError(
                f"eval.temperature 0{own} is greedy and eval.samples is {samples}: they would be "
                "the same; set eval.samples to 1 or raise the temperature"
            )
    check_sets(config)
    check_fit(config, model_config, mesh)


def check_fit(config: Config, model_config: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raise ValueError if rows are longer than the model's positions, or the model's sizes do not
    divide over the mesh."""
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    if longest > model_config.max_positions:
        raise ValueError(
            f"data.max_prompt_tokens + sampling.max_new_tokens is {longest} but the model has "
            f"{model_config.max_positions} positions; lower one of them"
        )
    split = {
        "the model's key heads": (model_config.kv_heads, "kv_heads"),
        "the model's heads": (model_config.heads, "heads"),
        "the model's feed-forward width": (model_config.mlp, "mlp"),
        "the model's vocabulary": (model_config.vocab_size, "vocab"),
    }
    check_divides(mesh, split | {"the model's embedding width": (model_config.embed, "embed")})
    ways = config.mesh.sample_tensor
    if ways and mesh.size % ways:
        raise ValueError(
            f"mesh.sample_tensor = {ways} does not divide the {mesh.size} devices; give a divisor "
            "of their number, or 0 for mesh.tensor"
        )
    check_divides(regrouped(mesh, ways), split, tensor="sample_tensor")


def check_memory(
    config: Config,
    model_config: ModelConfig,
    mesh: Mesh,
    *,
    prompt_width: int,
    rows: int,
    training: bool = False,
) -> None:
    """Raise ValueError if ``plan.memory_needs`` exceeds the devices' memory. The message has the
    bytes by part and the nearest plan that fits."""
    request = plan.Request(
        config,
        model_config,
        prompt_width=prompt_width,
        rows=rows,
        available=device_memory(list(mesh.local_devices)),
        training=training,
    )
    share = f" for JAX ({share_advice(os.environ)})" if platform_of(mesh) == "gpu" else ""
    if sentence := plan.refusal(request, mesh, note=share):
        raise ValueError(sentence)


def memory_share(environment: Mapping[str, str]) -> float:
    """The share of a GPU's memory that JAX may use.

    The limit is the same with ``XLA_PYTHON_CLIENT_PREALLOCATE=false``, where memory is allocated
    only as needed. Only the allocator "platform" has no limit.
    """
    if environment.get(ALLOCATOR_VARIABLE, "").lower() == "platform":
        return 1.0
    return float(next(filter(None, map(environment.get, SHARE_VARIABLES)), GPU_SHARE))


def usable_memory(device_bytes: int, environment: Mapping[str, str]) -> int:
    """Bytes that JAX may use of a GPU with ``device_bytes`` of memory."""
    return int(device_bytes * memory_share(environment))


def share_advice(environment: Mapping[str, str]) -> str:
    return f"{memory_share(environment):.0%} of the GPU; {SHARE_VARIABLES[0]}=0.95 raises it"


def device_memory(devices: Sequence) -> int:
    """Bytes that JAX may use of one of these devices.

    GPUs and TPUs report their limit. If a GPU reports none, it is a share of the memory that
    ``nvidia-smi`` shows; if that is not known either, there is no limit. On a CPU every device has
    an equal share of the machine's memory.
    """
    stats = devices[0].memory_stats() or {}
    if stats.get("bytes_limit"):
        return stats["bytes_limit"]
    if devices[0].platform == "gpu":
        return usable_memory(gpu_bytes() or sys.maxsize, os.environ)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)


def gpu_bytes() -> int:
    """The memory of the smallest NVIDIA GPU of this machine, or 0 if it is not known."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return min(int(line) for line in found.stdout.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0


def check_loss(config: Config) -> None:
    """Raise ValueError for an aggregation, an estimator or a correction that does not fit the
    objective, and for an empty range of the sampler's ratio."""
    loss = config.loss
    if loss.objective in ("gspo", *REGRESSIONS) and loss.aggregation != "sequence_mean":
        raise ValueError(
            f"loss.objective {loss.objective} is a mean over sequences, loss.aggregation is "
            f"{loss.aggregation!r}; set it to sequence_mean"
        )
    if loss.sampler_correction in ("icepop", "mask") and loss.sampler_floor >= loss.sampler_cap:
        raise ValueError(
            f"loss.sampler_floor is {loss.sampler_floor} and loss.sampler_cap is "
            f"{loss.sampler_cap}; give a floor below the cap"
        )
    if loss.objective in REGRESSIONS:
        check_regression(config)


def check_regression(config: Config) -> None:
    """Raise ValueError unless a regression gets the targets it is defined for: of the estimator
    that it goes with or of a user's own, without weights, and of whole prompts (``rebel``)."""
    loss, name, group = config.loss, config.estimator.name, config.sampling.group_size
    if ":" not in name and name != TARGETS[loss.objective]:
        raise ValueError(
            f"loss.objective {loss.objective} regresses on the advantages of "
            f"{TARGETS[loss.objective]} and estimator.name is {name!r}; set it to "
            f"{TARGETS[loss.objective]}, or to your own estimator"
        )
    if loss.sampler_correction != "none":
        raise ValueError(
            f"loss.objective {loss.objective} is a regression, which needs no weights, and "
            f"loss.sampler_correction is {loss.sampler_correction!r}; set it to none"
        )
    rollouts = config.train.minibatch_rollouts
    if loss.objective == "rebel" and (group < 2 or rollouts % group):
        raise ValueError(
            f"loss.objective rebel compares the rollouts of a prompt, sampling.group_size is "
            f"{group} and train.minibatch_rollouts {rollouts}; give groups of 2 or more and whole "
            "groups an update"
        )


def check_trainable(sampling: SamplingSection) -> None:
    """Raise ValueError if rollouts would not come from the distribution that is trained."""
    if sampling.top_p < 1 or sampling.top_k > 0:
        raise ValueError(
            f"sampling.top_p = {sampling.top_p} and sampling.top_k = {sampling.top_k} truncate the "
            "distribution while the gradient is that of the full softmax; train with "
            "sampling.top_p 1 and sampling.top_k 0"
        )
    if sampling.temperature <= 0:
        raise ValueError(
            f"sampling.temperature is {sampling.temperature}; training needs one above 0"
        )


def check_features(size: int, count: int, width: int) -> None:
    """Raise ValueError unless ``count`` problems with states of size ``width`` have ``size``
    principal directions."""
    most = min(count - 1, width)
    if not 1 <= size <= most:
        raise ValueError(
            f"estimator.features is {size} for {count} problems with states of {width} numbers; "
            f"give 1 to {most}"
        )


def check_data(section: DataSection) -> None:
    """Raise ValueError for a wrapper without ``{problem}``, an unknown prompt format, and an answer
    mode that the verifier does not have."""
    check_words(("data.prompt_format", section.prompt_format, FORMATS))
    extraction_mode(section.verifier, section.answer_mode)
    check_rewards(section)
    if section.problem_wrapper and "{problem}" not in section.problem_wrapper:
        raise ValueError(
            f"data.problem_wrapper is {section.problem_wrapper!r}; write {{problem}} where the "
            "problem stands in it"
        )


def check_rewards(section: DataSection) -> None:
    """Raise ValueError for an unknown reward and for one that is the verifier itself."""
    for name in section.rewards:
        if name == section.verifier:
            raise ValueError(
                f"data.rewards names {name!r}, which is data.verifier; give its weight as "
                "data.verifier_weight"
            )
        if not is_own(name) and name not in ADDED_REWARDS:
            raise ValueError(
                f"data.rewards names {name!r}; allowed are {', '.join(ADDED_REWARDS)}, {FORMS}"
            )
    if section.normalise_rewards and not section.rewards:
        raise ValueError(
            "data.normalise_rewards is for several rewards and data.rewards is empty; name some, "
            "or set it to False"
        )
