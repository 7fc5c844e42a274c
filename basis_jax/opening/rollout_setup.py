"""What stays fixed for all rollouts of a run, built from its config."""

import dataclasses
import shlex
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from basis_jax.config import Config, DataSection, ModelSection
from basis_jax.data.templates import turn_end
from basis_jax.model import attention
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.lora import TARGETS, Lora
from basis_jax.model.sharding import make_mesh
from basis_jax.opening.checks import COMPUTE_DTYPES, check_words
from basis_jax.opening.plan import axis_sizes
from basis_jax.sampling.rollouts import RolloutSetup
from basis_jax.verify import is_own, make_verifier
from basis_jax.verify.rewards import FormatReward, OverlongReward, SeveralRewards
from basis_jax.verify.verdicts import Verifier
from basis_jax.weights import huggingface


def locate_model(config: Config) -> tuple[Path, ModelConfig, Mesh]:
    """The model's folder, its shape and the mesh of devices. No weights are read.

    Raises ValueError if the model is not found or not supported, or the mesh does not fit the
    devices.
    """
    check_words(("model.compute_dtype", config.model.compute_dtype, COMPUTE_DTYPES))
    mesh = make_mesh(**axis_sizes(config))
    folder = huggingface.resolve_folder(config.model.path)
    model_config = huggingface.read_model_config(folder)
    return folder, as_configured(model_config, config.model, mesh.devices.ravel()[0]), mesh


def as_configured(model_config: ModelConfig, section: ModelSection, device: Any) -> ModelConfig:
    """The model's shape with the config's settings of how it is computed on this device."""
    layers = section.decode_layers
    return dataclasses.replace(
        model_config,
        compute_dtype=section.compute_dtype,
        remat=section.remat,
        attention=attention_for(section, device, model_config.head_dim),
        scan_decode=layers == "scanned" or (layers == "auto" and device.platform == "tpu"),
        lora=adapters_of(section),
    )


def attention_for(section: ModelSection, device: Any, head_dim: int) -> str:
    """``model.attention``, or for ``auto`` the best kind for this device."""
    if section.attention != "auto":
        return section.attention
    if device.platform == "gpu" and not has_cudnn_attention(device):
        return "plain"
    return attention.kernel_of(device.platform, section.compute_dtype, head_dim)


def has_cudnn_attention(device: Any) -> bool:
    """Whether it is an NVIDIA GPU, Ampere or newer. AMD's compute capability is not a number."""
    capability = str(getattr(device, "compute_capability", ""))
    return capability[:1].isdigit() and float(capability) >= 8


def adapters_of(section: ModelSection) -> Lora | None:
    """The adapters, or None if none are trained. Raises ValueError for unknown projections."""
    if not section.lora_rank:
        return None
    targets = section.lora_targets
    if not targets or len({*targets}) < len(targets) or not {*targets} <= {*TARGETS}:
        raise ValueError(
            f"model.lora_targets is {', '.join(targets) or 'empty'}; give one or more of "
            f"{', '.join(TARGETS)}, each once"
        )
    return Lora(section.lora_rank, section.lora_alpha, targets, section.compute_dtype)


@contextmanager
def open_setup(
    config: Config,
    folder: Path,
    model_config: ModelConfig,
    mesh: Mesh,
    tokenizer: Any,
    *,
    verifiers: "Verifiers | None" = None,
    report: Callable[[str], None] = print,
) -> Iterator[RolloutSetup]:
    """Yield the setup with the given verifiers. If none are given they are made, and their
    processes end with the block."""
    ends = huggingface.eos_ids(folder, tokenizer) + stop_ids(config, tokenizer)
    report_turn_end(config, tokenizer, ends, report)
    with ExitStack() as opened:
        verifiers = verifiers or opened.enter_context(open_verifiers(config))
        yield RolloutSetup(
            model_config=model_config,
            mesh=mesh,
            sample_tensor=config.mesh.sample_tensor,
            tokenizer=tokenizer,
            eos_ids=ends,
            verifier=verifiers.training,
            held_out_verifiers=verifiers.held_out,
            seed=config.seed,
            rows_at_once=config.train.sample_rollouts,
        )


@dataclass(frozen=True)
class Verifiers:
    """What grades training rollouts, and the completions of each held-out set."""

    training: Verifier
    held_out: dict[str, Verifier]


@contextmanager
def open_verifiers(config: Config) -> Iterator[Verifiers]:
    """Yield the Verifiers; their processes end with the block. Raises ValueError for an unknown
    name and for a function that cannot be loaded."""
    made: dict[tuple[str, str], Verifier] = {}

    def verifier(name: str, section: DataSection) -> Verifier:
        mode = section.answer_mode if name == section.verifier else ""
        if (name, mode) not in made:
            made[name, mode] = opened.enter_context(make_reward(name, mode, config))
        return made[name, mode]

    with ExitStack() as opened:
        data = config.data
        held_out = {}
        for name in config.eval.sets:
            section = config.held_out_data(name)
            held_out[name] = verifier(section.verifier, section)
        training = verifier(data.verifier, data)
        if data.rewards or data.verifier_weight != 1:
            weights = {data.verifier: data.verifier_weight, **data.rewards}
            rewards = {name: verifier(name, data) for name in weights}
            training = SeveralRewards(
                dict(zip(short_names([*weights]), rewards.values(), strict=True)),
                [*weights.values()],
                normalised=data.normalise_rewards,
            )
        yield Verifiers(training, held_out)


def make_reward(name: str, mode: str, config: Config) -> Verifier:
    """A verifier or ready-made reward by name, or a user's own function by reference."""
    data = config.data
    if name == "format":
        return FormatReward(data.format_pattern)
    if name == "overlong":
        limit = data.overlong_limit or config.sampling.max_new_tokens
        return OverlongReward(limit, data.overlong_buffer)
    if is_own(name):
        return make_verifier(
            name, mode=mode, workers=data.reward_workers, seconds=data.reward_seconds
        )
    return make_verifier(name, mode=mode)


def short_names(names: list[str]) -> list[str]:
    """Names of rewards in metrics: own functions without their file if that is unambiguous."""
    short = [name.rpartition(":")[2] for name in names]
    return [s if short.count(s) == 1 else name for s, name in zip(short, names, strict=True)]


def report_turn_end(
    config: Config, tokenizer: Any, ends: Collection[int], report: Callable[[str], None]
) -> None:
    """Warn if the chat template ends a turn with a token that does not end a completion."""
    if config.data.prompt_format != "chat":
        return
    text, ids = turn_end(config.data, tokenizer)
    if not ids or ids[0] in ends:
        return
    if len(ids) == 1:
        advice = f"give --sampling.stop-tokens {shlex.quote(text)}"
    else:
        advice = "that is several tokens, so check that the tokenizer is that of the model"
    report(
        f"warning: the chat template ends a turn with {text!r}, which ends no completion of this "
        f"model; {advice}"
    )


def stop_ids(config: Config, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of ``sampling.stop_tokens``. Raises ValueError if one is not a single token."""
    ids = []
    for text in config.sampling.stop_tokens:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            raise ValueError(
                f"sampling.stop_tokens holds {text!r}, which is {len(tokens)} tokens of this "
                "model; only strings of one token can stop a completion"
            )
        ids += tokens
    return tuple(ids)
