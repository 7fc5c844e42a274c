"""config.json of Qwen2, Qwen3 and Llama <-> ModelConfig.

Absent settings have the defaults of transformers 5.23. A setting is refused by name if transformers
refuses it, if transformers would guess a size that may not fit the others, or if transformers
computes something else than we do.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from basis_jax.model.decoder import ModelConfig
from basis_jax.model.rope import LinearScaling, RopeScaling, YarnScaling
from basis_jax.weights.layout import list_names

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
LARGEST = {"num_hidden_layers": 10_000}
LARGEST_SIZE = 1 << 31  # of anything else
ASSUMED = {  # by transformers if they are absent, whatever the other sizes are
    "llama": {},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
SCALINGS = {"llama3": RopeScaling, "linear": LinearScaling, "yarn": YarnScaling}
SCALING_FIELDS = {  # of the classes above -> config.json
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
    "amplitude": "attention_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
}


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    """config.json's contents -> ModelConfig in float32, without remat.

    A YaRN model has at least ``factor`` times its original positions, as Qwen's model cards add
    YaRN without raising ``max_position_embeddings``.
    """
    _check_supported(raw)
    kind, sizes = raw["model_type"], {ours: raw[theirs] for theirs, ours in SIZES.items()}
    theta, scaling = read_rope(raw)
    kv_heads, head_dim = _heads(raw)
    if isinstance(scaling, YarnScaling):
        extended = scaling.factor * scaling.original_max_positions
        if extended > LARGEST_SIZE:
            raise ValueError(
                f"{scaling.factor:g} times {scaling.original_max_positions} positions is more than "
                "any model has; is the file damaged?"
            )
        sizes["max_positions"] = max(sizes["max_positions"], int(extended))
    bias = kind != "qwen2" and _flag(raw, "attention_bias")
    return ModelConfig(
        architecture=kind,
        **sizes,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_positive(raw, "rms_norm_eps", 1e-6),
        tied=_flag(raw, "tie_word_embeddings"),
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias,
        mlp_bias=kind == "llama" and _flag(raw, "mlp_bias"),
        qk_norm=kind == "qwen3",
    )


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
        raw["rope_scaling"] = {SCALING_FIELDS[name]: value for name, value in scaling.items()}
        kinds = {made: kind for kind, made in SCALINGS.items()}
        raw["rope_scaling"]["rope_type"] = kinds[type(model_config.rope_scaling)]
    return raw


def _check_supported(raw: Mapping[str, Any]) -> None:
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(f"model_type {kind!r} is not supported; {list_names(ARCHITECTURES)} are")
    given = [n for n in ("num_key_value_heads", "head_dim") if raw.get(n) is not None]
    wrong = [f"{n} {raw.get(n)!r}" for n in [*SIZES, *given] if not _is_whole(raw.get(n))]
    if wrong:
        raise ValueError(f"{list_names(wrong)} must be given as whole numbers, 1 or more")
    absurd = [f"{n} {raw[n]}" for n in [*SIZES, *given] if raw[n] > LARGEST.get(n, LARGEST_SIZE)]
    if absurd:
        raise ValueError(f"{list_names(absurd)} is more than any model has; is the file damaged?")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported; silu is")
    if raw.get("quantization_config"):
        raise ValueError("quantization_config is set; quantised weights are not supported")
    kinds = raw.get("layer_types")
    if kinds is None and _flag(raw, "use_sliding_window") and raw.get("sliding_window"):
        first = raw.get("max_window_layers", 28)
        if not _is_whole(first, least=0):
            raise ValueError(f"max_window_layers is {first!r}; a whole number is needed")
        kinds = ["sliding_attention"] * max(0, raw["num_hidden_layers"] - first)
    others = {*map(str, _sequence(kinds, "layer_types"))} - {"full_attention"}
    if others:
        raise ValueError(
            f"layers with {list_names(others)} are not supported; full_attention is "
            "(use_sliding_window false)"
        )


def _heads(raw: Mapping[str, Any]) -> tuple[int, int]:
    """Key heads and head size."""
    kind, heads, width = (raw[n] for n in ("model_type", "num_attention_heads", "hidden_size"))
    for name, assumed in ASSUMED[kind].items():
        if name not in raw:
            raise ValueError(
                f"{name} is absent, and transformers takes it for {assumed} in every {kind}; write "
                "the number that the weights have"
            )
    kv_heads, head_dim = raw.get("num_key_value_heads") or heads, raw.get("head_dim")
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}; write "
            "the numbers that the weights have"
        )
    if head_dim is None and (width % heads or kind == "qwen3"):
        raise ValueError(
            f"head_dim is not given, and hidden_size {width} / num_attention_heads {heads} cannot "
            "stand for it; write the size of a head that the weights have"
        )
    head_dim = head_dim or width // heads
    if head_dim % 2:
        raise ValueError(f"the size of a head is {head_dim}; rotary embedding needs an even one")
    return kv_heads, head_dim


def read_rope(
    raw: Mapping[str, Any],
) -> tuple[float, RopeScaling | LinearScaling | YarnScaling | None]:
    """theta and scaling, from ``rope_parameters`` (transformers 5) or ``rope_scaling`` (4).

    As in transformers (``convert_rope_params_to_dict``), a ``rope_scaling`` takes the place of the
    whole ``rope_parameters``, and settings inside override those of the top level. Raises
    ValueError if that would lose the theta of ``rope_parameters``.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(name), dict | None):
            raise ValueError(f"{name} is {raw[name]!r}; an object or null is needed")
    parameters, scaling = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    rope = scaling or parameters
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1
    untyped = kind == "default" and not {"rope_type", "type"} & rope.keys() and "factor" in rope
    nested = [name for name, value in rope.items() if isinstance(value, dict)]
    if kind not in ("default", *SCALINGS) or partial != 1 or nested or untyped:
        raise ValueError(
            f"rotary embedding {rope}, partial_rotary_factor {partial} is not supported; the types "
            f"default, {list_names(SCALINGS)}, the same in all layers and over whole heads, are"
        )
    lost = parameters.get("rope_theta")
    if scaling and lost is not None and scaling.get("rope_theta") is None:
        if raw.get("rope_theta") is None:
            raise ValueError(
                f"rope_scaling takes the place of rope_parameters and lacks its rope_theta {lost}; "
                "write rope_theta in rope_scaling too, or put all settings into rope_parameters"
            )
    theta = _positive(rope, "rope_theta", _positive(raw, "rope_theta", 10_000.0))
    return theta, None if kind == "default" else _scaling(kind, rope, raw, theta)


