"""Group estimators for pass@k, for the best rollout alone, and for varied right rollouts.

Groups, invalid rows and errors as in ``group.py``. Where it says "rewards 0 or 1", one outside
[0, 1] is a ValueError (not while tracing) and every reward above 0 is a success.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Num

from basis_jax.estimators.group import grpo
from basis_jax.estimators.ranges import GROUP, SHARE, SWITCH, Options, Rewards, Whole
from basis_jax.estimators.rows import centre, divide, join, nan_reported, split, total
from basis_jax.types import Estimate


@nan_reported
@Options(group_size=GROUP, k=Whole(1))
def pass_at_k(
    rewards: Num[ArrayLike, " N"],
    *,
    group_size: int,
    k: int,
    valid: Bool[ArrayLike, " N"] | None = None,
) -> Estimate:
    """Closed-form pass@k advantage. Chen et al. 2025, arXiv 2508.10751. Rewards 0 or 1. R and sd
    count all rollouts of the group, the own one included.

    n rollouts, w wrong: R = 1 - C(w, k) / C(n, k), sd = sqrt(R (1 - R)); right rollouts get
    (1 - R) / (sd + 1e-6), wrong ones (1 - R - C(w - 1, k - 1) / C(n - 1, k - 1)) / (sd + 1e-6).
    k = 1 is GRPO with ddof = 0. A group without a success, with fewer than k failures or with
    fewer than k valid rollouts gives 0. ``values`` are R. Raises ValueError as ``rloo``, and
    unless 1 <= k <= group_size.

    >>> rewards = np.float32([1, 0, 0, 0])  # one prompt, four rollouts
    >>> estimate = estimators.pass_at_k(rewards, group_size=4, k=2)
    >>> print(estimate.advantages, estimate.values)
    [ 1.    -0.333 -0.333 -0.333] [0.5 0.5 0.5 0.5]
    """
    Rewards().check("pass_at_k", rewards, valid)
    r, w = split(rewards, valid, group_size)
    if k > group_size:
        raise ValueError(f"got k={k} for group_size={group_size}; k is between 1 and group_size")
    n, wrong = total(w), total(w * (r <= 0).astype(jnp.float32))
    mean = 1 - _choose_ratio(wrong, n, k)
    miss = jnp.where(r > 0, 0, _choose_ratio(wrong - 1, n - 1, k - 1))
    advantages = (1 - mean - miss) / (jnp.sqrt(mean * (1 - mean)) + 1e-6)
    informative = (n >= k) & (wrong >= k) & (wrong < n)
    return join(jnp.where(informative, advantages, 0), mean, r, w)


def _choose_ratio(a: Float[Array, "*s"], b: Float[Array, "*s"], k: int) -> Float[Array, "*s"]:
    """C(a, k) / C(b, k) for a <= b; 0 where a < k."""
    ratio = jnp.ones_like(a)
    for i in range(k):
        ratio = ratio * divide(jnp.maximum(a - i, 0), jnp.maximum(b - i, 0))
    return ratio


@nan_reported
@Options(group_size=GROUP, scale=SWITCH)
def best_of_group(
    rewards: Num[ArrayLike, " N"],
    *,
    group_size: int,
    valid: Bool[ArrayLike, " N"] | None = None,
    scale: bool = False,
) -> Estimate:
    """Only the best rollout counts: best - second best, the others 0. arXiv 2503.19595, as verl's
    ``grpo_passk``; ``scale`` divides by the group's sd + 1e-6 (ddof = 1, own reward included).
    Ties give 0. The own reward decides which rollout is best, so the baseline depends on it;
    ``values`` are r - A. Raises ValueError as ``rloo``.

    >>> rewards = np.float32([0.2, 0.9, 0.6, 0.1])  # one prompt, four rollouts
    >>> print(estimators.best_of_group(rewards, group_size=4).advantages)
    [0.  0.3 0.  0. ]
    """
    r, w = split(rewards, valid, group_size)
    ranked = jnp.sort(jnp.where(w > 0, r, -jnp.inf), 1)
    best, second = ranked[:, -1:], ranked[:, -2:-1]
    gain = jnp.where(jnp.isfinite(second), best - second, 0)
    advantages = jnp.where((w > 0) & (r == best), gain, 0)
    if scale:
        variance = divide(total(w * centre(r, w)[0] ** 2), total(w) - 1)
        advantages = advantages / (jnp.sqrt(variance) + 1e-6)
    return join(advantages, r - advantages, r, w)


@nan_reported
@Options(group_size=GROUP, weight=SHARE)
def ucpo(
    rewards: Num[ArrayLike, " N"],
    logprob_sum: Float[ArrayLike, " N"],
    lengths: Num[ArrayLike, " N"],
    *,
    group_size: int,
    weight: float = 0.2,
    valid: Bool[ArrayLike, " N"] | None = None,
) -> Estimate:
    """UCPO: GRPO (ddof = 1, eps 1e-8) that gives more of the advantage of right rollouts to the
    unlikely ones. arXiv 2605.00365, in the form of the published code. Rewards 0 or 1.

    q is the softmax over the right rollouts of ``logprob_sum`` / ``lengths``, a completion's mean
    token log-probability under the policy that sampled it; q is at least 1e-6. If n_c >= 2 rollouts
    are right, each of them gets n_c A w_i with w_i = (1 - weight) / n_c + weight (1 / q_i) /
    sum_j 1 / q_j. All other advantages are those of GRPO. Raises ValueError as ``rloo``.

    >>> rewards, logprob_sum = np.float32([1, 1, 0, 0]), np.float32([-2, -6, -1, -1])
    >>> lengths = np.array([2, 2, 1, 1])
    >>> print(estimators.ucpo(rewards, logprob_sum, lengths, group_size=4).advantages)
    [ 0.734  0.998 -0.866 -0.866]
    """
    Rewards().check("ucpo", rewards, valid)
    r, w = split(rewards, valid, group_size, logprob_sum=logprob_sum, lengths=lengths)
    e = grpo(rewards, group_size=group_size, valid=valid, convention="oat")
    advantages, values = e.advantages.reshape(r.shape), e.values.reshape(r.shape)
    right = (w > 0) & (r > 0)
    tokens = jnp.maximum(jnp.asarray(lengths, jnp.float32), 1)
    means = (jnp.asarray(logprob_sum, jnp.float32) / tokens).reshape(r.shape)
    logprobs = jnp.where(right, means, -jnp.inf)
    some = jnp.any(right, 1, keepdims=True)
    q = jnp.maximum(jax.nn.softmax(jnp.where(some, logprobs, 0), axis=1), 1e-6)
    inverse = jnp.where(right, 1 / q, 0)
    count = total(right.astype(jnp.float32))
    lean = (1 - weight) + weight * count * divide(inverse, total(inverse))
    return join(jnp.where(right & (count > 1), advantages * lean, advantages), values, r, w)
