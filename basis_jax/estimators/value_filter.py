"""A filter of every problem's value from batch, history and prompt features. It is our own.

The success rate of problem i is sigmoid(z_i), z_i = u_i + phi_i . w. Here u_i ~ N(m_i, v_i) is the
problem's own difficulty, and w ~ N(mu, S) is the policy's state, which drifts and is shared by all
problems; phi_i = (1, t_i, features_i). t_i is the logit that the offline table gave. The first
values already contain it, so its weight starts at 0. The weight falls when the table stops holding,
which one number can express for all problems at once. It rises when the differences between
problems grow. Nothing pulls it back to 0. A step reads the values *before* its rewards enter:

1. widen: v_i by ``own_drift`` per step since the last visit, S by ``drift`` (``table_drift`` for
   t) on its diagonal, and its intercept by more where the batch's mean residual says that the
   policy jumped;
2. fit w on the batch (Newton on the logistic posterior, u_i integrated out), for every fold on the
   rows of the other folds. The value of row i is E sigmoid(N(a, s)), nearly sigmoid(a / sqrt(1 +
   pi s / 8)), with a = m_i + phi_i . w and s = v_i + phi_i . S phi_i under the w of its fold: it
   is exactly independent of reward i;
3. update u_i by its reward under that same w (assumed-density step), and w on all rows.

Rewards in [low, high] enter as y = (r - low) / (high - low), through the quasi-likelihood
y log p + (1 - y) log(1 - p). A reward outside raises ValueError; under jit y is clipped into [0, 1]
instead, while A keeps the reward. A step costs O(N d^2). The state holds four numbers per problem
and its features.

Here ``own_drift`` is a given number. The module ``filter_mixture`` learns it and has the public
functions.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Num

from basis_jax.estimators.rows import (
    at,
    estimate,
    fold_of,
    from_unit,
    inside,
    problem_total,
    read,
    to_unit,
    visit,
)
from basis_jax.estimators.table import init_table
from basis_jax.masked import masked_mean
from basis_jax.pytree import pytree
from basis_jax.types import Estimate, Signals

NEWTON_STEPS = 8  # at most; the fit ends after a step that moves no logit by more than ENOUGH
ENOUGH = 0.01  # the error after such a step is of the order of its square
SURPRISE = 2.5  # standard deviations of the mean residual; beyond them the policy has jumped
LARGEST_JUMP = 4.0  # variance that a jump adds to the intercept, at most
TABLE_DOUBT = 1e-4  # variance of the table's weight at the start, when the table fits the policy
LARGEST_MOVE = 4.0  # of any logit in a Newton step: far from the optimum full steps oscillate
EM_STEPS = 40
NODES = 15  # of the quadrature over a logit


@pytree
class FilterState:
    """u_i ~ N(own_mean, own_variance) as of step ``last``; w ~ N(mean, covariance).

    >>> state = estimators.value_filter_init(np.zeros(9), np.zeros(9), own_drift=0.02)
    >>> isinstance(state, estimators.FilterState), state.features.shape
    (True, (9, 1))
    """

    own_mean: Float[Array, " M"]
    own_variance: Float[Array, " M"]
    last: Int[Array, " M"]
    mean: Float[Array, " d"]
    covariance: Float[Array, "d d"]
    features: Float[Array, "M e"]  # the table's logit, then those given; d = 1 + e
    step: Int[Array, ""]


class Rows(NamedTuple):
    """The batch as the fit of w sees it."""

    y: Float[Array, " N"]  # rewards in [0, 1]
    phi: Float[Array, "N d"]
    own_mean: Float[Array, " N"]
    own_variance: Float[Array, " N"]


class Shared(NamedTuple):
    mean: Float[Array, " d"]
    covariance: Float[Array, "d d"]


# ------------------------------------------------------------------------------------- the start
def single_filter_init(
    successes: Num[ArrayLike, " M"],
    trials: Num[ArrayLike, " M"],
    *,
    features: Float[ArrayLike, "M e"] | None = None,
    own_variance: float = 2.5,
    shared_variance: float = 2.5,
) -> FilterState:
    """Empirical Bayes on the offline counts: z_i ~ N(phi_i . w, t), w and t by EM.

    Trials may be 0 for some problems or for all. Without any trials w ~ N(0, ``shared_variance``)
    and t = ``own_variance``. Features are fixed at the start, such as a few dozen directions of the
    reference policy's prompt states. They are centred and scaled to a mean squared norm of 1, so
    each variance says how far its part may move a logit. Successes may be fractional.
    """
    table = init_table(successes, trials)
    size = table.trials.size
    if features is None:
        features = jnp.zeros((size, 0))
    features = jnp.asarray(features, jnp.float32)
    if features.ndim != 2 or features.shape[0] != size:
        raise ValueError(
            f"got features {features.shape} for {size} problems; give one row per problem"
        )
    phi = jnp.concatenate([jnp.ones((size, 1)), _scaled(features)], 1)
    ridge = jnp.eye(phi.shape[1]) / shared_variance

    def em_step(_, guess):
        mean, own = guess
        z, variance = _moments(table.successes, table.trials, phi @ mean, own)
        known = (table.trials > 0).astype(jnp.float32)
        precision = jnp.matmul(phi.T * known[None], phi, precision="highest") / own + ridge
        mean = jnp.linalg.solve(precision, phi.T @ (known * z) / own)
        squares = jnp.sum(known * (variance + (z - phi @ mean) ** 2))
        own = (2 * own_variance + squares) / (2 + jnp.sum(known))  # worth two problems a priori
        return mean, own

    start = jnp.zeros(phi.shape[1]), jnp.asarray(own_variance, jnp.float32)
    mean, own = jax.lax.fori_loop(0, EM_STEPS, em_step, start)
    z, variance = _moments(table.successes, table.trials, phi @ mean, own)
    told = (1 - variance / own) / own  # information of the counts of i about w
    covariance = jnp.linalg.inv(jnp.matmul(phi.T * told[None], phi, precision="highest") + ridge)
    weights = 1 + phi.shape[1]
    given = jnp.asarray([0, *range(2, weights)])  # all but the table's
    return FilterState(
        own_mean=z - phi @ mean,
        own_variance=variance,
        last=jnp.zeros(z.shape, jnp.int32),
        mean=jnp.zeros(weights).at[given].set(mean),
        covariance=(TABLE_DOUBT * jnp.eye(weights)).at[jnp.ix_(given, given)].set(covariance),
        features=jnp.concatenate([_scaled(z[:, None]), phi[:, 1:]], 1),
        step=jnp.zeros((), jnp.int32),
    )


def _scaled(features: Float[Array, "M e"]) -> Float[Array, "M e"]:
    """Centred, of mean squared norm 1; 0 where all rows are alike."""
    features = features - jnp.mean(features, 0, keepdims=True)
    norm = jnp.sqrt(jnp.mean(jnp.sum(features**2, 1)))
    return jnp.where(norm > 1e-6, features / jnp.where(norm > 0, norm, 1), 0)


def _moments(
    successes: Float[Array, " M"],
    trials: Float[Array, " M"],
    prior_mean: Float[Array, " M"],
    prior_variance: Float[Array, ""],
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """Mean and variance of a logit's posterior for a normal prior and binomial counts, with
    Gauss-Hermite nodes around the mode. (The mode itself would be biased where k is 0 or n.)"""
    mode, spread = _mode(successes, trials, prior_mean, prior_variance)
    nodes, weights = (jnp.asarray(x, jnp.float32) for x in np.polynomial.hermite.hermgauss(NODES))
    z = mode[None] + jnp.sqrt(2 * spread)[None] * nodes[:, None]
    likelihood = successes[None] * jax.nn.log_sigmoid(z)
    likelihood += (trials - successes)[None] * jax.nn.log_sigmoid(-z)
    density = likelihood - (z - prior_mean[None]) ** 2 / (2 * prior_variance)
    share = jax.nn.softmax(density + (nodes**2 + jnp.log(weights))[:, None], axis=0)
    mean = jnp.sum(share * z, 0)
    return mean, jnp.sum(share * (z - mean[None]) ** 2, 0)


def _mode(
    successes: Float[Array, " M"],
    trials: Float[Array, " M"],
    prior_mean: Float[Array, " M"],
    prior_variance: Float[Array, ""],
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """(mode, 1 / curvature) of that posterior, by Newton steps of at most 1 logit. They start from
    a weighted mean of the prior mean and the smoothed counts' logit."""
    counted = jnp.log(successes + 0.5) - jnp.log(trials - successes + 0.5)
    weight = trials / (trials + 4 / prior_variance)

    def newton(_, z):
        p = jax.nn.sigmoid(z)
        slope = successes - trials * p - (z - prior_mean) / prior_variance
        return z + jnp.clip(slope / (trials * p * (1 - p) + 1 / prior_variance), -1, 1)

    z = jax.lax.fori_loop(0, 12, newton, weight * counted + (1 - weight) * prior_mean)
    p = jax.nn.sigmoid(z)
    return z, 1 / (trials * p * (1 - p) + 1 / prior_variance)


