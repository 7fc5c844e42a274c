"""The parts of a training step: state, estimate, jitted update, metrics. ``loop.py`` uses them."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from basis_jax import processes
from basis_jax.config import LossSection, OptimSection
from basis_jax.estimators import Estimator, noise_report
from basis_jax.model import decoder, lora
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.sharding import named_tree
from basis_jax.sampling.rollouts import Graded, counted_tokens
from basis_jax.training.first_pass import make_first_pass
from basis_jax.training.gradient_sum import make_gradient_sum
from basis_jax.training.measure import make_measure
from basis_jax.training.moments import kept_in_bfloat16
from basis_jax.training.objective import policy_objective
from basis_jax.types import Batch, Estimate, Measurement, Signals, TokenCredit, TrainState
from basis_jax.verify.verdicts import RIGHT_ABOVE, shares

ADAMW = OptimSection()


def learning_rate(section: OptimSection, *, updates: int) -> optax.Schedule:
    """Learning rate by number of earlier updates: a warm-up, then a schedule up to ``updates``."""
    decay = max(1, updates - section.warmup_steps)
    main_schedule = {
        "constant": optax.constant_schedule(section.lr),
        "linear": optax.linear_schedule(section.lr, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(section.lr, decay),
    }[section.schedule]
    share = section.lr / (section.warmup_steps + 1)  # the first update learns too
    warmup = optax.linear_schedule(share, section.lr, max(1, section.warmup_steps))
    return optax.join_schedules([warmup, main_schedule], [section.warmup_steps])


def make_optimizer(section: OptimSection, *, updates: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW with the schedule ``learning_rate``. Its moments are kept in
    ``optim.moments_dtype``."""
    schedule = learning_rate(section, updates=updates)
    adamw = optax.adamw(
        schedule, b1=section.b1, b2=section.b2, eps=section.eps, weight_decay=section.weight_decay
    )
    if section.moments_dtype == "bfloat16":
        adamw = kept_in_bfloat16(adamw)
    if section.max_grad_norm > 0:
        return optax.chain(optax.clip_by_global_norm(section.max_grad_norm), adamw)
    return adamw


def make_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    estimator_state: PyTree,
    *,
    model_config: ModelConfig,
    mesh: Mesh,
    frozen: PyTree = None,
    critic: PyTree = None,
) -> TrainState:
    """The state before the first step, laid out like ``abstract_state``, with ``frozen`` and
    ``critic`` added."""
    like = abstract_state(optimizer, estimator_state, model_config=model_config, mesh=mesh)

    def layout(tree):
        return jax.tree.map(lambda x: x.sharding, tree)

    return TrainState(
        step=processes.put_everywhere(mesh, np.int32(0)),
        params=params,
        opt_state=jax.jit(optimizer.init, out_shardings=layout(like.opt_state))(params),
        estimator_state=processes.put_everywhere(mesh, estimator_state),
        frozen=frozen,
        critic=critic,
    )


def abstract_state(
    optimizer: optax.GradientTransformation,
    estimator_state: PyTree,
    *,
    model_config: ModelConfig,
    mesh: Mesh,
    critic: PyTree = None,
) -> TrainState:
    """Shapes and layout of the state, without arrays: what a checkpoint is restored into.

    Optimizer moments have the sharding of their parameters. The estimator's state and ``critic``,
    the critic's shapes, are replicated on every device.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def first(whole, estimator_state, critic):
        params = lora.trained(whole)
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=optimizer.init(params),
            estimator_state=estimator_state,
            frozen=lora.frozen(whole),
            critic=critic,
        )

    shapes = jax.eval_shape(first, decoder.param_shapes(model_config), estimator_state, critic)
    of_whole = named_tree(mesh, decoder.param_axes(model_config))
    of_params = lora.trained(of_whole)
    of_moments = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes.opt_state,
        of_params,
        transform_non_params=lambda _: everywhere,
    )
    of_estimator, of_critic = jax.tree.map(lambda _: everywhere, (estimator_state, critic))
    of_frozen = lora.frozen(of_whole)
    parts = (everywhere, of_params, of_moments, of_estimator, of_frozen, of_critic)
    layout = jax.tree.leaves(parts)
    leaves = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x, sharding in zip(jax.tree.leaves(shapes), layout, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


LARGEST_NATURAL_NORM = 1e3  # of one token; a probability of 0.001 has it


def make_estimate(
    estimator: Estimator, *, aggregation: str = "token_mean", score_norms: str = "logits"
) -> Callable[..., tuple[PyTree, Estimate]]:
    """The estimator's jitted step over the whole batch, before any split.

    The estimate's info includes ``noise_report``. The given state is donated: a step writes the
    batch's problems in place and copies nothing else. ``credit``: the step's credit by token, if it
    has one; its ``start_values`` become those of the signals.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: PyTree, signals: Signals) -> tuple[PyTree, Estimate]:
        state, found = estimator.update(state, signals)
        return state, replace(found, info=found.info | noise_report(signals, found))

    def estimate(
        state: PyTree, graded: Graded, credit: TokenCredit | None = None
    ) -> tuple[PyTree, Estimate]:
        signals = make_signals(graded, aggregation=aggregation, score_norms=score_norms)
        if credit is not None:
            signals = replace(signals, start_values=jnp.asarray(credit.start_values))
        return update(state, signals)

    return estimate


