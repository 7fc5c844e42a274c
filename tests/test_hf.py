"""Hugging Face folders: what is read is what transformers computes with, and comes back exactly."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import make_golden
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from basis_jax.model import decoder
from basis_jax.model.sharding import make_mesh, named
from basis_jax.weights import huggingface, layout

NAMES = list(make_golden.CASES)
PLAIN = [n for n, (_, s) in make_golden.CASES.items() if not make_golden.LONG.items() <= s.items()]
V4 = {  # Llama in the form of transformers 4
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def golden(name):
    """(config.json, float32 tensors, the file) of a golden model."""
    file = np.load(make_golden.FOLDER / f"{name}.npz")
    stored = {k.removeprefix("weight:"): file[k] for k in file if k.startswith("weight:")}
    return json.loads(file["config"].item()), make_golden.weights(stored), file


def write(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def golden_folder(path, name="qwen2_untied"):
    config, tensors, _ = golden(name)
    return write(path / name, config, tensors)


def changed(path, change, name="qwen2_tied"):
    """A golden folder whose tensors went through ``change(tensors)``."""
    config, tensors, _ = golden(name)
    change(tensors)
    return write(path / "changed", config, tensors)


def load(folder):
    return huggingface.load_params(folder, huggingface.read_model_config(folder))


def config_of(path, **settings):
    (path / "config.json").write_text(json.dumps(V4 | settings))
    return huggingface.read_model_config(path)


def random_folder(path, name, dtype):
    """A golden model's folder with weights that use every bit of ``dtype``."""
    config, tensors, _ = golden(name)
    random = np.random.default_rng(0)
    tensors = {n: random.normal(size=x.shape).astype(jnp.dtype(dtype)) for n, x in tensors.items()}
    return write(path / name, config, tensors)


def read_back(folder):
    return {k: v for path in layout.weight_files(folder) for k, v in load_file(path).items()}


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(tmp_path, name):
    folder, (_, _, file) = golden_folder(tmp_path, name), golden(name)
    model_config = huggingface.read_model_config(folder)
    params = huggingface.load_params(folder, model_config)

    @jax.jit
    def logits(params, tokens):
        return decoder.logits(
            params, model_config, decoder.forward(params, model_config, tokens)[0]
        )

    ours = np.asarray(logits(params, jnp.asarray(file["tokens"])))
    for row, length in enumerate(file["lengths"]):
        gap = np.abs(ours[row, :length] - file["logits"][row, :length]).max()
        assert gap < 1e-4, (row, gap)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", PLAIN)
def test_folder_to_params_to_folder_is_exact(tmp_path, name, dtype):
    folder = random_folder(tmp_path, name, dtype)
    out = huggingface.save_params(
        load(folder), huggingface.read_model_config(folder), tmp_path / "out", source=folder
    )
    before, after = read_back(folder), read_back(out)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert after[key].tobytes() == value.tobytes(), key
    assert json.loads((out / "config.json").read_text()) == golden(name)[0]


def test_parameters_are_float32_whatever_the_file_holds(tmp_path):
    for dtype in ("bfloat16", "float16"):
        folder = random_folder(tmp_path / dtype, "qwen3_tied", dtype)
        assert {x.dtype for x in jax.tree.leaves(load(folder))} == {jnp.dtype("float32")}