# ----------------------------------------------------------------------------------------- a step
class Read(NamedTuple):
    """What a step reads of its signals and of the state, apart from the beliefs about u and w."""

    rewards: Float[Array, " N"]
    given: Bool[Array, " N"]  # the row is valid
    known: Bool[Array, " N"]  # its problem exists
    valid: Bool[Array, " N"]  # both
    y: Float[Array, " N"]  # rewards in [0, 1]
    idle: Float[Array, " N"]  # steps since the last visit
    phi: Float[Array, "N d"]


def read_batch(
    signals: Signals,
    last: Int[Array, " M"],
    features: Float[Array, "M e"],
    *,
    step: Int[Array, ""],
    low: float,
    high: float,
) -> Read:
    rewards, given = read(signals.rewards, signals.valid)
    ids = signals.problem_ids
    known = inside(ids, last.size)
    return Read(
        rewards=rewards,
        given=given,
        known=known,
        valid=given & known,
        y=jnp.where(given & known, to_unit(rewards, low, high), 0.5),
        idle=(step - at(last, ids)).astype(jnp.float32),
        phi=jnp.concatenate([jnp.ones((ids.size, 1)), at(features, ids, fill=0.0)], 1),
    )


def single_filter_update(
    state: FilterState,
    signals: Signals,
    *,
    folds: int,
    drift: float,
    table_drift: float,
    own_drift: float,
    low: float,
    high: float,
) -> tuple[FilterState, Estimate]:
    """One step of this module's filter; A = r - value.

    Several rows of one problem share its old value. Their updates add up in natural parameters, so
    their order does not matter. Info: ``shared`` (w's intercept), ``table_weight`` (the weight of
    t; 0 at the start), ``own_sd`` (mean sd of u_i).
    """
    batch = read_batch(signals, state.last, state.features, step=state.step, low=low, high=high)
    ids, valid = signals.problem_ids, batch.valid
    rows = Rows(
        y=batch.y,
        phi=batch.phi,
        own_mean=at(state.own_mean, ids, fill=0.0),
        own_variance=at(state.own_variance, ids, fill=1.0) + own_drift * batch.idle,
    )
    prior = widened(Shared(state.mean, state.covariance), drift, table_drift)
    shared, a, s = cross_fit(rows, valid, prior, folds=folds)
    values = jnp.where(batch.known, from_unit(expected(a, s), low, high), jnp.nan)
    mean, variance = own_posterior(rows, valid, ids, logit=(a, s))
    written = jnp.where(valid, ids, state.last.size)  # out of range: dropped
    new = dataclasses.replace(
        state,
        own_mean=state.own_mean.at[written].set(mean, mode="drop"),
        own_variance=state.own_variance.at[written].set(variance, mode="drop"),
        last=visit(state.last, ids, live=valid, step=state.step),
        mean=shared.mean,
        covariance=shared.covariance,
        step=state.step + 1,
    )
    return new, estimate(
        batch.rewards - values,
        values,
        batch.given,
        shared=new.mean[0],
        table_weight=new.mean[1],
        own_sd=masked_mean(jnp.sqrt(rows.own_variance), valid),
    )


