"""Adapters: the full model's gradient in their directions, nothing changed at the start, merged as
good as separate, checkpoints and exports of adapters alone."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from whole_runs import final_arrays, repeatable, small

from basis_jax import command_line
from basis_jax.commands import convert, evaluate, generate
from basis_jax.config import (
    CheckpointSection,
    Config,
    LossSection,
    ModelSection,
    OptimSection,
    SamplingSection,
)
from basis_jax.model import costs, decoder, decoding, lora, traffic
from basis_jax.model.lora import TARGETS, Lora
from basis_jax.model.sharding import abstract_mesh, make_mesh, named_tree, regrouped
from basis_jax.opening import checks
from basis_jax.opening.rollout_setup import adapters_of
from basis_jax.runs import checkpoint
from basis_jax.runs.compiles import count_compiles
from basis_jax.runs.metrics import read_metrics
from basis_jax.sampling.refill import sample_rows
from basis_jax.training import loop
from basis_jax.training.loop import train
from basis_jax.training.update import abstract_state, make_optimizer, make_state, make_update
from basis_jax.types import Batch, TrainState
from basis_jax.weights import adapters, huggingface, trained
from basis_jax.weights.known_models import KNOWN_MODELS

LORA = Lora(rank=3, alpha=6.0)


def with_lora(model_config, **changes):
    return dataclasses.replace(model_config, lora=dataclasses.replace(LORA, **changes))


def start(model_config, seed=0):
    shapes = lora.trained(decoder.param_shapes(model_config))
    return jax.jit(lambda key: lora.start(shapes, key))(jax.random.key(seed))


def learnt(model_config, seed=0):
    """Adapters of which neither A nor B is 0."""
    random = np.random.default_rng(seed)
    shapes = lora.trained(decoder.param_shapes(model_config))
    return jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.2, x.shape), jnp.float32), shapes)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_before_the_first_step_the_policy_is_the_base_model_bit_for_bit(dtype):
    """Its log-probabilities, with weights kept in the compute dtype, and what it decodes with."""
    plain = dataclasses.replace(tiny.TINY, compute_dtype=dtype)
    config = with_lora(plain, base_dtype=dtype)
    shapes = lora.frozen(decoder.param_shapes(config))
    base = jax.tree.map(lambda x, like: x.astype(like.dtype), tiny.params(), shapes)
    policy = lora.whole(base, start(config))
    tokens = jnp.asarray(tiny.tokens_of((4, 9)))
    found = tiny.token_logprobs(policy, config, tokens)
    assert_equal(found, tiny.token_logprobs(tiny.params(), plain, tokens))
    weights = decoding.decode_weights(policy, config)
    assert_equal(weights, decoding.decode_weights(tiny.params(), plain))
    assert {str(x.dtype) for x in jax.tree.leaves(shapes)} == {"float32", dtype}


def test_the_start_is_a_function_of_seed_target_and_layer_alone():
    few = with_lora(tiny.TINY, targets=("o_proj", "up_proj"))
    deep = with_lora(dataclasses.replace(tiny.TINY, layers=3))
    found, others = start(few)["layers"], start(deep)["layers"]
    assert found.keys() == {"o_proj_a", "o_proj_b", "up_proj_a", "up_proj_b"}
    for name, value in found.items():
        assert_equal(value, others[name][:2])
        assert (jnp.ptp(value) == 0) == name.endswith("_b")
    drawn = [v for k, v in others.items() if k.endswith("_a")]
    first = [float(layer.ravel()[0]) for v in drawn for layer in v]  # of every target and layer
    assert len(set(first)) == len(first) == 3 * len(TARGETS)
    assert not np.array_equal(start(few, seed=1)["layers"]["o_proj_a"], found["o_proj_a"])
    bound = 1 / np.sqrt(tiny.TINY.embed)  # of up_proj's inputs; 192 draws reach 0.9 of it but for
    assert 0.9 * bound < float(jnp.abs(found["up_proj_a"]).max()) < bound  # one in 10^8


TOKENS = tiny.tokens_of((4, 11))


@pytest.fixture(scope="module")
def merged_gradient():
    """(loss, log-probabilities, adapters, dL/dW) of all weights of the merged model."""
    config = with_lora(tiny.EVERYTHING)
    params = tiny.random_params(tiny.EVERYTHING)
    found = learnt(config)
    merged = lora.merged_params(params, found, LORA.scale)
    gradients, logprobs = tiny.gradient(merged, tiny.EVERYTHING, jnp.asarray(TOKENS), 4)
    return params, found, gradients["layers"], logprobs


def directions(layers, gradients):
    """dL/dA = s dL/dW B^T and dL/dB = s A^T dL/dW, layer by layer in float64."""
    expected = {}
    for name in TARGETS:
        a, b, w = (
            np.asarray(x, np.float64)
            for x in (layers[f"{name}_a"], layers[f"{name}_b"], gradients[name])
        )
        count, rank = len(w), LORA.rank
        flat = w.reshape(count, a[0].size // rank, b[0].size // rank)
        of_a = flat @ b.reshape(count, rank, -1).transpose(0, 2, 1)
        of_b = a.reshape(count, -1, rank).transpose(0, 2, 1) @ flat
        expected[f"{name}_a"] = 2.0 * of_a.reshape(a.shape)
        expected[f"{name}_b"] = 2.0 * of_b.reshape(b.shape)
    return expected


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 2)], ids=["1 device", "4 devices"])
def test_gradients_are_those_of_the_full_model_in_the_adapters_directions(merged_gradient, sizes):
    """And the log-probabilities those of the merged model, to 1e-5 of the largest."""
    params, found, gradients, logprobs = merged_gradient
    config = with_lora(tiny.EVERYTHING)
    mesh = make_mesh(
        **dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)),
        devices=jax.devices()[: int(np.prod(sizes))],
    )
    layout = named_tree(mesh, decoder.param_axes(config))
    with jax.set_mesh(mesh):
        whole = jax.device_put(lora.whole(params, found), layout)

        def score(adapters):
            return tiny.score_sum(lora.whole(whole, adapters), config, jnp.asarray(TOKENS), 4)

        of_adapters, separate = jax.jit(jax.grad(score, has_aux=True))(lora.trained(whole))
    np.testing.assert_allclose(separate, logprobs, atol=2e-5)
    expected = directions(found["layers"], gradients)
    for name, value in of_adapters["layers"].items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
def test_decoding_takes_the_merged_weights(scanned):
    """Those of the merged model, rounded once, so that it samples what the merged export does;
    where layers are scanned, prompts are read with them too."""
    for dtype in ("float32", "bfloat16"):
        plain = dataclasses.replace(tiny.EVERYTHING, compute_dtype=dtype, scan_decode=scanned)
        config, params = with_lora(plain), tiny.random_params(tiny.EVERYTHING)
        found = decoding.decode_weights(lora.whole(params, learnt(config)), config)
        merged = lora.merged_params(params, learnt(config), LORA.scale)
        expected = decoding.decode_weights(merged, plain)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape
            np.testing.assert_allclose(
                x.astype(jnp.float32),
                y.astype(jnp.float32),
                atol=1e-6,
                rtol=1e-2 * (dtype[0] == "b"),
            )
        if scanned:
            read, reader = decoding.prompt_params(None, found, config)
            assert read["layers"].keys() == merged["layers"].keys()
            assert reader == plain


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
def test_on_four_devices_the_sampler_draws_what_the_merged_model_would(scanned):
    """The trainer's parameters over four devices, the sampler's over two pairs."""
    plain = dataclasses.replace(tiny.TINY, scan_decode=scanned)
    config, mesh = with_lora(plain), make_mesh(data=1, fsdp=4)
    prompts, found = tiny.prompts(rows=12), learnt(config)

    def sample(params, model_config):
        axes = named_tree(mesh, decoder.param_axes(model_config))
        return sample_rows(
            jax.device_put(params, axes),
            model_config,
            prompts,
            sampling=SamplingSection(max_new_tokens=9),
            eos_ids=(1, 2),
            keys=jax.random.split(jax.random.key(0), 12),
            mesh=regrouped(mesh, 2),
            rows_at_once=8,
        )

    rollouts = sample(lora.whole(tiny.params(), found), config)
    expected = sample(lora.merged_params(tiny.params(), found, LORA.scale), plain)
    np.testing.assert_array_equal(rollouts.tokens, expected.tokens)
    np.testing.assert_allclose(rollouts.sampler_logprobs, expected.sampler_logprobs, atol=2e-5)


def test_an_adapter_lies_where_its_weight_lies_and_its_rank_everywhere():
    axes = decoder.param_axes(with_lora(tiny.TINY))["layers"]
    for name in TARGETS:
        a, b = axes[f"{name}_a"], axes[f"{name}_b"]
        assert a[-1] is None and b[1] is None
        assert (*a[:-1], *b[2:]) == axes[name]


def batch(rows=4):
    random = np.random.default_rng(3)
    mask = np.ones((rows, TOKENS.shape[1]), bool)
    mask[:, :3] = False
    return Batch(
        tokens=TOKENS[:rows],
        completion_mask=mask,
        loss_weights=(mask / mask.sum()).astype(np.float32),
        advantages=random.normal(size=rows).astype(np.float32),
        old_logprobs=None,
        sampler_logprobs=np.where(mask, np.float32(-1), np.float32(0)),
        rows=np.arange(rows, dtype=np.int32),
    )


@pytest.mark.slow
def test_an_update_changes_the_adapters_alone_and_takes_the_base_as_an_argument():
    """Another base needs no other program: it is not a constant of it. A measurement is of the
    adapters, too."""
    config, mesh = with_lora(tiny.TINY), make_mesh(devices=jax.devices()[:1])
    optimizer = make_optimizer(OptimSection(lr=1e-2), updates=9)
    update = make_update(config, optimizer, loss=LossSection(), temperature=1.0, microbatch=4)
    losses = []
    with jax.set_mesh(mesh), count_compiles() as compiled:
        for factor in (1.0, 0.5):
            base = jax.tree.map(lambda x, f=factor: x * f, tiny.params())
            state = make_state(
                learnt(config), optimizer, (), model_config=config, mesh=mesh, frozen=base
            )
            before = jax.device_get((state.params, state.frozen))
            compiled.take()
            state, metrics = update(state, [batch(), batch()], measured=True)
            programs = compiled.take()["compile/programs"]
            losses.append(float(metrics["policy/entropy"]))
            assert metrics["measurement"].square > 0
            assert_equal(state.frozen, before[1])
            changed = jax.tree.map(lambda x, y: bool((x != y).any()), state.params, before[0])
            assert all(jax.tree.leaves(changed))
        assert programs == 0 and losses[0] != losses[1]
    sizes = [x.size for x in jax.tree.leaves(state.opt_state) if x.size > 1]
    assert sum(sizes) == 2 * costs.adapter_parameters(config)


QWEN3_4B = dataclasses.replace(
    KNOWN_MODELS["Qwen/Qwen3-4B"], compute_dtype="bfloat16", remat="full"
)


@pytest.mark.parametrize("rank", [16, 32])
def test_qwen3_4b_trains_within_24_gb(monkeypatch, rank):
    """One device: 8 rollouts of 3,072 tokens at once, microbatches of 2; all weights never fit."""
    monkeypatch.setattr(checks, "device_memory", lambda devices: 24 * 10**9)
    config = command_line.load_config("quickstart")
    config = dataclasses.replace(
        config,
        sampling=dataclasses.replace(config.sampling, max_new_tokens=2560),
        train=dataclasses.replace(config.train, sample_rollouts=8, microbatch_rollouts=2),
    )
    one = make_mesh(devices=jax.devices()[:1])
    adapted = with_lora(QWEN3_4B, rank=rank, base_dtype="bfloat16")
    sizes = {"prompt_width": 512, "rows": 512, "training": True}
    checks.check_memory(config, adapted, one, **sizes)
    with pytest.raises(ValueError, match="moments 32.2 GB"):
        checks.check_memory(config, QWEN3_4B, one, **sizes)


def test_devices_exchange_the_gradients_of_adapters_alone():
    """In bfloat16, over two that split the parameters and two that have them once more."""
    mesh = abstract_mesh(4, data=2, fsdp=2, tensor=1)
    adapted = with_lora(QWEN3_4B, base_dtype="bfloat16")
    plain, sent = (
        traffic.microbatch_traffic(c, mesh, rows=4, width=8) for c in (QWEN3_4B, adapted)
    )
    size = 2 * costs.adapter_parameters(adapted)
    assert sent["reduce-scatter"] == size / 2 and "all-reduce" not in sent  # that is once an update
    held = costs.parameter_bytes(adapted, mesh, part=lora.trained)  # some split over fsdp, float32
    assert 4 * costs.adapter_parameters(adapted) / 2 < held < 4 * costs.adapter_parameters(adapted)
    assert traffic.update_traffic(adapted, mesh) == {"all-reduce": held}
    assert sent["all-gather"] == plain["all-gather"] + size


def test_the_memory_of_a_state_is_that_of_its_arrays():
    """Base, adapters and moments, each as it is stored, on one device of four."""
    config = with_lora(
        dataclasses.replace(tiny.TINY, compute_dtype="bfloat16"), base_dtype="bfloat16"
    )
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    optimizer = make_optimizer(OptimSection(), updates=1)
    state = abstract_state(optimizer, (), model_config=config, mesh=mesh)

    def held(tree):
        leaves = [x for x in jax.tree.leaves(tree) if x.size > 1]
        shards = [x.sharding.shard_shape(x.shape) for x in leaves]
        return sum(int(np.prod(s)) * x.dtype.itemsize for s, x in zip(shards, leaves, strict=True))

    parts = costs.update_memory(config, mesh, rows=4, width=8, chunk=8)
    assert parts["weights"] == held((state.params, state.frozen))
    assert parts["moments"] == held(state.opt_state)
    assert parts["gradients"] <= 2 * held(state.params)
    gathered = config.vocab_size * config.embed * 2 // 2  # the output layer, in bfloat16
    assert parts["output layer and its gradient"] == gathered
    halves = costs.update_memory(config, mesh, rows=4, width=8, chunk=8, moment=2)
    assert 2 * halves["moments"] == parts["moments"]


@pytest.mark.slow
def test_the_backward_pass_keeps_a_projection_once():
    """``dots`` saves W x + s B A x, not both products: no more memory than with all weights."""
    plain = dataclasses.replace(tiny.TINY, layers=6, embed=64, mlp=192, remat="dots")
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    temporary = []
    for config in (plain, with_lora(plain)):
        whole = decoder.param_shapes(config)

        def score(part, frozen, tokens, config=config):
            return tiny.score_sum(lora.whole(frozen, part), config, tokens, 128)[0]

        compiled = jax.jit(jax.grad(score)).lower(lora.trained(whole), lora.frozen(whole), tokens)
        temporary.append(compiled.compile().memory_analysis().temp_size_in_bytes)
    assert temporary[1] < 1.02 * temporary[0]


@pytest.mark.parametrize(
    "targets, said",
    [
        ((), "model.lora_targets is empty; give one or more of q_proj, "),
        (("q_proj", "q_proj"), "model.lora_targets is q_proj, q_proj; .*each once"),
        (("lm_head",), "model.lora_targets is lm_head; "),
    ],
)
def test_targets_that_there_are_not_are_refused(targets, said):
    with pytest.raises(ValueError, match=said):
        adapters_of(ModelSection(lora_rank=2, lora_targets=targets))
    assert adapters_of(ModelSection(lora_targets=targets)) is None


CHANGES = {
    "model.lora-rank": 2,
    "model.lora-alpha": 4,
    "mesh.data": 1,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
    "loss.kl-coef": 0.01,
    "optim.lr": 1e-2,
}


def config_of(folder, problems, run_dir, **changes):
    arguments = small(folder, problems, run_dir, **CHANGES | changes)
    return command_line.parse("", argv=["--config", "quickstart", *arguments])[0]


@pytest.fixture(scope="module")
def run(tiny_folder, dapo_file, tmp_path_factory):
    """(run folder after four steps on four devices, what the KL term referred to)."""
    run_dir = tmp_path_factory.mktemp("lora") / "run"
    references, make_batches = [], loop.make_batches

    def remember(*arguments, **options):
        references.append((options["reference"], options["params"]))
        return make_batches(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_batches", remember)
        train(config_of(tiny_folder, dapo_file, run_dir), report=lambda _: None)
    return run_dir, references


@pytest.mark.slow
def test_the_reference_of_a_kl_term_is_the_base_itself(run):
    """Its arrays are those of the policy, no second copy, and its divergence begins at 0."""
    run_dir, references = run
    for reference, params in references:
        assert all(
            x is y
            for x, y in zip(
                *(jax.tree.leaves(lora.frozen(p)) for p in (reference, params)), strict=True
            )
        )
        assert not any(v.any() for k, v in reference["layers"].items() if k.endswith("_b"))
    rows = read_metrics(run_dir)
    assert rows[1]["policy/kl_ref"] == 0 < rows[-1]["policy/kl_ref"]
    assert all(row["sampler/logprob_gap_max"] < 1e-4 for row in rows[1:])


@pytest.mark.slow
def test_checkpoints_hold_adapters_alone_and_a_run_goes_on_bit_for_bit(
    run, tiny_folder, dapo_file, tmp_path
):
    expected_dir, _ = run
    copy = tmp_path / "run"
    shutil.copytree(expected_dir, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    step, before = final_arrays(copy)
    names = [name for name in before if ".params" in name]
    assert step == 2 and len(names) == 2 * len(TARGETS)
    assert all(name.endswith(("_proj_a']", "_proj_b']")) for name in names)
    train(config_of(tiny_folder, dapo_file, copy), report=lambda _: None)
    rows, expected = (repeatable(read_metrics(folder)) for folder in (copy, expected_dir))
    assert rows == expected
    (step, found), (_, wanted) = final_arrays(copy), final_arrays(expected_dir)
    assert step == 4 and found.keys() == wanted.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)
    with pytest.raises(ValueError) as refused:
        train(config_of(tiny_folder, dapo_file, copy, **{"model.lora-rank": 3}))
    assert str(refused.value) == (
        f"run folder {copy} holds a run of another configuration: model.lora_rank is 2 there and 3 "
        "here; take the values that are there, or give another --run-dir"
    )


def in_float32(folder):
    return huggingface.load_params(folder, huggingface.read_model_config(folder))


@pytest.mark.slow
def test_a_run_is_evaluated_and_exported_merged(run, tiny_folder, dapo_file, tmp_path, monkeypatch):
    """The export's weights are W + s A B; the run itself has the same evaluation and generates with
    the same weights."""
    run_dir, _ = run
    convert.run(run_dir, to=tmp_path / "merged")
    model_config = huggingface.read_model_config(tiny_folder)
    newest = trained.find_checkpoint(run_dir)
    found = trained.load_checkpoint_params(
        newest, dataclasses.replace(model_config, lora=adapters.saved_lora(newest))
    )
    before, after = in_float32(tiny_folder), in_float32(tmp_path / "merged")
    for name in TARGETS:
        a, b = (np.float64(found["layers"][f"{name}_{part}"]) for part in "ab")
        flat = a.reshape(2, -1, 2) @ b.reshape(2, 2, -1)  # alpha / rank is 2
        expected = np.float64(before["layers"][name]) + 2 * flat.reshape(
            before["layers"][name].shape
        )
        np.testing.assert_allclose(after["layers"][name], expected, atol=1e-6)
        assert np.abs(flat).max() > 1e-3
    results = []
    for options in (["--checkpoint", run_dir], ["--model.path", tmp_path / "merged"]):
        out = tmp_path / f"out{len(results)}"
        arguments = small(tiny_folder, dapo_file, run_dir, **CHANGES)
        arguments = [*arguments, "--out", str(out), *map(str, options)]
        monkeypatch.setattr("sys.argv", ["x", "--config", "quickstart", *arguments])
        evaluate.main()
        results.append(json.loads((out / "results.json").read_text()))
    assert results[0]["protocol"] == results[1]["protocol"]
    assert results[0]["sets"] == results[1]["sets"]
    used, roll_out = [], generate.roll_out
    monkeypatch.setattr(
        generate,
        "roll_out",
        lambda params, *a, **k: used.append(params) or roll_out(params, *a, **k),
    )
    monkeypatch.setattr("sys.argv", ["x", str(run_dir), "what is 2 + 3?", "--samples", "2"])
    generate.main()
    assert_equal(used[0], after)


@pytest.fixture(scope="module")
def saved(tiny_folder, tmp_path_factory):
    """A run folder whose only checkpoint holds learnt adapters of rank 3."""
    return saved_run(tiny_folder, tmp_path_factory.mktemp("saved") / "run")


def saved_run(tiny_folder, run_dir, **options):
    section = ModelSection(path=str(tiny_folder), lora_rank=3, lora_alpha=6.0, **options)
    config = with_lora(huggingface.read_model_config(tiny_folder))
    state = TrainState(
        step=jnp.int32(1), params=learnt(config), opt_state=(), estimator_state=jnp.float32(0)
    )
    described = dataclasses.asdict(Config(run_dir=str(run_dir), model=section))
    with checkpoint.open_checkpoints(run_dir, CheckpointSection()) as checkpoints:
        checkpoint.save(checkpoints, state, described)
    identity = {"model.path": huggingface.fingerprint(tiny_folder)}
    record = {"config": described, "identity": identity, "starts": []}
    (run_dir / "config.json").write_text(json.dumps(record))
    return run_dir


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_merged_into_the_weights_that_they_were_trained_beside(
    tiny_folder, tmp_path, dtype
):
    """A run in bfloat16 keeps the model's float32 weights rounded, and so does its export."""
    run_dir = saved_run(tiny_folder, tmp_path / "run", compute_dtype=dtype)
    convert.run(run_dir, to=tmp_path / "out", dtype="float32")
    before, after = in_float32(tiny_folder), in_float32(tmp_path / "out")
    config = with_lora(huggingface.read_model_config(tiny_folder), base_dtype=dtype)
    shapes = lora.frozen(decoder.param_shapes(config))
    rounded = jax.tree.map(lambda x, like: x.astype(like.dtype), before, shapes)
    change = learnt(config)["layers"]
    for name, value in lora.base(rounded)["layers"].items():
        expected = np.float64(value)
        if name in TARGETS:
            a, b = (np.float64(change[f"{name}_{part}"]) for part in "ab")
            flat = a.reshape(len(a), -1, 3) @ b.reshape(len(b), 3, -1)  # alpha / rank is 2
            expected = expected + 2 * flat.reshape(value.shape)
        np.testing.assert_allclose(after["layers"][name], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(after["embedding"], np.float32(rounded["embedding"]))
    same = np.array_equal(np.float32(rounded["embedding"]), before["embedding"])
    assert same == (dtype == "float32")


def test_adapters_beside_other_weights_are_refused(saved, tiny_folder, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    params = jax.tree.map(lambda x: 2 * x, in_float32(tiny_folder))
    model_config = huggingface.read_model_config(tiny_folder)
    huggingface.save_params(params, model_config, other, source=tiny_folder, overwrite=True)
    for options in ({}, {"adapters": True}):
        with pytest.raises(ValueError, match="were trained with other weights than those of"):
            convert.run(saved, to=tmp_path / "out", model_path=str(other), **options)
    assert not (tmp_path / "out").exists()


def test_a_run_of_all_weights_has_no_adapters_to_write(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "saved_lora", lambda _: None)
    with pytest.raises(ValueError, match="model.lora_rank is 0; leave out --adapters"):
        convert.run(saved, to=tmp_path / "out", adapters=True)


@pytest.mark.torch
def test_peft_loads_the_adapters_and_computes_the_same_logits(saved, tiny_folder, tmp_path):
    """Those of our separate adapters, at 1e-4, and after peft has merged them too."""
    torch, peft = (pytest.importorskip(name) for name in ("torch", "peft"))
    import transformers

    convert.run(saved, to=tmp_path / "out", adapters=True)
    config = with_lora(huggingface.read_model_config(tiny_folder))
    params = lora.whole(in_float32(tiny_folder), learnt(config))
    ours = tiny.next_token_logits(params, config, jnp.asarray(TOKENS))
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    with torch.no_grad():
        plain = base(torch.tensor(TOKENS).long()).logits
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
        separate = theirs(torch.tensor(TOKENS).long()).logits
        merged = theirs.merge_and_unload()(torch.tensor(TOKENS).long()).logits
    np.testing.assert_allclose(separate.numpy(), ours, atol=1e-4)
    np.testing.assert_allclose(merged.numpy(), ours, atol=1e-4)
    assert np.abs(plain.numpy() - ours).max() > 0.1
