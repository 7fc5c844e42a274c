"""Least time of a step, and the cost of the reference table, for a config on a chip."""

from dataclasses import dataclass
from pathlib import Path

from jax.sharding import AbstractMesh, Mesh

from basis_jax.config import Config
from basis_jax.corrections import OF_UPDATE
from basis_jax.data.sources import load_training
from basis_jax.model import costs
from basis_jax.model.chips import Chip
from basis_jax.model.decoder import ModelConfig, computed_in
from basis_jax.model.roofline import Bound, prefill_bound, token_bound, update_bound
from basis_jax.model.sharding import batch_shards, regrouped
from basis_jax.opening.plan import rollouts_per_pass

KNOWN_SETS = {"BytedTsinghua-SIA/DAPO-Math-17k": 17_398, "openai/gsm8k": 7_473}
"""Number of training problems of data sets on the hub, after duplicates are dropped."""


def problem_count(config: Config) -> int | None:
    """Number of problems that a run would train on, for a known data set, a file or a task. None if
    a download from the hub would be needed."""
    path, size = config.data.path, config.data.size
    count = KNOWN_SETS.get(path.partition(":")[0])
    if count is None and (path.startswith("task:") or Path(path).expanduser().exists()):
        count = len(load_training(config.data))
    return min(size or count, count) if count else size or None


@dataclass(frozen=True)
class Step:
    """Bounds on the parts of a step whose rows all have the same length."""

    sampling: Bound
    prefill: Bound
    scoring: Bound
    update: Bound
    flops: int

    @property
    def sample_seconds(self) -> float:
        return self.sampling.seconds + self.prefill.seconds

    @property
    def seconds(self) -> float:
        return self.sample_seconds + self.scoring.seconds + self.update.seconds


def step_bounds(
    config: Config,
    model_config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    chip: Chip,
    *,
    prompt: int,
    new: int,
) -> Step:
    """Bounds on a step whose prompts have ``prompt`` tokens and whose completions have ``new``.

    All slots are assumed busy, and each token's context is that of the middle of a completion.
    """
    train = config.train
    rollouts = train.prompts_per_step * config.sampling.group_size
    slots = min(train.sample_rollouts, rollouts)
    sampler = computed_in(model_config, config.sampling.dtype)
    sampling_mesh = regrouped(mesh, config.mesh.sample_tensor)
    token = token_bound(sampler, sampling_mesh, chip, slots=slots, context=prompt + new // 2)
    updates = rollouts // train.minibatch_rollouts
    of_update = update_bound(
        model_config,
        mesh,
        chip,
        rows=train.minibatch_rollouts,
        width=prompt + new,
        microbatch=rollouts_per_pass(train, batch_shards(mesh)),
    )
    passes = (updates > 1) + config.loss.needs_reference
    if config.loss.sampler_correction in OF_UPDATE and updates == 1:
        passes += 1
    if config.loss.objective == "rebel" and updates > 1:
        passes += 1
    score = prefill_bound(model_config, mesh, chip, rows=rollouts, width=prompt + new)
    return Step(
        sampling=token.times(new * rollouts / slots),
        prefill=prefill_bound(sampler, mesh, chip, rows=rollouts, width=prompt),
        scoring=score.times(passes),
        update=of_update.times(updates),
        flops=step_flops(config, model_config, prompt=prompt, new=new),
    )


def step_flops(config: Config, model_config: ModelConfig, *, prompt: int, new: int) -> int:
    """FLOPs of a step on all devices together."""
    rollouts = config.train.prompts_per_step * config.sampling.group_size
    middle = costs.decode_step(model_config, rows=rollouts, context=prompt + new // 2)
    first = costs.prefill(model_config, rows=rollouts, width=prompt)
    trained = costs.update(model_config, rows=rollouts, width=prompt + new)
    return new * middle.flops + first.flops + trained.flops
