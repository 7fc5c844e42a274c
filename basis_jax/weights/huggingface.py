"""Hugging Face folders: config.json, weights and tokenizer in, and trained parameters out.

``layout.py`` holds the names and layouts of the tensors. Parameters are float32 whatever the
files hold (bfloat16, float16 or float32).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from basis_jax.files import read_json
from basis_jax.model import decoder
from basis_jax.model.decoder import ModelConfig, RopeScaling
from basis_jax.model.sharding import named
from basis_jax.weights import layout
from basis_jax.weights.layout import DTYPES, list_names

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SIZES = {  # config.json -> ModelConfig
    "vocab_size": "vocab_size",
    "hidden_size": "embed",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp",
    "max_position_embeddings": "max_positions",
}
SCALING = {  # config.json -> RopeScaling
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_positions",
}
CARRIED_FILES = (  # from the source folder into an export
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
)


def resolve_folder(path: str | Path) -> Path:
    """The local folder of a model.

    ``path`` is ``embedded:quickstart`` (in this package), a folder, or a hub id, which is
    downloaded or found in the hub's cache. Raises ValueError where there is none.
    """
    if path == "embedded:quickstart":
        return Path(__file__).parent / "quickstart_model"
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if str(path).startswith((".", "~", "/")) or str(path).count("/") != 1:
        raise ValueError(
            f"{path} is no folder, no hub id (owner/name) and not embedded:quickstart; "
            "give one of these with --model.path"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "LICENSE"]
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:  # the hub client's own errors, httpx's and the system's
        raise ValueError(
            f"{path} is no local folder and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}); give a local folder with --model.path"
        ) from error


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from ``rope_parameters`` (transformers 5) or the top level (4)."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1
    if kind not in ("default", "llama3") or partial != 1 or {dict} & {*map(type, rope.values())}:
        raise ValueError(
            f"rotary embedding {rope}, partial_rotary_factor {partial} is not supported; the types "
            "default and llama3, the same in all layers and over whole heads, are"
        )
    if kind == "default":
        return theta, None
    absent = [name for name in SCALING if rope.get(name) is None]
    if absent:
        raise ValueError(f"rotary embedding of type llama3 needs {list_names(absent)}")
    return theta, RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(rope["original_max_position_embeddings"]),
    )


def _check_supported(raw: Mapping[str, Any]) -> None:
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type {kind!r} is not supported; {list_names(ARCHITECTURES)} are")
    absent = [name for name in SIZES if not isinstance(raw.get(name), int)]
    if absent:
        raise ValueError(f"{list_names(absent)} must be given as whole numbers")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported; silu is")
    if raw.get("quantization_config"):
        raise ValueError("quantization_config is set; quantised weights are not supported")
    kinds = raw.get("layer_types")
    if kinds is None and raw.get("use_sliding_window") and raw.get("sliding_window"):
        sliding = raw["num_hidden_layers"] - raw.get("max_window_layers", 28)
        kinds = ["sliding_attention"] * sliding
    others = {*(kinds or ())} - {"full_attention"}
    if others:
        raise ValueError(
            f"layers with {list_names(others)} are not supported; full_attention is "
            "(use_sliding_window false)"
        )


def _parse(raw: Mapping[str, Any]) -> ModelConfig:
    """config.json's contents -> ModelConfig in float32, without remat."""
    _check_supported(raw)
    theta, scaling = _rope(raw)
    kind, heads = raw["model_type"], raw["num_attention_heads"]
    bias = kind != "qwen2" and bool(raw.get("attention_bias"))
    return ModelConfig(
        architecture=kind,
        **{ours: raw[theirs] for theirs, ours in SIZES.items()},
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied=bool(raw.get("tie_word_embeddings")),
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias,
        mlp_bias=kind == "llama" and bool(raw.get("mlp_bias")),
        qk_norm=kind == "qwen3",
    )


def read_model_config(
    folder: str | Path,
    *,
    compute_dtype: str = "float32",
    remat: str = "none",
    attention: str = "plain",
) -> ModelConfig:
    """The decoder that ``config.json`` describes, written by transformers 4 or 5.

    Raises ValueError naming whatever we would compute otherwise than transformers does: another
    architecture or activation, sliding windows, another rotary embedding, quantised weights.
    """
    if compute_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"compute_dtype is {compute_dtype!r}; float32 and bfloat16 are allowed")
    path = Path(folder) / "config.json"
    raw = read_json(path)
    try:
        return replace(_parse(raw), compute_dtype=compute_dtype, remat=remat, attention=attention)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def describe(model_config: ModelConfig) -> dict[str, Any]:
    """config.json of a ModelConfig, in the form that transformers 4 and 5 both read."""
    raw = {theirs: getattr(model_config, ours) for theirs, ours in SIZES.items()}
    raw |= {
        "architectures": [ARCHITECTURES[model_config.architecture]],
        "model_type": model_config.architecture,
        "num_key_value_heads": model_config.kv_heads,
        "head_dim": model_config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model_config.norm_eps,
        "rope_theta": model_config.rope_theta,
        "tie_word_embeddings": model_config.tied,
        "attention_bias": model_config.output_bias,
        "mlp_bias": model_config.mlp_bias,
    }
    if model_config.rope_scaling is not None:
        scaling = asdict(model_config.rope_scaling)
        raw["rope_scaling"] = {theirs: scaling[ours] for theirs, ours in SCALING.items()}
        raw["rope_scaling"]["rope_type"] = "llama3"
    return raw