def widened(w: Shared, drift: float, table_drift: float) -> Shared:
    """The belief about w one step later."""
    variance = jnp.full(w.mean.size, drift).at[1].set(table_drift)
    return Shared(w.mean, w.covariance + jnp.diag(variance))


def surprising(square: Float[Array, ""], variance: Float[Array, ""]) -> Float[Array, ""]:
    """The part of e^2 that a jump explains: e^2 - Var e if e is beyond SURPRISE standard deviations
    of it, otherwise 0."""
    return jnp.where(square > SURPRISE**2 * variance, square - variance, 0)


def cross_fit(
    rows: Rows,
    valid: Bool[Array, " N"],
    prior: Shared,
    *,
    folds: int,
    excess: Callable = surprising,
) -> tuple[Shared, Float[Array, " N"], Float[Array, " N"]]:
    """(w fitted on all valid rows; mean and variance of every row's logit under the w that is
    fitted on the other folds).

    The j-th valid row is in fold j mod ``folds``. ``excess`` is a function like ``surprising``.
    """
    fold = fold_of(valid, folds)
    used = valid[None, :] & (fold[None, :] != jnp.arange(folds + 1)[:, None])  # the last: all rows
    fits = jax.vmap(lambda live: _fit(rows, live, _jumped(rows, live, prior, excess)))(used)
    a, s = jax.vmap(lambda fit: _predict(rows, fit))(Shared(*(x[:-1] for x in fits)))
    own = jnp.arange(fold.size)
    return Shared(fits.mean[-1], fits.covariance[-1]), a[fold, own], s[fold, own]