def _scaling(
    kind: str, rope: Mapping[str, Any], raw: Mapping[str, Any], theta: float
) -> RopeScaling | LinearScaling | YarnScaling:
    where = f" in a rotary embedding of type {kind}"
    factor = _positive(rope, "factor", where=where)
    if kind == "linear":
        return LinearScaling(factor)
    inside = rope.get("original_max_position_embeddings", raw["max_position_embeddings"])
    original = raw.get("original_max_position_embeddings", inside)
    if not _is_whole(original) or original > LARGEST_SIZE:
        raise ValueError(
            f"original_max_position_embeddings is {original!r}{where}; a whole number of at most "
            f"{LARGEST_SIZE} is needed"
        )
    if kind == "llama3":
        low, high = (_positive(rope, f"{n}_freq_factor", where=where) for n in ("low", "high"))
        if low >= high:
            raise ValueError(f"low_freq_factor {low} is not below high_freq_factor {high}{where}")
        return RopeScaling(factor, low, high, original)
    if theta <= 1:
        raise ValueError(f"rope_theta is {theta}{where}; a number above 1 is needed")
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        amplitude=_positive(rope, "attention_factor", _yarn_amplitude(rope, factor), where=where),
        beta_fast=_positive(rope, "beta_fast", 32.0, where=where),
        beta_slow=_positive(rope, "beta_slow", 1.0, where=where),
        truncate=rope.get("truncate") is None or _flag(rope, "truncate"),
    )


def _yarn_amplitude(rope: Mapping[str, Any], factor: float) -> float:
    """m(1) with m(s) = 0.1 s ln(factor) + 1, or m(mscale) / m(mscale_all_dim) if both are set
    (DeepSeek-V2's convention)."""

    def at(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return at(_positive(rope, "mscale")) / at(_positive(rope, "mscale_all_dim"))
    return at(1.0)


def _is_whole(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    """A setting that is off if it is absent. Raises ValueError for "false" and other strings."""
    value = raw.get(name)
    if not isinstance(value, bool | None):
        raise ValueError(f"{name} is {value!r}; true or false is needed, without quotes")
    return bool(value)


def _positive(
    raw: Mapping[str, Any], name: str, default: float | None = None, *, where: str = ""
) -> float:
    """A finite number above 0; ``default`` if it is absent or null."""
    value = raw.get(name)
    if value is None:
        value = default
    largest = sys.float_info.max  # an integer may be larger
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= largest:
        raise ValueError(f"{name} is {value!r}{where}; a number above 0 is needed")
    return float(value)


def _sequence(value: object, name: str) -> Iterable:
    if not isinstance(value, list | None):
        raise ValueError(f"{name} is {value!r}; a list or null is needed")
    return value or ()
