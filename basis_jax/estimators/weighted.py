"""Baselines of least gradient noise, from one rollout per prompt.

A baseline b is subtracted to make the gradient less noisy: with g = grad log pi(completion) and
w = |g|^2, the noise is E[w (r - b)^2]. It is least at b*(x) = E[w r | x] / E[w | x] (Weaver and
Tao 2001), which is not the value E[r | x] unless right and wrong completions have equal w: logit b*
= logit V + log(m1 / m0) with m1 = E[w | right] and m0 = E[w | wrong]. ``score_norms`` stand for w:
the sampler records the sum over the completion's tokens of |onehot - p|^2, the squared norm of the
score in the logits. Its scale does not matter.

Here ``weighted_mean`` is one b for all prompts, ``otb`` one for each group of rollouts, and
``least_variance`` (module ``value_map``) one for each prompt from single rollouts.

A score norm that is negative or not finite counts as 0: such a row has a baseline like any other,
but no influence on that of others.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Num

from basis_jax.estimators.ranges import FINITE, GROUP, Number, Options, Rewards
from basis_jax.estimators.rows import (
    centre,
    divide,
    estimate,
    from_unit,
    join,
    nan_reported,
    others_sum,
    read,
    split,
    to_unit,
    total,
)
from basis_jax.pytree import pytree
from basis_jax.types import Estimate, Signals

MEMORY = Number(0.0, 1.0, without=("high",))


def usable(
    score_norms: Num[ArrayLike, " N"] | None, valid: Bool[Array, " N"]
) -> Float[Array, " N"]:
    """The weights w of valid rows; 0 in invalid rows and where a weight is negative, NaN or
    infinite. Raises ValueError without score norms."""
    if score_norms is None:
        raise ValueError("these Signals have no score_norms; give one number of at least 0 a row")
    w = jnp.asarray(score_norms, jnp.float32)
    return jnp.where(valid & jnp.isfinite(w) & (w > 0), w, 0)


def effective(total: Float[Array, "*s"], squares: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """(sum w)^2 / sum w^2, the effective number of rows: n for n equal weights, 0 without any."""
    return total * divide(total, squares)


@pytree
class WeightedSums:
    """Sums over the rows of earlier steps, discounted.

    >>> sums = estimators.WeightedSums(reward=jnp.float32(3), weight=jnp.float32(6),
    ...                                rows=jnp.float32(40))
    >>> float(sums.reward / sums.weight)
    0.5
    """

    reward: Float[Array, ""]  # w r, r on the scale of [0, 1]
    weight: Float[Array, ""]  # w
    rows: Float[Array, ""]  # effective rows


def weighted_mean_init(
    successes: Num[ArrayLike, " M"], trials: Num[ArrayLike, " M"]
) -> WeightedSums:
    """Nothing seen yet. The counts are not used: they have no weights.

    >>> float(estimators.weighted_mean_init(np.full(9, 4), np.full(9, 8)).rows)
    0.0
    """
    zero = jnp.float32(0)
    return WeightedSums(reward=zero, weight=zero, rows=zero)


@nan_reported
@Options(memory=MEMORY, low=FINITE, high=FINITE)
def weighted_mean_update(
    state: WeightedSums,
    signals: Signals,
    *,
    memory: float = 0.8,
    low: float = 0.0,
    high: float = 1.0,
) -> tuple[WeightedSums, Estimate]:
    """A = r - b with one baseline for all prompts, the mean reward weighted by score norms:

        b_i = (n_i m_i + h m_h) / (n_i + h),  m_i = sum_{j != i} w_j r_j / sum_{j != i} w_j.

    n_i is the effective number of the other rows, m_h the weighted mean of earlier steps, and h
    their effective rows, multiplied by ``memory`` at every step. If neither has any weight, b is
    the plain mean of the others. b_i does not depend on completion i at all, neither on its reward
    nor on its score norm. ``values`` are the plain means of the others.

    Info: ``effective_rows`` of the batch. Raises ValueError without score norms, for rewards
    outside [``low``, ``high``] (under jit they are clipped) and for ``memory`` outside [0, 1).

    >>> state = estimators.weighted_mean_init(np.zeros(9), np.zeros(9))
    >>> signals = estimators.Signals(rewards=jnp.float32([1, 0, 1]), valid=jnp.ones(3, bool),
    ...                              problem_ids=jnp.array([3, 7, 1]), lengths=jnp.array([5, 6, 4]),
    ...                              score_norms=jnp.float32([1, 3, 1]))
    >>> state, estimate = estimators.weighted_mean_update(state, signals)
    >>> print(estimate.baselines, estimate.values)
    [0.25 1.   0.25] [0.5 1.  0.5]
    """
    Rewards(low, high).check("weighted_mean", signals.rewards, signals.valid)
    rewards, valid = read(signals.rewards, signals.valid)
    w = usable(signals.score_norms, valid)
    y = jnp.where(valid, to_unit(rewards, low, high), 0)
    mean = divide(others_sum(y), others_sum(valid.astype(jnp.float32)))
    weight = others_sum(w)
    rows, of_others = effective(weight, others_sum(w**2)), divide(others_sum(w * y), weight)
    known = rows + state.rows
    weighted = divide(rows * of_others + state.rows * divide(state.reward, state.weight), known)
    baselines = from_unit(jnp.where(known > 0, weighted, mean), low, high)
    seen = effective(jnp.sum(w), jnp.sum(w**2))
    new = WeightedSums(
        reward=memory * (state.reward + jnp.sum(w * y)),
        weight=memory * (state.weight + jnp.sum(w)),
        rows=memory * (state.rows + seen),
    )
    values = from_unit(mean, low, high)
    return new, estimate(
        rewards - baselines, values, valid, baselines=baselines, effective_rows=seen
    )


@nan_reported
@Options(group_size=GROUP)
def otb(
    rewards: Num[ArrayLike, " N"],
    score_norms: Num[ArrayLike, " N"],
    *,
    group_size: int,
    valid: Bool[ArrayLike, " N"] | None = None,
) -> Estimate:
    """A = r - sum w r / sum w over the group, own rollout included, with score norms w.

    The optimal token baseline (arXiv 2602.07078) has a baseline for every token t, weighted by the
    tokens up to t. Here a completion has one baseline, that of its last token. A group without
    weights has its plain mean. ``values`` are the plain group means. Raises ValueError as ``rloo``.

    >>> rewards, score_norms = np.float32([1, 0, 1, 1]), np.float32([1, 3, 2, 2])  # two of each
    >>> print(estimators.otb(rewards, score_norms, group_size=2).advantages)
    [ 0.75 -0.25  0.    0.  ]
    """
    r, w = split(rewards, valid, group_size, score_norms=score_norms)
    norms = usable(score_norms, w.ravel() > 0).reshape(r.shape)
    mean = centre(r, w)[1]
    baselines = centre(r, jnp.where(total(norms) > 0, norms, w))[1]
    return join(r - baselines, mean, r, w, baselines=baselines)