def expected(a: Float[Array, "*s"], s: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """E sigmoid(N(a, s))."""
    return jax.nn.sigmoid(a * _shrink(s))


def _shrink(variance: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """E sigmoid(N(a, s)) ~ sigmoid(a * this)."""
    return 1 / jnp.sqrt(1 + jnp.pi / 8 * variance)


def _fit(rows: Rows, live: Bool[Array, " N"], prior: Shared) -> Shared:
    """Laplace posterior of w given the live rows' rewards."""
    shrink = jnp.where(live, _shrink(rows.own_variance), 0)
    prior_precision = jnp.linalg.inv(prior.covariance)

    def newton(carry):
        steps, mean, _, _ = carry
        p = jax.nn.sigmoid(shrink * (rows.own_mean + rows.phi @ mean))
        information = (rows.phi * (shrink**2 * p * (1 - p))[:, None]).T
        precision = jnp.matmul(information, rows.phi, precision="highest") + prior_precision
        slope = (shrink * (rows.y - p)) @ rows.phi - prior_precision @ (mean - prior.mean)
        step = jnp.linalg.solve(precision, slope)
        move = jnp.max(jnp.abs(shrink * (rows.phi @ step)), initial=0)
        mean = mean + step * jnp.minimum(1, LARGEST_MOVE / jnp.maximum(move, 1e-6))
        return steps + 1, mean, precision, move

    def unfinished(carry):
        steps, _, _, move = carry
        return (steps < NEWTON_STEPS) & (move > ENOUGH)

    start = 0, prior.mean, prior_precision, jnp.asarray(jnp.inf)
    _, mean, precision, _ = jax.lax.while_loop(unfinished, newton, start)
    return Shared(mean, jnp.linalg.inv(precision))


def _jumped(rows: Rows, live: Bool[Array, " N"], prior: Shared, excess: Callable) -> Shared:
    """The prior, with a larger variance of the intercept if the policy moved faster than ``drift``
    allows: if the live rows' e = sum (y - p) is too large for its variance (``excess``)."""
    shrink = _shrink(rows.own_variance)
    p = jax.nn.sigmoid(shrink * (rows.own_mean + rows.phi @ prior.mean))
    noise = jnp.where(live, p * (1 - p), 0)
    slope = (shrink * noise) @ rows.phi  # of e in w
    variance = jnp.sum(noise) + slope @ prior.covariance @ slope
    gap = jnp.sum(jnp.where(live, rows.y - p, 0))
    asked = excess(gap**2, variance) / jnp.maximum(slope[0], 1e-6) ** 2
    extra = jnp.minimum(asked, LARGEST_JUMP)
    return Shared(prior.mean, prior.covariance.at[0, 0].add(extra))


def _predict(rows: Rows, w: Shared) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Mean and variance of every row's logit z."""
    spread = jnp.sum((rows.phi @ w.covariance) * rows.phi, 1)
    return rows.own_mean + rows.phi @ w.mean, rows.own_variance + spread


def own_posterior(
    rows: Rows,
    valid: Bool[Array, " N"],
    ids: Int[Array, " N"],
    *,
    logit: tuple[Float[Array, " N"], Float[Array, " N"]],
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Mean and variance of u_i after its rewards. A single one gives m + v g and v - v^2 h, where g
    and -h are the first two derivatives of log P(reward) in the mean of z. Several rewards add up
    in natural parameters."""
    a, s = logit
    p = expected(a, s)
    g = jnp.where(valid, _shrink(s) * (rows.y - p), 0)
    h = jnp.where(valid, _shrink(s) ** 2 * p * (1 - p), 0)
    rest = 1 - rows.own_variance * h  # the share of the variance that is left: above 1/3
    variance = 1 / (1 / rows.own_variance + problem_total(h / rest, ids))
    return rows.own_mean + variance * problem_total(g / rest, ids), variance