def load_params(folder: str | Path, model_config: ModelConfig, mesh: Mesh | None = None) -> PyTree:
    """float32 parameters of a folder, laid out over the mesh; without one, on the first device.

    Every device's part is read from the files on its own: the host never holds the whole model.
    Raises ValueError naming missing, unknown and misshapen tensors and damaged files.
    """
    tensors = layout.open_tensors(folder)
    layout.check_tensors(tensors, model_config, folder)
    axes = jax.tree.leaves(decoder.param_axes(model_config), is_leaf=lambda x: isinstance(x, tuple))
    leaves = []
    for parameter, names in zip(layout.parameters(model_config), axes, strict=True):
        if mesh is None:
            sharding: Sharding = SingleDeviceSharding(jax.local_devices()[0])
        else:
            sharding = named(mesh, names)
        read = parameter.reader(tensors)
        leaves.append(
            jax.make_array_from_callback(
                parameter.shape,
                sharding,
                read,  # type: ignore[arg-type]  # JAX never calls it with None
                dtype=jnp.float32,
            )
        )
    return jax.tree.unflatten(jax.tree.structure(decoder.param_shapes(model_config)), leaves)


def save_params(
    params: PyTree,
    model_config: ModelConfig,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Write parameters in Hugging Face layout; float32 survives the round trip bit for bit.

    With ``source`` (the folder that training began from) its config.json, tokenizer and
    generation files are carried over, and ``dtype=None`` stores each tensor as it is stored there.
    Without it, config.json is made from ``model_config`` and None means float32. For crashes and
    ``overwrite`` see ``layout.write_folder``. Raises ValueError where config.json and
    ``model_config`` disagree.
    """
    if dtype not in (None, *DTYPES.values()):
        raise ValueError(f"dtype is {dtype!r}; None, {list_names(DTYPES.values())} are allowed")
    raw, files, stored = describe(model_config), {}, {}
    if source is not None:
        source = Path(source)
        raw = read_json(source / "config.json")
        files = {n: (source / n).read_bytes() for n in CARRIED_FILES if (source / n).is_file()}
    if source is not None and dtype is None:
        tensors = layout.open_tensors(source)
        stored = {name: DTYPES.get(tensor.get_dtype()) for name, tensor in tensors.items()}
    else:
        raw["dtype" if "dtype" in raw else "torch_dtype"] = dtype or "float32"
    if _parse(raw) != replace(
        model_config, compute_dtype="float32", remat="none", attention="plain"
    ):
        raise ValueError(
            f"config.json of {source or model_config.architecture} cannot stand for {model_config}"
            "; give as source the folder that the parameters were loaded from"
        )
    files["config.json"] = json.dumps(raw, indent=2).encode()
    converted = (
        (name, value.astype(jnp.dtype(stored.get(name) or dtype or "float32"), copy=False))
        for name, value in layout.stored_tensors(params, model_config)
    )
    return layout.write_folder(
        folder, converted, files, max_shard_bytes=max_shard_bytes, overwrite=overwrite
    )


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's tokenizer, through transformers and from local files only."""
    vocabularies = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((Path(folder) / name).is_file() for name in vocabularies):
        raise ValueError(  # transformers would make an empty one
            f"{folder} holds no tokenizer ({list_names(vocabularies)}); copy that of the "
            "model there"
        )
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions for damaged files
        raise ValueError(f"the tokenizer of {folder} cannot be loaded: {error}") from error


def eos_ids(folder: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a completion, ascending.

    The union of eos_token_id in generation_config.json, in config.json and of the tokenizer.
    Raises ValueError where there is none.
    """
    found = {tokenizer.eos_token_id}
    for path in (Path(folder) / name for name in ("generation_config.json", "config.json")):
        if path.is_file():
            ids = read_json(path).get("eos_token_id")
            found |= set(ids) if isinstance(ids, list) else {ids}
    found.discard(None)
    if not found:
        raise ValueError(
            f"{folder} names no end-of-sequence token; add eos_token_id to generation_config.json"
        )
    return tuple(sorted(found))


def fingerprint(folder: str | Path) -> str:
    """sha256 (hex) over config.json and the weight files, by name, size and contents.

    Reads every weight once: about 1 s a GB where the files are in the page cache.
    """
    digest = hashlib.sha256()
    for path in [Path(folder) / "config.json", *layout.weight_files(folder)]:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
