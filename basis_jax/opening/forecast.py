"""Least time of a step, and the cost of the reference table, for a config on a chip."""

import inspect
import os
from dataclasses import dataclass

from jax.sharding import AbstractMesh, Mesh

from basis_jax import plans
from basis_jax.config import Config, DataSection
from basis_jax.corrections import OF_UPDATE
from basis_jax.data.sources import load_more, load_training
from basis_jax.estimators import definition
from basis_jax.files import home
from basis_jax.model import costs
from basis_jax.model.chips import Chip
from basis_jax.model.decoder import ModelConfig, computed_in
from basis_jax.model.roofline import Bound, prefill_bound, token_bound, update_bound
from basis_jax.model.sharding import batch_shards, regrouped
from basis_jax.opening.plan import rollouts_per_pass
from basis_jax.opening.rollout_plan import CRITIC, setting_of

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
    if count is None and (path.startswith("task:") or os.path.exists(home(path))):
        loaded = load_training(section) if path == section.path else load_more(path, section)
        count = len(loaded)
    return min(section.size or count, count) if count else section.size or None


@dataclass(frozen=True)
class Counts:
    """How often a step does what takes time, when its plan asks for the most rollouts. Evaluations
    and a critic's warm-up are not counted."""

    rollouts: int  # trained on
    greedy: int  # completions beside them
    branches: int  # completions from the steps of rollouts
    branched: float  # whole completions with as many tokens as all branches sample
    updates: int
    scores: tuple[str, ...]  # what needs a forward pass over the rollouts for log-probabilities
    values: tuple[str, ...]  # what needs a pass without the output layer, for a critic
    measure_every: int  # steps between measurements of two more gradients of an update; 0: none

    @property
    def completions(self) -> float:
        """Completions sampled, counted in whole ones."""
        return self.rollouts + self.greedy + self.branched

    @property
    def gradients(self) -> float:
        """Gradients per update, on average. Only the first update of a step is measured."""
        return 1.0 + (2 / self.measure_every / self.updates if self.measure_every else 0.0)


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
    sizes = [train.prompts_per_step] * (1 + len(config.data.more_sets))  # as good as the true ones
    plan = plans.make(config.sampling.plan, setting_of(config, sizes), config.sampling.plan_options)
    branches, branched = branches_of(config)
    measured = definition(section.name).learn is not None
    return Counts(
        rollouts=rollouts,
        greedy=train.prompts_per_step if plan.greedy else 0,
        branches=branches,
        branched=branched,
        updates=updates,
        scores=tuple(what for what, needed in scores.items() if needed),
        values=("the critic's values", "its updates") if section.name == CRITIC else (),
        measure_every=section.measure_every if measured else 0,
    )


def branches_of(config: Config) -> tuple[int, float]:
    """``Counts.branches`` and ``Counts.branched`` of the plan ``branch``, if rollouts have as many
    steps as it samples from, of equal length. Rollouts of a problem share its first step."""
    if config.sampling.plan != "branch":
        return 0, 0.0
    prompts, group = config.train.prompts_per_step, config.sampling.group_size
    each, later = plan_option(config, "rollouts"), group * (branch_steps(config) - 1)
    return each * prompts * (1 + later), each * prompts * (1 + later / 2)


def branch_steps(config: Config) -> int:
    """The most steps of a rollout that the plan ``branch`` samples from."""
    return min(plan_option(config, "most"), config.sampling.max_new_tokens)


def plan_option(config: Config, name: str) -> int:
    """An option of the plan, which may be its default."""
    options = config.sampling.plan_options
    parameters = inspect.signature(plans.find(config.sampling.plan, options)).parameters
    return int(options.get(name, parameters[name].default))


def described(config: Config) -> list[str]:
    """Lines that say what is counted in a step, what is assumed and what is left out."""
    counts, plan = step_counts(config), config.sampling.plan
    assumed = ""
    if plan == "sequential":
        first = config.train.prompts_per_step * plan_option(config, "first")
        assumed = f", the most that sequential asks for; it begins with {first}"
    elif ":" in plan:
        assumed = ", the most that the plan may ask for"
    lines = [f"counted in a step: {counts.rollouts} rollouts{assumed}"]
    if counts.greedy:
        lines.append(f"    {counts.greedy} greedy completions beside them")
    if counts.branches:
        each, steps = plan_option(config, "rollouts"), branch_steps(config)
        lines.append(
            f"    {counts.branches} completions from steps of the rollouts, with the tokens of "
            f"{counts.branched:.0f} whole ones: {each} from each of {steps} steps, the most"
        )
    if passes := (*counts.scores, *counts.values):
        lines.append(f"    forward passes over the rollouts for {', '.join(passes)}")
    lines.append(
        f"    updates: {counts.updates}, each over {config.train.minibatch_rollouts} rollouts"
    )
    if every := counts.measure_every:
        lines.append(f"    two more gradients of an update every {every} steps, spread evenly")
    own = ", completions for the credit of your own plan" * (":" in plan)
    return [*lines, f"    not counted: evaluations, checkpoints, grading{own}"]


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

    All slots are assumed busy, and each token's context is that of the middle of a completion,
    where branches begin on average. ``step_counts`` says what is counted.
    """
    train, counts, width = config.train, step_counts(config), prompt + new
    sampler = computed_in(model_config, config.sampling.dtype)
    sampling_mesh = regrouped(mesh, config.mesh.sample_tensor)

    def sampled(rows: int, whole: float) -> Bound:
        slots = max(1, min(train.sample_rollouts, rows))
        token = token_bound(sampler, sampling_mesh, chip, slots=slots, context=prompt + new // 2)
        return token.times(new * whole / slots)

    def prefilled(rows: int, width: int) -> Bound:
        return prefill_bound(sampler, mesh, chip, rows=rows, width=width)

    trained, greedy = (sampled(rows, float(rows)) for rows in (counts.rollouts, counts.greedy))
    prompts = prefilled(counts.rollouts + counts.greedy, prompt)
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
        sampling=trained.plus(greedy).plus(sampled(counts.branches, counts.branched)),
        prefill=prompts.plus(prefilled(counts.branches, prompt + new // 2)),
        passes=score.times(len(counts.scores)).plus(value.times(len(counts.values))),
        update=of_update.times(counts.updates),
        flops=step_flops(counts, model_config, prompt=prompt, new=new),
    )


def step_flops(counts: Counts, model_config: ModelConfig, *, prompt: int, new: int) -> int:
    """FLOPs of a step, on all devices together."""
    rows, width = counts.rollouts, prompt + new
    middle = costs.decode_step(model_config, rows=1, context=prompt + new // 2)
    first = costs.prefill(model_config, rows=rows + counts.greedy, width=prompt)
    begun = costs.prefill(model_config, rows=counts.branches, width=prompt + new // 2)
    score = costs.prefill(model_config, rows=rows, width=width, outputs=new)
    value = costs.prefill(model_config, rows=rows, width=width, outputs=0)
    trained = costs.update(model_config, rows=rows, width=width)
    passes = len(counts.scores) * score.flops + len(counts.values) * value.flops
    sampled = new * counts.completions * middle.flops + first.flops + begun.flops
    return round(sampled + passes + counts.gradients * trained.flops)