def test_sharded_files_hold_at_most_the_limit_and_read_as_one(tmp_path):
    folder = golden_folder(tmp_path)
    params, model_config = load(folder), huggingface.read_model_config(folder)
    limit = 20_000
    out = huggingface.save_params(
        params, model_config, tmp_path / "out", source=folder, max_shard_bytes=limit
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    parts = {p.name: load_file(p) for p in out.glob("*.safetensors")}
    assert len(parts) > 3 and set(index["weight_map"].values()) == set(parts)
    assert all(sum(x.nbytes for x in part.values()) <= limit for part in parts.values())
    assert all(name in parts[file] for name, file in index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in read_back(folder).values())
    jax.tree.map(np.testing.assert_array_equal, load(out), params)


@pytest.mark.parametrize("name", NAMES)
def test_config_made_without_a_source_describes_the_same_model(tmp_path, name):
    folder = golden_folder(tmp_path, name)
    params, model_config = load(folder), huggingface.read_model_config(folder)
    out = huggingface.save_params(params, model_config, tmp_path / "out", dtype="bfloat16")
    assert huggingface.read_model_config(out) == model_config
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {str(x.dtype) for x in read_back(out).values()} == {"bfloat16"}


@pytest.mark.parametrize("name", PLAIN)
def test_a_mesh_changes_the_layout_and_not_the_numbers(tmp_path, name):
    """Every parameter over (data 1, fsdp 2, tensor 2), laid out as its logical axes say."""
    folder = golden_folder(tmp_path, name)
    model_config, mesh = huggingface.read_model_config(folder), make_mesh(data=1, fsdp=2, tensor=2)
    sharded = huggingface.load_params(folder, model_config, mesh)
    jax.tree.map(np.testing.assert_array_equal, sharded, load(folder))
    jax.tree.map(
        lambda x, axes: x.sharding.is_equivalent_to(named(mesh, axes), x.ndim) or pytest.fail(axes),
        sharded,
        decoder.param_axes(model_config),
    )
    query = sharded["layers"]["q_proj"]
    assert query.addressable_shards[0].data.size == query.size // 4


def test_devices_read_their_own_part_of_the_files_once(tmp_path, monkeypatch):
    """Numbers read = parameters, over four devices, and never a whole matrix at once."""
    read = []

    class Recorded:
        def __init__(self, stored):
            self.get_shape, self.get_dtype = stored.get_shape, stored.get_dtype
            self.stored = stored

        def __getitem__(self, index):
            block = self.stored[index]
            read.append((block.size, block.ndim, np.prod(self.get_shape())))
            return block

    opened = layout.open_tensors
    monkeypatch.setattr(
        layout, "open_tensors", lambda f: {k: Recorded(v) for k, v in opened(f).items()}
    )
    folder = golden_folder(tmp_path)
    model_config = huggingface.read_model_config(folder)
    params = huggingface.load_params(folder, model_config, make_mesh(data=1, fsdp=2, tensor=2))
    assert sum(size for size, _, _ in read) == sum(x.size for x in jax.tree.leaves(params))
    assert all(size * 4 == full for size, ndim, full in read if ndim == 2)


@pytest.mark.parametrize("path", ["layers/q_proj", "layers/o_proj", "layers/v_bias", "output"])
def test_any_block_of_a_parameter_can_be_read_alone(tmp_path, path):
    """Also along layers and inside a head, which no mesh of ours cuts today."""
    folder = golden_folder(tmp_path)
    found = {p.path: p for p in layout.parameters(huggingface.read_model_config(folder))}[path]
    read = found.reader(layout.open_tensors(folder))
    whole = read((slice(None),) * len(found.shape))
    assert whole.shape == found.shape
    for axis, size in enumerate(found.shape):
        for cut in (slice(0, 1), slice(1, 2), slice(size // 2, None)):
            index = tuple(cut if i == axis else slice(None) for i in range(len(found.shape)))
            np.testing.assert_array_equal(read(index), whole[index])


def test_config_of_transformers_4_and_5_are_the_same(tmp_path):
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    }
    old = config_of(tmp_path, rope_theta=5e5, rope_scaling=scaling)
    new = config_of(tmp_path, rope_parameters=scaling | {"rope_theta": 5e5})
    assert old == new
    assert old.rope_theta == 5e5 and old.rope_scaling == decoder.RopeScaling(8.0, 1.0, 4.0, 64)
    plain = config_of(tmp_path, rope_theta=5e5, rope_scaling=None)
    assert plain == config_of(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert plain.rope_theta == 5e5 and plain.rope_scaling is None


def test_absent_settings_mean_what_transformers_takes_them_for(tmp_path):
    model_config = config_of(tmp_path)
    assert (model_config.head_dim, model_config.kv_heads, model_config.rope_theta) == (
        8,
        4,
        10_000.0,
    )
    assert not (
        model_config.tied
        or model_config.qkv_bias
        or model_config.output_bias
        or model_config.mlp_bias
    )
    assert config_of(tmp_path, head_dim=16).head_dim == 16
    assert config_of(tmp_path, attention_bias=True).output_bias
    heads = {"num_key_value_heads": 2, "head_dim": 16}
    qwen = config_of(tmp_path, model_type="qwen2", use_sliding_window=False, **heads)
    assert qwen.qkv_bias and not qwen.output_bias and not qwen.qk_norm
    assert config_of(tmp_path, model_type="qwen3", **heads).qk_norm


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model_type": "mistral"}, "mistral"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "sliding_attention",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
    ],
)
def test_what_we_would_compute_otherwise_is_refused_by_name(tmp_path, settings, named):
    with pytest.raises(ValueError, match=named) as raised:
        config_of(tmp_path, **settings)
    assert str(tmp_path / "config.json") in str(raised.value)


def test_a_sliding_window_that_reaches_no_layer_is_no_obstacle(tmp_path):
    config_of(tmp_path, use_sliding_window=True, sliding_window=8, max_window_layers=2)


def test_missing_surplus_misshapen_and_odd_tensors_are_named(tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
        tensors["model.layers.1.self_attn.q_proj.weight"] = np.zeros((32, 16), np.float32)
        tensors["model.layers.0.self_attn.k_proj.bias"] = np.zeros(16, np.float64)

    with pytest.raises(ValueError) as raised:
        load(changed(tmp_path, change))
    for sentence in (
        "missing: model.norm.weight",
        "unknown: model.layers.2.mlp.up_proj.weight",
        "misshapen: model.layers.1.self_attn.q_proj.weight (32, 16) not (32, 32)",
        "not BF16, F16, F32: model.layers.0.self_attn.k_proj.bias F64",
    ):
        assert sentence in str(raised.value)


def test_at_most_five_tensors_are_listed(tmp_path):
    with pytest.raises(ValueError, match="and 20 more") as raised:
        load(changed(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors)[1:]]))
    assert str(raised.value).count("model.layers") == 5


