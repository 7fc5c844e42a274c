"""The models of benchmarks: a Hugging Face folder, or a known model with random weights."""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from basis_jax.model import decoder
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.sharding import named_tree
from basis_jax.runs.provenance import provenance
from basis_jax.weights import huggingface
from basis_jax.weights.known_models import KNOWN_MODELS

MODEL_HELP = "Hugging Face folder, or the hub id of a known model: its shape with random weights"

Sampler = Callable[[np.ndarray, int, tuple[int, ...], int], np.ndarray]
"""(tokens [N P], slots, eos_ids, new) -> lengths [N] of the completions, the end token counted."""


def named_model_config(
    name: str, *, compute_dtype: str = "float32", remat: str = "none", attention: str = "plain"
) -> ModelConfig:
    if name in KNOWN_MODELS:
        known = KNOWN_MODELS[name]
        return replace(known, compute_dtype=compute_dtype, remat=remat, attention=attention)
    return huggingface.read_model_config(
        huggingface.resolve_folder(name),
        compute_dtype=compute_dtype,
        remat=remat,
        attention=attention,
    )


def our_params(name: str, model_config: ModelConfig, mesh: Mesh) -> PyTree:
    if name not in KNOWN_MODELS:
        return huggingface.load_params(huggingface.resolve_folder(name), model_config, mesh)
    layout = named_tree(mesh, decoder.param_axes(model_config))
    return jax.jit(decoder.init, static_argnums=0, out_shardings=layout)(
        model_config, jax.random.key(0)
    )


def torch_model(name: str, model_config: ModelConfig) -> tuple[Any, Any] | None:
    """(torch, transformers' model on torch's device in the same dtype), or None without torch."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would block our cores
    try:
        import torch
    except ImportError:
        return None
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    dtype, causal = getattr(torch, model_config.compute_dtype), transformers.AutoModelForCausalLM
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name in KNOWN_MODELS:
        described = huggingface.describe(model_config)
        shape = transformers.AutoConfig.for_model(described.pop("model_type"), **described)
        with device:  # random weights are drawn there: on a CPU this takes minutes
            loaded = causal.from_config(shape, dtype=dtype)
    else:
        loaded = causal.from_pretrained(huggingface.resolve_folder(name), dtype=dtype)
    return torch, loaded.to(device)


def write_result(options: argparse.Namespace, rows: list[dict], **more: Any) -> None:
    """Write rows, options, machine and versions to the file ``options.out``, if one is given."""
    if not options.out:
        return
    about = {"device": str(jax.devices()[0]), "cores": os.cpu_count(), "peak_bytes": peak_bytes()}
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    about |= {**settings, **provenance("torch", "trl", "google-tunix"), **more}
    Path(options.out).write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")
    print(options.out)


def peak_bytes() -> int | None:
    """The most bytes that the device has held so far; None if the backend does not count (CPUs)."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
