"""What devices exchange during an update, read from the compiled program."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
import tiny

from basis_jax.config import LossSection, OptimSection
from basis_jax.model.sharding import make_mesh, put_rows
from basis_jax.training import update
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


def compiled_update(model_config, mesh, *, rows, width):
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
        return lower(state, [put_rows(mesh, batch)]).compile().as_text()


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
