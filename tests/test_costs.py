"""What costs.py says of parameters, FLOPs and memory is what the model and XLA say."""

import dataclasses
import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from basis_jax.config import (
    Config,
    LossSection,
    MeshSection,
    OptimSection,
    SamplingSection,
    TrainSection,
)
from basis_jax.evaluation.evaluate import open_evaluation
from basis_jax.model import costs, decoder, decoding, logprobs
from basis_jax.model.sharding import make_mesh
from basis_jax.opening import checks
from basis_jax.opening.checks import check_memory, device_memory, usable_memory
from basis_jax.sampling.decode import sample_with
from basis_jax.training import update
from basis_jax.training.session import open_session
from basis_jax.types import Batch, Prompts
from basis_jax.weights.known_models import KNOWN_MODELS

SMALL = dataclasses.replace(
    tiny.TINY, vocab_size=512, embed=64, layers=4, head_dim=16, mlp=192, max_positions=1024
)
SMOLLM2 = KNOWN_MODELS["HuggingFaceTB/SmolLM2-135M-Instruct"]
BAND = (0.75, 1.25)  # estimate / XLA's figure


def shape(size, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(size, dtype)


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@functools.cache
def compiled_update(model_config, rows, width, microbatch):
    optimizer = update.make_optimizer(OptimSection(), updates=9)
    update_params = update.make_update(
        model_config, optimizer, loss=LossSection(), temperature=1.0, microbatch=microbatch
    )
    state = update.abstract_state(optimizer, {}, model_config=model_config, mesh=one_device())
    numbers = np.zeros((microbatch, width), np.float32)
    batch = Batch(
        tokens=numbers.astype(np.int32),
        completion_mask=numbers > 0,
        loss_weights=numbers,
        advantages=numbers[:, 0],
        old_logprobs=None,
        sampler_logprobs=numbers,
    )
    micros = [batch] * (rows // microbatch)
    return jax.jit(update_params, donate_argnums=0).lower(state, micros).compile()


def compiled_sample(model_config, rows, width, new):
    zeros = np.zeros(rows, np.int32)
    return sample_with.lower(
        decoder.param_shapes(model_config),
        weight_shapes(model_config),
        Prompts(tokens=np.zeros((rows, width), np.int32), lengths=zeros, problem_ids=zeros),
        jax.random.split(jax.random.key(0), rows),
        model_config=model_config,
        sampling=SamplingSection(max_new_tokens=new),
        eos_ids=(0,),
    ).compile()


def weight_shapes(model_config):
    return jax.eval_shape(
        lambda params: decoding.decode_weights(params, model_config),
        decoder.param_shapes(model_config),
    )


def cache_shapes(model_config, rows, length):
    return jax.eval_shape(lambda: decoding.empty_cache(model_config, rows, length))


def held(compiled):
    """Bytes of arguments, results and what lies between, shared ones once."""
    found = compiled.memory_analysis()
    total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return total - found.alias_size_in_bytes


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    "model_config",
    [
        tiny.TINY,
        SMOLLM2,
        dataclasses.replace(SMALL, tied=False, qkv_bias=True, qk_norm=False),
        dataclasses.replace(SMALL, output_bias=True, mlp_bias=True),
    ],
)
def test_parameters_are_those_of_the_model(model_config):
    leaves = jax.tree.leaves(decoder.param_shapes(model_config))
    assert costs.parameters(model_config) == sum(leaf.size for leaf in leaves)
    assert costs.parameter_bytes(model_config, one_device()) == 4 * costs.parameters(model_config)


@pytest.mark.parametrize("context", [8, 1000])
def test_a_decode_steps_flops_are_those_xla_counts(context):
    """One layer: XLA counts the body of a loop once. At 1000 positions attention is the most."""
    one = dataclasses.replace(SMALL, layers=1)
    rows = 16

    def step(weights, tokens, positions, cache):
        return decoding.decode_step(weights, one, tokens, positions, cache)

    places = shape((rows,), jnp.int32)
    counted = flops(step, weight_shapes(one), places, places, cache_shapes(one, rows, context))
    said = costs.decode_step(one, rows=rows, context=context)
    assert BAND[0] < said.flops / counted < BAND[1]


def test_a_prefills_flops_are_those_xla_counts():
    """Short rows: XLA computes the attention that the mask then takes away, we do not count it."""
    one, rows, width = dataclasses.replace(SMALL, layers=1), 16, 16

    def first(params, tokens):
        hidden, _ = decoder.forward(params, one, tokens)
        return decoder.logits(params, one, hidden[:, -1])

    counted = flops(first, decoder.param_shapes(one), shape((rows, width), jnp.int32))
    assert BAND[0] < costs.prefill(one, rows=rows, width=width).flops / counted < BAND[1]


@pytest.mark.slow
def test_an_updates_flops_are_those_xla_counts(monkeypatch):
    monkeypatch.setattr(logprobs, "PIECES", 1)  # XLA counts a loop's body once
    one, rows, width = dataclasses.replace(SMALL, layers=1), 16, 16
    counted = compiled_update(one, rows, width, rows).cost_analysis()["flops"]
    said = costs.update(one, rows=rows, width=width).flops
    assert BAND[0] < said / counted < BAND[1]
    again = costs.update(dataclasses.replace(one, remat="full"), rows=rows, width=width).flops
    layer = costs.prefill(one, rows=rows, width=width).flops - 2 * rows * 512 * 64
    assert again - said == pytest.approx(layer)
    dots = costs.update(dataclasses.replace(one, remat="dots"), rows=rows, width=width).flops
    assert dots - said == 4 * 64 * rows * width * (width + 1) // 2  # scores and mixing once more


def test_a_decode_step_moves_weights_and_cache_once():
    half = dataclasses.replace(SMALL, compute_dtype="bfloat16")
    cache = jax.tree.leaves(cache_shapes(half, 16, 101))
    products = costs.layer_products(half) * 4 + 512 * 64
    assert costs.decode_step(half, rows=16, context=100).bytes == (
        2 * products + 2 * sum(x.size for x in cache) + 16 * 512 * 4
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "layers", "rows", "width", "least"),
    [("none", 4, 4, 128, BAND[0]), ("dots", 16, 4, 128, BAND[0]), ("full", 4, 8, 16, 0.9)],
)
def test_an_updates_memory_is_what_xla_plans(remat, layers, rows, width, least):
    """In one microbatch and in two: there is one gradient, the sum."""
    model_config = dataclasses.replace(SMALL, remat=remat, layers=layers)
    compiled = compiled_update(model_config, rows, width, 4)
    parts = costs.update_memory(model_config, one_device(), rows=4, width=width, chunk=512)
    assert least < sum(parts.values()) / held(compiled) < BAND[1]


