"""BASIS (Gong et al. 2026, arXiv 2605.27293): baselines from a batch with one rollout per prompt.

Offline, once: k successes in n reference completions of every prompt, p = k / n. A policy tilted
by exp(reward / beta) has the value V = E_ref[r exp(r / beta)] / E_ref[exp(r / beta)] (eq. 5), for
0/1 rewards sigmoid(logit p + 1 / beta). Each step, the baseline of prompt i is the best linear
unbiased combination of the *other* prompts' rewards,

    b_i = sum_{j != i} w_ij r_j,  w_ij = (V_i V_j / s_j) / sum_{k != i} V_k^2 / s_k,  s = V (1 - V)

(eq. 2, 3), and beta is the grid point with the least squared error of b on the rewards (eq. 6).
Let o = V / (1 - V) be the odds (for 0/1 rewards k / (n - k) exp(1 / beta)) and q = 1 / (1 - V)
= 1 + o. The weights have rank one, so all b together cost O(N) per beta (O(N n) with reference
rewards): b_i = V_i (sum q r - q_i r_i) / (sum o - o_i).

``rule="published"`` follows the paper exactly:

- beta minimises eq. 6 over all grid points with an active prompt. The same batch chooses beta and
  uses it, so b_i depends on r_i through beta.
- Prompts outside the active set (p in {0, 1}, or no trials) have b = 0. If only one prompt is
  active, it has b = 0 too.
- b may exceed 1.

``rule="robust"``, the default, differs in four points:

1. A beta is considered only if at least max(2, m / 2) prompts are active under it, where m is the
   number of prompts with 0 < p < 1. For the beta of a fold, both numbers are counted over the
   rows of the other folds.
2. A prompt outside the active set, or alone in it, has the baseline b = sigmoid(logit p' + 1/beta)
   with Jeffreys' p' = (k + 1/2) / (n + 1). Every beta is scored on these prompts too. With
   reference rewards, b is eq. 5 after adding half a completion of reward 0 and half a completion of
   reward 1, which is the same if rewards are 0 and 1.
3. beta is cross-fitted. The j-th valid row is in fold j mod ``folds`` (3 or more). The beta of fold
   f is scored on the rewards of the other folds, and those of fold g are predicted from the folds
   that are neither f nor g. So b_i is exactly independent of r_i. With fewer rows than folds each
   row is a fold. b_i itself combines all other valid rows, those of its own fold included.
4. b is clipped to [low, high].

If no beta can be considered, or fewer than 3 rows are valid, the largest beta is used.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Num

from basis_jax.estimators.ranges import FINITE, Number, OneOf, Options, OrNone, Rewards, Whole
from basis_jax.estimators.rows import (
    divide,
    estimate,
    fold_of,
    from_unit,
    nan_reported,
    others_sum,
    read,
    share,
    to_unit,
)
from basis_jax.masked import masked_mean
from basis_jax.types import Estimate

BETAS = np.concatenate([np.arange(1, 201) / 100, np.arange(21, 51) / 10]).astype(np.float32)
CHUNK = 23  # betas scored at once: few enough for their arrays of N rows to stay in the cache
EPS = 1e-6  # a prompt is active where EPS < V < 1 - EPS
RULES = ("robust", "published")


class Variant(NamedTuple):
    """App. B: b_i = V_i sum_{j != i} a(o_j) r_j / (constant + sum_{j != i} d(o_j))."""

    a: Callable
    d: Callable
    constant: float


VARIANTS = {
    "unb": Variant(lambda o: 1 + o, lambda o: o, 0.0),  # best linear unbiased
    "vop": Variant(lambda o: 1 + o, lambda o: o, 1.0),  # least variance, shrinks to zero
    "rvg": Variant(lambda o: 1 + 1 / o, jnp.ones_like, 0.0),  # V_i times the mean of r_j / V_j
}


class ValidRows(NamedTuple):
    rewards: Float[Array, " N"]  # in [0, 1]
    valid: Bool[Array, " N"]
    odds: Float[Array, " N"]  # k / (n - k); 0 stands for p = 0, p = 1 and n = 0: never active
    smoothed: Float[Array, " N"]  # logit of Jeffreys' (k + 1/2) / (n + 1)
    reference: Float[Array, "N n"] | None  # rewards in [0, 1], NaN where none; None: 0/1, counted


class Tilted(NamedTuple):
    """The batch under one beta; weights and V are 0 outside the active set."""

    active: Bool[Array, " N"]
    values: Float[Array, " N"]  # V
    a: Float[Array, " N"]
    d: Float[Array, " N"]


class Fit(NamedTuple):
    active: Bool[Array, " N"]
    fitted: Bool[Array, " N"]  # active, and not alone
    baseline: Float[Array, " N"]  # 0 where not fitted


@nan_reported
@Options(
    variant=OneOf(tuple(VARIANTS)),
    rule=OneOf(RULES),
    folds=Whole(3, "it cross-fits twice"),
    betas=OrNone(Number(0.0, without=("low",), axes=1)),
    low=FINITE,
    high=FINITE,
)
def basis(
    rewards: Num[ArrayLike, " N"],
    successes: Num[ArrayLike, " N"] | None = None,
    trials: Num[ArrayLike, " N"] | None = None,
    *,
    reference_rewards: Num[ArrayLike, "N n"] | None = None,
    valid: Bool[ArrayLike, " N"] | None = None,
    variant: str = "unb",
    rule: str = "robust",
    folds: int = 8,
    betas: Float[ArrayLike, " K"] | None = None,
    low: float = 0.0,
    high: float = 1.0,
) -> Estimate:
    """BASIS: A_i = r_i - b_i, not scaled or whitened. The top of this module's file explains the
    baseline b and the two rules.

    - ``rewards``: in [``low``, ``high``], one rollout for each of N prompts.
    - ``successes``, ``trials``: counts of reference completions of the same prompts, whose rewards
      were low or high. Successes outside [0, trials] are clipped into it.
    - ``reference_rewards``: given instead of counts if rewards between low and high occur; NaN
      where there is no completion. V is then eq. 5 of these, k is their sum and n their number.

    A row whose count is NaN (an unknown problem) has the value NaN. Rewards are first mapped to
    (r - low) / (high - low), and beta refers to that scale. The variance s = V (1 - V) is the
    largest that rewards in [0, 1] with mean V can have.

    Info: ``beta`` (mean over rows), ``active_fraction``, ``fallback_share`` (rows whose baseline
    is the Jeffreys value, or the published 0), ``zero_share`` (rows with advantage 0).

    Raises ValueError for another ``variant`` or ``rule``, ``folds`` below 3, ``betas`` that are
    empty or not above 0, low >= high, rewards outside [low, high] (under jit they are clipped for
    the baseline, while A keeps the reward), arrays of unequal length, and if neither counts nor
    reference rewards are given.

    >>> rewards, successes = np.float32([1, 0, 1, 0]), np.array([6, 2, 7, 1])
    >>> estimate = estimators.basis(rewards, successes, np.full(4, 8))  # of 8 reference completions
    >>> print(estimate.values)
    [1.    0.339 1.    0.167]
    >>> reference_rewards = np.float32([[0.9, 0.7], [0.2, 0.4], [0.8, 1.0], [0.1, 0.3]])  # of 2
    >>> estimate = estimators.basis(
    ...     rewards, reference_rewards=reference_rewards, betas=np.float32([1])
    ... )
    >>> print(estimate.values)
    [0.831 0.347 0.962 0.232]
    """
    betas = jnp.asarray(BETAS if betas is None else betas, jnp.float32)
    _check(rewards, valid, reference_rewards, betas, Rewards(low, high))
    counts = {"successes": successes, "trials": trials}
    rewards, given = read(rewards, valid, **{n: x for n, x in counts.items() if x is not None})
    batch = _batch(rewards, given, successes, trials, reference_rewards, low=low, high=high)
    if rule == "published":
        row_beta, fit = _published(batch, betas, VARIANTS[variant])
        baseline = fit.baseline
    else:
        row_beta, fit = _cross_fitted(batch, betas, VARIANTS[variant], folds)
        baseline = jnp.where(fit.fitted, jnp.clip(fit.baseline, 0, 1), _fallback(batch, row_beta))
    values = from_unit(baseline, low, high)
    values = jnp.where(given & ~batch.valid, jnp.nan, values)
    return estimate(rewards - values, values, given, **_info(batch, fit, row_beta))


def _info(batch: ValidRows, fit: Fit, row_beta: Float[Array, " N"]) -> dict[str, Array]:
    return {
        "beta": masked_mean(row_beta, batch.valid),
        "active_fraction": share(fit.active, batch.valid),
        "fallback_share": share(~fit.fitted, batch.valid),
    }


def _check(
    rewards: Num[ArrayLike, " N"],
    valid: Bool[ArrayLike, " N"] | None,
    reference_rewards: Num[ArrayLike, "N n"] | None,
    betas: Float[Array, "*K"],
    allowed: Rewards,
) -> None:
    if betas.ndim != 1 or not betas.size:  # traced, too
        raise ValueError(f"basis got betas of shape {betas.shape}; give one number or more")
    allowed.check("basis", rewards, valid)
    if reference_rewards is not None:
        allowed.check("basis", reference_rewards)


def _batch(
    rewards: Float[Array, " N"],
    valid: Bool[Array, " N"],
    successes: Num[ArrayLike, " N"] | None,
    trials: Num[ArrayLike, " N"] | None,
    reference_rewards: Num[ArrayLike, "N n"] | None,
    *,
    low: float,
    high: float,
) -> ValidRows:
    """The rows on the scale of [0, 1]; those with an unknown problem are invalid."""
    known = jnp.ones(rewards.shape, bool)
    for count in (successes, trials):
        if count is not None:
            known &= ~jnp.isnan(jnp.asarray(count, jnp.float32))
    reference = None
    if reference_rewards is not None:
        if np.ndim(reference_rewards) != 2 or np.shape(reference_rewards)[0] != rewards.size:
            raise ValueError(
                f"basis got reference_rewards {np.shape(reference_rewards)} for {rewards.size} "
                "rewards; give the rewards of each row's reference completions"
            )
        reference = to_unit(jnp.asarray(reference_rewards, jnp.float32), low, high)
        k = jnp.nansum(reference, 1)
        n = jnp.sum(~jnp.isnan(reference), 1).astype(jnp.float32)
    elif successes is None or trials is None:
        raise ValueError("basis got no counts; give successes and trials, or reference_rewards")
    else:
        n = jnp.asarray(trials, jnp.float32)
        k = jnp.clip(jnp.asarray(successes, jnp.float32), 0, n)
    smoothed = jnp.log(k + 0.5) - jnp.log(n - k + 0.5)
    y = jnp.where(valid, to_unit(rewards, low, high), 0)
    return ValidRows(y, valid & known, divide(k, n - k), smoothed, reference)


def _odds(batch: ValidRows, beta: Float[Array, ""]) -> Float[Array, " N"]:
    """V / (1 - V) of eq. 5; 0 where V is 0, 1 or unknown."""
    if batch.reference is None:
        return batch.odds * jnp.exp(jnp.minimum(1 / beta, 60))  # no odds are active beyond 60
    r, drawn = jnp.nan_to_num(batch.reference), ~jnp.isnan(batch.reference)
    best = jnp.max(jnp.where(drawn, r, 0), 1, keepdims=True, initial=0)
    tilt = jnp.where(drawn, jnp.exp((r - best) / beta), 0)
    return divide(jnp.sum(tilt * r, 1), jnp.sum(tilt * (1 - r), 1))


def _fallback(batch: ValidRows, beta: Float[Array, "*s"]) -> Float[Array, " N"]:
    """Eq. 5 with half a success and half a failure added, under one beta or one per row."""
    if batch.reference is None:
        return jax.nn.sigmoid(batch.smoothed + 1 / beta)
    r, drawn = jnp.nan_to_num(batch.reference), ~jnp.isnan(batch.reference)
    inverse = 1 / jnp.broadcast_to(beta, batch.rewards.shape)
    tilt = jnp.where(drawn, jnp.exp((r - 1) * inverse[:, None]), 0)
    return (jnp.sum(tilt * r, 1) + 0.5) / (jnp.sum(tilt, 1) + 0.5 + 0.5 * jnp.exp(-inverse))


def _tilt(batch: ValidRows, variant: Variant, beta: Float[Array, ""]) -> Tilted:
    o = _odds(batch, beta)
    active = batch.valid & (o > EPS / (1 - EPS)) & (o < (1 - EPS) / EPS)
    o = jnp.where(active, o, 1)
    values, a, d = (jnp.where(active, x, 0) for x in (o / (1 + o), variant.a(o), variant.d(o)))
    return Tilted(active, values, a, d)


def _fit(batch: ValidRows, variant: Variant, beta: Float[Array, ""]) -> Fit:
    t = _tilt(batch, variant, beta)
    fitted = t.active & (jnp.sum(t.active) > 1)
    weight = variant.constant + others_sum(t.d)
    baseline = divide(t.values * others_sum(t.a * batch.rewards), weight)
    return Fit(t.active, fitted, jnp.where(fitted, baseline, 0))


def _published(
    batch: ValidRows, betas: Float[Array, " K"], variant: Variant
) -> tuple[Float[Array, " N"], Fit]:
    """Eq. 6 on the whole batch: (beta of every row, the same for all; the fit)."""

    def loss(beta: Float[Array, ""]) -> Float[Array, ""]:
        fit = _fit(batch, variant, beta)
        error = masked_mean((batch.rewards - fit.baseline) ** 2, fit.active)
        return jnp.where(jnp.any(fit.active), error, jnp.inf)

    beta = _best(betas, jax.vmap(loss)(betas))
    return jnp.broadcast_to(beta, batch.rewards.shape), _fit(batch, variant, beta)


def _cross_fitted(
    batch: ValidRows, betas: Float[Array, " K"], variant: Variant, folds: int
) -> tuple[Float[Array, " N"], Fit]:
    """(beta of every row, chosen without its fold; the row's fit under that beta)."""
    fold = fold_of(batch.valid, folds)
    in_fold = jax.nn.one_hot(fold, folds)
    losses = jax.lax.map(
        lambda beta: _losses_without_fold(batch, in_fold, variant, beta), betas, batch_size=CHUNK
    )
    losses = jnp.where(jnp.sum(batch.valid) > 2, losses, jnp.inf)
    fold_betas = jax.vmap(lambda loss: _best(betas, loss), in_axes=1)(losses)
    fits = jax.vmap(lambda beta: _fit(batch, variant, beta))(fold_betas)
    own = jnp.arange(fold.size)
    return fold_betas[fold], Fit(*(x[fold, own] for x in fits))


def _losses_without_fold(
    batch: ValidRows, in_fold: Float[Array, "N F"], variant: Variant, beta: Float[Array, ""]
) -> Float[Array, " F"]:
    """For every fold f: mean squared error on the other folds g, where b_j = c V_j with c from
    the folds that are neither f nor g, or the fallback where j is not active; inf where too few
    prompts of the other folds are active."""
    t, r = _tilt(batch, variant, beta), batch.rewards
    active, mixed = jnp.float32(t.active), jnp.float32(batch.valid & (batch.odds > 0))
    fallback = _fallback(batch, beta)
    missed = jnp.where(batch.valid & ~t.active, (r - fallback) ** 2, 0)
    valid = jnp.float32(batch.valid)
    columns = (t.a * r, t.d, active * r**2, t.values * r, t.values**2, active, mixed, missed, valid)
    sums = jnp.matmul(jnp.stack(columns), in_fold, precision="highest")  # [9, F]
    other = 1 - jnp.eye(in_fold.shape[1])  # [f, g]: g is not f
    neither = other[:, None] * other[None]  # [f, g, h]: h is neither f nor g
    ar, d = jnp.einsum("fgh,xh->xfg", neither, sums[:2], precision="highest")
    c = divide(ar, variant.constant + d)
    rr, rv, vv = sums[2:5, None]
    error = rr - 2 * c * rv + c**2 * vv
    others = jnp.einsum("fg,xg->xf", other, sums[5:], precision="highest")
    active, mixed, missed, valid = others
    counts = active >= jnp.maximum(2, mixed / 2)
    return jnp.where(counts, divide(jnp.sum(other * error, 1) + missed, valid), jnp.inf)


def _best(betas: Float[Array, " K"], losses: Float[Array, " K"]) -> Float[Array, ""]:
    """The first beta of least loss; the largest beta (the reference policy) where all are inf."""
    return jnp.where(jnp.any(losses < jnp.inf), betas[jnp.argmin(losses)], jnp.max(betas))
