"""Hugging Face folders: config.json, weights and tokenizer in, and trained parameters out.

``layout.py`` holds the names and layouts of the tensors. Parameters are float32 whatever the
files hold (bfloat16, float16 or float32).
"""

import collections
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from basis_jax.files import check_size, home, one_line, read_json
from basis_jax.model import decoder, lora
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.sharding import named
from basis_jax.weights import layout
from basis_jax.weights.config_json import describe, parse
from basis_jax.weights.layout import DTYPES, list_names

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
CARRIED_FILES = (*TOKENIZER_FILES, "generation_config.json", "LICENSE")
"""Files that an export copies from the source folder."""
EMBEDDED = {"embedded:quickstart": "quickstart_model", "embedded:steps": "steps_model"}
"""The models in this package, and their folders beside this file."""


def resolve_folder(path: str | Path) -> Path:
    """The local folder of a model.

    ``path`` is one of ``EMBEDDED`` (in this package), a folder, a model's folder in the hub's
    cache (``models--owner--name``: its newest snapshot), or a hub id, which is downloaded or found
    in that cache. Raises ValueError if there is none.
    """
    if str(path) in EMBEDDED:
        return Path(__file__).parent / EMBEDDED[str(path)]
    folder, embedded = home(path), " or ".join(EMBEDDED)
    allowed = f"give a folder, a hub id (owner/name), {embedded} with --model.path"
    if not str(path).strip():
        raise ValueError(f"the model's path is empty; {allowed}")
    if os.path.isdir(folder):  # False where the name cannot be one
        return folder if (folder / "config.json").exists() else _in_cache(folder)
    if os.path.exists(folder):
        raise ValueError(
            f"{path} is a file; give the folder that contains it with --model.path (basis-jax "
            "convert makes a folder out of a .gguf file)"
        )
    if str(path).startswith((".", "~", "/")) or str(path).count("/") != 1:
        raise ValueError(
            f"{path} is no folder, no hub id (owner/name) and not {embedded}; "
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


def _in_cache(folder: Path) -> Path:
    """The snapshot in a folder of the hub's cache that ``main`` names, or its only one. Any other
    folder is returned unchanged. Raises ValueError for the cache itself and for several
    snapshots."""
    models = list_names(p.name for i in ("", "hub/") for p in folder.glob(f"{i}models--*"))
    if models:
        raise ValueError(
            f"{folder} is the hub's cache, which holds {models}; give one of these folders, or the "
            "hub id (owner/name), with --model.path"
        )
    main, snapshots = folder / "refs" / "main", folder / "snapshots"
    found = sorted(p for p in snapshots.iterdir() if p.is_dir()) if snapshots.is_dir() else []
    newest = main.read_bytes()[:1000].decode(errors="replace").strip() if main.is_file() else ""
    if newest and snapshots / newest in found:
        return snapshots / newest
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds several snapshots, {list_names(p.name for p in found)}, and none is "
            "main; give the folder of one with --model.path"
        )
    return found[0] if found else folder


def read_model_config(
    folder: str | Path,
    *,
    compute_dtype: str = "float32",
    remat: str = "none",
    attention: str = "plain",
) -> ModelConfig:
    """The decoder that ``config.json`` describes, written by transformers 4 or 5.

    Raises ValueError for anything that we would compute differently from transformers, and names
    it: another architecture or activation, sliding windows, another rotary embedding, quantised
    weights.
    """
    if compute_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"compute_dtype is {compute_dtype!r}; float32 and bfloat16 are allowed")
    path = Path(folder) / "config.json"
    _check_complete(Path(folder))
    raw = read_json(path)
    try:
        return replace(parse(raw), compute_dtype=compute_dtype, remat=remat, attention=attention)
    except ValueError as error:
        raise ValueError(one_line(f"{path}: {error}")) from error