@pytest.mark.slow
def test_samplings_memory_is_what_xla_plans():
    parts = costs.sampling_memory(SMALL, one_device(), slots=64, length=128, width=32)
    planned = held(compiled_sample(SMALL, 64, 32, 96))
    assert BAND[0] < sum(parts.values()) / planned < BAND[1]


def test_what_a_mesh_splits_is_divided():
    whole = one_device()
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    sizes = {"slots": 64, "length": 128, "width": 32}
    at_one = costs.sampling_memory(SMALL, whole, **sizes)
    at_four = costs.sampling_memory(SMALL, mesh, **sizes)
    assert at_four["key-value cache"] * 4 == at_one["key-value cache"]
    assert at_four["logits"] * 4 == at_one["logits"]
    shardings = update.abstract_state(
        update.make_optimizer(OptimSection(), updates=1), {}, model_config=SMALL, mesh=mesh
    ).params
    shares = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(shardings)]
    assert at_four["weights"] == sum(4 * math.prod(share) for share in shares)


def test_a_sampler_that_splits_the_weights_has_them_in_parts():
    """Four ways instead of one: a quarter of the copy and, of twice the rows, of all else."""
    mesh, sizes = make_mesh(data=1, fsdp=4), {"slots": 64, "length": 128, "width": 32}
    model_config = dataclasses.replace(SMALL, kv_heads=4)
    before = costs.sampling_memory(model_config, mesh, **sizes)
    after = costs.sampling_memory(model_config, mesh, **sizes, sample_tensor=4)
    copy = "weights laid out for decoding"
    assert after["weights"] == before["weights"]
    norms = 4 * 64 * 2 + 64 + 4 * 16 * 2  # of every device
    assert after[copy] - 4 * norms == (before[copy] - 4 * norms) / 4
    assert after["key-value cache"] == before["key-value cache"]
    assert after["logits"] == before["logits"]


@pytest.mark.parametrize(
    ("ways", "sentence"),
    [
        (3, "mesh.sample_tensor = 3 does not divide the 4 devices"),
        (4, r"key heads = 2 does not divide over 4 devices \(mesh.sample_tensor\)"),
    ],
)
def test_a_sampler_that_cannot_be_split_so_is_refused(ways, sentence):
    config = Config(run_dir="", mesh=MeshSection(fsdp=4, sample_tensor=ways))
    with pytest.raises(ValueError, match=sentence):
        checks.check_fit(config, tiny.TINY, make_mesh(data=1, fsdp=4))
    checks.check_fit(
        dataclasses.replace(config, mesh=MeshSection(fsdp=4, sample_tensor=2)),
        tiny.TINY,
        make_mesh(data=1, fsdp=4),
    )


LARGE = Config(
    run_dir="",
    sampling=SamplingSection(max_new_tokens=4096),
    train=TrainSection(sample_rollouts=512, microbatch_rollouts=64),
)


def with_memory(monkeypatch, size):
    monkeypatch.setattr("basis_jax.opening.checks.device_memory", lambda devices: size)


