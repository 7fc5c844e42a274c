"""A dry run says what a run needs of devices that are not there, and reads no weights."""

import dataclasses
import json
import re

import pytest
import tiny

from basis_jax import command_line
from basis_jax.commands import train
from basis_jax.model import costs, traffic
from basis_jax.model.chips import CHIPS, chip_of, read_topology, slice_shape
from basis_jax.model.collectives import collectives, sent_bytes
from basis_jax.model.sharding import abstract_mesh, make_mesh
from basis_jax.opening import plan
from basis_jax.training import compiled_plan
from basis_jax.weights import config_json
from basis_jax.weights.known_models import KNOWN_MODELS

PUBLISHED = {  # billions of parameters, by the model cards
    "Qwen/Qwen3-0.6B": 0.6,
    "Qwen/Qwen3-1.7B": 1.7,
    "Qwen/Qwen3-4B": 4.0,
    "Qwen/Qwen3-8B": 8.2,
    "Qwen/Qwen3-14B": 14.8,
    "Qwen/Qwen3-32B": 32.8,
    "Qwen/Qwen2.5-0.5B-Instruct": 0.49,
    "Qwen/Qwen2.5-1.5B-Instruct": 1.54,
    "Qwen/Qwen2.5-3B-Instruct": 3.09,
    "Qwen/Qwen2.5-7B-Instruct": 7.61,
    "meta-llama/Llama-3.2-1B-Instruct": 1.23,
    "meta-llama/Llama-3.2-3B-Instruct": 3.21,
    "meta-llama/Llama-3.1-8B-Instruct": 8.03,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 0.135,
}


