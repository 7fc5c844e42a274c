"""Model folders with something wrong: right, or refused by name in one sentence."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_hf import V4, changed, config_of, golden_folder, load

from basis_jax.model.sharding import make_mesh
from basis_jax.weights import huggingface

HEADS = {"num_key_value_heads": 2, "head_dim": 16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_nan_and_infinity_are_refused_with_the_tensor_that_holds_them(tmp_path, name, wrong, dtype):
    def change(tensors):
        tensors[name].reshape(-1)[-1] = wrong
        tensors[name] = tensors[name].astype(jnp.dtype(dtype))

    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity"):
        load(changed(tmp_path, change))


def test_infinities_of_both_signs_do_not_cancel(tmp_path):
    def change(tensors):
        tensors["model.norm.weight"][:2] = [np.inf, -np.inf]

    with pytest.raises(ValueError, match="norm.weight holds NaN"):
        load(changed(tmp_path, change))


def test_numbers_whose_sum_overflows_are_no_infinity(tmp_path):
    def change(tensors):
        tensors["model.norm.weight"][:] = 3e38

    assert np.all(np.asarray(load(changed(tmp_path, change))["norm"]) == np.float32(3e38))


def test_nan_in_any_devices_part_is_found(tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    mesh = make_mesh(data=1, fsdp=2, tensor=2)
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):

        def change(tensors, corner=corner):
            tensors[name][corner] = np.nan

        folder = changed(tmp_path, change)
        with pytest.raises(ValueError, match=f"{name} holds NaN"):
            huggingface.load_params(folder, huggingface.read_model_config(folder), mesh)


def test_parameters_with_nan_or_too_large_for_their_dtype_are_not_written(tmp_path):
    folder = golden_folder(tmp_path)
    params, model_config = load(folder), huggingface.read_model_config(folder)
    for value, dtype, words in (
        (jnp.nan, "float32", "norm.weight holds NaN"),
        (1e5, "float16", "norm.weight holds numbers beyond float16"),
    ):
        wrong = params | {"norm": jnp.full_like(params["norm"], value)}
        with pytest.raises(ValueError, match=words):
            huggingface.save_params(wrong, model_config, tmp_path / "out", dtype=dtype)
    huggingface.save_params(wrong, model_config, tmp_path / "out", dtype="bfloat16")


def test_a_lora_folder_is_named_with_its_base_model(tmp_path):
    for name in ("alone", "beside"):
        folder = tmp_path / name
        folder.mkdir()
        adapter = {"base_model_name_or_path": "Qwen/Qwen3-4B", "peft_type": "LORA"}
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
        if name == "beside":  # transformers would add the adapter to it
            (folder / "config.json").write_text(json.dumps(V4))
        with pytest.raises(ValueError, match="LoRA adapter .* Qwen/Qwen3-4B.* merge it"):
            huggingface.read_model_config(huggingface.resolve_folder(folder))


def test_a_folder_without_config_json_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no config.json; give the folder"):
        huggingface.read_model_config(huggingface.resolve_folder(tmp_path))


def cached(path, *snapshots, main=None):
    """A model's folder as the hub's client keeps it."""
    model = path / "models--owner--name"
    for name in snapshots:
        (model / "snapshots" / name).mkdir(parents=True)
        (model / "snapshots" / name / "config.json").write_text(json.dumps(V4))
    if main:
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(main)
    return model


def test_a_model_in_the_hubs_cache_is_its_newest_snapshot(tmp_path):
    model = cached(tmp_path / "a", "0a", "1b", "2c", main="1b")
    assert huggingface.resolve_folder(model) == model / "snapshots" / "1b"
    model = cached(tmp_path / "b", "0a")
    assert huggingface.resolve_folder(str(model)) == model / "snapshots" / "0a"
    model = cached(tmp_path / "c", "0a", "1b", main="gone")
    with pytest.raises(ValueError, match="several snapshots, 0a, 1b, and none is main"):
        huggingface.resolve_folder(model)


def test_the_hubs_cache_itself_is_refused_with_the_models_in_it(tmp_path):
    cached(tmp_path / "hub", "0a")
    for root in (tmp_path / "hub", tmp_path):
        with pytest.raises(ValueError, match="is the hub's cache, which holds models--owner--name"):
            huggingface.resolve_folder(root)


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_refused(tmp_path, monkeypatch, path):
    """Also in a folder that holds a model."""
    monkeypatch.chdir(golden_folder(tmp_path))
    with pytest.raises(ValueError, match="the model's path is empty; give a folder"):
        huggingface.resolve_folder(path)


def test_a_file_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "small.gguf").write_text("")
    with pytest.raises(ValueError, match="is a file; give the folder .*convert"):
        huggingface.resolve_folder("models/small.gguf")


def test_a_byte_order_mark_in_config_json_is_skipped(tmp_path):
    expected = config_of(tmp_path)
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert huggingface.read_model_config(tmp_path) == expected


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; true or false"),
        ({"attention_bias": "False"}, "attention_bias is 'False'"),
        ({"mlp_bias": 0}, "mlp_bias is 0"),
        ({"use_sliding_window": "false", "sliding_window": 4}, "use_sliding_window is 'false'"),
        (
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": "2"},
            "max_window_layers is '2'",
        ),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; a number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"vocab_size": True}, "vocab_size True must be given as whole numbers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"hidden_size": 32.0}, r"hidden_size 32\.0"),
        ({"head_dim": "8"}, "head_dim '8'"),
        ({"head_dim": 0}, "head_dim 0"),
        ({"head_dim": 7}, "the size of a head is 7"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"hidden_size": 30}, "hidden_size 30 / num_attention_heads 4 cannot"),
        ({"model_type": "qwen2"}, "num_key_value_heads is absent.* 32 in every qwen2"),
        ({"model_type": "qwen3", "head_dim": 8}, "num_key_value_heads is absent.* 32"),
        ({"model_type": "qwen3", "num_key_value_heads": 2}, "head_dim is absent.* 128"),
        ({"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": None}, "head_dim is not"),
        ({"model_type": ["llama"]}, "model_type"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_named(tmp_path, settings, named):
    with pytest.raises(ValueError, match=named) as raised:
        config_of(tmp_path, **settings)
    assert "\n" not in str(raised.value)


def test_absent_and_null_heads_are_what_transformers_takes_them_for(tmp_path):
    assert config_of(tmp_path).kv_heads == config_of(tmp_path, num_key_value_heads=None).kv_heads
    null = {"num_key_value_heads": None, "head_dim": 16}
    found = config_of(tmp_path, model_type="qwen3", **null)
    assert (found.kv_heads, found.head_dim) == (4, 16)
    assert config_of(tmp_path, model_type="qwen2", num_key_value_heads=2).head_dim == 8