def test_slots_and_lengths_that_do_not_fit_are_refused_with_the_bytes(monkeypatch):
    with_memory(monkeypatch, 24 * 10**9)
    sentence = (
        r"sampling 512 rollouts of 4160 tokens at once needs 99.6 GB a device \(key-value "
        r"cache 98\.1 GB, .*there are 24 GB; lower train\.sample_rollouts"
    )
    with pytest.raises(ValueError, match=sentence):
        check_memory(LARGE, SMOLLM2, one_device(), prompt_width=64, rows=512)
    half = dataclasses.replace(LARGE.sampling, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"key-value cache 49\.1 GB"):
        config = dataclasses.replace(LARGE, sampling=half)
        check_memory(config, SMOLLM2, one_device(), prompt_width=64, rows=512)
    check_memory(LARGE, SMOLLM2, one_device(), prompt_width=64, rows=32)  # no more than there are
    check_memory(LARGE, SMOLLM2, make_mesh(fsdp=-1, data=1), prompt_width=64, rows=128)


@pytest.mark.parametrize("opened", [open_session, open_evaluation])
def test_a_session_says_so_before_it_reads_weights(monkeypatch, opened):
    with_memory(monkeypatch, 10**6)
    with pytest.raises(ValueError, match="needs .* a device"):
        with opened(Config(run_dir=""), report=lambda text: None):
            pass


def check_training(config, model_config):
    check_memory(config, model_config, one_device(), prompt_width=64, rows=4, training=True)


def test_an_update_that_does_not_fit_is_refused_with_the_bytes(monkeypatch):
    with_memory(monkeypatch, 24 * 10**9)
    small = dataclasses.replace(LARGE, train=TrainSection(sample_rollouts=4, microbatch_rollouts=4))
    with pytest.raises(ValueError, match=r"microbatches of 4 rollouts of 4160 tokens .*activation"):
        check_training(small, SMOLLM2)
    remat = dataclasses.replace(SMOLLM2, remat="full")
    check_training(small, remat)
    with_memory(monkeypatch, 4 * 540 * 10**6)  # weights, moments, gradients: 4 x 538 MB
    with pytest.raises(ValueError, match="weights 0.538 GB"):
        check_training(small, remat)


def silent(platform, stats=None):
    return SimpleNamespace(memory_stats=lambda: stats, platform=platform)


def test_a_devices_memory_is_what_it_says_or_its_share_of_the_machine():
    assert device_memory([silent("cpu", {"bytes_limit": 7})] * 2) == 7
    assert 10**8 < device_memory([silent("cpu")] * 4) == device_memory([silent("cpu")]) // 4


FRACTION, OLD_FRACTION = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
PREALLOCATE, ALLOCATOR = "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR"


@pytest.mark.parametrize(
    "environment, usable",
    [
        ({}, 60),
        ({FRACTION: ".9"}, 72),
        ({OLD_FRACTION: "0.5"}, 40),
        ({FRACTION: "", OLD_FRACTION: ""}, 60),
        ({PREALLOCATE: "false"}, 60),  # the limit of JAX's allocator holds without it too
        ({PREALLOCATE: "false", FRACTION: ".9"}, 72),
        ({ALLOCATOR: "platform"}, 80),
        ({ALLOCATOR: "platform", FRACTION: ".9"}, 80),
        ({ALLOCATOR: "bfc"}, 60),
    ],
)
def test_jax_may_use_a_share_of_a_gpu(monkeypatch, environment, usable):
    """75 % unless the environment says otherwise, and once: a reported limit has it inside."""
    assert usable_memory(80 * 10**9, environment) == usable * 10**9
    for name in (FRACTION, OLD_FRACTION, PREALLOCATE, ALLOCATOR):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert device_memory([silent("gpu", {"bytes_limit": usable})]) == usable
    monkeypatch.setattr("basis_jax.opening.checks.gpu_bytes", lambda: 80 * 10**9)
    assert device_memory([silent("gpu")]) == usable * 10**9


def test_a_gpu_that_tells_nothing_refuses_nothing(monkeypatch):
    monkeypatch.setattr("basis_jax.opening.checks.gpu_bytes", lambda: 0)
    assert device_memory([silent("gpu")]) > 10**15


def test_what_is_too_large_for_a_gpu_is_told_of_the_share(monkeypatch):
    monkeypatch.delenv(FRACTION, raising=False)
    monkeypatch.delenv(OLD_FRACTION, raising=False)
    monkeypatch.setattr("basis_jax.opening.checks.platform_of", lambda mesh: "gpu")
    with_memory(monkeypatch, 6 * 10**9)
    sentence = re.escape(f"6 GB for JAX (75% of the GPU; {FRACTION}=0.95 raises it); lower train")
    with pytest.raises(ValueError, match=sentence):
        check_memory(LARGE, SMOLLM2, one_device(), prompt_width=64, rows=512)
