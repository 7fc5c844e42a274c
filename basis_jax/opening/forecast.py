"""Least time of a step, and the cost of the reference table, for a config on a chip."""

from dataclasses import dataclass
from pathlib import Path

from jax.sharding import AbstractMesh, Mesh

from basis_jax import plans
from basis_jax.config import Config, DataSection
from basis_jax.corrections import OF_UPDATE
from basis_jax.data.sources import load_more, load_training
from basis_jax.estimators import definition
from basis_jax.model import costs
from basis_jax.model.chips import Chip
from basis_jax.model.decoder import ModelConfig, computed_in
from basis_jax.model.roofline import Bound, prefill_bound, token_bound, update_bound
from basis_jax.model.sharding import batch_shards, regrouped
from basis_jax.opening.plan import rollouts_per_pass
from basis_jax.opening.rollout_plan import setting_of
from basis_jax.plans import Belief

KNOWN_SETS = {"BytedTsinghua-SIA/DAPO-Math-17k": 17_398, "openai/gsm8k": 7_473}
"""Number of training problems of data sets on the hub, after duplicates are dropped."""


def problem_count(config: Config) -> int | None:
    """Number of problems that a run would train on, of all its sets: known data sets, files and
    tasks. None if a download from the hub would be needed."""
    total = 0
    for path in (config.data.path, *config.data.more_sets):
        count = set_size(config.data, path)
        if count is None:
            return None
        total += count
    return total


def set_size(section: DataSection, path: str) -> int | None:
    """``problem_count`` of one training set."""
    count = KNOWN_SETS.get(path.partition(":")[0])
    if count is None and (path.startswith("task:") or Path(path).expanduser().exists()):
        loaded = load_training(section) if path == section.path else load_more(path, section)
        count = len(loaded)
    return min(section.size or count, count) if count else section.size or None


@dataclass(frozen=True)
class Counts:
    """How often a step does what takes time, when every rollout that its plan may ask for is
    sampled. Evaluations and a critic's warm-up are not counted."""

    rollouts: int  # trained on
    greedy: int  # completions beside them
    updates: int
    scores: tuple[str, ...]  # forward passes over the rollouts for log-probabilities: what for
    values: tuple[str, ...]  # a critic's, which do without the output layer
    measure_every: int  # steps between measurements of two more gradients of an update; 0: none

    @property
    def completions(self) -> int:
        return self.rollouts + self.greedy

    @property
    def gradients(self) -> float:
        """Of an update, on average. Only the first update of a step is measured."""
        return 1.0 + (2 / self.measure_every / self.updates if self.measure_every else 0.0)


def plan_of(config: Config) -> plans.Plan:
    """The plan, made for data sets of a step's size: what it declares does not depend on them."""
    sizes = [config.train.prompts_per_step] * (1 + len(config.data.more_sets))
    return plans.make(config.sampling.plan, setting_of(config, sizes), config.sampling.plan_options)


def step_counts(config: Config) -> Counts:
    """What a step does, by its config. Raises ValueError for a plan that cannot be made."""
    train, loss, section = config.train, config.loss, config.estimator
    rollouts = train.prompts_per_step * config.sampling.group_size
    updates = rollouts // train.minibatch_rollouts
    scores = {
        "old log-probabilities": updates > 1,
        "those of the reference": loss.needs_reference,
        "the groups of rebel": loss.objective == "rebel" and updates > 1,
        f"the correction {loss.sampler_correction}": (
            loss.sampler_correction in OF_UPDATE and updates == 1
        ),
    }
    measured = definition(section.name).learn is not None
    return Counts(
        rollouts=rollouts,
        greedy=train.prompts_per_step if plan_of(config).greedy else 0,
        updates=updates,
        scores=tuple(what for what, needed in scores.items() if needed),
        values=("the critic's values", "its updates") if section.name == "gae" else (),
        measure_every=section.measure_every if measured else 0,
    )


def plan_note(config: Config) -> str:
    """What is assumed of a plan whose number of rollouts is not fixed; else empty."""
    if config.sampling.plan == "sequential":
        begun = plan_of(config).ask(0, Belief()).problems.size
        return f", the most that sequential asks for; it begins with {begun}"
    return ", the most that the plan may ask for" if ":" in config.sampling.plan else ""


@dataclass(frozen=True)
class Step:
    """Bounds on the parts of a step whose rows all have the same length."""

    sampling: Bound
    prefill: Bound
    passes: Bound  # over the rollouts, forward
    update: Bound
    flops: int

    @property
    def sample_seconds(self) -> float:
        return self.sampling.seconds + self.prefill.seconds

    @property
    def seconds(self) -> float:
        return self.sample_seconds + self.passes.seconds + self.update.seconds


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

    All slots are assumed busy, and each token's context is that of the middle of a completion. What
    is counted, ``step_counts`` says.
    """
    train, counts, width = config.train, step_counts(config), prompt + new
    sampler = computed_in(model_config, config.sampling.dtype)
    sampling_mesh = regrouped(mesh, config.mesh.sample_tensor)

    def sampled(completions: int) -> Bound:
        slots = max(1, min(train.sample_rollouts, completions))
        token = token_bound(sampler, sampling_mesh, chip, slots=slots, context=prompt + new // 2)
        return token.times(new * completions / slots)

    of_update = update_bound(
        model_config,
        mesh,
        chip,
        rows=train.minibatch_rollouts,
        width=width,
        microbatch=rollouts_per_pass(train, batch_shards(mesh)),
        gradients=counts.gradients,
    )
    rows = {"rows": counts.rollouts, "width": width}
    score = prefill_bound(model_config, mesh, chip, **rows, outputs=new)
    value = prefill_bound(model_config, mesh, chip, **rows, outputs=0)
    return Step(
        sampling=sampled(counts.rollouts).plus(sampled(counts.greedy)),
        prefill=prefill_bound(sampler, mesh, chip, rows=counts.completions, width=prompt),
        passes=score.times(len(counts.scores)).plus(value.times(len(counts.values))),
        update=of_update.times(counts.updates),
        flops=step_flops(counts, model_config, prompt=prompt, new=new),
    )


def step_flops(counts: Counts, model_config: ModelConfig, *, prompt: int, new: int) -> int:
    """FLOPs of a step on all devices together."""
    rows, width = counts.rollouts, prompt + new
    middle = costs.decode_step(model_config, rows=counts.completions, context=prompt + new // 2)
    first = costs.prefill(model_config, rows=counts.completions, width=prompt)
    score = costs.prefill(model_config, rows=rows, width=width, outputs=new)
    value = costs.prefill(model_config, rows=rows, width=width, outputs=0)
    trained = costs.update(model_config, rows=rows, width=width)
    passes = len(counts.scores) * score.flops + len(counts.values) * value.flops
    return round(new * middle.flops + first.flops + passes + counts.gradients * trained.flops)
