"""What a config may say, as far as it can be told before weights are read."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from basis_jax.config import Config, DataSection, LossSection, SamplingSection, WatchSection
from basis_jax.data.encoding import FORMATS
from basis_jax.data.tasks import GYM
from basis_jax.losses import AGGREGATIONS, KL_FORMS, OBJECTIVES
from basis_jax.model import costs
from basis_jax.model.decoder import ATTENTION, REMAT, ModelConfig, computed_in
from basis_jax.model.sharding import batch_shards, check_divides
from basis_jax.opening.ranges import check_ranges
from basis_jax.verify import extraction_mode

WARNINGS = tuple(field.name for field in dataclasses.fields(WatchSection))
SCHEDULES = ("constant", "linear", "cosine")
SCORE_NORMS = ("logits", "natural")
COMPUTE_DTYPES = ("float32", "bfloat16")
GPU_SHARE = 0.75
"""Of a GPU's memory, where the environment says nothing else: JAX takes it when it starts."""
SHARE_VARIABLES = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)  # the newer name first
ALLOCATOR_VARIABLE = "XLA_PYTHON_CLIENT_ALLOCATOR"


def check(config: Config, model_config: ModelConfig, mesh: Mesh) -> None:
    """Raise a ValueError for unknown words and sizes that do not divide, before reading weights."""
    train, group = config.train, config.sampling.group_size
    check_ranges(config)
    check_trainable(config.sampling)
    check_words(*(("train.abort_on", name, WARNINGS) for name in config.train.abort_on))
    check_data(config.data)
    check_words(
        ("optim.schedule", config.optim.schedule, SCHEDULES),
        ("estimator.score_norms", config.estimator.score_norms, SCORE_NORMS),
        ("loss.aggregation", config.loss.aggregation, AGGREGATIONS),
        ("loss.objective", config.loss.objective, OBJECTIVES),
        ("loss.kl", config.loss.kl, KL_FORMS),
    )
    check_model(config, model_config, mesh)
    check_loss(config.loss)
    check_scorers(config.data.verifier, (config.data.path, *config.eval.sets))
    check_fit(config, model_config, mesh)
    rollouts = train.prompts_per_step * group
    shards = batch_shards(mesh)
    for larger, smaller, sizes in (
        (
            "train.prompts_per_step x sampling.group_size: rollouts per step",
            "train.minibatch_rollouts",
            (rollouts, train.minibatch_rollouts),
        ),
        (
            "train.minibatch_rollouts",
            "train.microbatch_rollouts",
            (train.minibatch_rollouts, train.microbatch_rollouts),
        ),
        (
            "train.microbatch_rollouts",
            "the batch's devices, mesh.data x mesh.fsdp",
            (train.microbatch_rollouts, shards),
        ),
    ):
        if min(sizes) < 1 or sizes[0] % sizes[1]:
            raise ValueError(
                f"{larger} = {sizes[0]} is not a multiple of {smaller} = {sizes[1]}; "
                f"choose sizes that divide"
            )


def check_words(*fields: tuple[str, str, Sequence[str]]) -> None:
    """Raise a ValueError for the first (name, value, allowed) whose value is not allowed."""
    for name, value, allowed in fields:
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")


def check_model(config: Config, model_config: ModelConfig, mesh: Mesh) -> None:
    """Raise a ValueError for what the model cannot be computed in on these devices."""
    section = config.model
    check_words(
        ("model.compute_dtype", section.compute_dtype, COMPUTE_DTYPES),
        ("sampling.dtype", config.sampling.dtype or COMPUTE_DTYPES[0], COMPUTE_DTYPES),
        ("model.remat", section.remat, tuple(REMAT)),
        ("model.attention", section.attention, ATTENTION),
    )
    platform, size = mesh.devices.ravel()[0].platform, model_config.head_dim
    fits = platform == "gpu" and section.compute_dtype == "bfloat16"
    if section.attention == "cudnn" and not (fits and size % 8 == 0 and size <= 128):
        raise ValueError(
            "model.attention cudnn needs NVIDIA GPUs, model.compute_dtype bfloat16 and heads of up "
            f"to 128 in eights, and this is {platform} with {section.compute_dtype} and heads of "
            f"{size}; use plain"
        )


def check_scorers(verifier: str, paths: Sequence[str]) -> None:
    """Problems of reasoning-gym are graded by their own scorers, and nothing else is."""
    for path in paths:
        if path.startswith("task:" + GYM) != (verifier == "gym"):
            raise ValueError(
                f"data.verifier is {verifier!r} for the problems of {path!r} (data.path or "
                "eval.sets); those of task:gym/... need the verifier 'gym', and no others can have "
                "it"
            )


def check_evaluation(config: Config, model_config: ModelConfig, mesh: Mesh) -> None:
    """Raise a ValueError for numbers that make no evaluation and a model that does not fit."""
    check_ranges(config)
    check_data(config.data)
    check_model(config, model_config, mesh)
    section = config.eval
    if not section.sets:
        raise ValueError("eval.sets is empty; name at least one set with --eval.sets")
    if section.temperature == 0 and section.samples > 1:
        raise ValueError(
            f"eval.temperature 0 is greedy and eval.samples is {section.samples}: they would be "
            "the same; set eval.samples to 1 or raise the temperature"
        )
    check_scorers(config.data.verifier, section.sets)
    check_fit(config, model_config, mesh)


