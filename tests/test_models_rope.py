"""Scaled rotary embeddings: the published formulas, in every place that computes with them."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from basis_jax.model import decoder, decoding
from basis_jax.model.rope import LinearScaling, YarnScaling
from basis_jax.weights import huggingface
from basis_jax.weights.config_json import parse

BASE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
QWEN_CARD = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
QWEN3_4B = BASE | {
    "model_type": "qwen3",
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
}


def yarn_by_hand(size, theta, *, factor, length, fast=32.0, slow=1.0):
    """Pair by pair in float64, as the authors' code does it (arXiv 2309.00071, section 3.2)."""

    def pair_of(turns):
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair_of(fast)), 0), min(math.ceil(pair_of(slow)), size - 1)
    found = []
    for i in range(size // 2):
        frequency = theta ** (-2 * i / size)
        interpolated = min(max((i - low) / (high - low), 0.0), 1.0)
        found.append(frequency / factor * interpolated + frequency * (1 - interpolated))
    return np.array(found), (low, high)


def test_yarn_of_qwens_model_card_has_the_published_frequencies_and_length():
    model_config = parse(QWEN3_4B | {"rope_scaling": QWEN_CARD})
    expected, (low, high) = yarn_by_hand(128, 1e6, factor=4.0, length=32768)
    assert 0 < low < high < 63, "kept, mixed and interpolated pairs"
    np.testing.assert_allclose(decoder.rope_frequencies(model_config), expected, rtol=2e-6)
    assert model_config.rope_scaling.amplitude == pytest.approx(0.1 * math.log(4) + 1)
    assert model_config.max_positions == 4 * 32768


def test_linear_scaling_divides_every_frequency():
    plain = parse(BASE)
    scaled = parse(BASE | {"rope_scaling": {"type": "linear", "factor": 2.5}})
    frequencies = decoder.rope_frequencies(plain)
    np.testing.assert_allclose(decoder.rope_frequencies(scaled), frequencies / 2.5, rtol=1e-6)
    assert scaled.max_positions == 128


@pytest.mark.parametrize(
    ("settings", "amplitude"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 0.5}, 0.5),
        ({"attention_factor": 0.5, "mscale": 3, "mscale_all_dim": 2}, 0.5),
        (
            {"mscale": 3, "mscale_all_dim": 2},
            (0.3 * math.log(4) + 1) / (0.2 * math.log(4) + 1),
        ),
        ({"mscale": 3}, 0.1 * math.log(4) + 1),
        ({"mscale": 3, "mscale_all_dim": 0}, 0.1 * math.log(4) + 1),
        ({"factor": 0.5}, 1.0),
    ],
)
def test_yarns_amplitude_is_that_of_transformers(settings, amplitude):
    scaling = parse(BASE | {"rope_parameters": QWEN_CARD | settings}).rope_scaling
    assert scaling.amplitude == pytest.approx(amplitude)


def test_the_original_length_is_that_of_transformers():
    """At the top level it wins, and without any it is max_position_embeddings."""
    bare = {"rope_type": "yarn", "factor": 4.0}
    for raw, length in (
        ({"rope_parameters": bare}, 128),
        ({"rope_parameters": QWEN_CARD}, 32768),
        ({"rope_parameters": QWEN_CARD, "original_max_position_embeddings": 64}, 64),
    ):
        assert parse(BASE | raw).rope_scaling.original_max_positions == length


def test_rope_scaling_takes_the_place_of_rope_parameters_whole():
    other = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e5}
    found = parse(BASE | {"rope_parameters": other, "rope_scaling": QWEN_CARD | {"rope_theta": 5}})
    assert found.rope_theta == 5 and isinstance(found.rope_scaling, YarnScaling)
    top = {"rope_theta": 6, "rope_parameters": other, "rope_scaling": QWEN_CARD}
    assert parse(BASE | top).rope_theta == 6
    for nothing in ({}, None):
        found = parse(BASE | {"rope_theta": 6, "rope_parameters": other, "rope_scaling": nothing})
        assert (found.rope_theta, found.rope_scaling) == (7e5, LinearScaling(2.0))


def test_a_rope_scaling_that_would_lose_the_theta_of_rope_parameters_is_refused():
    """As where the line of a model card is added to what transformers 5 wrote."""
    raw = BASE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    with pytest.raises(ValueError, match=r"lacks its rope_theta 1000000\.0; write rope_theta in"):
        parse(raw | {"rope_scaling": QWEN_CARD})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]"),
        ({"rope_scaling": {"factor": 2.0}}, "factor"),
        ({"rope_scaling": {"type": "yarn"}}, "factor is None in a rotary embedding of type yarn"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor is -1"),
        ({"rope_scaling": QWEN_CARD | {"original_max_position_embeddings": 1.5}}, "original_max"),
        ({"rope_scaling": QWEN_CARD | {"truncate": "false"}}, "truncate is 'false'"),
        ({"rope_scaling": QWEN_CARD | {"beta_fast": True}}, "beta_fast is True"),
        ({"rope_scaling": QWEN_CARD | {"attention_factor": 0}}, "attention_factor is 0"),
        ({"rope_scaling": QWEN_CARD, "rope_theta": 1}, "above 1"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"rope_scaling": {"rope_type": ["yarn"], "factor": 2}}, "yarn"),
        (
            {"rope_scaling": {"type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4}},
            "factor is None",
        ),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 2,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "not below",
        ),
    ],
)
def test_a_wrong_setting_is_named(settings, named):
    with pytest.raises(ValueError, match=named) as raised:
        parse(BASE | settings)
    assert "\n" not in str(raised.value)


def test_decoding_one_token_at_a_time_rotates_as_the_full_pass_does():
    scaling = YarnScaling(factor=4.0, original_max_positions=8, amplitude=1.3)
    model_config = dataclasses.replace(tiny.TINY, rope_scaling=scaling)
    params, tokens = tiny.random_params(model_config), tiny.tokens_of((2, 12))
    expected = np.asarray(tiny.next_token_logits(params, model_config, tokens))
    assert np.abs(expected - tiny.next_token_logits(params, tiny.TINY, tokens)).max() > 1e-2
    _, kept = jax.jit(decoder.forward, static_argnums=1, static_argnames="keep")(
        params, model_config, tokens[:, :11], keep=True
    )
    step = jax.jit(decoding.decode_step, static_argnums=1)
    logits, _ = step(
        decoding.decode_weights(params, model_config),
        model_config,
        jnp.asarray(tokens[:, 11]),
        jnp.full(2, 11, jnp.int32),
        decoding.filled_cache(kept, 12),
    )
    np.testing.assert_allclose(np.asarray(logits).T, expected[:, 11], atol=1e-5)


def test_described_scalings_are_read_back(tmp_path):
    yarn = parse(BASE | {"rope_scaling": QWEN_CARD | {"attention_factor": 1.7}}).rope_scaling
    for scaling in (LinearScaling(3.0), yarn):
        model_config = dataclasses.replace(
            tiny.TINY, rope_scaling=scaling, max_positions=4 * 32768, rope_theta=1e6
        )
        described = huggingface.describe(model_config)
        (tmp_path / "config.json").write_text(json.dumps(described))
        assert huggingface.read_model_config(tmp_path) == model_config