def make_learn(estimator: Estimator) -> Callable[[PyTree, Measurement], PyTree]:
    """The jitted function (estimator state, measurement) -> estimator state; donates the state."""
    return jax.jit(estimator.learn or (lambda state, measurement: state), donate_argnums=0)


def make_signals(graded: Graded, *, aggregation: str, score_norms: str) -> Signals:
    """What estimators see of the rollouts.

    ``score_norms`` is ``logits``, as the sampler recorded them, or ``natural``, the sum of
    1 / p - 1 over the tokens. The latter is the squared norm of a token's score in the Fisher
    metric of its distribution. In this metric all directions are equally noisy, as they are for
    AdamW. Score norms are scaled as in the loss: ``sequence_mean`` divides a completion's gradient
    by its length.
    """
    rollouts = graded.rollouts
    lengths = np.asarray(rollouts.completion_lengths)
    norms = np.asarray(rollouts.score_norms)
    if score_norms == "natural":
        surprises = np.expm1(-np.asarray(rollouts.sampler_logprobs))  # 0 outside the completion
        norms = np.sum(np.minimum(surprises, np.float32(LARGEST_NATURAL_NORM)), axis=1)
    if aggregation == "sequence_mean":
        norms = norms / np.maximum(lengths, 1).astype(np.float32) ** 2
    return Signals(
        rewards=jnp.asarray(graded.rewards),
        valid=jnp.asarray(graded.valid),
        problem_ids=jnp.asarray(rollouts.problem_ids),
        lengths=jnp.asarray(lengths),
        score_norms=jnp.asarray(norms),
        logprob_sum=jnp.asarray(np.sum(rollouts.sampler_logprobs, axis=1)),
        **{name: jnp.asarray(found) for name, found in graded.signals.items()},
    )


def finish_step(state: TrainState, estimator_state: PyTree) -> TrainState:
    """The state after all updates of a step."""
    return replace(state, step=state.step + 1, estimator_state=estimator_state)


def newest_learning_rate(schedule: optax.Schedule, opt_state: PyTree) -> float:
    """The learning rate of the newest update, or of the first one if there was none yet."""
    counts = [int(count) for _, count in optax.tree.get_all_with_path(opt_state, "count")]
    return float(schedule(max(0, counts[0] - 1)))


def merge_updates(outcomes: list[dict[str, Float[Array, ""]]]) -> dict[str, float]:
    """Metrics of a step's updates: their mean, or their maximum if the name says so.

    Raises ValueError if a gradient or an update is not finite: the parameters are then unusable.
    """
    outcomes = jax.device_get(outcomes)
    norms = ("policy/grad_norm", "policy/update_norm", "critic/grad_norm")
    if not all(np.isfinite(o.get(name, 0.0)) for o in outcomes for name in norms):
        raise ValueError(
            "the update of this step is not finite, and none of it is saved; likely causes, in "
            "this order, are token ids beyond the model's vocabulary, NaN in the model's weights, "
            "bfloat16 (set model.compute_dtype to float32) and too high an optim.lr; the same "
            "command would come to this step again, so give another --run-dir too"
        )
    merged = {}
    for name in outcomes[0] if outcomes else ():
        values = [o[name] for o in outcomes]
        merged[name] = float(np.max(values) if name.endswith("_max") else np.mean(values))
    return merged


