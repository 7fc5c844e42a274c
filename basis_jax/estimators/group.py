"""Estimators that compare the rollouts of one prompt: rows in groups of ``group_size``, adjacent.

All raise ValueError for group_size < 2, because a group of one has nothing to compare with, and for
rows that do not fill whole groups. Invalid rows are left out of their group's statistics. If a
group has only one valid rollout, its advantage is 0. ``info["degenerate_share"]`` is the share of
valid rows in groups whose rewards are all equal, which have no signal.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Num

from basis_jax.estimators.ranges import GROUP, OneOf, Options
from basis_jax.estimators.rows import (
    centre,
    divide,
    join,
    nan_reported,
    others_sum,
    split,
    total,
)
from basis_jax.estimators.single import CONVENTIONS, standardise
from basis_jax.types import Estimate

STD_EPS = {
    "trl": 1e-4,
    "trl_batch": 1e-4,
    "verl": 1e-6,
    "openrlhf": 1e-9,
    "oat": 1e-8,
    "nemo": 1e-6,
}


@nan_reported
@Options(group_size=GROUP)
def rloo(
    rewards: Num[ArrayLike, " N"], *, group_size: int, valid: Bool[ArrayLike, " N"] | None = None
) -> Estimate:
    """Leave-one-out baseline: b_i = mean of the other rewards in i's group. Kool et al. 2019;
    Ahmadian et al. 2024, arXiv 2402.14740. Unbiased: b_i does not depend on completion i.

    Raises ValueError for group_size < 2 and for rows that do not fill whole groups, as all
    estimators with a group_size do.

    >>> rewards = np.float32([1, 0, 0, 0, 1, 1, 1, 1])  # two prompts, four rollouts of each
    >>> print(estimators.rloo(rewards, group_size=4).values)
    [0.    0.333 0.333 0.333 1.    1.    1.    1.   ]
    """
    r, w = split(rewards, valid, group_size)
    others = total(w) - w
    baseline = divide(jax.vmap(others_sum)(w * r), others)
    return join(jnp.where(others > 0, r - baseline, 0), baseline, r, w)


@nan_reported
@Options(group_size=GROUP, convention=OneOf(tuple(STD_EPS)))
def grpo(
    rewards: Num[ArrayLike, " N"],
    *,
    group_size: int,
    valid: Bool[ArrayLike, " N"] | None = None,
    convention: str = "trl",
) -> Estimate:
    """A = (r - group mean) / (sd + eps), ddof = 1. Shao et al. 2024, arXiv 2402.03300, sect. 4.1.

    Mean and sd are those of the group, own reward included, with eps 1e-4 (``trl``), 1e-6
    (``verl``, also tunix), 1e-8 (``oat``) or 1e-9 (``openrlhf``). ``trl_batch`` is ``trl`` with the
    sd of all rewards of the batch. ``nemo``, eps 1e-6, takes mean and sd of the *other* rollouts
    and does not divide where that sd is 0. A degenerate group gives 0; in a nearly degenerate one
    advantages are amplified (2.47 for one success in 8).
    Raises ValueError as ``rloo``, and for another ``convention``.

    >>> rewards = np.float32([1, 0, 0, 0, 1, 1, 1, 1])  # two prompts, four rollouts of each
    >>> print(estimators.grpo(rewards, group_size=4).advantages)
    [ 1.5 -0.5 -0.5 -0.5  0.   0.   0.   0. ]
    """
    r, w = split(rewards, valid, group_size)
    eps = STD_EPS[convention]
    if convention == "nemo":
        mean, std = _others_moments(r, w)
        scale = jnp.where(std > 0, std + eps, 1)
        return join(jnp.where(total(w) > 1, (r - mean) / scale, 0), mean, r, w)
    centred, mean = centre(r, w)
    around = centre(r.reshape(1, -1), w.reshape(1, -1))[0] if convention == "trl_batch" else centred
    weights = w.reshape(around.shape)
    variance = divide(total(weights * around**2), total(weights) - 1)
    return join(centred / (jnp.sqrt(variance).reshape(r.shape) + eps), mean, r, w)


def _others_moments(
    r: Float[Array, "B G"], w: Float[Array, "B G"]
) -> tuple[Float[Array, "B G"], Float[Array, "B G"]]:
    """Mean and sd (ddof = 1; 0 where fewer than two) of the other rollouts of the group."""
    others = w[:, None, :] * (1 - jnp.eye(r.shape[1]))[None]  # [b, g, k]: k is not g
    x = jnp.broadcast_to(r[:, None, :], others.shape)
    deviations, means = centre(x, others)
    variance = divide(jnp.sum(others * deviations**2, 2), jnp.sum(others, 2) - 1)
    return means[:, :, 0], jnp.sqrt(variance)


@nan_reported
@Options(group_size=GROUP)
def dr_grpo(
    rewards: Num[ArrayLike, " N"], *, group_size: int, valid: Bool[ArrayLike, " N"] | None = None
) -> Estimate:
    """A = r - group mean, own reward included: (G - 1) / G times RLOO. Liu et al. 2025,
    arXiv 2503.20783; the paper's loss divides by a constant length (``constant_length``).
    Raises ValueError as ``rloo``.

    >>> rewards = np.float32([1, 0, 0, 0, 1, 1, 1, 1])  # two prompts, four rollouts of each
    >>> print(estimators.dr_grpo(rewards, group_size=4).advantages)
    [ 0.75 -0.25 -0.25 -0.25  0.    0.    0.    0.  ]
    """
    r, w = split(rewards, valid, group_size)
    centred, mean = centre(r, w)
    return join(centred, mean, r, w)


@nan_reported
@Options(group_size=GROUP)
def opo(
    rewards: Num[ArrayLike, " N"],
    lengths: Num[ArrayLike, " N"],
    *,
    group_size: int,
    valid: Bool[ArrayLike, " N"] | None = None,
) -> Estimate:
    """A = r - sum l r / sum l over the group, own reward included. Hao et al. 2025, 2505.23585.

    The variance-optimal baseline if the squared norm of grad log pi grows as the length l; under a
    token-mean loss every group's tokens then sum to 0. Raises ValueError as ``rloo``.

    >>> rewards, lengths = np.float32([1, 0, 1, 1]), np.array([7, 5, 9, 3])  # two prompts, two each
    >>> print(estimators.opo(rewards, lengths, group_size=2).advantages)
    [ 0.417 -0.583  0.     0.   ]
    """
    r, w = split(rewards, valid, group_size, lengths=lengths)
    tokens = jnp.asarray(lengths, jnp.float32).reshape(r.shape)
    centred, mean = centre(r, jnp.where(w > 0, tokens, 0))
    return join(centred, mean, r, w)


@nan_reported
@Options(group_size=GROUP, convention=OneOf(("authors", "verl")))
def gpg(
    rewards: Num[ArrayLike, " N"],
    *,
    group_size: int,
    valid: Bool[ArrayLike, " N"] | None = None,
    convention: str = "authors",
) -> Estimate:
    """A = alpha (r - group mean), own reward included. Chu et al. 2025, arXiv 2504.02546.

    alpha makes up for rows without gradient. ``authors``: valid rows divided by the valid rows of
    groups with two different rewards. ``verl``: valid rows divided by those with a reward other
    than 0, which is another quantity: with rewards of -1 and 1 it is always 1. If no row counts, A
    is 0. Raises ValueError as ``rloo``, and for another ``convention``.

    >>> rewards = np.float32([1, 0, 0, 0, 1, 1, 1, 1])  # two prompts, four rollouts of each
    >>> print(estimators.gpg(rewards, group_size=4).advantages)
    [ 1.5 -0.5 -0.5 -0.5  0.   0.   0.   0. ]
    """
    r, w = split(rewards, valid, group_size)
    centred, mean = centre(r, w)
    informative = total(jnp.abs(centred)) > 0 if convention == "authors" else r != 0
    counted = jnp.sum(w * informative.astype(jnp.float32))
    alpha = jnp.sum(w) / jnp.maximum(counted, 1)
    return join(alpha * centred, mean, r, w, alpha=alpha)


@nan_reported
@Options(group_size=GROUP, convention=OneOf(tuple(CONVENTIONS)))
def reinforce_pp_baseline(
    rewards: Num[ArrayLike, " N"],
    lengths: Num[ArrayLike, " N"],
    *,
    group_size: int,
    valid: Bool[ArrayLike, " N"] | None = None,
    convention: str = "openrlhf",
) -> Estimate:
    """REINFORCE++-baseline: r - group mean (own reward included), then ``standardise`` over the
    batch. Hu et al. 2025, arXiv 2501.03262; the KL term belongs to the loss.

    The token-weighted mean over the batch shifts all advantages. So a group with equal rewards does
    not get 0 but -mean / sd, which pushes prompts that have no signal. ``values`` are the group
    means. Raises ValueError as ``rloo`` and ``standardise``.

    >>> rewards, lengths = np.float32([1, 0, 1, 1]), np.array([7, 5, 9, 3])  # two prompts, two each
    >>> print(estimators.reinforce_pp_baseline(rewards, lengths, group_size=2).advantages)
    [ 1.305 -1.543 -0.119 -0.119]
    """
    r, w = split(rewards, valid, group_size, lengths=lengths)
    tokens = jnp.where(w > 0, jnp.asarray(lengths, jnp.float32).reshape(r.shape), 0)
    centred, mean = centre(r, w)
    advantages, _ = standardise(centred.ravel(), tokens.ravel(), convention)
    return join(advantages.reshape(r.shape), mean, r, w)
