"""PPO's critic: a linear value head on the policy's final states, with its own optimizer.

V_t = w . h_(t-1) / |h_(t-1)| + b is the value before token t, where h is the decoder's final hidden
state. The states have no gradient: the head learns beside the policy and does not change it. PPO's
usual critic is a second network of the policy's size. This head is our own, not from a paper. It
costs 3 (D + 1) numbers of memory and two forward passes per step. w and b start at 0, where the
advantages are the rewards.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from basis_jax import processes
from basis_jax.config import Config, CriticSection
from basis_jax.estimators import gae, terminal_rewards, whiten
from basis_jax.losses import value_loss
from basis_jax.model import decoder, lora
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.sharding import batch_shards, constrain, put_rows
from basis_jax.opening.checks import rollouts_per_pass
from basis_jax.opening.rollout_plan import CRITIC
from basis_jax.pytree import pytree
from basis_jax.sampling.rollouts import Graded, counted_tokens
from basis_jax.training.microbatches import cut_rows
from basis_jax.types import Batch, TokenCredit, TrainState


@pytree
class CriticState:
    """Part of a ``TrainState``; replicated on all devices."""

    head: dict[str, Any]  # weight [D], bias []
    opt_state: Any


class Critic(NamedTuple):
    """``credit(state, graded)`` is the step's credit by token, made before its updates.
    ``update(state, microbatches)`` -> state, metrics. ``alone(step)``: whether only the critic
    learns in this step."""

    credit: Callable[[TrainState, Graded], TokenCredit | None]
    update: Callable[[TrainState, list[Batch]], tuple[TrainState, dict[str, Array]]]
    alone: Callable[[int], bool]


def make_critic(config: Config, model_config: ModelConfig, mesh: Mesh) -> Critic:
    """The critic of a run, or one that passes the plan's credit on if ``estimator.name`` is not
    ``gae``."""
    if config.estimator.name != CRITIC:
        return Critic(
            lambda state, graded: graded.credit, lambda state, micros: (state, {}), lambda n: False
        )
    section = config.critic
    values = jax.jit(functools.partial(token_values, model_config))
    credit = jax.jit(functools.partial(credited, section))
    rows = rollouts_per_pass(config.train, batch_shards(mesh))

    def of_step(state: TrainState, graded: Graded) -> TokenCredit:
        r = graded.rollouts
        lengths, width = r.prompt_lengths + r.completion_lengths, r.tokens.shape[1]
        mask = np.asarray(counted_tokens(graded))
        found = np.zeros(mask.shape, np.float32)
        lengths = np.where(graded.valid, lengths, 0)
        policy = lora.whole(state.frozen, state.params)
        for index, narrow in cut_rows(lengths, rows=rows, max_width=width):
            part = put_rows(mesh, (r.tokens[index, :narrow], mask[index, :narrow]))
            found[index, :narrow] = processes.on_host(values(policy, state.critic.head, *part))
        return processes.on_host(credit(jnp.asarray(graded.rewards), found, mask))

    return Critic(
        of_step, make_critic_update(model_config, section), lambda n: n < section.warmup_steps
    )


def token_values(
    model_config: ModelConfig,
    params: PyTree,
    head: dict[str, Array],
    tokens: Int[Array, "N T"],
    mask: Bool[Array, "N T"],
) -> Float[Array, "N T"]:
    """The values before every token in the mask, 0 elsewhere."""
    hidden, _ = decoder.forward(params, model_config, tokens)
    hidden = jax.lax.stop_gradient(hidden).astype(jnp.float32)
    size = jnp.sqrt(jnp.sum(hidden**2, axis=-1, keepdims=True))
    direction = hidden / jnp.maximum(size, 1e-6)
    values = jnp.sum(direction * head["weight"][None, None], axis=-1) + head["bias"]
    return jnp.where(mask, jnp.pad(values[:, :-1], ((0, 0), (1, 0))), 0.0)


def credited(
    section: CriticSection,
    rewards: Float[Array, " N"],
    values: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
) -> TokenCredit:
    """The advantages of ``estimators.gae``, whitened over the tokens of the whole step where asked,
    and the returns, which are not."""
    token_rewards = terminal_rewards(jnp.where(jnp.any(mask, axis=1), rewards, 0.0), mask)
    advantages, returns = gae(
        token_rewards,
        values,
        mask,
        discount=section.discount,
        trace_decay=section.trace_decay,
    )
    if section.whiten:
        advantages = whiten(advantages, mask, convention="verl")
    first = jnp.argmax(mask, axis=1)
    start = jnp.take_along_axis(values, first[:, None], axis=1)[:, 0]
    return TokenCredit(advantages=advantages, returns=returns, values=values, start_values=start)


def make_optimizer(section: CriticSection) -> optax.GradientTransformation:
    return optax.adam(section.lr)


def first_critic(config: Config, model_config: ModelConfig, mesh: Mesh) -> CriticState | None:
    """The critic before the first step, or None if the run has none."""
    like = abstract_critic(config, model_config)
    if like is None:
        return None
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    return processes.put_everywhere(mesh, zeros)


def abstract_critic(config: Config, model_config: ModelConfig) -> CriticState | None:
    """The critic's shapes, or None if the run has none."""
    if config.estimator.name != CRITIC:
        return None

    def first() -> CriticState:
        head = {"weight": jnp.zeros(model_config.embed), "bias": jnp.float32(0)}
        return CriticState(head=head, opt_state=make_optimizer(config.critic).init(head))

    return jax.eval_shape(first)


def make_critic_update(
    model_config: ModelConfig, section: CriticSection
) -> Callable[[TrainState, list[Batch]], tuple[TrainState, dict[str, Array]]]:
    """Make the function (state, microbatches of an update) -> state, metrics: one step of Adam on
    ``value_loss``, summed over the microbatches. The policy is read only."""
    optimizer = make_optimizer(section)

    def loss(head: PyTree, params: PyTree, micro: Batch) -> Array:
        tokens, mask = jnp.asarray(micro.tokens), jnp.asarray(micro.completion_mask)
        values = token_values(model_config, params, head, tokens, mask)
        return value_loss(values, micro, clip=section.clip)

    def everywhere(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: constrain(x, (None,) * x.ndim), tree)

    @jax.jit
    def zero(head: PyTree) -> Any:
        return everywhere((jnp.float32(0), jax.tree.map(jnp.zeros_like, head)))

    @jax.jit
    def add(total: Any, head: PyTree, params: PyTree, frozen: PyTree, micro: Batch) -> Any:
        found = jax.value_and_grad(loss)(head, lora.whole(frozen, params), micro)
        return everywhere(jax.tree.map(jnp.add, total, found))

    @jax.jit
    def apply(critic: CriticState, total: Any) -> tuple[CriticState, dict[str, Array]]:
        value, gradient = total
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its counts with floats
            changes, opt_state = optimizer.update(gradient, critic.opt_state, critic.head)
        head = optax.apply_updates(critic.head, changes)
        told = {"critic/value_loss": value, "critic/grad_norm": optax.tree.norm(gradient)}
        return CriticState(head=head, opt_state=opt_state), told

    def update(state: TrainState, micros: list[Batch]) -> tuple[TrainState, dict[str, Array]]:
        total = zero(state.critic.head)
        for micro in micros:
            total = add(total, state.critic.head, state.params, state.frozen, micro)
        critic, told = apply(state.critic, total)
        return replace(state, critic=critic), told

    return update
