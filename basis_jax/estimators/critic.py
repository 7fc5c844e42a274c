"""Token-level advantages [N T] from rewards, KL penalties and a critic's values.

Arrays are token-aligned; ``mask`` is True on the tokens that the policy sampled, and everything
else (prompt, tool output, padding) may hold anything and gets 0. A rollout's reward counts at its
last True token. ``across`` says how the recursion passes False tokens between True ones: ``skip``
carries it over them unchanged (verl, tunix, NeMo); ``count`` treats them as steps of reward and
value 0 that are discounted too (OpenRLHF). Rows without True tokens get 0 everywhere; give an
invalid row such a mask.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Num

from basis_jax.estimators.ranges import (
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Number,
    OneOf,
    Options,
    Whole,
)
from basis_jax.estimators.rows import divide, estimate, nan_reported, read
from basis_jax.estimators.single import CONVENTIONS, standardise
from basis_jax.types import Estimate

ACROSS = ("skip", "count")


def terminal_rewards(rewards: Float[Array, " N"], mask: Bool[Array, "N T"]) -> Float[Array, "N T"]:
    """Token rewards: a rollout's reward at its last True token, 0 elsewhere.

    >>> mask = jnp.array([[False, True, True, True]])  # a prompt token, three sampled ones
    >>> estimators.terminal_rewards(jnp.float32([1]), mask).tolist()
    [[0.0, 0.0, 0.0, 1.0]]
    """
    later = jnp.cumsum(mask[:, ::-1].astype(jnp.int32), axis=1)[:, ::-1]
    return jnp.where(mask & (later == 1), rewards[:, None], 0)


@Options(discount=SHARE, across=OneOf(ACROSS))
def returns_to_go(
    token_rewards: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    discount: float = 1.0,
    across: str = "skip",
) -> Float[Array, "N T"]:
    """R_t = r_t + discount R_{t+1}: ``gae`` with values 0 and trace_decay 1.

    With r = terminal reward - kl_coef * kl this is REINFORCE++ and ReMax (reward minus greedy
    reward at the end) with the KL penalty in the reward. Errors as in ``gae``.

    >>> mask = jnp.array([[False, True, True, True]])  # a prompt token, three sampled ones
    >>> token_rewards = jnp.float32([[0, 0, 0, 1]])
    >>> estimators.returns_to_go(token_rewards, mask, discount=0.5).tolist()
    [[0.0, 0.25, 0.5, 1.0]]
    """
    zeros = jnp.zeros_like(token_rewards)
    return gae(token_rewards, zeros, mask, discount=discount, trace_decay=1.0, across=across)[0]


@Options(discount=SHARE, trace_decay=Number(0.0, 1.0, axes=None), across=OneOf(ACROSS))
def gae(
    token_rewards: Float[Array, "N T"],
    values: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    discount: float = 1.0,
    trace_decay: float | Float[Array, " N"] = 1.0,
    across: str = "skip",
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """(advantages, returns = advantages + values). Schulman et al. 2015, arXiv 1506.02438.

    d_t = r_t + discount V_{t+1} - V_t, A_t = d_t + discount trace_decay A_{t+1}, V = A = 0 after
    the end. No whitening: apply ``whiten`` to the advantages, never to the returns. With both
    decays 1, A_t = r - V_t. ``trace_decay`` may be one per rollout (``length_trace_decay``).
    ValueError for another ``across``, and unless 0 <= discount, trace_decay <= 1.

    >>> mask = jnp.array([[False, True, True, True]])  # a prompt token, three sampled ones
    >>> token_rewards, values = jnp.float32([[0, 0, 0, 1]]), jnp.float32([[0, 0.25, 0.5, 0.5]])
    >>> advantages, returns = estimators.gae(token_rewards, values, mask, trace_decay=0.5)
    >>> advantages.tolist(), returns.tolist()
    ([[0.0, 0.375, 0.25, 0.5]], [[0.0, 0.625, 0.75, 1.0]])
    """
    decay = jnp.broadcast_to(jnp.asarray(trace_decay, jnp.float32), mask.shape[:1])

    def backward(carry, token):
        next_value, next_advantage = carry
        reward, value, live = token
        reward, value = jnp.where(live, reward, 0), jnp.where(live, value, 0)
        advantage = reward + discount * next_value - value + discount * decay * next_advantage
        kept = live if across == "skip" else jnp.ones_like(live)
        carry = jnp.where(kept, value, next_value), jnp.where(kept, advantage, next_advantage)
        return carry, jnp.where(live, advantage, 0)

    start = jnp.zeros(mask.shape[0]), jnp.zeros(mask.shape[0])
    tokens = token_rewards.T, values.T, mask.T
    advantages = jax.lax.scan(backward, start, tokens, reverse=True)[1].T
    return advantages, jnp.where(mask, advantages + values, 0)


@nan_reported
def start_advantages(
    rewards: Num[ArrayLike, " N"],
    start_values: Float[ArrayLike, " N"],
    *,
    valid: Bool[ArrayLike, " N"] | None = None,
) -> Estimate:
    """A = r - V with the values of the prompts: ``gae`` and ``vineppo`` for whole completions.

    A run computes its metrics from these advantages, but trains on the token-level advantages of
    the functions ``gae`` and ``vineppo``. If both decays are 1, the advantage of ``gae`` at the
    first token equals this one. Raises ValueError unless all arrays are [N].

    >>> rewards, start_values = np.float32([1, 0]), np.float32([0.75, 0.25])
    >>> estimators.start_advantages(rewards, start_values).advantages.tolist()
    [0.25, -0.25]
    """
    rewards, valid = read(rewards, valid, start_values=start_values)
    values = jnp.asarray(start_values, jnp.float32)
    return estimate(rewards - values, values, valid)


@Options(alpha=POSITIVE)
def length_trace_decay(lengths: Int[Array, " N"], alpha: float) -> Float[Array, " N"]:
    """max(0, 1 - 1 / (alpha length)), the length-adaptive lambda of VAPO and SAO (alpha 1.5).
    ValueError unless alpha > 0.

    >>> print(estimators.length_trace_decay(jnp.array([1, 4, 100]), 1.5))
    [0.333 0.833 0.993]
    """
    return jnp.maximum(0, 1 - divide(jnp.ones(lengths.shape), alpha * lengths.astype(jnp.float32)))


@Options(convention=OneOf(tuple(CONVENTIONS)))
def whiten(
    x: Float[Array, "N T"], mask: Bool[Array, "N T"], *, convention: str = "openrlhf"
) -> Float[Array, "N T"]:
    """(x - mean) / sd over all True tokens of the batch, 0 elsewhere; conventions and errors as of
    ``standardise``.

    >>> mask = jnp.array([[False, True, True, True]])  # a prompt token, three sampled ones
    >>> print(estimators.whiten(jnp.float32([[9, 1, 2, 3]]), mask))
    [[ 0.    -1.225  0.     1.225]]
    """
    tokens = jnp.where(mask, x, 0).ravel()
    return standardise(tokens, mask.ravel().astype(x.dtype), convention)[0].reshape(x.shape)


@Options(discount=SHARE, kl_coef=NOT_NEGATIVE)
def remax_original(
    gains: Float[Array, " N"],
    kl: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    discount: float = 0.95,
    kl_coef: float = 0.1,
) -> Float[Array, "N T"]:
    """ReMax in its authors' code: discount^(L - t) (r - greedy) - kl_coef KL_t. arXiv 2310.10505.

    t = 0..L-1 counts True tokens, so even the last one is discounted once. KL_t is the penalty of
    token t alone, not a sum. ``gains``: reward minus the greedy completion's reward. ValueError
    unless 0 <= discount <= 1 and kl_coef >= 0.

    >>> mask = jnp.array([[False, True, True, True]])  # a prompt token, three sampled ones
    >>> gains, kl = jnp.float32([1]), jnp.float32([[0, 0.5, 0, 0]])
    >>> print(estimators.remax_original(gains, kl, mask, discount=0.5))
    [[0.    0.075 0.25  0.5  ]]
    """
    left = jnp.cumsum(mask[:, ::-1].astype(jnp.float32), axis=1)[:, ::-1]
    return jnp.where(mask, discount**left * gains[:, None] - kl_coef * kl, 0)


def vineppo(
    rewards: Float[Array, " N"],
    step_values: Float[Array, "N S"],
    steps: Int[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    estimated: Bool[Array, "N S"] | None = None,
) -> Float[Array, "N T"]:
    """A_step = r_step + V_next - V_this on all tokens of the step. arXiv 2410.01679.

    ``step_values``: the mean reward of fresh rollouts from the start of each step. ``steps``: the
    step of every token, 0..S-1; the rollout's last True token is in its last step. The reward
    belongs to the last step, and V = 0 after it. A step that is not ``estimated`` has
    V = r + V_next, so its A is 0.

    >>> mask = jnp.array([[False, True, True, True]])  # a prompt token, three sampled ones
    >>> steps = jnp.array([[0, 0, 0, 1]])  # the last token is a step of its own
    >>> step_values = jnp.float32([[0.5, 0.75]])  # mean reward from the start of each step
    >>> estimators.vineppo(jnp.float32([1]), step_values, steps, mask).tolist()
    [[0.0, 0.25, 0.25, 0.25]]
    """
    count = jnp.max(jnp.where(mask, steps, -1), axis=1) + 1
    index = jnp.arange(step_values.shape[1])[None, :]
    reward = jnp.where(index == count[:, None] - 1, rewards[:, None], 0)
    known = jnp.ones(step_values.shape, bool) if estimated is None else estimated

    def backward(following, step):
        value, reward, known, inside = step
        target = reward + following
        value = jnp.where(inside, jnp.where(known, value, target), 0)
        return value, jnp.where(inside, target - value, 0)

    columns = step_values.T, reward.T, known.T, (index < count[:, None]).T
    gains = jax.lax.scan(backward, jnp.zeros(count.shape), columns, reverse=True)[1].T
    return jnp.where(mask, jnp.take_along_axis(gains, jnp.where(mask, steps, 0), axis=1), 0)


@Options(k=Whole(1), trust=FINITE)
def sr_ppo(
    rewards: Float[Array, " N"],
    prefix_values: Float[Array, "N T"],
    prompt_values: Float[Array, " N"],
    mask: Bool[Array, "N T"],
    *,
    k: int = 4,
    trust: float = 1.0,
) -> Float[Array, "N T"]:
    """SR-PPO: A_t = q_t - q_{t-1} + trust (r - q_last), q = 1 - (1 - P)^k. arXiv 2606.25451.

    P is the critic's success probability after token t (``prefix_values``) or before the first
    token (``prompt_values``). Advantages are not normalised. False tokens are skipped. ValueError
    unless k is 1 or more and trust finite.

    >>> mask = jnp.array([[False, True, True, True]])  # a prompt token, three sampled ones
    >>> prefix_values, prompt_values = jnp.float32([[0, 0.5, 0.5, 1]]), jnp.float32([0.5])
    >>> estimators.sr_ppo(jnp.float32([1]), prefix_values, prompt_values, mask, k=1).tolist()
    [[0.0, 0.0, 0.0, 0.5]]
    """
    q = jnp.where(mask, 1 - (1 - prefix_values) ** k, 0)
    start = 1 - (1 - prompt_values) ** k

    def forward(previous, token):
        value, live = token
        return jnp.where(live, value, previous), jnp.where(live, value - previous, 0)

    final, gains = jax.lax.scan(forward, start, (q.T, mask.T))
    return jnp.where(mask, gains.T + trust * (rewards - final)[:, None], 0)
