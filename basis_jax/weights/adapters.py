"""Adapters out of a run: merged into their model, or as a folder that peft reads.

peft's lora_A is [rank, in] and its lora_B [out, rank], in the layout of the projection's own weight
in Hugging Face's files.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from basis_jax.files import read_json
from basis_jax.model import decoder, lora
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.lora import Lora
from basis_jax.model.sharding import named_tree
from basis_jax.weights import huggingface, layout, trained


def saved_lora(checkpoint: Path) -> Lora | None:
    """The adapters that a checkpoint holds; None if it holds all parameters."""
    section = trained.saved_config(checkpoint)["model"]
    if not section.get("lora_rank"):  # absent in those of older versions
        return None
    with trained.reading(checkpoint):
        targets = tuple(section["lora_targets"])
        if type(section["lora_rank"]) is not int or not {*targets} <= {*lora.TARGETS}:
            raise ValueError("its config has adapters that this version does not know")
        return Lora(section["lora_rank"], section["lora_alpha"], targets, section["compute_dtype"])


def load_policy(
    checkpoint: Path, folder: Path, model_config: ModelConfig, mesh: Mesh | None = None
) -> PyTree:
    """All parameters of a checkpoint, its adapters merged into the weights of ``folder``.

    They are float32 and laid out over the mesh; without one, NumPy arrays. The weights below the
    adapters are first rounded to the dtype in which training had them. Raises ValueError as
    ``trained.load_checkpoint_params``, and if the adapters were trained with other weights.
    """
    found = saved_lora(checkpoint)
    plain = dataclasses.replace(model_config, lora=None)
    if found is None:
        return trained.load_checkpoint_params(checkpoint, plain, mesh)
    check_base(checkpoint, folder)
    with_adapters = dataclasses.replace(model_config, lora=found)
    adapters = trained.load_checkpoint_params(checkpoint, with_adapters, mesh)

    def merge(base: PyTree, adapters: PyTree) -> PyTree:
        base = jax.tree.map(lambda x: x.astype(jnp.float32), base)
        return lora.merged_params(base, adapters, found.scale)

    base = huggingface.load_params(folder, with_adapters, mesh)
    shardings = None if mesh is None else named_tree(mesh, decoder.param_axes(plain))
    donated = (0,) if found.base_dtype == "float32" else ()
    merged = jax.jit(merge, out_shardings=shardings, donate_argnums=donated)(base, adapters)
    return jax.device_get(merged) if mesh is None else merged


def check_base(checkpoint: Path, folder: Path) -> None:
    """Raise ValueError if the run's config.json says that its model had other weights. A checkpoint
    that was moved out of its run is not checked."""
    record = checkpoint.parent.parent / "config.json"
    identity = read_json(record).get("identity") if record.is_file() else None
    known = identity.get("model.path") if isinstance(identity, dict) else None
    if known is not None and known != huggingface.fingerprint(folder):
        raise ValueError(
            f"the adapters of {checkpoint} were trained with other weights than those of "
            f"{folder}; give the model folder that their training began from"
        )


def save_adapters(
    checkpoint: Path, folder: Path, model_config: ModelConfig, to: Path, *, model_name: str
) -> Path:
    """Write the checkpoint's adapters as peft does, for the model in ``folder``, which they name
    ``model_name``. Raises ValueError for a checkpoint without adapters, and as ``load_policy``."""
    found = saved_lora(checkpoint)
    if found is None:
        raise ValueError(
            f"{checkpoint} holds no adapters, since its model.lora_rank is 0; leave out --adapters "
            "to write the whole model"
        )
    check_base(checkpoint, folder)
    with_adapters = dataclasses.replace(model_config, lora=found)
    params = trained.load_checkpoint_params(checkpoint, with_adapters)
    described = json.dumps(peft_config(found, model_name), indent=2).encode()
    return layout.write_folder(
        to, peft_tensors(params["layers"]), {"adapter_config.json": described}, name="adapter_model"
    )


def peft_config(found: Lora, model_name: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model_name,
        "r": found.rank,
        "lora_alpha": found.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(found.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }


def peft_tensors(layers: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """(peft's name, tensor) of every layer's adapters."""
    for name, stacked in layers.items():
        stored, part = layout.LAYOUTS[f"layers/{name[:-2]}"].name, name[-1]
        rank_axis = -1 if part == "a" else 0
        for i, value in enumerate(stacked):
            flat = np.moveaxis(value, rank_axis, 0).reshape(value.shape[rank_axis], -1)
            tensor = np.ascontiguousarray(flat if part == "a" else flat.T)
            module = stored.format(i).removesuffix(".weight")
            yield f"base_model.model.{module}.lora_{part.upper()}.weight", tensor