def test_computed_and_repeated_tensors_do_no_harm(tmp_path):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    plain = load(golden_folder(tmp_path, "qwen2_tied"))
    jax.tree.map(np.testing.assert_array_equal, load(changed(tmp_path, change)), plain)


def test_a_tied_model_with_another_output_layer_is_refused(tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(1)

    with pytest.raises(ValueError, match=r"lm_head\.weight that differs"):
        load(changed(tmp_path, change))


def test_damaged_and_absent_weight_files_are_named(tmp_path):
    folder = golden_folder(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short"):
        load(folder)
    file.unlink()
    with pytest.raises(ValueError, match="holds neither"):
        load(folder)
    index = folder / "model.safetensors.index.json"
    for name in ("model-00001-of-00002.safetensors", "../qwen2_untied/config.json"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(ValueError, match=f"needs files that .* lacks: {name}"):
            load(folder)
    index.write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        load(folder)


def test_an_interrupted_save_leaves_no_folder_and_the_next_one_works(tmp_path):
    folder = golden_folder(tmp_path)
    params, model_config = load(folder), huggingface.read_model_config(folder)
    broken = dict(params, norm=jnp.zeros(3))
    with pytest.raises(ValueError, match=r"parameter norm is \(3,\)"):
        huggingface.save_params(
            broken, model_config, tmp_path / "out", source=folder, max_shard_bytes=5000
        )
    assert not (tmp_path / "out").exists()
    huggingface.save_params(params, model_config, tmp_path / "out", source=folder)
    assert {p.name for p in tmp_path.iterdir()} == {folder.name, "out"}
    with pytest.raises(ValueError, match="norm"):
        huggingface.save_params(
            broken, model_config, tmp_path / "out", source=folder, overwrite=True
        )
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out"), params)


def test_a_folder_with_contents_is_replaced_only_when_asked(tmp_path):
    folder = golden_folder(tmp_path)
    params, model_config = load(folder), huggingface.read_model_config(folder)
    with pytest.raises(ValueError, match="exists already"):
        huggingface.save_params(params, model_config, folder, source=folder)
    doubled = jax.tree.map(lambda x: x * 2, params)
    huggingface.save_params(doubled, model_config, folder, source=folder, overwrite=True)
    jax.tree.map(np.testing.assert_array_equal, load(folder), doubled)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_an_export_carries_the_source_tokenizer_and_its_settings(tmp_path):
    folder = golden_folder(tmp_path)
    params, model_config = load(folder), huggingface.read_model_config(folder)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_text(f"{name}!")
    (folder / "optimizer.pt").write_text("not ours")
    raw = json.loads((folder / "config.json").read_text()) | {"dtype": "float32", "extra": 1}
    (folder / "config.json").write_text(json.dumps(raw))
    out = huggingface.save_params(
        params, model_config, tmp_path / "out", source=folder, dtype="bfloat16"
    )
    assert (out / "tokenizer.json").read_text() == "tokenizer.json!"
    assert {p.name for p in out.iterdir()} == {p.name for p in folder.iterdir()} - {"optimizer.pt"}
    assert json.loads((out / "config.json").read_text()) == raw | {"dtype": "bfloat16"}
    modes = {p.stat().st_mode for p in out.iterdir()}
    assert len(modes) == 1, "weights are as readable as the other files"


def test_a_source_of_another_model_is_refused(tmp_path):
    folder, other = golden_folder(tmp_path), golden_folder(tmp_path, "llama_tied")
    with pytest.raises(ValueError, match="cannot stand for"):
        huggingface.save_params(
            load(folder), huggingface.read_model_config(folder), tmp_path / "out", source=other
        )
    odd = replace(huggingface.read_model_config(folder), qkv_bias=False)
    with pytest.raises(ValueError, match="cannot stand for"):
        huggingface.save_params(load(folder), odd, tmp_path / "out")
    with pytest.raises(ValueError, match="float64"):
        huggingface.save_params(
            load(folder), huggingface.read_model_config(folder), tmp_path / "out", dtype="float64"
        )


def test_the_fingerprint_is_of_config_and_weights_and_not_of_the_place(tmp_path):
    first, second = golden_folder(tmp_path / "a"), golden_folder(tmp_path / "b")
    same = huggingface.fingerprint(first)
    assert same == huggingface.fingerprint(second) and len(same) == 64
    (first / "tokenizer.json").write_text("{}")
    assert huggingface.fingerprint(first) == same
    file = second / "model.safetensors"
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 1
    file.write_bytes(contents)
    config = first / "config.json"
    config.write_text(config.read_text() + " ")
    assert len({same, huggingface.fingerprint(first), huggingface.fingerprint(second)}) == 3


class EndOnly:
    def __init__(self, eos_token_id):
        self.eos_token_id = eos_token_id


def test_every_end_of_sequence_token_is_known(tmp_path):
    assert huggingface.eos_ids(tmp_path, EndOnly(7)) == (7,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert huggingface.eos_ids(tmp_path, EndOnly(7)) == (3, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 3]}')
    assert huggingface.eos_ids(tmp_path, EndOnly(None)) == (3, 9)
    with pytest.raises(ValueError, match="end-of-sequence"):
        huggingface.eos_ids(tmp_path / "nowhere", EndOnly(None))


def test_a_model_is_found_or_one_sentence_says_why_not(tmp_path, monkeypatch):
    assert huggingface.resolve_folder(tmp_path) == tmp_path
    for name, folder in (("quickstart", "quickstart_model"), ("steps", "steps_model")):
        found = huggingface.resolve_folder(f"embedded:{name}")
        assert found == Path(huggingface.__file__).parent / folder
        assert (found / "config.json").is_file()
    with pytest.raises(ValueError, match="not embedded:quickstart or embedded:steps; give one"):
        huggingface.resolve_folder("embedded:step")
    for path in ("./nowhere", str(tmp_path / "nowhere"), "nowhere", "a/b/c"):
        with pytest.raises(ValueError, match="is no folder, no hub id") as raised:
            huggingface.resolve_folder(path)
        assert path in str(raised.value)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"nobody/nothing .* give a local folder with --model"):
        huggingface.resolve_folder("nobody/nothing")


def test_a_folder_without_a_tokenizer_or_with_a_damaged_one_is_named(tmp_path):
    folder = golden_folder(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        huggingface.load_tokenizer(folder)
    (folder / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=f"tokenizer of {folder} cannot be loaded"):
        huggingface.load_tokenizer(folder)


@pytest.mark.torch
@pytest.mark.parametrize("name", NAMES)
def test_golden_files_are_what_transformers_computes_now(name):
    _, _, file = golden(name)
    made = make_golden.make(name)
    assert made.keys() == set(file)
    for key in set(file) - {"config"}:
        np.testing.assert_allclose(made[key], file[key], atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("with_source", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_computes_the_same_with_our_export(tmp_path, name, with_source):
    import transformers

    folder, (_, _, file) = golden_folder(tmp_path, name), golden(name)
    params, model_config = load(folder), huggingface.read_model_config(folder)
    source = folder if with_source else None
    out = huggingface.save_params(
        params, model_config, tmp_path / "out", source=source, max_shard_bytes=20_000
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    logits = make_golden.torch_logits(theirs, file["tokens"], file["lengths"])
    for row, length in enumerate(file["lengths"]):
        np.testing.assert_allclose(
            logits[row, :length], file["logits"][row, :length], atol=1e-5, rtol=0
        )
