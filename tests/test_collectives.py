"""What devices exchange during an update, read from the compiled program."""

import dataclasses
import functools
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from basis_jax.config import LossSection, OptimSection
from basis_jax.model.decoder import param_axes, param_shapes
from basis_jax.model.lora import Lora
from basis_jax.model.sharding import make_mesh, named_tree, put_rows
from basis_jax.training import update
from basis_jax.training.gradient_sum import make_gradient_sum
from basis_jax.training.objective import policy_objective
from basis_jax.types import Batch

EXCHANGES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
LARGE_VOCABULARY = dataclasses.replace(tiny.TINY, vocab_size=4096, remat="full")


def computations(text):
    """{name: lines} of the computations of a compiled program."""
    found, name = {}, None
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = start[1]
        found.setdefault(name, []).append(line)
    return found


def called(line):
    keys = "body|condition|to_apply|calls|branch_computations|true_computation|false_computation"
    lists = re.findall(rf"(?:{keys})=\{{?((?:%[\w.\-]+(?:, )?)+)", line)
    return [name for names in lists for name in re.findall(r"%([\w.\-]+)", names)]


def exchanges(text):
    """(inside a loop, kind, numbers) of everything that devices exchange."""
    found = computations(text)
    lines = [line for group in found.values() for line in group]
    left, inside = [name for line in lines if " while(" in line for name in called(line)], set()
    while left:
        name = left.pop()
        if name not in inside:
            inside.add(name)
            left += [other for line in found[name] for other in called(line)]
    for name, group in found.items():
        for line in group:
            if made := re.search(rf"= (.*?) ({EXCHANGES})(?:-start)?\(", line):
                for sizes in re.findall(r"\w\[([\d,]+)\]", made[1]):
                    yield name in inside, made[2], math.prod(map(int, sizes.split(",")))


def compiled_update(model_config, mesh, *, rows, width, microbatches=1):
    optimizer = update.make_optimizer(OptimSection(), updates=9)
    loss = LossSection(logprob_chunk=8)
    update_params = update.make_update(
        model_config, optimizer, loss=loss, temperature=1.0, microbatch=rows
    )

    numbers = np.zeros((rows, width), np.float32)
    batch = Batch(
        tokens=numbers.astype(np.int32),
        completion_mask=numbers > 0,
        loss_weights=numbers,
        advantages=numbers[:, 0],
        old_logprobs=None,
        sampler_logprobs=numbers,
    )
    state = update.abstract_state(optimizer, {}, model_config=model_config, mesh=mesh)
    lower = jax.jit(update_params, donate_argnums=0).lower
    with jax.set_mesh(mesh):
        return lower(state, [put_rows(mesh, batch)] * microbatches).compile().as_text()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 1), (1, 2, 2), (2, 1, 2)])
def test_no_chunk_exchanges_the_output_weight_or_its_gradient(sizes):
    """The vocabulary is so large that nothing else that is exchanged comes near a quarter of it."""
    data, fsdp, tensor = sizes
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[: np.prod(sizes)])
    found = list(exchanges(compiled_update(LARGE_VOCABULARY, mesh, rows=4, width=32)))
    share = LARGE_VOCABULARY.vocab_size * LARGE_VOCABULARY.embed // (tensor * fsdp)
    assert [made for made in found if made[0]], "layers exchange their weights or sums in a loop"
    assert [made for made in found if made[0] and made[2] >= share] == []
    of_weight = [kind for inside, kind, numbers in found if numbers >= share]
    assert of_weight.count("all-gather") == (fsdp > 1)
    assert 1 <= len(of_weight) - of_weight.count("all-gather") <= 2  # tied: embedding and output


@pytest.mark.slow
def test_a_frozen_output_weight_has_no_gradient_to_exchange():
    """With adapters devices exchange the output weight once, and nothing else of its size."""
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    adapted = dataclasses.replace(LARGE_VOCABULARY, lora=Lora(rank=2, alpha=4.0))
    found = list(exchanges(compiled_update(adapted, mesh, rows=4, width=32)))
    share = LARGE_VOCABULARY.vocab_size * LARGE_VOCABULARY.embed // 4
    assert [kind for _, kind, numbers in found if numbers >= share] == ["all-gather"]


@pytest.mark.slow
def test_gradients_are_reduced_over_data_once_an_update_however_many_microbatches():
    """Beside a few numbers for the metrics, devices of ``data`` exchange the gradient, once."""
    mesh = make_mesh(data=2, fsdp=1, tensor=1, devices=jax.devices()[:2])
    sent = [
        list(exchanges(compiled_update(tiny.TINY, mesh, rows=4, width=16, microbatches=count)))
        for count in (1, 3)
    ]
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(param_shapes(tiny.TINY)))
    for found in sent:
        assert not any(inside for inside, _, _ in found)
        assert parameters <= sum(numbers for _, _, numbers in found) <= parameters + 100


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_partial_sums_of_groups_add_up_to_the_sum_of_one_device(sizes):
    data, fsdp, tensor = sizes
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[: math.prod(sizes)])
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 12, 8)
    mask = (np.arange(16)[None] >= 3) & (np.arange(16)[None] < 3 + lengths[:, None])
    batches = [
        Batch(
            tokens=rng.integers(3, 32, (8, 16)).astype(np.int32),
            completion_mask=mask,
            loss_weights=(mask / 50).astype(np.float32),
            advantages=rng.normal(size=8).astype(np.float32),
            old_logprobs=None,
            sampler_logprobs=np.full((8, 16), -3, np.float32),
            ais_alpha=jnp.float32(0.5),
        )
        for _ in range(2)
    ]
    objective = functools.partial(
        policy_objective,
        model_config=tiny.TINY,
        loss=LossSection(logprob_chunk=8, sampler_correction="ais"),
        temperature=1.0,
        microbatch=8,
    )
    gradient_sum = make_gradient_sum(objective, param_axes(tiny.TINY))
    params = tiny.params()
    wanted = jax.device_get(gradient_sum(params, None, batches))
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, named_tree(mesh, param_axes(tiny.TINY)))
        rows = [replace(put_rows(mesh, replace(b, ais_alpha=None)), ais_alpha=b.ais_alpha)
                for b in batches]  # fmt: skip
        found = gradient_sum(spread, None, rows)
    for gradient, parameter in zip(*map(jax.tree.leaves, (found[0], spread)), strict=True):
        assert gradient.sharding.is_equivalent_to(parameter.sharding, gradient.ndim)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6, rtol=2e-5), wanted, found)
