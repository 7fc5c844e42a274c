"""Sizes that a run chooses itself, and what they mean on several devices."""

import dataclasses
import json

import jax
import pytest
import tiny

from basis_jax import command_line
from basis_jax.config import Config, LossSection, SamplingSection, TrainSection
from basis_jax.model import costs
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.lora import Lora
from basis_jax.model.sharding import make_mesh
from basis_jax.opening.checks import check, check_memory, rollouts_per_pass
from basis_jax.opening.sizes import FILLED, divisors, with_sizes

AUTO = Config(
    run_dir="",
    sampling=SamplingSection(max_new_tokens=192),
    loss=LossSection(logprob_chunk=32),
    train=TrainSection(
        prompts_per_step=48, minibatch_rollouts=24, microbatch_rollouts=0, sample_rollouts=0
    ),
)
SIZES = {"prompt_width": 64, "rows": 48, "training": True}


def mesh_of(**sizes):
    return make_mesh(**{"data": 1, "fsdp": 1, "tensor": 1} | sizes, devices=jax.devices()[:2])


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def with_memory(monkeypatch, size):
    monkeypatch.setattr("basis_jax.opening.checks.device_memory", lambda devices: int(size))


def needed(count, mesh=None):
    parts = costs.update_memory(tiny.TINY, mesh or one_device(), rows=count, width=256, chunk=32)
    return sum(parts.values())


def chosen(config, mesh, lines=None, model_config=tiny.TINY):
    report = (lambda line: None) if lines is None else lines.append
    return with_sizes(config, model_config, mesh, **SIZES, report=report).train


@pytest.mark.parametrize("fitting", [1, 3, 4, 12])
def test_the_largest_size_that_fits_is_chosen_and_reported(monkeypatch, fitting):
    with_memory(monkeypatch, needed(fitting) / FILLED + 1)
    lines = []
    train = chosen(AUTO, one_device(), lines)
    assert train.microbatch_rollouts == fitting
    assert 48 % train.sample_rollouts == 0
    assert lines == [
        f"train.microbatch_rollouts: {fitting} (auto)",
        f"train.sample_rollouts: {train.sample_rollouts} (auto)",
    ]


def test_adapters_leave_room_for_more(monkeypatch):
    """Where all weights leave none for one rollout: only adapters have moments and a reference."""
    model_config = dataclasses.replace(tiny.TINY, vocab_size=100_000)
    adapted = dataclasses.replace(model_config, lora=Lora(rank=2, alpha=4.0))
    config = dataclasses.replace(AUTO, loss=dataclasses.replace(AUTO.loss, kl_coef=0.1))
    weights = costs.parameter_bytes(model_config, one_device())
    with_memory(monkeypatch, 3 * weights / FILLED)
    assert chosen(config, one_device(), model_config=model_config).sample_rollouts == 1
    assert chosen(config, one_device(), model_config=adapted).sample_rollouts > 1


def test_with_room_all_are_taken_and_numbers_of_the_config_stay(monkeypatch):
    with_memory(monkeypatch, 10**12)
    train = chosen(AUTO, one_device())
    assert (train.microbatch_rollouts, train.sample_rollouts) == (24, 48)
    assert chosen(AUTO, mesh_of(data=2)).microbatch_rollouts == 12  # on each of two
    given = dataclasses.replace(AUTO.train, microbatch_rollouts=3, sample_rollouts=7)
    assert chosen(dataclasses.replace(AUTO, train=given), one_device()) == given


def test_a_device_that_holds_nothing_is_refused_by_the_check_of_memory(monkeypatch):
    with_memory(monkeypatch, 1000)
    config = dataclasses.replace(AUTO, train=chosen(AUTO, one_device()))
    assert config.train.microbatch_rollouts == config.train.sample_rollouts == 1
    with pytest.raises(ValueError, match="sampling 1 rollouts .*or raise mesh.fsdp, mesh.tensor"):
        check_memory(config, tiny.TINY, one_device(), **SIZES)


def test_a_resumed_run_takes_its_sizes_again_unless_the_devices_need_others(monkeypatch, tmp_path):
    with_memory(monkeypatch, 10**12)
    config = dataclasses.replace(AUTO, run_dir=str(tmp_path))
    train = {"microbatch_rollouts": 4, "sample_rollouts": 12}
    (tmp_path / "config.json").write_text(json.dumps({"config": {"train": train}}))
    found = chosen(config, one_device())
    assert (found.microbatch_rollouts, found.sample_rollouts) == (4, 12)
    with_memory(monkeypatch, needed(3) / FILLED + 1)
    lines = []
    assert chosen(config, one_device(), lines).microbatch_rollouts == 3
    assert lines[0] == (
        f"train.microbatch_rollouts was 4 in {tmp_path} and is 3 from now on, as these devices "
        "need another choice"
    )
    (tmp_path / "config.json").write_text("torn")
    assert chosen(config, one_device()).microbatch_rollouts == 3


@pytest.mark.parametrize(
    ("microbatch", "shards", "passed"), [(8, 1, 8), (8, 4, 32), (2, 128, 256), (8, 64, 256)]
)
def test_a_microbatch_is_counted_on_each_device(microbatch, shards, passed):
    train = TrainSection(minibatch_rollouts=256, microbatch_rollouts=microbatch)
    assert rollouts_per_pass(train, shards) == passed


@pytest.mark.parametrize("shards", [16, 64, 128])
def test_the_flagships_sizes_are_accepted_on_many_devices(shards):
    config = command_line.load_config("qwen_math")
    model_config = ModelConfig(
        "qwen3", 151_936, 2560, 36, 32, 8, 128, 9728, max_positions=40_960, tied=True, qk_norm=True
    )
    mesh = jax.sharding.Mesh(  # one device in many places: nothing is computed
        [[[jax.devices()[0]]] * shards], ("data", "fsdp", "tensor")
    )
    check(config, model_config, mesh)
    with pytest.raises(ValueError, match="fsdp = 512; .*or raise mesh.tensor, which does not"):
        mesh = jax.sharding.Mesh([[[jax.devices()[0]]] * 512], ("data", "fsdp", "tensor"))
        check(config, model_config, mesh)


@pytest.mark.parametrize("given", ["auto", "=auto"])
def test_auto_on_the_command_line_is_0(given):
    words = [f"--train.microbatch-rollouts{given}"] if given[0] == "=" else [
        "--train.microbatch-rollouts", given
    ]  # fmt: skip
    config, _ = command_line.parse("", argv=["--config", "quickstart", *words])
    assert config.train.microbatch_rollouts == 0
    assert config.train.sample_rollouts > 0


def test_divisors_come_largest_first():
    assert divisors(12) == [12, 6, 4, 3, 2, 1]
