"""``value_filter``: several filters of the module ``value_filter`` at once, which learns the drift.

Two things are unknown: how fast a problem's own difficulty drifts (q, ``own_drift``), and whether
the offline table still holds. So several filters run in parallel. Every problem has one belief
N(m, v) about its own difficulty for each q of ``OWN_DRIFTS``, in each of two families: ``TABLE``
starts from the offline counts, ``BLIND`` as if there were none. The filters of a family share one
fit of w, made with the mean and the variance of their mixture: the batch as a whole determines w,
and their beliefs about it hardly differ. Eight filters therefore cost little more than one.

If the batch's mean residual is beyond ``LATER_SURPRISE`` standard deviations, the policy has
jumped. The single filter then raises the variance of w's intercept by the squared residual minus
its variance. These filters raise it only by what exceeds the threshold, so a false alarm does
little harm.

With p_ik the value of row i under filter k, read before the rewards of step t enter,

    value_i = sum_k weight_k p_ik,    weight = softmax(score),
    score_k <- DISCOUNT score_k + sum_i y_i log p_ik + (1 - y_i) log(1 - p_ik).

The weights of a step come from earlier steps alone, and p_ik is exactly independent of reward i.
So the value is independent of reward i too. The discount lets a filter regain its weight when the
policy starts to change faster or slower.

``value_filter_init`` and ``value_filter_update`` with a number as ``own_drift`` are the single
filter with that drift.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from basis_jax.estimators.ranges import (
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    Number,
    Options,
    OrNone,
    Rewards,
    Whole,
)
from basis_jax.estimators.rows import at, estimate, from_unit, nan_reported, visit
from basis_jax.estimators.value_filter import (
    FilterState,
    Read,
    Rows,
    Shared,
    cross_fit,
    expected,
    own_posterior,
    read_batch,
    single_filter_init,
    single_filter_update,
    widened,
)
from basis_jax.masked import masked_mean
from basis_jax.pytree import pytree
from basis_jax.types import Estimate, Signals

OWN_DRIFTS = (0.0, 0.002, 0.02, 0.1)
TABLE, BLIND = 0, 1  # the families
DISCOUNT = 0.9  # of the scores per step: about ten steps count
DOUBT = 5.0  # nats that BLIND starts behind: a priori a table is wrong in one of e^5 runs
FIRST_SURPRISE = 2.0  # in the first step: the policy may not be the one that made the table
LATER_SURPRISE = 2.5
SUREST = 1e-6  # least p and 1 - p in a score: no reward costs a filter more than -log of it


@pytree
class MixtureState:
    """Like FilterState, for two families (F) of filters, each with one filter for every drift (D).

    >>> state = estimators.value_filter_init(np.zeros(9), np.zeros(9))
    >>> isinstance(state, estimators.MixtureState), state.own_mean.shape
    (True, (9, 2, 4))
    """

    own_mean: Float[Array, "M F D"]
    own_variance: Float[Array, "M F D"]
    last: Int[Array, " M"]
    mean: Float[Array, "F d"]
    covariance: Float[Array, "F d d"]
    features: Float[Array, "M e"]
    score: Float[Array, "F D"]  # discounted log-likelihood of the rewards so far
    step: Int[Array, ""]


class Own(NamedTuple):
    """Every filter's belief about the own difficulty of the rows' problems."""

    mean: Float[Array, "N F D"]
    variance: Float[Array, "N F D"]


@Options(
    features=OrNone(Number(axes=2)),
    own_variance=POSITIVE,
    shared_variance=POSITIVE,
    own_drift=OrNone(NOT_NEGATIVE),
)
def value_filter_init(
    successes: Num[ArrayLike, " M"],
    trials: Num[ArrayLike, " M"],
    *,
    features: Float[ArrayLike, "M e"] | None = None,
    own_variance: float = 2.5,
    shared_variance: float = 2.5,
    own_drift: float | None = None,
) -> MixtureState | FilterState:
    """Empirical Bayes on the offline counts: z_i ~ N(phi_i . w, t), w and t by EM.

    Trials may be 0 for some problems or for all. Without any trials w ~ N(0, ``shared_variance``)
    and t = ``own_variance``. Features are fixed at the start, such as a few dozen directions of the
    reference policy's prompt states. They are centred and scaled to a mean squared norm of 1, so
    each variance says how far its part may move a logit. Successes may be fractional.
    ``own_drift``: None to learn it, or a number of at least 0; the update needs the same.
    Raises ValueError for a variance that is not above 0 and for features that are not finite.

    >>> successes, trials = np.array([4, 0, 8]), np.array([8, 0, 8])  # of three problems
    >>> state = estimators.value_filter_init(successes, trials, own_drift=0.02)
    >>> print(state.own_variance)  # of each problem's logit: largest without trials
    [0.46  2.619 1.135]
    """
    single = single_filter_init(
        successes,
        trials,
        features=features,
        own_variance=own_variance,
        shared_variance=shared_variance,
    )
    if own_drift is not None:
        return single
    drifts = len(OWN_DRIFTS)

    def both(of_table: Float[Array, " M"], of_blind: float) -> Float[Array, "M F D"]:
        families = jnp.stack([of_table, jnp.full_like(of_table, of_blind)], 1)
        return jnp.repeat(families[:, :, None], drifts, 2)

    wide = shared_variance * jnp.eye(single.mean.size)
    return MixtureState(
        own_mean=both(single.own_mean, 0.0),
        own_variance=both(single.own_variance, own_variance),
        last=single.last,
        mean=jnp.stack([single.mean, jnp.zeros_like(single.mean)]),
        covariance=jnp.stack([single.covariance, wide]),
        features=single.features,
        score=jnp.zeros((2, drifts)).at[BLIND].set(-DOUBT),
        step=single.step,
    )


@nan_reported
@Options(
    folds=Whole(2, "it cross-fits"),
    drift=NOT_NEGATIVE,
    table_drift=NOT_NEGATIVE,
    own_drift=OrNone(NOT_NEGATIVE),
    low=FINITE,
    high=FINITE,
)
def value_filter_update(
    state: MixtureState | FilterState,
    signals: Signals,
    *,
    folds: int = 8,
    drift: float = 0.003,
    table_drift: float = 0.01,
    own_drift: float | None = None,
    low: float = 0.0,
    high: float = 1.0,
) -> tuple[MixtureState | FilterState, Estimate]:
    """One step of the value filter: A = r - value. If ``own_drift`` is a number, a single filter
    with that drift is used; otherwise the mixture that learns it.

    For cross-fitting the j-th valid row is in fold j mod ``folds``. Several rows of one problem
    share its old value, and their updates add up in any order. Invalid rows change no belief. A
    problem id outside 0..M-1 reads NaN and writes nothing. Only the problems of the batch are read
    and written, so with a donated state the cost does not grow with M.

    Info: ``own_drift`` (mean under the weights of the filters), ``table_trust`` (weight of the
    filters that started from the table), ``mixture`` (the weights themselves [F D]), ``shared``
    (w's intercept), ``table_weight`` (that of t; 0 at the start), ``own_sd`` (mean sd of u_i). A
    single filter reports the last three.

    Raises ValueError for fewer than 2 folds, for a drift below 0, and for a state that was made
    with the other kind of ``own_drift`` (learned or fixed).

    >>> state = estimators.value_filter_init(np.full(9, 4), np.full(9, 8))
    >>> signals = estimators.Signals(rewards=jnp.float32([1, 0]), valid=jnp.array([True, True]),
    ...                              problem_ids=jnp.array([3, 7]), lengths=jnp.array([5, 6]))
    >>> state, estimate = estimators.value_filter_update(state, signals)
    >>> print(estimate.values)
    [0.485 0.515]
    """
    Rewards(low, high).check("value_filter", signals.rewards, signals.valid)
    options: dict[str, Any] = {"folds": folds, "drift": drift, "table_drift": table_drift}
    options |= {"low": low, "high": high}
    if isinstance(state, FilterState) and own_drift is not None:
        return single_filter_update(state, signals, own_drift=own_drift, **options)
    if isinstance(state, MixtureState) and own_drift is None:
        return _mixture_update(state, signals, **options)
    made = "learned" if isinstance(state, MixtureState) else "fixed"
    raise ValueError(
        f"value_filter got own_drift={own_drift} and a state whose drift is {made}; give init and "
        "update the same own_drift"
    )


def filter_values(state: MixtureState | FilterState, ids: Int[Array, " n"]) -> Float[Array, " n"]:
    """The expected success rates of these problems under the state. The drift since the last step
    is not included. NaN for an id outside 0..M-1.

    >>> state = estimators.value_filter_init(np.array([4, 0]), np.array([8, 8]), own_drift=0.02)
    >>> print(estimators.filter_values(state, jnp.array([0, 1])))
    [0.467 0.117]
    """
    phi = jnp.concatenate([jnp.ones((ids.size, 1)), at(state.features, ids)], 1)
    mean, variance = at(state.own_mean, ids), at(state.own_variance, ids)

    def rates(phi, w, mean, variance):
        a, s = phi @ w.mean, jnp.sum((phi @ w.covariance) * phi, 1)
        shape = (-1,) + (1,) * (mean.ndim - 1)
        return expected(mean + a.reshape(shape), variance + s.reshape(shape))

    if isinstance(state, FilterState):
        return rates(phi, Shared(state.mean, state.covariance), mean, variance)
    blind = phi.at[:, 1].set(0)
    weights = jax.nn.softmax(state.score, (0, 1))
    families = [
        rates(x, Shared(state.mean[f], state.covariance[f]), mean[:, f], variance[:, f])
        @ weights[f]
        for f, x in ((TABLE, phi), (BLIND, blind))
    ]
    return families[0] + families[1]


def filter_predict(state: MixtureState | FilterState) -> Float[Array, " M"]:
    """``filter_values`` of all problems.

    >>> state = estimators.value_filter_init(np.zeros(9), np.zeros(9))
    >>> estimators.filter_predict(state).shape
    (9,)
    """
    return filter_values(state, jnp.arange(state.last.size))


def _mixture_update(
    state: MixtureState,
    signals: Signals,
    *,
    folds: int,
    drift: float,
    table_drift: float,
    low: float,
    high: float,
) -> tuple[MixtureState, Estimate]:
    batch = read_batch(signals, state.last, state.features, step=state.step, low=low, high=high)
    ids, valid = signals.problem_ids, batch.valid
    idle = batch.idle[:, None] * jnp.asarray(OWN_DRIFTS)[None]
    own = Own(
        mean=at(state.own_mean, ids, fill=0.0),
        variance=at(state.own_variance, ids, fill=1.0) + idle[:, None],
    )
    prior = jax.vmap(lambda w: widened(w, drift, table_drift))(Shared(state.mean, state.covariance))
    share = jax.nn.softmax(state.score, 1)
    surprise = jnp.where(state.step == 0, FIRST_SURPRISE, LATER_SURPRISE)
    shared, a, s = _fit_families(batch, own, prior, share, folds=folds, surprise=surprise)
    p = expected(a, s)
    weights = jax.nn.softmax(state.score, (0, 1))
    mixed = jnp.sum(weights[None] * p, (1, 2))
    values = jnp.where(batch.known, from_unit(mixed, low, high), jnp.nan)
    learnt = _learn_own(batch, own, ids, (a, s))
    written = jnp.where(valid, ids, state.last.size)  # out of range: dropped
    new = dataclasses.replace(
        state,
        own_mean=state.own_mean.at[written].set(learnt.mean, mode="drop"),
        own_variance=state.own_variance.at[written].set(learnt.variance, mode="drop"),
        last=visit(state.last, ids, live=valid, step=state.step),
        mean=shared.mean,
        covariance=shared.covariance,
        score=DISCOUNT * state.score + _log_likelihood(batch, p),
        step=state.step + 1,
    )
    family = jnp.sum(weights, 1)
    return new, estimate(
        batch.rewards - values,
        values,
        batch.given,
        own_drift=jnp.sum(weights, 0) @ jnp.asarray(OWN_DRIFTS),
        table_trust=family[TABLE],
        mixture=weights,
        shared=family @ new.mean[:, 0],
        table_weight=new.mean[TABLE, 1],
        own_sd=masked_mean(jnp.sum(weights[None] * jnp.sqrt(own.variance), (1, 2)), valid),
    )


def _fit_families(
    batch: Read, own: Own, prior: Shared, share: Float[Array, "F D"], *, folds: int, surprise: Array
) -> tuple[Shared, Float[Array, "N F D"], Float[Array, "N F D"]]:
    """(w of each family, fitted with its beliefs mixed by ``share``; mean and variance of every
    row's logit under each filter)."""

    def excess(square, variance):
        return jnp.maximum(square - surprise**2 * variance, 0)

    def fit(family):
        phi, mean, variance, share, prior = family
        centre = mean @ share
        around = mean - centre[:, None]
        spread = (variance + around**2) @ share
        rows = Rows(batch.y, phi, centre, spread)
        w, a, s = cross_fit(rows, batch.valid, prior, folds=folds, excess=excess)
        return w, a[:, None] + around, s[:, None] + variance - spread[:, None]

    blind = batch.phi.at[:, 1].set(0)  # does not see the table's logit
    phi = jnp.stack([batch.phi, blind])
    own_mean, own_variance = jnp.moveaxis(own.mean, 1, 0), jnp.moveaxis(own.variance, 1, 0)
    # One family after the other: vmap would make every product over rows a batched one, and two
    # independent loops can wait for each other forever on two CPU cores (jaxlib 0.10.2).
    w, a, s = jax.lax.map(fit, (phi, own_mean, own_variance, share, prior))
    return w, jnp.moveaxis(a, 0, 1), jnp.moveaxis(s, 0, 1)


def _learn_own(
    batch: Read,
    own: Own,
    ids: Int[Array, " N"],
    logit: tuple[Float[Array, "N F D"], Float[Array, "N F D"]],
) -> Own:
    """The beliefs of every filter after the rewards."""

    def one(mean, variance, a, s):
        rows = Rows(batch.y, batch.phi, mean, variance)
        return own_posterior(rows, batch.valid, ids, logit=(a, s))

    every = jax.vmap(jax.vmap(one, 1, 1), 2, 2)
    return Own(*every(own.mean, own.variance, *logit))


def _log_likelihood(batch: Read, p: Float[Array, "N F D"]) -> Float[Array, "F D"]:
    p = jnp.clip(p, SUREST, 1 - SUREST)
    y = batch.y[:, None, None]
    told = y * jnp.log(p) + (1 - y) * jnp.log1p(-p)
    return jnp.sum(jnp.where(batch.valid[:, None, None], told, 0), 0)
