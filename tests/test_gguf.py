"""GGUF files become the Hugging Face folder of the same model and tokenizer."""

import json
import re
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file

from basis_jax.weights import gguf, huggingface
from basis_jax.weights.layout import LAYOUTS

gguf_package = pytest.importorskip("gguf")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
EMBED, HEADS, KV_HEADS, MLP = 32, 4, 2, 64
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"


def byte_letters():
    """The 256 letters that byte-level BPE writes for bytes (GPT-2), space being Ġ."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


WORDS = SPECIAL + byte_letters() + ["12", "he", "Ġhe"]
MERGES = ["1 2", "h e", "Ġ he"]


def llama_weights(random):
    """Tensors in Hugging Face's names and order; random normal."""
    kv = EMBED // HEADS * KV_HEADS
    layer = {
        "input_layernorm": (EMBED,),
        "post_attention_layernorm": (EMBED,),
        "self_attn.q_proj": (EMBED, EMBED),
        "self_attn.k_proj": (kv, EMBED),
        "self_attn.v_proj": (kv, EMBED),
        "self_attn.o_proj": (EMBED, EMBED),
        "mlp.gate_proj": (MLP, EMBED),
        "mlp.up_proj": (MLP, EMBED),
        "mlp.down_proj": (EMBED, MLP),
    }
    shapes = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens": (len(WORDS), EMBED), "model.norm": (EMBED,)}
    return {f"{n}.weight": random.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def permute(weight, heads):
    """What llama.cpp does to q and k: row (head, half, i) goes to (head, i, half)."""
    rows = weight.shape[0] // heads
    order = [
        head * rows + half * (rows // 2) + i
        for head in range(heads)
        for i in range(rows // 2)
        for half in range(2)
    ]
    return weight[order]


def write_gguf(
    path, tensors, *, architecture="llama", pre="smollm", quantised=(), fields=None, extra=None
):
    writer = gguf_package.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(EMBED)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(WORDS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, value in (fields or {}).items():
        writer.add_float32(name, value)
    names = {theirs: ours for ours, theirs in gguf.TENSORS.items()}
    for name, value in tensors.items():
        layer, part = re.match(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name).groups()
        stored = names[part]
        if stored in ("attn_q", "attn_k"):
            value = permute(value, HEADS if stored == "attn_q" else KV_HEADS)
        kind = gguf_package.GGMLQuantizationType.Q8_0
        if name in quantised:
            value = gguf_package.quants.quantize(value, kind)
        prefix = f"blk.{layer}." if layer else ""
        writer.add_tensor(
            f"{prefix}{stored}.weight", value, raw_dtype=kind if name in quantised else None
        )
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tensors():
    return llama_weights(np.random.default_rng(0))


def test_weights_come_back_in_the_order_of_hugging_face(tmp_path, tensors):
    folder = gguf.convert(write_gguf(tmp_path / "a.gguf", tensors), tmp_path / "out")
    found = load_file(folder / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    model_config = huggingface.read_model_config(folder)
    assert (model_config.rope_theta, model_config.norm_eps, model_config.tied) == (
        5000.0,
        1e-5,
        True,
    )
    assert (model_config.heads, model_config.kv_heads, model_config.head_dim) == (
        HEADS,
        KV_HEADS,
        EMBED // HEADS,
    )
    assert huggingface.load_params(folder, model_config)["embedding"].shape == (len(WORDS), EMBED)


def test_an_own_output_layer_is_kept(tmp_path, tensors):
    output = {LAYOUTS["output"].name: tensors["model.embed_tokens.weight"] * 2}
    folder = gguf.convert(write_gguf(tmp_path / "a.gguf", tensors | output), tmp_path / "out")
    model_config = huggingface.read_model_config(folder)
    params = huggingface.load_params(folder, model_config)
    assert not model_config.tied
    np.testing.assert_array_equal(params["output"], params["embedding"] * 2)


def test_quantised_weights_become_the_numbers_they_stand_for(tmp_path, tensors):
    """Q8_0: blocks of 32 share a scale, so the error is at most half of max / 127."""
    name = "model.layers.1.mlp.down_proj.weight"
    file = write_gguf(tmp_path / "a.gguf", tensors, quantised=(name,))
    found = load_file(gguf.convert(file, tmp_path / "out") / "model.safetensors")[name]
    blocks, exact = found.reshape(-1, 32), tensors[name].reshape(-1, 32)
    step = np.abs(exact).max(axis=1, keepdims=True) / 127
    assert found.dtype == np.float32 and np.any(blocks != exact)
    assert np.all(np.abs(blocks - exact) <= step * 0.6)  # 0.5, and the scale's own float16 rounding


def test_a_wheel_is_opened_and_bfloat16_is_half_the_size(tmp_path, tensors):
    with zipfile.ZipFile(tmp_path / "a-1-py3-none-any.whl", "w") as wheel:
        wheel.write(write_gguf(tmp_path / "a.gguf", tensors), "a/model.gguf")
    wide = gguf.convert(tmp_path / "a.gguf", tmp_path / "wide")
    narrow = gguf.convert(wheel.filename, tmp_path / "narrow", dtype="bfloat16")
    for name, value in load_file(narrow / "model.safetensors").items():
        assert str(value.dtype) == "bfloat16"
        exact = load_file(wide / "model.safetensors")[name]
        np.testing.assert_array_equal(value, exact.astype(value.dtype))
    assert json.loads((narrow / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_tokenizer_is_that_of_the_gguf(tmp_path, tensors):
    """Merges apply, digits stay single, special tokens are one token, text survives."""
    folder = gguf.convert(write_gguf(tmp_path / "a.gguf", tensors), tmp_path / "out")
    tokenizer = huggingface.load_tokenizer(folder)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("he he 1212"))
    assert pieces == ["he", "Ġhe", "Ġ", "1", "2", "1", "2"]
    assert tokenizer.encode("<|im_start|>h<|im_end|>") == [1, WORDS.index("h"), 2]
    text = "12 + 3 = don't\n\n  é你"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ended = tokenizer.encode("he<|endoftext|>")
    assert tokenizer.decode(ended, skip_special_tokens=True) == "he"
    messages = [{"role": "user", "content": "he"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False)
    assert chat == "<|im_start|>he<|im_end|>"
    assert huggingface.eos_ids(folder, tokenizer) == (2,)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, len(tokenizer)) == (2, 1, len(WORDS))


def test_gpt2_splitting_joins_digits(tmp_path, tensors):
    file = write_gguf(tmp_path / "a.gguf", tensors, pre="gpt-2")
    tokenizer = huggingface.load_tokenizer(gguf.convert(file, tmp_path / "out"))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("1212")) == ["12", "12"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"architecture": "qwen2"}, "qwen2"),
        ({"pre": "tekken"}, "tekken"),
        ({"fields": {"llama.rope.scaling.factor": 4.0}}, r"rope\.scaling\.factor"),
        ({"extra": {"rope_freqs.weight": np.ones(4, np.float32)}}, r"rope_freqs\.weight"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, r"blk\.0\.attn_q\.bias"),
    ],
)
def test_what_is_not_a_plain_llama_is_refused_by_name(tmp_path, tensors, settings, named):
    file = write_gguf(tmp_path / "a.gguf", tensors, **settings)
    with pytest.raises(ValueError, match=named):
        gguf.convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_files_and_wheels_without_a_model_are_named(tmp_path, tensors):
    file = write_gguf(tmp_path / "a.gguf", tensors)
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:20_000])
    (tmp_path / "junk.gguf").write_bytes(b"junk" * 100)
    for name in ("cut.gguf", "junk.gguf", "nothing.gguf"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as GGUF"):
            gguf.convert(tmp_path / name, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as wheel:
        wheel.writestr("a.txt", "nothing")
    with pytest.raises(ValueError, match="holds 0 .gguf files"):
        gguf.convert(wheel.filename, tmp_path / "out")