def check_fit(config: Config, model_config: ModelConfig, mesh: Mesh) -> None:
    """Raise a ValueError where rows are longer than the model's positions, or the mesh does not
    divide the model."""
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    if longest > model_config.max_positions:
        raise ValueError(
            f"data.max_prompt_tokens + sampling.max_new_tokens is {longest} but the model has "
            f"{model_config.max_positions} positions; lower one of them"
        )
    check_divides(
        mesh,
        {
            "the model's key heads": (model_config.kv_heads, "kv_heads"),
            "the model's heads": (model_config.heads, "heads"),
            "the model's feed-forward width": (model_config.mlp, "mlp"),
            "the model's vocabulary": (model_config.vocab_size, "vocab"),
            "the model's embedding width": (model_config.embed, "embed"),
        },
    )


def check_memory(
    config: Config,
    model_config: ModelConfig,
    mesh: Mesh,
    *,
    prompt_width: int,
    rows: int,
    training: bool = False,
) -> None:
    """Raise a ValueError where sampling ``rows`` rollouts after prompts of this width does not fit
    the devices; with ``training`` beside the optimizer's moments, and an update whose rows are as
    long as they may be. A cache that is growing and what XLA needs besides are not counted: what
    is refused has no chance.
    """
    train, length = config.train, prompt_width + config.sampling.max_new_tokens
    devices = list(mesh.local_devices)
    weights = costs.parameter_bytes(model_config, mesh)
    moments = {"moments": 2 * weights} if training else {}
    reference = {"a KL term's reference": weights} if training and config.loss.kl_coef else {}
    slots = min(train.sample_rollouts, rows)
    sampler = computed_in(model_config, config.sampling.dtype)
    parts = costs.sampling_memory(sampler, mesh, slots=slots, length=length, width=prompt_width)
    _check_fits(
        f"sampling {slots} rollouts of {length} tokens at once",
        parts | moments | reference,
        devices,
        "lower train.sample_rollouts or sampling.max_new_tokens, or raise mesh.fsdp",
    )
    if training:
        count = train.microbatch_rollouts
        parts = costs.update_memory(
            model_config, mesh, rows=count, width=length, chunk=config.loss.logprob_chunk
        )
        remat = "" if model_config.remat == "full" else "set model.remat to full, "
        _check_fits(
            f"an update over microbatches of {count} rollouts of {length} tokens",
            parts | reference,
            devices,
            "lower train.microbatch_rollouts, loss.logprob_chunk or sampling.max_new_tokens, "
            f"{remat}or raise mesh.fsdp",
        )


def _check_fits(what: str, parts: Mapping[str, int], devices: Sequence, advice: str) -> None:
    needed, available = sum(parts.values()), device_memory(devices)
    if needed > available:
        biggest = sorted(parts.items(), key=lambda part: -part[1])[:3]
        named = ", ".join(f"{name} {gigabytes(size)}" for name, size in biggest if size)
        share = f" for JAX ({share_advice(os.environ)})" if devices[0].platform == "gpu" else ""
        raise ValueError(
            f"{what} needs {gigabytes(needed)} a device ({named}) and there are "
            f"{gigabytes(available)}{share}; {advice}"
        )


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def memory_share(environment: Mapping[str, str]) -> float:
    """The share of a GPU's memory that JAX may use.

    It is the same limit with ``XLA_PYTHON_CLIENT_PREALLOCATE=false``, where memory is taken as it
    is needed; only the allocator "platform" knows none.
    """
    if environment.get(ALLOCATOR_VARIABLE, "").lower() == "platform":
        return 1.0
    return float(next(filter(None, map(environment.get, SHARE_VARIABLES)), GPU_SHARE))


def usable_memory(device_bytes: int, environment: Mapping[str, str]) -> int:
    """Bytes that JAX may use of a GPU that has ``device_bytes``."""
    return int(device_bytes * memory_share(environment))


def share_advice(environment: Mapping[str, str]) -> str:
    return f"{memory_share(environment):.0%} of the GPU; {SHARE_VARIABLES[0]}=0.95 raises it"


def device_memory(devices: Sequence) -> int:
    """Bytes that JAX may use of one of these devices. GPUs and TPUs report their limit, which is a
    share already; a GPU that reports none is asked for its size, and nothing is refused where it
    does not tell. A CPU's is an equal share of the machine's memory."""
    stats = devices[0].memory_stats() or {}
    if stats.get("bytes_limit"):
        return stats["bytes_limit"]
    if devices[0].platform == "gpu":
        return usable_memory(gpu_bytes() or sys.maxsize, os.environ)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)


def gpu_bytes() -> int:
    """The memory of the smallest NVIDIA GPU of this machine; 0 where nobody tells."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return min(int(line) for line in found.stdout.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0


def check_loss(loss: LossSection) -> None:
    """Raise a ValueError for a denominator that does not fit the objective."""
    if loss.objective == "gspo" and loss.aggregation != "sequence_mean":
        raise ValueError(
            f"loss.objective gspo is a mean over sequences, loss.aggregation is "
            f"{loss.aggregation!r}; set it to sequence_mean"
        )


def check_trainable(sampling: SamplingSection) -> None:
    """Raise ValueError where rollouts would not come from the distribution that is trained."""
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
    """Raise a ValueError where there are not so many prompt features of ``count`` problems."""
    most = min(count - 1, width)
    if not 1 <= size <= most:
        raise ValueError(
            f"estimator.features is {size} for {count} problems with states of {width} numbers; "
            f"give 1 to {most}"
        )


def check_data(section: DataSection) -> None:
    """Raise a ValueError for a wrapper without a place for the problem, an unknown format, and a
    place of the answer that the verifier does not look at."""
    check_words(("data.prompt_format", section.prompt_format, FORMATS))
    extraction_mode(section.verifier, section.answer_mode)
    if section.problem_wrapper and "{problem}" not in section.problem_wrapper:
        raise ValueError(
            f"data.problem_wrapper is {section.problem_wrapper!r}; write {{problem}} where the "
            "problem stands in it"
        )
