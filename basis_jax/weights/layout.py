"""Where every parameter of ``decoder.py`` lives in Hugging Face's safetensors files.

One table, ``LAYOUTS``, gives its name there and the order of its axes; reading and writing both
follow it, so folder -> params -> folder is exact.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from basis_jax import processes
from basis_jax.files import one_line, read_json
from basis_jax.model import decoder, lora
from basis_jax.model.decoder import ModelConfig

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors -> NumPy


@dataclass(frozen=True)
class Layout:
    """``ours`` and ``theirs`` are axis letters, one per axis of a layer's parameter.

    An axis of the file's tensor may be made of two: ``"hk d"`` is (heads x head_dim, embed).
    """

    name: str  # in the files; {} stands for the layer, which is axis 0 of our parameter
    ours: str = "d"
    theirs: str = "d"

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the files of one layer's parameter of this shape."""
        sizes = dict(zip(self.ours, shape, strict=True))
        return tuple(math.prod(sizes[a] for a in group) for group in self.theirs.split())

    def to_stored(self, value: np.ndarray) -> np.ndarray:
        """One layer's parameter -> tensor of the file."""
        order = [self.ours.index(a) for a in self.theirs.replace(" ", "")]
        return np.ascontiguousarray(value.transpose(order)).reshape(self.stored_shape(value.shape))

    def read(self, stored: Any, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """Block ``index`` of one layer's parameter of this shape.

        A joined axis of ``stored`` is cut in the file by its first letter, in memory by the rest.
        """
        sizes = dict(zip(self.ours, shape, strict=True))
        ranges = {a: range(*s.indices(sizes[a])) for a, s in zip(self.ours, index, strict=True)}
        cuts, split, inner = [], [], []
        for first, rest in ((group[0], group[1:]) for group in self.theirs.split()):
            step = math.prod(sizes[a] for a in rest)
            cuts.append(slice(ranges[first].start * step, ranges[first].stop * step))
            split += [len(ranges[first]), *(sizes[a] for a in rest)]
            inner += [slice(None), *(slice(ranges[a].start, ranges[a].stop) for a in rest)]
        block = stored[tuple(cuts)].reshape(split)[tuple(inner)]
        letters = self.theirs.replace(" ", "")
        return block.transpose([letters.index(a) for a in self.ours])


def _layouts() -> dict[str, Layout]:
    layer, attention, mlp = "model.layers.{}.", "model.layers.{}.self_attn.", "model.layers.{}.mlp."
    table = {
        "embedding": Layout("model.embed_tokens.weight", "vd", "v d"),
        "output": Layout("lm_head.weight", "vd", "v d"),
        "norm": Layout("model.norm.weight"),
        "layers/attention_norm": Layout(layer + "input_layernorm.weight"),
        "layers/mlp_norm": Layout(layer + "post_attention_layernorm.weight"),
        "layers/o_proj": Layout(attention + "o_proj.weight", "hkd", "d hk"),
        "layers/o_bias": Layout(attention + "o_proj.bias"),
    }
    for name in "qkv":
        table[f"layers/{name}_proj"] = Layout(f"{attention}{name}_proj.weight", "dhk", "hk d")
        table[f"layers/{name}_bias"] = Layout(f"{attention}{name}_proj.bias", "hk", "hk")
        table[f"layers/{name}_norm"] = Layout(f"{attention}{name}_norm.weight")
    for name in ("gate", "up", "down"):
        table[f"layers/{name}_proj"] = Layout(f"{mlp}{name}_proj.weight", "io", "o i")
        table[f"layers/{name}_bias"] = Layout(f"{mlp}{name}_proj.bias")
    return table


LAYOUTS = _layouts()


@dataclass(frozen=True)
class Parameter:
    """One leaf of the parameter tree and the tensors it is made of."""

    path: str
    shape: tuple[int, ...]
    layout: Layout
    stacked: bool  # axis 0 is the layer

    @property
    def names(self) -> list[str]:
        """Tensors in the files, one per layer if it is stacked."""
        if not self.stacked:
            return [self.layout.name]
        return [self.layout.name.format(i) for i in range(self.shape[0])]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.layout.stored_shape(self.shape[1:] if self.stacked else self.shape)

    def reader(
        self, tensors: Mapping[str, Any], dtype: Any = np.float32
    ) -> Callable[[tuple[slice, ...]], np.ndarray]:
        """index -> that block in ``dtype``; devices that hold the same block share one reading.

        A reading raises ValueError if the block holds NaN or infinity.
        """
        parts = [tensors[name] for name in self.names]
        blocks: dict[tuple, np.ndarray] = {}

        def block(index):
            if not self.stacked:
                whole = self.layout.read(parts[0], self.shape, index).astype(dtype)
                check_finite(whole, self.names[0])
                return whole
            layers = [self.layout.read(p, self.shape[1:], index[1:]) for p in parts[index[0]]]
            stacked = np.stack([layer.astype(dtype, copy=False) for layer in layers])
            for layer, name in zip(stacked, self.names[index[0]], strict=True):
                check_finite(layer, name)
            return stacked

        def read(index):
            key = tuple((s.start, s.stop) for s in index)
            if key not in blocks:
                blocks[key] = block(index)
            return blocks[key]

        return read


def check_finite(value: np.ndarray, name: str) -> None:
    """Raise ValueError if the values hold NaN or infinity.

    First their sum is checked, in one pass without a copy. Only if it is not finite are the values
    checked one by one, because a sum of finite numbers can overflow too.
    """
    with np.errstate(all="ignore"):
        finite = np.isfinite(np.sum(value)) or np.isfinite(value).all()
    if not finite:
        raise ValueError(
            f"{name} holds NaN or infinity; give weights of which every number is finite, such as "
            "an earlier checkpoint"
        )


def parameters(model_config: ModelConfig) -> list[Parameter]:
    """Every parameter of the model, without adapters, in the order of the tree's leaves."""
    shapes = lora.base(decoder.param_shapes(model_config))
    leaves, _ = jax.tree_util.tree_flatten_with_path(shapes)
    found = []
    for keys, leaf in leaves:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        found.append(Parameter(path, leaf.shape, LAYOUTS[path], path.startswith("layers/")))
    return found


SHOWN = 120  # characters of a name in a message


def list_names(names: Iterable[object]) -> str:
    """The first five of the names in order, and how many more there are."""
    names = sorted(str(name) for name in names)
    names[:5] = [one_line(name[:SHOWN]) for name in names[:5]]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def weight_files(folder: str | Path) -> list[Path]:
    """``model.safetensors``, or the files that ``model.safetensors.index.json`` names."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(
            f"{folder} holds neither {single.name} nor {index.name}; only safetensors are read "
            "(scripts/convert.py makes a folder out of a .gguf file)"
        )
    weight_map = read_json(index).get("weight_map")
    names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
    absent = {n for n in names if Path(n).name != n or not os.path.isfile(folder / n)}
    if absent or not names:
        raise ValueError(
            f"{index} needs files that {folder} lacks: {list_names(absent) or 'it has none'}"
        )
    return [folder / name for name in sorted(names)]


def open_tensors(folder: str | Path) -> dict[str, Any]:
    """Every tensor of the folder by name, as safetensors' slices: nothing is read yet. Raises
    ValueError for a damaged file, and for a name that is in two of them."""
    tensors: dict[str, Any] = {}
    for path in weight_files(folder):
        try:
            handle = safe_open(path, framework="numpy")
        except (SafetensorError, OSError, MemoryError) as error:
            raise ValueError(one_line(f"{path} is damaged or cut short: {error}")) from error
        held = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        if twice := held.keys() & tensors.keys():
            raise ValueError(
                f"{path} holds {list_names(twice)}, which another file of {folder} holds too; "
                "remove the files that do not belong to the model"
            )
        tensors |= held
    return tensors


def check_tensors(
    tensors: Mapping[str, Any], model_config: ModelConfig, folder: str | Path
) -> None:
    """Raise ValueError unless the files hold exactly the parameters, in the right shapes.

    rotary_emb.inv_freq (computed here) is allowed too, and with tied embeddings an lm_head.weight
    that equals the embedding.
    """
    expected = {name: p.stored_shape for p in parameters(model_config) for name in p.names}
    surplus = {n for n in tensors if n not in expected and not n.endswith("rotary_emb.inv_freq")}
    if model_config.tied and {LAYOUTS[n].name for n in ("output", "embedding")} <= tensors.keys():
        _check_tied(tensors, folder)
        surplus.remove(LAYOUTS["output"].name)
    shapes = {n: tuple(tensors[n].get_shape()) for n in expected if n in tensors}
    kinds = {n: tensors[n].get_dtype() for n in shapes}
    problems = {
        "missing": set(expected) - set(tensors),
        "unknown": surplus,
        "misshapen": {f"{n} {s} not {expected[n]}" for n, s in shapes.items() if s != expected[n]},
        f"not {list_names(DTYPES)}": {
            f"{n} {kind}" for n, kind in kinds.items() if kind not in DTYPES
        },
    }
    descriptions = [
        f"{problem}: {list_names(names)}" for problem, names in problems.items() if names
    ]
    if descriptions:
        raise ValueError(
            f"the weights of {folder} do not fit its config.json; {'; '.join(descriptions)}"
        )


def _check_tied(tensors: Mapping[str, Any], folder: str | Path, rows: int = 4096) -> None:
    output, embedding = (tensors[LAYOUTS[path].name] for path in ("output", "embedding"))
    shape = output.get_shape()
    alike = shape == embedding.get_shape() and len(shape) == 2
    readable = {output.get_dtype(), embedding.get_dtype()} <= DTYPES.keys()
    same = (alike and readable) and all(
        np.array_equal(output[i : min(i + rows, shape[0])], embedding[i : min(i + rows, shape[0])])
        for i in range(0, shape[0], rows)
    )
    if not same:
        raise ValueError(
            f"{folder} has an lm_head.weight that differs from model.embed_tokens.weight while its "
            "config.json says tie_word_embeddings; set that to false or remove the tensor"
        )


def stored_tensors(params: PyTree, model_config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) in the files' names and layouts, one parameter on the host at a time. Every
    process gets whole tensors, and must take all of them."""
    for parameter, leaf in zip(parameters(model_config), jax.tree.leaves(params), strict=True):
        if leaf.shape != parameter.shape:
            raise ValueError(
                f"parameter {parameter.path} is {leaf.shape}; its config says {parameter.shape}"
            )
        value = processes.on_host(leaf)
        layers = value if parameter.stacked else [value]
        for name, layer in zip(parameter.names, layers, strict=True):
            yield name, parameter.layout.to_stored(layer)


def rounded(value: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """The values in another dtype. Raises ValueError for NaN and infinity, and for numbers beyond
    the range of float16."""
    check_finite(value, name)
    with np.errstate(over="ignore"):
        found = value.astype(jnp.dtype(dtype), copy=False)
    if dtype == "float16" and not np.isfinite(found).all():
        raise ValueError(f"{name} holds numbers beyond float16's 65504; store it as bfloat16")
    return found


def write_folder(
    folder: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    files: Mapping[str, bytes],
    *,
    name: str = "model",
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Write named tensors as ``name``.safetensors (with an index if there are several) and other
    files.

    Everything is written to ``<folder>.partial``, which is renamed when it is complete, so a crash
    leaves no half-written folder. Raises ValueError if the folder is not empty, unless
    ``overwrite``; the old folder then stays until the new one is complete. The first of several
    processes writes.
    """
    folder = Path(folder).absolute()
    processes.by_first(lambda: _check_free(folder, overwrite))
    if processes.is_first():
        _write_and_rename(folder, name, tensors, files, max_shard_bytes)
    else:
        for _ in tensors:  # gathering them takes all processes
            pass
    processes.barrier()
    return folder


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; remove it or give another name")


def _write_and_rename(
    folder: Path,
    name: str,
    tensors: Iterable[tuple[str, np.ndarray]],
    files: Mapping[str, bytes],
    max_shard_bytes: int,
) -> None:
    partial, old = (folder.with_name(folder.name + end) for end in (".partial", ".replaced"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_shards(partial, name, tensors, max_shard_bytes)
    for file_name, contents in files.items():
        (partial / file_name).write_bytes(contents)
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_shards(
    folder: Path, name: str, tensors: Iterable[tuple[str, np.ndarray]], limit: int
) -> None:
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush():
        path = folder / f"{len(shards)}.safetensors"
        path.touch()
        usual = path.stat().st_mode
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(usual)  # safetensors makes it readable by its owner alone
        shards.append(list(pending))
        pending.clear()

    for key, value in tensors:
        if pending and sum(x.nbytes for x in pending.values()) + value.nbytes > limit:
            flush()
        pending[key] = value
        total += value.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / f"{name}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"{name}-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2))
