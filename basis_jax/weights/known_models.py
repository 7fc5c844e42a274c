"""Shapes of well-known models by hub id, so that a run can be planned without the hub.

They are the fields of each model's config.json, as published on the Hugging Face hub.
"""

from basis_jax.model.decoder import ModelConfig
from basis_jax.model.rope import RopeScaling


def _qwen3(embed: int, layers: int, heads: int, mlp: int, *, tied: bool = False) -> ModelConfig:
    return ModelConfig(
        architecture="qwen3",
        vocab_size=151_936,
        embed=embed,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        mlp=mlp,
        max_positions=40_960,
        rope_theta=1e6,
        tied=tied,
        qk_norm=True,
    )


def _qwen2_5(
    embed: int, layers: int, heads: int, kv_heads: int, mlp: int, *, tied: bool = False
) -> ModelConfig:
    return ModelConfig(
        architecture="qwen2",
        vocab_size=151_936 if tied else 152_064,
        embed=embed,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=embed // heads,
        mlp=mlp,
        max_positions=32_768,
        rope_theta=1e6,
        tied=tied,
        qkv_bias=True,
    )


def _llama3(
    embed: int, layers: int, heads: int, mlp: int, *, factor: float, tied: bool = False
) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=128_256,
        embed=embed,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=embed // heads,
        mlp=mlp,
        max_positions=131_072,
        rope_theta=5e5,
        rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192),
        norm_eps=1e-5,
        tied=tied,
    )


KNOWN_MODELS = {
    "Qwen/Qwen3-0.6B": _qwen3(1024, 28, 16, 3072, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 28, 16, 6144, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 36, 32, 9728, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 36, 32, 12_288),
    "Qwen/Qwen3-14B": _qwen3(5120, 40, 40, 17_408),
    "Qwen/Qwen3-32B": _qwen3(5120, 64, 64, 25_600),
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen2_5(896, 24, 14, 2, 4864, tied=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen2_5(1536, 28, 12, 2, 8960, tied=True),
    "Qwen/Qwen2.5-3B-Instruct": _qwen2_5(2048, 36, 16, 2, 11_008, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": _qwen2_5(3584, 28, 28, 4, 18_944),
    "meta-llama/Llama-3.2-1B-Instruct": _llama3(2048, 16, 32, 8192, factor=32.0, tied=True),
    "meta-llama/Llama-3.2-3B-Instruct": _llama3(3072, 28, 24, 8192, factor=32.0, tied=True),
    "meta-llama/Llama-3.1-8B-Instruct": _llama3(4096, 32, 32, 14_336, factor=8.0),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ModelConfig(
        architecture="llama",
        vocab_size=49_152,
        embed=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        mlp=1536,
        max_positions=8192,
        rope_theta=1e5,
        norm_eps=1e-5,
        tied=True,
    ),
}
