"""What stays fixed for all rollouts of a run, built from its config."""

import dataclasses
import shlex
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from basis_jax.config import Config, ModelSection
from basis_jax.data.templates import turn_end
from basis_jax.model import attention
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.sharding import AXES, make_mesh
from basis_jax.opening.checks import COMPUTE_DTYPES, check_words
from basis_jax.sampling.rollouts import RolloutSetup
from basis_jax.verify import make_verifier
from basis_jax.weights import huggingface


def locate_model(config: Config) -> tuple[Path, ModelConfig, Mesh]:
    """The model's folder, its shape and the mesh of devices; no weights are read. Raises
    ValueError where one of them cannot be had."""
    check_words(("model.compute_dtype", config.model.compute_dtype, COMPUTE_DTYPES))
    mesh = make_mesh(**{axis: getattr(config.mesh, axis) for axis in AXES})
    folder = huggingface.resolve_folder(config.model.path)
    model_config = huggingface.read_model_config(
        folder, compute_dtype=config.model.compute_dtype, remat=config.model.remat
    )
    device = mesh.devices.ravel()[0]
    kind = attention_for(config.model, device, model_config.head_dim)
    layers = config.model.decode_layers
    scanned = layers == "scanned" or (layers == "auto" and device.platform == "tpu")
    return folder, dataclasses.replace(model_config, attention=kind, scan_decode=scanned), mesh


def attention_for(section: ModelSection, device: Any, head_dim: int) -> str:
    """``model.attention``, and for ``auto`` the kind that suits this device."""
    if section.attention != "auto":
        return section.attention
    if device.platform == "gpu" and not has_cudnn_attention(device):
        return "plain"
    return attention.kernel_of(device.platform, section.compute_dtype, head_dim)


def has_cudnn_attention(device: Any) -> bool:
    """NVIDIA's GPUs from Ampere on; AMD's have no number as compute capability."""
    capability = str(getattr(device, "compute_capability", ""))
    return capability[:1].isdigit() and float(capability) >= 8


@contextmanager
def open_setup(
    config: Config,
    folder: Path,
    model_config: ModelConfig,
    mesh: Mesh,
    tokenizer: Any,
    *,
    report: Callable[[str], None] = print,
) -> Iterator[RolloutSetup]:
    """Start the verifier and yield the setup; the verifier's processes end with the block."""
    ends = huggingface.eos_ids(folder, tokenizer) + stop_ids(config, tokenizer)
    report_turn_end(config, tokenizer, ends, report)
    with make_verifier(config.data.verifier, mode=config.data.answer_mode) as verifier:
        yield RolloutSetup(
            model_config=model_config,
            mesh=mesh,
            sample_tensor=config.mesh.sample_tensor,
            tokenizer=tokenizer,
            eos_ids=ends,
            verifier=verifier,
            seed=config.seed,
            rows_at_once=config.train.sample_rollouts,
        )


def report_turn_end(
    config: Config, tokenizer: Any, ends: Collection[int], report: Callable[[str], None]
) -> None:
    """Warn of a chat template that ends a turn with what does not end a completion."""
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
    """Token ids of ``sampling.stop_tokens``. Raises ValueError where one is not one token."""
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
