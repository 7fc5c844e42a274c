"""Group means shrunk towards something less noisy than a few rewards: the other prompts
(James-Stein) or a prior value (V_0.5). Groups, invalid rows and errors as in ``group.py``."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Num

from basis_jax.estimators.filter_mixture import (
    MixtureState,
    filter_values,
    value_filter_update,
)
from basis_jax.estimators.ranges import (
    FINITE,
    GROUP,
    POSITIVE,
    SWITCH,
    OneOf,
    Options,
    Rewards,
)
from basis_jax.estimators.rows import (
    divide,
    from_unit,
    join,
    nan_reported,
    others_sum,
    share,
    split,
    total,
)
from basis_jax.estimators.value_filter import FilterState
from basis_jax.masked import masked_mean
from basis_jax.types import Estimate, Signals


@nan_reported
@Options(group_size=GROUP, convention=OneOf(("paper", "code")))
def james_stein(
    rewards: Num[ArrayLike, " N"],
    *,
    group_size: int,
    valid: Bool[ArrayLike, " N"] | None = None,
    convention: str = "paper",
) -> Estimate:
    """b_ig = (1 - l_i) mean of i's other rollouts + l_i mean over the other prompts' means.
    arXiv 2511.03710, eq. 10-16. Unbiased: neither mean nor l_i depends on reward g of prompt i.

    l_i = (n - 1) / n v / (v + s) for n prompts. v is the mean of (group variance / rollouts) over
    the other prompts, s the variance of their means. ``code`` drops (n - 1) / n and adds 1e-6 to
    the denominator. A rollout that is alone in its group has l = 1; groups with one valid rollout
    do not count in v. Degenerate groups get an advantage other than 0: never divide by a group sd
    afterwards. Raises ValueError as ``rloo``, and for another ``convention``.

    >>> rewards = np.float32([1, 0, 0, 1, 1, 0])  # two prompts, three rollouts of each
    >>> print(estimators.james_stein(rewards, group_size=3).values)
    [0.333 0.583 0.583 0.417 0.417 0.667]
    """
    r, w = split(rewards, valid, group_size)
    count = jnp.sum(w, 1)
    mean = divide(jnp.sum(w * r, 1), count)
    deviation = jnp.where(w > 0, r - mean[:, None], 0)
    noise = divide(divide(jnp.sum(deviation**2, 1), count - 1), count)
    others = 1 - jnp.eye(mean.size)  # [i, k]
    pooled = _mean_over(others, count > 0, mean)
    spread = (mean[None, :] - pooled[:, None]) ** 2
    v = _mean_over(others, count > 1, noise)
    s = _mean_over(others, count > 0, spread)
    prompts = jnp.sum(count > 0).astype(jnp.float32)
    shrink = divide(v, v + s + 1e-6) if convention == "code" else divide(v, v + s)
    shrink = shrink if convention == "code" else shrink * (prompts - 1) / jnp.maximum(prompts, 1)
    left = count[:, None] - w
    own = divide(jax.vmap(others_sum)(w * r), left)
    shrink = jnp.where(left > 0, jnp.where(prompts > 1, shrink, 0)[:, None], 1)
    baseline = (1 - shrink) * own + shrink * pooled[:, None]
    return join(r - baseline, baseline, r, w, shrinkage=masked_mean(shrink, w > 0))


def _mean_over(
    others: Float[Array, "B B"], chosen: Bool[Array, " B"], x: Float[Array, "*s"]
) -> Float[Array, " B"]:
    """For every i the mean of x[k] (or x[i, k]) over the chosen k other than i; 0 without any."""
    weights = others * chosen.astype(jnp.float32)[None, :]
    x = jnp.broadcast_to(x if x.ndim == 2 else x[None, :], weights.shape)
    return divide(jnp.sum(jnp.where(weights > 0, x, 0), 1), jnp.sum(weights, 1))


@nan_reported
@Options(group_size=GROUP, low=FINITE, high=FINITE)
def v05(
    rewards: Num[ArrayLike, " N"],
    successes: Num[ArrayLike, " N"],
    trials: Num[ArrayLike, " N"],
    *,
    group_size: int,
    valid: Bool[ArrayLike, " N"] | None = None,
    low: float = 0.0,
    high: float = 1.0,
) -> Estimate:
    """V_0.5: the group mean (own reward included) fused with a prior value. arXiv 2603.10848.

    The paper's prior is a pretrained value model; here it is the offline table's Jeffreys rate
    (k + 1/2) / (n + 1), mapped to [low, high], the range of the rewards. See ``fuse``.
    The paper reports that one or two rollouts are too few: the prior is never rejected. Raises
    ValueError as ``rloo``, unless low < high, and for a reward outside [low, high] (while tracing
    it is clipped in the mean, while A keeps the reward). NaN in rows without a prior.

    >>> rewards = np.float32([1, 1, 1, 1])  # one prompt, four rollouts
    >>> successes, trials = np.full(4, 1), np.full(4, 8)  # the prompt's offline counts, by row
    >>> print(estimators.v05(rewards, successes, trials, group_size=4).values)
    [0.925 0.925 0.925 0.925]
    """
    Rewards(low, high).check("v05", rewards, valid)
    r, w = split(rewards, valid, group_size, successes=successes, trials=trials)
    rate = (jnp.asarray(successes, jnp.float32) + 0.5) / (jnp.asarray(trials, jnp.float32) + 1)
    prior = (low + (high - low) * rate).reshape(r.shape)
    near = jnp.clip(r, low, high)
    mean = divide(total(w * near), total(w))
    weight, baseline = fuse(mean, prior, total(w), spread=(high - low) / 2)
    return join(
        r - baseline, baseline, r, w, prior_kept=share((weight == 0).ravel(), w.ravel() > 0)
    )


@nan_reported
@Options(group_size=GROUP, leave_one_out=SWITCH, low=FINITE, high=FINITE)
def v05_filter_update(
    state: MixtureState | FilterState,
    signals: Signals,
    *,
    group_size: int,
    leave_one_out: bool = True,
    low: float = 0.0,
    high: float = 1.0,
) -> tuple[MixtureState | FilterState, Estimate]:
    """V_0.5 (arXiv 2603.10848; see ``fuse``) with the value of ``value_filter`` as prior. No table
    and no value model is needed. The filter then learns from the group's rewards.

    The prior is that of the state, before any reward of this step (``filter_values``). The mean is
    that of the group's other rollouts; with ``leave_one_out=False``, as in the paper, the own
    reward is part of it. Groups may have any number of valid rows. Raises the errors of ``rloo``
    and ``value_filter_update``.

    >>> state = estimators.value_filter_init(np.zeros(9), np.zeros(9))
    >>> signals = estimators.Signals(rewards=jnp.ones(4), valid=jnp.ones(4, bool),
    ...                              problem_ids=jnp.full(4, 3), lengths=jnp.full(4, 5))
    >>> state, estimate = estimators.v05_filter_update(state, signals, group_size=4)
    >>> print(estimate.values)  # the prior was 1/2, and three others were right
    [0.833 0.833 0.833 0.833]
    """
    Rewards(low, high).check("v05_filter", signals.rewards, signals.valid)
    prior = from_unit(filter_values(state, signals.problem_ids), low, high)
    new, told = value_filter_update(state, signals, low=low, high=high)
    r, w = split(signals.rewards, signals.valid, group_size)
    near = w * jnp.clip(r, low, high)
    count = total(w) - w if leave_one_out else total(w)
    mean = divide(jax.vmap(others_sum)(near) if leave_one_out else total(near), count)
    weight, baseline = fuse(mean, prior.reshape(r.shape), count, spread=(high - low) / 2)
    kept = share((weight == 0).ravel(), w.ravel() > 0)
    info = {name: x for name, x in told.info.items() if name not in ("zero_share", "nan_share")}
    return new, join(r - baseline, baseline, r, w, prior_kept=kept, **info)


@Options(spread=POSITIVE)
def fuse(
    mean: Float[Array, "*s"], prior: Float[Array, "*s"], count: Float[Array, "*s"], *, spread: float
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """(weight of the mean, fused value) with noise e = spread^2 / count, the largest variance of
    a mean of ``count`` rewards in [-spread, spread] around their middle. arXiv 2603.10848.
    ValueError unless spread > 0.

    Deviation test: D = max(0, (mean - prior)^2 - e); weight = D / (D + e). Count 0 keeps the prior.

    >>> mean, prior, count = jnp.float32([1, 0.5]), jnp.float32([0, 0.5]), jnp.float32([4, 4])
    >>> weight, fused = estimators.fuse(mean, prior, count, spread=0.5)
    >>> print(weight, fused)
    [0.938 0.   ] [0.938 0.5  ]
    """
    noise = divide(jnp.full_like(count, spread**2), count)
    deviation = jnp.maximum(0, (mean - prior) ** 2 - noise)
    weight = jnp.where(count > 0, divide(deviation, deviation + noise), 0)
    return weight, weight * mean + (1 - weight) * prior
