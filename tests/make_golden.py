"""Writes tests/golden/*.npz: small random Qwen2, Qwen3 and Llama models and transformers' logits.

    python tests/make_golden.py [NAME ...]    # pip install torch==2.13.0 transformers==5.23.0

Each file holds config.json as transformers writes it, the weights as int8 (see ``weights``), right-
padded rows of tokens with their lengths, and the float32 logits. Where the settings have a
``rope_scaling``, config.json is as a user writes it: transformers would write one of the two.
"""

import copy
import json
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "golden"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
THETA = {"rope_type": "default", "rope_theta": 1e6}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LONG = {"head_dim": 16, "tie_word_embeddings": True}  # pairs on every part of YaRN's ramp
CASES = {  # name: (model type, settings besides SIZES)
    "qwen2_tied": ("qwen2", {"rope_parameters": THETA, "tie_word_embeddings": True}),
    "qwen2_untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3_tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_untied": (
        "qwen3",
        {"head_dim": 8, "rope_parameters": THETA, "tie_word_embeddings": False},
    ),
    "llama_tied": ("llama", {"rope_parameters": THETA, "tie_word_embeddings": True}),
    "llama_rope_scaled": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "llama_biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3_yarn": ("qwen3", LONG | {"rope_parameters": YARN}),
    "qwen3_yarn_amplitude": (
        "qwen3",
        LONG | {"rope_parameters": YARN | {"attention_factor": 1.5, "truncate": False}},
    ),
    "llama_yarn_mscale": (
        "llama",
        LONG | {"rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}},
    ),
    "llama_yarn_defaults": (
        "llama",
        LONG | {"rope_theta": 500.0, "rope_scaling": {"type": "yarn", "factor": 3, "beta_fast": 4}},
    ),
    "llama_linear": ("llama", LONG | {"rope_parameters": THETA | LINEAR}),
    "qwen2_both": (  # rope_scaling takes the place of rope_parameters
        "qwen2",
        LONG | {"rope_theta": 100.0, "rope_parameters": YARN, "rope_scaling": LINEAR},
    ),
    "qwen3_both": (
        "qwen3",
        LONG
        | {"rope_parameters": THETA, "rope_scaling": YARN | {"factor": 2.0, "rope_theta": 1e3}},
    ),
}
LENGTHS = (12, 7, 1)
LONG_LENGTHS = (96,)  # beyond the original length of the scaled ones


def weights(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """int8 -> float32 that bfloat16 holds exactly: i / 512, and 1 + i / 128 for norm scales."""
    return {
        name: 1 + i.astype(np.float32) / 128
        if name.endswith("norm.weight")
        else np.float32(i) / 512
        for name, i in stored.items()
    }


def torch_model(kind: str, settings: dict):
    """A transformers model of these settings, in float32, its parameters not yet set."""
    import transformers

    name = kind.capitalize()
    config = getattr(transformers, f"{name}Config")(**copy.deepcopy(SIZES | settings))
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def torch_logits(model, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    import torch

    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    with torch.no_grad():
        output = model(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long())
    return output.logits.float().numpy()


def make(name: str) -> dict[str, np.ndarray]:
    """Contents of one golden file."""
    import torch

    kind, settings = CASES[name]
    random = np.random.default_rng(list(CASES).index(name))
    model = torch_model(kind, settings)
    stored = {
        parameter: random.integers(-127, 128, tuple(value.shape)).astype(np.int8)
        for parameter, value in model.named_parameters()  # a tied lm_head is not listed twice
    }
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            value.copy_(torch.tensor(weights(stored)[parameter]))
    lengths = np.array(LONG_LENGTHS if LONG.items() <= settings.items() else LENGTHS, np.int32)
    tokens = random.integers(0, SIZES["vocab_size"], (len(lengths), max(lengths))).astype(np.int32)
    tokens[np.arange(tokens.shape[1]) >= lengths[:, None]] = 0
    config = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
    if "rope_scaling" in settings:
        config = {k: v for k, v in config.items() if k != "rope_parameters"} | settings
    return {
        "config": np.array(json.dumps(config)),
        "tokens": tokens,
        "lengths": lengths,
        "logits": torch_logits(model, tokens, lengths),
        **{f"weight:{parameter}": value for parameter, value in stored.items()},
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case in sys.argv[1:] or CASES:
        np.savez_compressed(FOLDER / f"{case}.npz", **make(case))
        print(case, (FOLDER / f"{case}.npz").stat().st_size, "bytes")