def _check_complete(folder: Path) -> None:
    """Raise ValueError for an adapter without its model, and a folder without config.json."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = list_names([read_json(adapter).get("base_model_name_or_path")])
        raise ValueError(
            f"{folder} holds a LoRA adapter (adapter_config.json) for the model {base}, which is "
            "not supported; merge it into that model (peft: merge_and_unload, save_pretrained) and "
            "give the merged folder with --model.path"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json; give the folder of a Hugging Face model with "
            "--model.path"
        )


def load_params(folder: str | Path, model_config: ModelConfig, mesh: Mesh | None = None) -> PyTree:
    """Parameters of a folder, laid out over the mesh; without one, on the first device. They are
    float32, but below adapters in ``lora.base_dtype``.

    Every device's part is read from the files on its own: the host never holds the whole model.
    Raises ValueError naming missing, unknown and misshapen tensors, damaged files, and tensors that
    hold NaN or infinity.
    """
    tensors = layout.open_tensors(folder)
    layout.check_tensors(tensors, model_config, folder)
    axes = jax.tree.leaves(
        lora.base(decoder.param_axes(model_config)), is_leaf=lambda x: isinstance(x, tuple)
    )
    shapes, structure = jax.tree.flatten(lora.base(decoder.param_shapes(model_config)))
    leaves = []
    for parameter, shape, names in zip(layout.parameters(model_config), shapes, axes, strict=True):
        if mesh is None:
            sharding: Sharding = SingleDeviceSharding(jax.local_devices()[0])
        else:
            sharding = named(mesh, names)
        read = parameter.reader(tensors, shape.dtype)
        leaves.append(
            jax.make_array_from_callback(
                parameter.shape,
                sharding,
                read,  # type: ignore[arg-type]  # JAX never calls it with None
                dtype=shape.dtype,
            )
        )
    return jax.tree.unflatten(structure, leaves)


def save_params(
    params: PyTree,
    model_config: ModelConfig,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    dtype: str | None = None,
    generation: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Write parameters in Hugging Face layout; float32 survives the round trip bit for bit.

    ``source`` is the folder that training began from: its config.json, tokenizer and generation
    files are copied, and ``dtype=None`` stores each tensor in the type that it has there. Without a
    source config.json is made from ``model_config``, and None means float32. ``generation`` holds
    the settings of generation_config.json that differ from those of the source. For crashes and
    ``overwrite`` see ``layout.write_folder``. Raises ValueError if config.json and ``model_config``
    disagree, and for parameters that hold NaN or infinity.
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
        names = [n for n in ("dtype", "torch_dtype") if n in raw] or ["torch_dtype"]
        raw |= dict.fromkeys(names, dtype or "float32")
    if parse(raw) != decoder.as_described(model_config):
        raise ValueError(
            f"config.json of {source or model_config.architecture} cannot stand for {model_config}"
            "; give as source the folder that the parameters were loaded from"
        )
    files["config.json"] = json.dumps(raw, indent=2).encode()
    if generation:
        described = _generation(source, raw) | dict(generation)
        files["generation_config.json"] = json.dumps(described, indent=2).encode()
    converted = (
        (name, layout.rounded(value, stored.get(name) or dtype or "float32", name))
        for name, value in layout.stored_tensors(params, model_config)
    )
    return layout.write_folder(
        folder, converted, files, max_shard_bytes=max_shard_bytes, overwrite=overwrite
    )


def _generation(source: str | Path | None, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The source's generation_config.json, or what transformers makes of config.json."""
    path = Path(source or "") / "generation_config.json"
    if source is not None and path.is_file():
        return read_json(path)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: raw[name] for name in names if raw.get(name) is not None}


def stored_dtype(folder: str | Path) -> str:
    """What most of a folder's numbers are stored in, such as "bfloat16"."""
    counts: collections.Counter[str] = collections.Counter()
    for tensor in layout.open_tensors(folder).values():
        counts[DTYPES.get(tensor.get_dtype(), "float32")] += math.prod(tensor.get_shape())
    return max(counts, key=lambda dtype: counts[dtype], default="float32")


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's tokenizer, through transformers and from local files only."""
    vocabularies = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((Path(folder) / name).is_file() for name in vocabularies):
        raise ValueError(  # transformers would make an empty one
            f"{folder} holds no tokenizer ({list_names(vocabularies)}); copy that of the "
            "model there"
        )
    for name in TOKENIZER_FILES:
        try:
            check_size(Path(folder) / name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ValueError(f"{Path(folder) / name} cannot be read: {error}") from error
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        words = tokenizer.get_vocab()
    except Exception as error:  # tokenizers raises bare Exceptions for damaged files
        reason = one_line(str(error)) or type(error).__name__
        raise ValueError(f"the tokenizer of {folder} cannot be loaded: {reason}") from error
    size = _vocabulary(folder)
    beyond = sorted((i, word) for word, i in words.items() if i >= size)
    if beyond:
        first, word = beyond[0]
        raise ValueError(
            f"the tokenizer of {folder} has ids beyond the model's vocabulary of {size:.0f} "
            f"(config.json), {len(beyond)} of them, from {first} ({word[:40]!r}) on; "
            "give the tokenizer of this model"
        )
    return tokenizer


def _vocabulary(folder: str | Path) -> int | float:
    """``vocab_size`` of config.json; infinity if it is absent."""
    path = Path(folder) / "config.json"
    size = read_json(path).get("vocab_size") if path.is_file() else None
    return size if isinstance(size, int) else math.inf


def eos_ids(folder: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a completion, ascending.

    The union of eos_token_id in generation_config.json, in config.json and of the tokenizer.
    Raises ValueError if there is none, and for ids that are not tokens of the model.
    """
    found = {tokenizer.eos_token_id}
    size = _vocabulary(folder)
    for path in (Path(folder) / name for name in ("generation_config.json", "config.json")):
        if not path.is_file():
            continue
        ids = read_json(path).get("eos_token_id")
        for i in ids if isinstance(ids, list) else [ids]:
            whole = isinstance(i, int) and not isinstance(i, bool)
            if i is not None and not (whole and 0 <= i < size):
                raise ValueError(
                    f"{path} has the eos_token_id {list_names([repr(i)])}, which is no token of "
                    f"the model; write whole numbers from 0, below its vocabulary of {size:.0f}"
                )
            found.add(i)
    found.discard(None)
    if not found:
        raise ValueError(
            f"{folder} names no end-of-sequence token; add eos_token_id to generation_config.json"
        )
    return tuple(sorted(found))


def fingerprint(folder: str | Path) -> str:
    """sha256 (hex) over config.json and the weight files, by name, size and contents.

    Reads every weight once: about 1 s per GB if the files are in the page cache.
    """
    digest = hashlib.sha256()
    for path in [Path(folder) / "config.json", *layout.weight_files(folder)]:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