def dry(monkeypatch, capsys, *arguments):
    """Exit status and output of ``basis-jax train --dry-run`` with these arguments."""
    monkeypatch.setattr("sys.argv", ["basis-jax train", "--dry-run", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        train.main()
    return int(ended.value.code), capsys.readouterr().out


@pytest.fixture(autouse=True)
def default_share_of_a_gpu(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_known_models_have_the_published_number_of_parameters(name):
    """And are what config.json would say, field by field."""
    known = KNOWN_MODELS[name]
    assert costs.parameters(known) / 1e9 == pytest.approx(PUBLISHED[name], rel=0.015)
    assert config_json.parse(config_json.describe(known)) == known


@pytest.mark.parametrize(
    ("config", "topology"),
    [("qwen_math", "h100:8"), ("qwen_math_1gpu", "h100"), ("gsm8k", "h100")],
)
def test_a_config_fits_the_hardware_that_its_header_names(monkeypatch, capsys, config, topology):
    status, shown = dry(monkeypatch, capsys, "--config", config, "--topology", topology)
    assert status == 0 and shown.endswith("fits\n")


def test_the_flagships_table_is_counted_in_steps_of_sampling(monkeypatch, capsys):
    """17,398 problems x 64 rollouts, 512 a step; 8 rollouts; none."""
    _, shown = dry(monkeypatch, capsys, "--config", "qwen_math", "--topology", "h100:8")
    assert "1,113,472 rollouts, as many as 2,175 steps of sampling; the run itself has 150" in shown
    assert "139,184 rollouts, as many as 272 steps" in shown
    assert "--estimator.table-samples 0" in shown


def test_what_does_not_fit_is_refused_by_part_with_a_plan_that_fits(monkeypatch, capsys):
    """Status 1; the plan that is named then has status 0, on the same devices."""
    options = ("--config", "gsm8k", "--topology", "l4:8")
    status, shown = dry(monkeypatch, capsys, *options)
    assert status == 1
    last = shown.splitlines()[-1]
    assert re.search(r"needs [\d.]+ GB a device \(.*weights [\d.]+ GB.*there are 18 GB", last)
    named = re.search(r"\(fits with (.*)\)", last).group(1).split()
    status, shown = dry(monkeypatch, capsys, *options, *named)
    assert status == 0, shown


def test_the_smallest_topology_fits_and_its_half_does_not():
    model_config = dataclasses.replace(
        KNOWN_MODELS["Qwen/Qwen3-8B"], compute_dtype="bfloat16", remat="full"
    )
    config = command_line.load_config("qwen_math")
    request = plan.Request(config, model_config, prompt_width=1024, rows=512, available=60 * 10**9)
    smallest, changes = plan.smallest_topology(request, read_topology("h100:8"))
    mesh = {name.split(".")[1]: n for name, n in changes.items() if name.startswith("mesh")}
    changed = request.with_changes(changes)
    assert changed.fits(abstract_mesh(smallest.devices, **(mesh or plan.axis_sizes(config))))
    assert plan.nearest_plan(request, smallest.devices // 2) is None


@pytest.mark.parametrize("asked", ["v5e", "v5e:4x4", "v5p:2x2x2", "h100:8", "L4"])
def test_topologies_are_read_as_they_are_written(asked):
    topology = read_topology(asked)
    assert str(topology) == (asked.lower() if ":" in asked else asked.lower() + ":1")


@pytest.mark.parametrize("asked", ["h300:8", "v5e:", "v5e:4x", "v5e:0x4", "h100:2x4", ":8"])
def test_an_unknown_topology_is_one_sentence(asked):
    with pytest.raises(ValueError, match="topology .*such as"):
        read_topology(asked)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_devices_that_are_present_have_the_data_sheet_of_their_chip(kind, name):
    assert chip_of(kind) == CHIPS.get(name)


def test_slices_of_any_size_have_as_many_chips():
    for chip in CHIPS.values():
        shapes = [slice_shape(chip, 2**n) for n in range(9)]
        assert [read_topology(f"{chip.name}:{'x'.join(map(str, s))}").devices for s in shapes] == [
            2**n for n in range(9)
        ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--mesh.tensor", "16"), "key heads = 8 does not divide over 16 devices"),
        (("--topology", "tpu:4"), "unknown topology 'tpu:4'"),
        (("--model.path", "nobody/nothing"), "not known without the hub"),
        (("--estimator.name", "vineppo"), "vineppo needs a plan .* is uniform; set it to branch"),
        (("--estimator.name", "grpo"), "but sampling.group_size is 1; give 2 or more"),
        (
            ("--compile", "--mesh.tensor", 4),
            "there is a compiler for absent TPUs, not for absent GPUs",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(monkeypatch, capsys, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        dry(monkeypatch, capsys, "--config", "qwen_math", "--topology", "h100:16", *options)


def test_plans_without_a_dry_run_are_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["basis-jax train", "--config", "gsm8k", "--topology", "l4"])
    with pytest.raises(ValueError, match="add --dry-run"):
        train.main()


def test_a_folder_and_a_config_json_are_planned_without_weights(monkeypatch, capsys, tmp_path):
    """A file of the shape alone is enough: no weights stand beside it."""
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(config_json.describe(KNOWN_MODELS["Qwen/Qwen3-0.6B"])))
    options = ("--config", "gsm8k", "--topology", "h100")
    _, known = dry(monkeypatch, capsys, *options, "--model.path", "Qwen/Qwen3-0.6B")
    _, read = dry(monkeypatch, capsys, *options, "--model.path", path)
    assert read.splitlines()[1:] == known.splitlines()[1:]


def test_weights_are_not_opened(monkeypatch, capsys, tiny_folder):
    def refuse(*args, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr("basis_jax.weights.huggingface.load_params", refuse)
    options = ("--config", "quickstart", "--model.path", tiny_folder, "--topology", "l4")
    assert dry(monkeypatch, capsys, *options)[0] == 0


HLO = """\
HloModule jit_f

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %all-reduce.1 = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%a
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%piece
}

%piece (p: f32[8]) -> f32[8] {
  %all-reduce.9 = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%a
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(36)
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

%unknown (p: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[] constant(36)
  ROOT %and = pred[] and(%i, %j)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body
  %while.2 = (s32[], f32[8]{0}) while(%t), condition=%unknown, body=%body
  %ag = (bf16[4]{0}, bf16[8]{0}) all-gather-start(%x), replica_groups=[2,2]<=[4], dimensions={0}
  %rs = bf16[4]{0} reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=2] {'b'}, to_apply=%a
}
"""


def test_collectives_are_counted_once_a_channel_and_as_often_as_their_loop_runs():
    found = collectives(HLO)
    once = sent_bytes(found, looped=False)
    assert once == {
        "all-reduce": 36 * 2 * 32 * 3 / 4,
        "all-gather": 16 / 2,
        "reduce-scatter": 16 / 2,
    }
    assert sent_bytes(found, looped=True) == {"all-reduce": 2 * 32 * 3 / 4}


def tiny_plan(rows=16, **sizes):
    config = command_line.load_config("quickstart")
    train = {"prompts_per_step": rows, "minibatch_rollouts": rows, "microbatch_rollouts": rows}
    train = dataclasses.replace(config.train, sample_rollouts=rows, **train)
    sampling = dataclasses.replace(config.sampling, max_new_tokens=48)
    mesh = dataclasses.replace(config.mesh, **sizes)
    return dataclasses.replace(config, train=train, sampling=sampling, mesh=mesh)


@pytest.mark.slow
def test_a_compiled_plan_sends_at_each_token_what_the_formula_says():
    """Compiled for four devices of this machine; the logits' statistics are not in the formula."""
    config = tiny_plan(fsdp=2, tensor=2)
    model_config = dataclasses.replace(tiny.TINY, vocab_size=512)
    mesh = make_mesh(**plan.axis_sizes(config))
    lowered = compiled_plan.lower_decoding(config, model_config, mesh, length=64)
    token = compiled_plan.described(lowered.compile())["each_loop"]
    formula = traffic.token_traffic(model_config, mesh, slots=16)
    assert sum(token.values()) == pytest.approx(sum(formula.values()), rel=0.1)


def has_libtpu():
    try:
        return bool(compiled_plan.find_libtpu())
    except ValueError:
        return False


needs_libtpu = pytest.mark.skipif(
    not has_libtpu(), reason="needs libtpu: the extra tpu-aot, or TPU_LIBRARY_PATH"
)


def assert_compiled_within(share, topology, config, model_config, *, prompt_width):
    found = compiled_plan.compile_for(
        read_topology(topology), config, model_config, prompt_width=prompt_width
    )
    mesh = abstract_mesh(read_topology(topology).devices, **plan.axis_sizes(config))
    rows = config.train.prompts_per_step
    sizes = {"prompt_width": prompt_width, "rows": rows, "training": True}
    said = plan.program_bytes(plan.memory_needs(config, model_config, mesh, **sizes))
    for name, program in found.items():
        assert said[name] == pytest.approx(program["held"], rel=share), name


@needs_libtpu
@pytest.mark.slow
def test_the_tpu_compiler_plans_decoding_within_a_tenth_of_the_formula():
    """A narrow model on v5e:2x2, in a process of its own."""
    config = tiny_plan(rows=32, tensor=2, fsdp=2, data=1)
    model_config = dataclasses.replace(
        KNOWN_MODELS["Qwen/Qwen3-0.6B"], layers=2, compute_dtype="bfloat16", remat="full"
    )
    assert_compiled_within(0.1, "v5e:2x2", config, model_config, prompt_width=976)


@needs_libtpu
@pytest.mark.nightly
def test_the_tpu_compiler_plans_the_flagship_within_a_tenth_of_the_formulas():
    config = command_line.load_config("qwen_math")
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=4, tensor=4))
    model_config = dataclasses.replace(
        KNOWN_MODELS["Qwen/Qwen3-4B"], compute_dtype="bfloat16", remat="full"
    )
    assert_compiled_within(0.1, "v5e:4x4", config, model_config, prompt_width=1024)
