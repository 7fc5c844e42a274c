"""The sampler: same distribution as the trainer, noise of its own for every rollout."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from basis_jax.config import SamplingSection
from basis_jax.masked import completion_mask
from basis_jax.model import decoder
from basis_jax.model.decoding import decode_weights
from basis_jax.model.sharding import make_mesh, named, named_tree, put_rows, regrouped
from basis_jax.opening.checks import check_trainable
from basis_jax.runs.compiles import count_compiles
from basis_jax.sampling import places, refill
from basis_jax.sampling.decode import sample
from basis_jax.sampling.draw import draw, pick, row_keys, truncate
from basis_jax.sampling.refill import sample_rows

SAMPLING = SamplingSection(max_new_tokens=9)


def keys_for(prompts, *, seed=0, stream="train", step=0, sample_index=0):
    samples = jnp.full(prompts.lengths.shape, sample_index, jnp.int32)
    return row_keys(seed, stream, step, problem_ids=prompts.problem_ids, samples=samples)


def run(prompts, *, sampling=SAMPLING, eos_ids=(1, 2), model_config=tiny.TINY, **noise):
    return sample(
        tiny.params(model_config),
        model_config,
        prompts,
        sampling=sampling,
        eos_ids=eos_ids,
        keys=keys_for(prompts, **noise),
    )


def run_on(mesh, prompts, *, sampling=SAMPLING, rows_at_once, on_ended=None):
    with jax.set_mesh(mesh):
        return sample_rows(
            jax.device_put(tiny.params(), named_tree(mesh, decoder.param_axes(tiny.TINY))),
            tiny.TINY,
            prompts,
            sampling=sampling,
            eos_ids=(1, 2),
            keys=keys_for(prompts),
            mesh=mesh,
            rows_at_once=rows_at_once,
            on_ended=on_ended,
        )


def completions(rollouts):
    return [
        tuple(np.asarray(row[p : p + n]).tolist())
        for row, p, n in zip(
            rollouts.tokens, rollouts.prompt_lengths, rollouts.completion_lengths, strict=True
        )
    ]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_are_those_of_the_trainer(temperature):
    sampling = dataclasses.replace(SAMPLING, temperature=temperature)
    rollouts = run(tiny.prompts(), sampling=sampling)
    scored, _ = tiny.token_logprobs(
        tiny.params(), tiny.TINY, rollouts.tokens, temperature=temperature
    )
    mask = completion_mask(
        rollouts.prompt_lengths, rollouts.completion_lengths, rollouts.tokens.shape[1]
    )
    np.testing.assert_allclose(rollouts.sampler_logprobs, jnp.where(mask, scored, 0), atol=1e-4)
    assert float(jnp.min(rollouts.sampler_logprobs)) < -0.5  # not the trivial distribution


def test_greedy_cached_decode_equals_full_recompute():
    prompts = tiny.prompts()
    rollouts = run(prompts, sampling=dataclasses.replace(SAMPLING, temperature=0.0), eos_ids=(1,))
    width = rollouts.tokens.shape[1]
    for row, found in enumerate(completions(rollouts)):
        start = int(prompts.lengths[row])
        tokens = prompts.tokens[row, :start].tolist()
        while len(tokens) < start + SAMPLING.max_new_tokens and 1 not in tokens[start:]:
            padded = jnp.array([tokens + [0] * (width - len(tokens))])
            logits = tiny.next_token_logits(tiny.params(), tiny.TINY, padded)
            tokens.append(int(np.argmax(logits[0, len(tokens) - 1])))
        assert found == tuple(tokens[start:])


@pytest.mark.slow
def test_frequencies_are_the_models_probabilities():
    """20,000 first tokens against the softmax: chi-square below its 1 - 1e-6 quantile (df < 32)."""
    prompts = tiny.prompts(rows=1)
    many = jax.tree.map(lambda x: jnp.repeat(x, 20_000, axis=0), prompts)
    many = dataclasses.replace(many, problem_ids=jnp.arange(20_000, dtype=jnp.int32))
    rollouts = run(many, sampling=dataclasses.replace(SAMPLING, max_new_tokens=1))
    first = rollouts.tokens[:, int(prompts.lengths[0])]
    counts = np.bincount(np.asarray(first), minlength=tiny.TINY.vocab_size)
    logits = tiny.next_token_logits(tiny.params(), tiny.TINY, prompts.tokens)[0, -1]
    expected = 20_000 * np.asarray(jax.nn.softmax(logits), np.float64)
    large = expected >= 5
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    assert np.sum((observed - expected) ** 2 / np.maximum(expected, 1.0)) < 80
    assert large.sum() >= 5


def test_a_vocabulary_of_several_blocks_is_drawn_from_as_it_says():
    """20,000 draws from 300 tokens of which a third has no probability, the last block not full;
    chi-square below its 1 - 1e-6 quantile (df <= 199)."""
    random = np.random.default_rng(0)
    logits = np.where(np.arange(300) % 3 == 1, -np.inf, random.normal(0, 2, 300))
    rows = jnp.asarray(np.repeat(logits[:, None], 20_000, axis=1), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)
    tokens, logprobs, _ = jax.jit(draw, static_argnums=2)(rows, keys, SAMPLING)
    probability = np.exp(logits - np.log(np.sum(np.exp(logits))))
    np.testing.assert_allclose(np.exp(logprobs), probability[np.asarray(tokens)], rtol=1e-4)
    counts, expected = np.bincount(tokens, minlength=300), 20_000 * probability
    assert not counts[1::3].any() and counts[256:].sum() > 1000
    large = expected >= 5
    counts = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    assert np.sum((counts - expected) ** 2 / expected) < 310 and 80 < large.sum() < 200


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("sizes", [(1, 1, 4), (2, 1, 2)])
def test_devices_that_share_the_vocabulary_draw_what_one_draws(sizes, temperature):
    """4,096 rows of 1,000 tokens, which are no whole blocks on each device: every token equal."""
    sampling = dataclasses.replace(SAMPLING, temperature=temperature)
    logits = np.random.default_rng(0).normal(0, 2, (1000, 4096)).astype(np.float32)
    logits[[3, 700]] = logits.max(axis=0) + 1  # two likeliest tokens, on two devices
    keys = jax.random.split(jax.random.key(0), 4096)
    one = jax.jit(draw, static_argnums=2)(logits, keys, sampling)
    mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    with jax.set_mesh(mesh):
        split = jax.device_put(logits, named(mesh, ("vocab", "batch")))
        shared = jax.jit(draw, static_argnums=2)(split, keys, sampling)
    np.testing.assert_array_equal(shared.tokens, one.tokens)
    found = set(np.asarray(one.tokens).tolist())
    assert found == {3} if temperature == 0 else len(found) > 500
    np.testing.assert_allclose(shared.logprobs, one.logprobs, atol=1e-5)
    np.testing.assert_allclose(shared.score_norms, one.score_norms, atol=1e-5)


@pytest.mark.slow
def test_no_token_moves_the_logits_of_a_vocabulary():
    """Devices exchange one block of logits a row at a token: less than a third of what one has."""
    model_config = dataclasses.replace(tiny.TINY, vocab_size=1000)
    mesh = make_mesh(data=2, tensor=2)
    axes = named_tree(mesh, decoder.param_axes(model_config))
    with jax.set_mesh(mesh):
        weights = decode_weights(jax.device_put(tiny.params(model_config), axes), model_config)
        assert weights.output.shape == (1024, 32)
        slots = refill.empty_slots(model_config, rows=64, length=96, cache_length=64)
        fixed = {"model_config": model_config, "sampling": SAMPLING, "eos_ids": (1,)}
        text = refill.advance.lower(weights, slots, np.int32(0), **fixed).compile().as_text()
    moved = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-|collective-|reduce-)[\w-]+\(", text)
    sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in moved]
    assert sizes and max(sizes) <= 32 * 128 < 32 * 512 / 3


@pytest.mark.slow
@pytest.mark.parametrize(("new", "scanned"), [(9, False), (40, False), (9, True), (40, True)])
def test_the_sampler_may_split_the_weights_otherwise_than_the_trainer(new, scanned):
    """Parameters over four devices, decoded over two pairs: the same tokens, batch by batch and in
    refilled slots; layers unrolled and scanned."""
    model_config = dataclasses.replace(tiny.TINY, scan_decode=scanned)
    prompts, limit = long_prompts(rows=12), SamplingSection(max_new_tokens=new)
    expected = run(prompts, sampling=limit)
    mesh = make_mesh(data=1, fsdp=4)
    axes = named_tree(mesh, decoder.param_axes(tiny.TINY))
    pairs = regrouped(mesh, 2)
    assert dict(pairs.shape) == {"data": 2, "fsdp": 1, "tensor": 2}
    assert regrouped(mesh, 1) is mesh is regrouped(mesh, 0)
    with jax.set_mesh(mesh):
        params = jax.device_put(tiny.params(), axes)
        rollouts = sample_rows(
            params,
            model_config,
            prompts,
            sampling=limit,
            eos_ids=(1, 2),
            keys=keys_for(prompts),
            mesh=pairs,
            rows_at_once=8,
        )
    with jax.set_mesh(pairs):
        layers = decode_weights(params, model_config).layers
    part = (layers if scanned else layers[0])["down_proj"].addressable_shards[0].data
    assert part.shape == ((2, 24, 32) if scanned else (32, 24))
    np.testing.assert_array_equal(rollouts.tokens, expected.tokens)
    np.testing.assert_allclose(rollouts.sampler_logprobs, expected.sampler_logprobs, atol=1e-5)


def test_what_has_no_weight_is_not_picked_at_either_end():
    weights = jnp.array([[0.0, 2.0, 0.0, 6.0, 0.0]] * 4)
    noise = jnp.array([0.0, 0.2499, 0.25, 1 - 2.0**-24], jnp.float32)
    assert pick(weights, noise).tolist() == [1, 1, 3, 3]
    assert pick(jnp.array([[0.0, 0.0, 1e-30]]), noise[:1]).tolist() == [2]


def test_noise_differs_between_steps_samples_streams_and_seeds():
    prompts = tiny.prompts()
    draws = [
        completions(run(prompts)),
        completions(run(prompts, step=1)),
        completions(run(prompts, sample_index=1)),
        completions(run(prompts, stream="evaluate")),
        completions(run(prompts, seed=1)),
    ]
    assert completions(run(prompts)) == draws[0]
    assert all(a != b for i, a in enumerate(draws) for b in draws[:i])


def test_noise_differs_between_problems_with_the_same_prompt():
    one = tiny.prompts(rows=1)
    twice = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), one)
    twice = dataclasses.replace(twice, problem_ids=jnp.array([4, 5], jnp.int32))
    first, second = completions(run(twice))
    assert first != second


@pytest.mark.slow
def test_draws_do_not_depend_on_order_batch_split_or_devices():
    prompts = tiny.prompts(rows=8)
    expected = completions(run(prompts))
    order = jnp.array([3, 1, 0, 2, 7, 6, 5, 4])
    permuted = jax.tree.map(lambda x: x[order], prompts)
    assert completions(run(permuted)) == [expected[i] for i in order.tolist()]
    for sizes, rows_at_once in (((1, 1, 1), 3), ((1, 2, 2), 4)):
        devices = jax.devices()[: math.prod(sizes)]
        mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2], devices=devices)
        rollouts = run_on(mesh, prompts, rows_at_once=rows_at_once)
        assert completions(rollouts) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("size", "tensor"), [(3, 1), (40, 1), (32, 2)])
def test_refilled_slots_give_the_rollouts_of_one_batch(size, tensor):
    """150 rows of 1 to 60 tokens, mean 16: the slots are refilled, then halved (40 -> 20)."""
    prompts, limit = tiny.prompts(rows=150, width=40), SamplingSection(max_new_tokens=60)
    expected = run(prompts, sampling=limit)
    lengths = np.asarray(expected.completion_lengths)
    assert lengths.max() > 3 * lengths.mean() and not expected.terminated.all()
    mesh = make_mesh(data=1, fsdp=tensor, tensor=tensor, devices=jax.devices()[: tensor**2])
    with count_compiles() as compiled:
        rollouts = run_on(mesh, prompts, sampling=limit, rows_at_once=size)
    for name in ("tokens", "prompt_lengths", "completion_lengths", "terminated", "problem_ids"):
        np.testing.assert_array_equal(getattr(rollouts, name), getattr(expected, name))
    np.testing.assert_allclose(rollouts.sampler_logprobs, expected.sampler_logprobs, atol=1e-5)
    assert compiled.take()["compile/programs"] < 50  # the small ones around admit and advance too


def long_prompts(rows=20):
    """Prompts that begin with the same 40 tokens."""
    prompts = tiny.prompts(rows=rows, width=50)
    tokens = jnp.where(jnp.arange(50)[None] < 40, prompts.tokens[:1], prompts.tokens)
    lengths = jnp.maximum(prompts.lengths, 41 + jnp.arange(rows, dtype=jnp.int32) % 3)
    return dataclasses.replace(prompts, tokens=tokens, lengths=lengths)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 2)])
def test_what_all_prompts_begin_with_is_read_once_and_changes_nothing(sizes, monkeypatch):
    prompts, limit = long_prompts(), SamplingSection(max_new_tokens=40)
    mesh = make_mesh(
        data=sizes[0], fsdp=sizes[1], tensor=sizes[2], devices=jax.devices()[: math.prod(sizes)]
    )
    assert refill.shared_prefix(jax.tree.map(np.asarray, prompts)) == 32
    assert refill.shared_prefix(jax.tree.map(np.asarray, tiny.prompts())) == 0
    read = []
    whole = refill.read_prefix
    monkeypatch.setattr(refill, "read_prefix", lambda *a, **k: read.append(1) or whole(*a, **k))
    shared = run_on(mesh, prompts, sampling=limit, rows_at_once=8)
    assert len(read) == 1
    expected = run(prompts, sampling=limit)
    np.testing.assert_array_equal(shared.tokens, expected.tokens)
    np.testing.assert_allclose(shared.sampler_logprobs, expected.sampler_logprobs, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", ["alike", "different"])
def test_slots_of_a_mesh_that_rows_do_not_divide_into(prompts):
    """10 rows in 6 slots on 4 devices, so 8; and fewer rows than devices. All prompts the same too:
    what they share is all but the last token, in multiples of 32."""
    many = tiny.prompts(rows=10, width=40)
    if prompts == "alike":
        same = {"tokens": many.tokens[:1], "lengths": many.lengths[:1]}
        same = {name: jnp.repeat(x, 10, axis=0) for name, x in same.items()}
        many = dataclasses.replace(many, **same)
        assert refill.shared_prefix(jax.tree.map(np.asarray, many)) == 32
    limit, mesh = SamplingSection(max_new_tokens=40), make_mesh(data=4, devices=jax.devices()[:4])
    expected = completions(run(many, sampling=limit))
    assert completions(run_on(mesh, many, sampling=limit, rows_at_once=6)) == expected
    three = jax.tree.map(lambda x: x[:3], many)
    assert completions(run_on(mesh, three, sampling=limit, rows_at_once=6)) == expected[:3]


def test_every_device_prefills_and_halves_its_own_slots():
    """Free slots are taken device by device in turn, a quarter of all at once, a row once."""
    free = places.round_robin(np.array([0, 1, 2, 5, 64, 70, 127]), 64)
    assert free.tolist() == [0, 64, 1, 70, 2, 127, 5]
    rows = np.arange(100, 100 + free.size)
    placed = {}
    for index, into in places.prefill_groups(rows, free, 128, 2):
        assert into.shape in ((2, 8), (2, 16)) and index.shape == (into.size,)
        for device, local, row in zip(
            np.repeat([0, 1], into.shape[1]), into.ravel(), index, strict=True
        ):
            if local < 64:
                assert row not in placed
                placed[int(row)] = int(device * 64 + local)
    assert placed == dict(zip(rows.tolist(), free.tolist(), strict=True))
    everything = np.arange(128)
    calls = list(places.prefill_groups(everything, places.round_robin(everything, 64), 128, 2))
    assert [into.shape for _, into in calls] == [(2, 16)] * 4
    assert not list(places.prefill_groups(everything[:0], free[:0], 128, 2))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 1, 2)])
def test_caches_stay_where_they_are(sizes):
    """No program of refilling gathers keys or values: what every device holds of a layer."""
    mesh = make_mesh(
        data=sizes[0], fsdp=1, tensor=sizes[2], devices=jax.devices()[: math.prod(sizes)]
    )
    with jax.set_mesh(mesh):
        params = jax.device_put(tiny.params(), named_tree(mesh, decoder.param_axes(tiny.TINY)))
        slots = refill.empty_slots(tiny.TINY, rows=64, length=96, cache_length=64)
        prompts = put_rows(mesh, jax.tree.map(np.asarray, tiny.prompts(rows=16)))
        into = np.arange(16, dtype=np.int32).reshape(sizes[0], -1)
        fixed = {"model_config": tiny.TINY, "sampling": SAMPLING}
        keys, weights = keys_for(tiny.prompts(rows=16)), decode_weights(params, tiny.TINY)
        programs = [
            refill.admit.lower(
                params, weights, slots, prompts, keys, into=into, prefix=None, **fixed
            ),
            refill.advance.lower(weights, slots, np.int32(0), eos_ids=(1,), **fixed),
            refill.select_slots.lower(slots, np.zeros((sizes[0], 32 // sizes[0]), np.int32)),
        ]
        for program in programs:
            text = program.compile().as_text()
            moved = re.findall(r"= (\w+)\[([\d,]*)\]\S* (?:all-gather|all-to-all)\(", text)
            assert all(len(shape.split(",")) < 3 for _, shape in moved), moved


@pytest.mark.slow
@pytest.mark.parametrize("new", [9, 40])
def test_rows_are_handed_on_as_they_end(new):
    """Each once and complete, before the last of them is there."""
    prompts, limit = tiny.prompts(rows=20), SamplingSection(max_new_tokens=new)
    parts = []

    def ended(found, rows):
        parts.append((rows, found.tokens[rows].copy(), found.completion_lengths[rows].copy()))

    mesh = make_mesh(devices=jax.devices()[:1])
    rollouts = run_on(mesh, prompts, sampling=limit, rows_at_once=8, on_ended=ended)
    rows = np.concatenate([part[0] for part in parts])
    assert sorted(rows.tolist()) == list(range(20)) and len(parts) > 2
    for numbers, tokens, lengths in parts:
        np.testing.assert_array_equal(rollouts.tokens[numbers], tokens)
        np.testing.assert_array_equal(rollouts.completion_lengths[numbers], lengths)


@pytest.mark.slow
def test_rollouts_may_be_decoded_in_another_dtype_than_the_trainers():
    sampling = dataclasses.replace(SAMPLING, dtype="bfloat16")
    mesh = make_mesh(devices=jax.devices()[:1])
    rollouts = run_on(mesh, tiny.prompts(), sampling=sampling, rows_at_once=8)
    scored, _ = tiny.token_logprobs(tiny.params(), tiny.TINY, jnp.asarray(rollouts.tokens))
    found = rollouts.sampler_logprobs
    gap = np.abs(found - scored)[found != 0]
    assert 1e-4 < gap.mean() < 0.1


def test_halved_slots_stay_split_over_the_devices():
    mesh = make_mesh(data=1, fsdp=4, tensor=1, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        slots = refill.empty_slots(tiny.TINY, rows=32, length=8, cache_length=8)
        halved = refill.select_slots(slots, np.arange(16).reshape(4, 4) % 8)
    for leaf in jax.tree.leaves(halved):
        assert leaf.addressable_shards[0].data.shape[0] == 4


def test_rows_end_with_their_first_eos_or_at_the_limit():
    rollouts = run(tiny.prompts(rows=64), eos_ids=(5, 6, 7))
    ended = 0
    for tokens, terminated in zip(completions(rollouts), rollouts.terminated, strict=True):
        stops = [t for t in tokens if t in (5, 6, 7)]
        if terminated:
            assert len(stops) == 1 and tokens[-1] in (5, 6, 7)
            ended += 1
        else:
            assert not stops and len(tokens) == SAMPLING.max_new_tokens
    assert 0 < ended < 64
    assert {len(t) for t in completions(rollouts)} > {1}  # EOS first among them


@pytest.mark.slow
def test_what_follows_a_row_is_zero_and_the_prompt_is_kept():
    prompts = tiny.prompts(rows=16)
    rollouts = run(prompts, eos_ids=tuple(range(3, 16)))
    for row in range(16):
        start, length = int(prompts.lengths[row]), int(rollouts.completion_lengths[row])
        np.testing.assert_array_equal(rollouts.tokens[row, :start], prompts.tokens[row, :start])
        assert not rollouts.tokens[row, start + length :].any()
        assert not rollouts.sampler_logprobs[row, start + length :].any()


def test_padding_behind_a_prompt_is_never_read():
    prompts = tiny.prompts()
    inside = jnp.arange(prompts.tokens.shape[1])[None] < prompts.lengths[:, None]
    other = dataclasses.replace(prompts, tokens=jnp.where(inside, prompts.tokens, 17))
    np.testing.assert_array_equal(run(prompts).tokens, run(other).tokens)


def test_top_k_and_top_p_keep_the_likeliest():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
    kept = lambda **options: jnp.isfinite(truncate(logits, **options))[0].tolist()  # noqa: E731
    assert kept(top_k=2, top_p=1.0) == [False, True, False, True]
    assert kept(top_k=0, top_p=0.69) == [False, True, False, True]
    assert kept(top_k=0, top_p=0.71) == [False, True, True, True]
    assert kept(top_k=0, top_p=0.0001) == [False, True, False, False]


@pytest.mark.parametrize("option", [{"top_p": 0.9}, {"top_k": 5}, {"temperature": 0.0}])
def test_truncating_or_greedy_samplers_are_refused_for_training(option):
    with pytest.raises(ValueError, match="training|full softmax"):
        check_trainable(dataclasses.replace(SAMPLING, **option))


@pytest.mark.parametrize("scanned", [False, True])
def test_a_growing_cache_holds_one_array_twice_at_most(scanned):
    """Each old array is deleted before the next one is resized; what it held is kept."""
    model_config = dataclasses.replace(tiny.TINY, scan_decode=scanned)
    slots = refill.empty_slots(model_config, rows=4, length=16, cache_length=8)
    slots = dataclasses.replace(slots, cache=jax.tree.map(lambda x: x + 1, slots.cache))
    old = jax.tree.leaves(slots.cache)
    size = old[0].size
    grown = refill.resize_cache(slots, cache_length=16)
    assert grown.cache.length == 16 and all(x.is_deleted() for x in old)
    assert [float(x.sum()) for x in jax.tree.leaves(grown.cache)] == [size] * len(old)
    back = refill.resize_cache(grown, cache_length=8)
    assert all(np.all(np.asarray(x) == 1) for x in jax.tree.leaves(back.cache))
