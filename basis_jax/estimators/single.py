"""Stateless estimators for one rollout per prompt: REINFORCE and batch baselines.

A mean over rollouts can count each rollout once (sequence weighting) or once per completion token
(token weighting). Use the weighting of the loss: token weighting with ``token_mean``, sequence
weighting with ``sequence_mean``.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Num

from basis_jax.estimators.ranges import SWITCH, OneOf, Options
from basis_jax.estimators.rows import (
    centre,
    divide,
    estimate,
    nan_reported,
    others_sum,
    read,
    total,
)
from basis_jax.types import Estimate

# variance -> 1 / sd
CONVENTIONS = {
    "openrlhf": lambda variance: 1 / jnp.sqrt(jnp.maximum(variance, 1e-8)),
    "verl": lambda variance: 1 / jnp.sqrt(variance + 1e-8),
    "spo_pp": lambda variance: 1 / (jnp.sqrt(variance) + 1e-8),
    "sequence": lambda variance: 1 / (jnp.sqrt(variance) + 1e-8),
}


@nan_reported
def reinforce(
    rewards: Num[ArrayLike, " N"], *, valid: Bool[ArrayLike, " N"] | None = None
) -> Estimate:
    """A_i = r_i, no baseline. Williams 1992. With 0/1 rewards only successes have a gradient.

    Raises ValueError for rows of unequal length, as every estimator does.

    >>> estimators.reinforce(np.float32([1, 0, 1, 0])).advantages.tolist()
    [1.0, 0.0, 1.0, 0.0]
    """
    rewards, valid = read(rewards, valid)
    return estimate(rewards, jnp.zeros_like(rewards), valid)


@nan_reported
@Options(leave_one_out=SWITCH)
def batch_mean(
    rewards: Num[ArrayLike, " N"],
    *,
    valid: Bool[ArrayLike, " N"] | None = None,
    leave_one_out: bool = True,
) -> Estimate:
    """A_i = r_i - mean of the batch, by default of the other rows.

    With ``leave_one_out=False`` the own reward is part of the mean, which shrinks the gradient by
    (N - 1) / N. A row that is alone in its batch has the baseline 0; without ``leave_one_out``, its
    own reward.

    >>> print(estimators.batch_mean(np.float32([1, 0, 0, 0])).values)
    [0.    0.333 0.333 0.333]
    >>> estimators.batch_mean(np.float32([1, 0, 0, 0]), leave_one_out=False).values.tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    rewards, valid = read(rewards, valid)
    weights = valid.astype(jnp.float32)
    own = weights if leave_one_out else jnp.zeros_like(weights)
    summed = others_sum(rewards) if leave_one_out else jnp.sum(rewards) - own * rewards
    baseline = divide(summed, jnp.sum(weights) - own)
    return estimate(rewards - baseline, baseline, valid)


@nan_reported
def remax(
    rewards: Num[ArrayLike, " N"],
    greedy_rewards: Num[ArrayLike, " N"],
    *,
    valid: Bool[ArrayLike, " N"] | None = None,
) -> Estimate:
    """A = r - reward of one greedy completion of the same prompt. Li et al. 2023, 2310.10505.

    Costs a second completion per prompt. A is 0 where both rewards are equal, and where the greedy
    reward is NaN.

    >>> greedy_rewards = np.float32([1, 1, 0])
    >>> estimators.remax(np.float32([1, 0, 1]), greedy_rewards).advantages.tolist()
    [0.0, -1.0, 1.0]
    """
    rewards, valid = read(rewards, valid, greedy_rewards=greedy_rewards)
    greedy = jnp.asarray(greedy_rewards, jnp.float32)
    valid = valid & jnp.isfinite(greedy)
    return estimate(rewards - greedy, greedy, valid)


@nan_reported
@Options(convention=OneOf(tuple(CONVENTIONS)))
def reinforce_pp(
    rewards: Num[ArrayLike, " N"],
    lengths: Num[ArrayLike, " N"],
    *,
    valid: Bool[ArrayLike, " N"] | None = None,
    convention: str = "openrlhf",
) -> Estimate:
    """REINFORCE++ without KL in the reward: A = (r - mean) / sd over the whole batch. Mean and sd
    include the own reward. Hu et al. 2025, arXiv 2501.03262. ``lengths`` are numbers of completion
    tokens. Conventions and errors as in ``standardise``.

    >>> rewards, lengths = np.float32([1, 0, 1, 0]), np.array([7, 5, 9, 3])
    >>> print(estimators.reinforce_pp(rewards, lengths).advantages)
    [ 0.707 -1.414  0.707 -1.414]
    >>> valid = np.array([True, True, False, True])  # the verifier failed on row 2
    >>> print(estimators.reinforce_pp(rewards, lengths, valid=valid).advantages)
    [ 1.069 -0.935  0.    -0.935]
    """
    rewards, valid = read(rewards, valid, lengths=lengths)
    weights = jnp.where(valid, jnp.asarray(lengths, jnp.float32), 0)
    advantages, mean = standardise(rewards, weights, convention)
    return estimate(advantages, mean, valid)


@Options(convention=OneOf(tuple(CONVENTIONS)))
def standardise(
    x: Float[Array, " N"], lengths: Float[Array, " N"], convention: str
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """((x - mean) / sd, mean) over the rows with length > 0. L = sum of lengths.

    ``openrlhf``: token-weighted mean, population variance, / sqrt(max(var, 1e-8));
    ``verl``: token-weighted, variance * L / (L - 1), / sqrt(var + 1e-8);
    ``spo_pp``: token-weighted, variance * L / (L - 1), / (sd + 1e-8) (arXiv 2608.24870);
    ``sequence``: every row once, ddof = 1, / (sd + 1e-8) (SPO, arXiv 2509.13232).
    Equal x, a single token and a single row give exactly 0. ValueError for another convention.

    >>> x, lengths = jnp.float32([1, 0, 1, 0]), jnp.float32([1, 1, 1, 3])
    >>> standardised, mean = estimators.standardise(x, lengths, "verl")
    >>> print(standardised, mean)
    [ 1.291 -0.645  1.291 -0.645] [0.333 0.333 0.333 0.333]
    """
    weights = (lengths > 0).astype(x.dtype) if convention == "sequence" else lengths
    centred, mean = centre(x, weights)
    ddof = 0 if convention == "openrlhf" else 1
    variance = divide(total(weights * centred**2), total(weights) - ddof)
    return centred * CONVENTIONS[convention](variance), mean