def make_update(
    model_config: ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    optim: OptimSection = ADAMW,
    loss: LossSection,
    temperature: float,
    microbatch: int,
    group_size: int = 1,
    rollouts: int = 0,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Make the function (state, microbatches) -> state, metrics: one optimizer update.

    It sums the gradients of ``state.params`` over the microbatches. Their ``loss_weights`` include
    the global denominators, so the sum is the gradient of the whole update, however it is split.
    Nothing is copied to the host until the metrics are read. Parameters and moments are donated;
    ``step`` and the estimator's state are passed on unchanged. With ``measured=True`` the metrics
    also hold a ``Measurement``, which uses AdamW's settings in ``optim``. ``group_size`` and
    ``rollouts``, those of an update, are for losses that compare the rollouts of a prompt.
    """
    objective = functools.partial(
        policy_objective,
        model_config=model_config,
        loss=loss,
        temperature=temperature,
        microbatch=microbatch,
    )
    axes = lora.trained(decoder.param_axes(model_config))
    first_pass = make_first_pass(
        model_config,
        loss=loss,
        temperature=temperature,
        microbatch=microbatch,
        group_size=group_size,
        rollouts=rollouts,
    )
    gradient_sum = make_gradient_sum(objective, axes)
    without_kl = functools.partial(objective, loss=replace(loss, kl_coef=0.0))
    measure = make_measure(
        make_gradient_sum(without_kl, axes) if loss.kl_coef else gradient_sum, optim
    )
    apply = jax.jit(functools.partial(apply_gradients, optimizer), donate_argnums=(0, 1))

    def update(
        state: TrainState, micros: list[Batch], *, measured: bool = False
    ) -> tuple[TrainState, dict[str, Any]]:
        micros = first_pass(state, micros)
        found = {"measurement": measure(state, micros)} if measured else {}
        total = gradient_sum(state.params, state.frozen, micros)
        params, opt_state, metrics = apply(state.params, state.opt_state, total)
        return replace(state, params=params, opt_state=opt_state), metrics | found

    return update


def apply_gradients(
    optimizer: optax.GradientTransformation, params: PyTree, opt_state: PyTree, total: PyTree
) -> tuple[PyTree, PyTree, dict[str, Float[Array, ""]]]:
    """Parameters and moments after one optimizer step, and the update's metrics per token."""
    gradients, (sums, gap) = total
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its counts with floats
        changes, opt_state = optimizer.update(gradients, opt_state, params)
    tokens = jnp.maximum(sums["tokens"], 1.0)
    metrics = {k: v if k == "policy/loss" else v / tokens for k, v in sums.items()}
    del metrics["tokens"]
    metrics["sampler/logprob_gap_max"] = gap
    metrics["policy/grad_norm"] = optax.tree.norm(gradients)
    metrics["policy/update_norm"] = optax.tree.norm(changes)
    return optax.apply_updates(params, changes), opt_state, metrics


def reward_metrics(
    graded: Graded, estimate: Estimate, credit: TokenCredit | None = None
) -> dict[str, float]:
    """Metrics of a step's rewards, verdicts, lengths and value estimates.

    ``reward/accuracy`` is the share of valid rows with a reward above 1/2; for rewards of 0 and 1
    this is the share of right completions. With several rewards it uses the verifier's own reward,
    and ``rewards/...`` is the unweighted mean of each. ``estimate/value_error`` is the mean of
    (reward - value)^2 over valid rows. It is the squared error of the values plus the variance of
    the rewards, which is E[V (1 - V)] for rewards of 0 and 1. So only differences between runs are
    meaningful. Absent rows are not counted anywhere. With ``credit`` by token, advantages are
    those of the tokens that count.
    """
    valid, present = graded.valid, graded.present
    lengths, ended = graded.rollouts.completion_lengths, graded.rollouts.terminated
    rewards = graded.rewards[valid]
    own = next(iter(graded.parts.values()), graded.rewards)[valid]
    advantages = np.asarray(estimate.advantages)[valid]
    if credit is not None:
        advantages = np.asarray(credit.advantages)[np.asarray(counted_tokens(graded))]
    errors = (graded.rewards - np.asarray(estimate.values))[valid] ** 2
    metrics = {
        "reward/mean": rewards.mean() if rewards.size else 0.0,
        "reward/accuracy": (own > RIGHT_ABOVE).mean() if rewards.size else 0.0,
        "reward/variance": rewards.var() if rewards.size else 0.0,
        "reward/invalid": 1.0 - valid[present].mean(),
        "estimate/value_error": errors.mean() if rewards.size else 0.0,
        "estimate/advantage_abs": np.abs(advantages).mean() if advantages.size else 0.0,
        "completion/length_mean": lengths[present].mean(),
        "completion/truncated": 1.0 - ended[present].mean(),
        "time/sample_s": graded.sample_seconds,
        "time/verify_s": graded.verify_seconds,
        "throughput/sample_tokens_per_s": graded.tokens / graded.sample_seconds,
    }
    metrics |= shares([graded.kinds[i] for i in np.flatnonzero(present)]) | graded.plan_metrics
    for name, part in graded.parts.items():
        metrics[f"rewards/{name}"] = part[valid].mean() if rewards.size else 0.0
    for name, value in estimate.info.items():
        if np.ndim(value) == 0:
            metrics[f"estimate/{name}"] = value
    if credit is not None:
        metrics["estimate/zero_share"] = (advantages == 0).mean() if advantages.size else 0.0
    return {name: float(value) for name, value in metrics.items()}
