"""Values of another estimator turned into baselines of least gradient noise.

The noise E[w (r - b)^2] is least at b*(x) = E[w r | x] / E[w | x], with w the squared norm of the
completion's score (module ``weighted``). A baseline that is a function of the value V alone can be
estimated from a batch with one rollout per prompt:

    logit b(V) = tilt + slope logit V,  slope >= 0.

If wrong completions have the mean weight m0 and right ones m1 in every prompt, the best map has
tilt = log m1/m0 and slope 1. Slope 0 is the constant baseline of ``weighted_mean``, which is best
where m0/m1 grows as fast as the odds of V. Both numbers maximise the weighted logistic likelihood

    sum_j w_j (y_j log b(V_j) + (1 - y_j) log(1 - b(V_j))) / s,  s = sum w^2 / sum w.

Among all functions b its maximum is at b*. Dividing by s makes the weights sum to the number of
effective rows. This is how much a batch counts relative to two other terms: the prior
slope ~ N(0, SLOPE_SD^2), tilt ~ N(0, TILT_SD^2), which pulls towards a constant baseline, and the
discounted likelihood of earlier steps.

b_i is exactly independent of completion i: of its reward, its score norm and its length. The rows
are divided into ``folds``. The map of a fold is fitted on the rows outside it, at the values that
the other estimator gives when the rows of the fold are marked invalid. These values have seen no
reward of the fold, and none of their own. (A map fitted to all rows could read reward i from the
values of the others.) Row i then gets b(V_i) under the map of its fold, with the V_i of the whole
batch, which has not seen reward i either.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from basis_jax.estimators.declare import Estimator
from basis_jax.estimators.ranges import FINITE, Options, Rewards, Whole
from basis_jax.estimators.rows import divide, estimate, fold_of, from_unit, read, to_unit
from basis_jax.estimators.weighted import MEMORY, effective, usable
from basis_jax.pytree import pytree
from basis_jax.types import Estimate, Signals

SLOPE_SD, TILT_SD = 0.7, 3.0  # of the prior
LARGEST_LOGIT = 5.0  # of a value that enters the map: .0067 to .9933
NEWTON_STEPS = 12
LARGEST_MOVE = 2.0  # of tilt and slope in a Newton step
TRIED_ROWS, TRIED_PROBLEMS = 16, 8  # of the check that no value depends on its own reward


@pytree
class MapState:
    """The other estimator's state, and the likelihood of (tilt, slope) from earlier steps: a normal
    one, in natural parameters.

    >>> estimator = estimators.least_variance(estimators.make("ema"))
    >>> state = estimator.init(np.zeros(9), np.zeros(9))
    >>> isinstance(state, estimators.MapState), state.precision.shape
    (True, (2, 2))
    """

    inner: PyTree
    precision: Float[Array, "2 2"]
    information: Float[Array, " 2"]  # precision times mean


class Fitted(NamedTuple):
    mean: Float[Array, " 2"]  # of the posterior: (tilt, slope); the slope may be negative
    precision: Float[Array, "2 2"]  # of the posterior
    used: Float[Array, " 2"]  # (tilt, slope) with slope >= 0


@Options(folds=Whole(2, "it cross-fits"), memory=MEMORY, low=FINITE, high=FINITE)
def least_variance(
    estimator: Estimator,
    *,
    folds: int = 8,
    memory: float = 0.8,
    low: float = 0.0,
    high: float = 1.0,
) -> Estimator:
    """An estimator with the values of ``estimator``, and baselines of least gradient noise.

    The baseline is a function of the value, fitted as the top of this module's file explains;
    A = r - b without scaling. The likelihood of earlier steps is multiplied by ``memory`` per step.
    ``low`` and ``high`` are the range of rewards and values. The update calls that of ``estimator``
    ``folds`` + 1 times; its signals need score norms.

    Info: that of ``estimator``, ``effective_rows`` of the batch, ``tilt`` and ``slope`` (means over
    folds). Raises ValueError for an estimator whose value of a row changes with the row's own
    reward (found by a trial on a few random rows), and in the update without score norms and for
    rewards outside [``low``, ``high``].

    >>> estimator = estimators.least_variance(estimators.make("spo"))
    >>> state = estimator.init(np.array([1, 7, 4, 4]), np.full(4, 8))
    >>> signals = estimators.Signals(rewards=jnp.float32([0, 1, 1, 0]), valid=jnp.ones(4, bool),
    ...                              problem_ids=jnp.arange(4), lengths=jnp.array([5, 6, 4, 9]),
    ...                              score_norms=jnp.float32([1, 2, 1, 8]))
    >>> state, estimate = estimator.update(state, signals)
    >>> print(estimate.values, estimate.baselines)
    [0.167 0.833 0.5   0.5  ] [0.26  0.208 0.246 0.693]
    """
    Rewards(low, high).check("least_variance", np.zeros(0))
    _check_own_reward_unseen(estimator, low, high)

    def init(successes: Any, trials: Any, **given: Any) -> MapState:
        inner = estimator.init(successes, trials, **given)
        return MapState(inner=inner, precision=jnp.zeros((2, 2)), information=jnp.zeros(2))

    def update(state: MapState, signals: Signals) -> tuple[MapState, Estimate]:
        Rewards(low, high).check("least_variance", signals.rewards, signals.valid)
        rewards, valid = read(signals.rewards, signals.valid)
        w, y = usable(signals.score_norms, valid), to_unit(rewards, low, high)
        fold = fold_of(valid, folds)

        def fit(outside: Bool[Array, " N"]) -> Fitted:
            seen = replace(signals, valid=outside)
            values = estimator.update(state.inner, seen)[1].values
            return _fit(state, _logit(values, low, high), y, jnp.where(outside, w, 0))

        maps = jax.vmap(fit)(valid[None] & (fold[None] != jnp.arange(folds)[:, None]))
        inner, told = estimator.update(state.inner, signals)
        logit = _logit(told.values, low, high)
        tilt, slope = maps.used[fold].T
        baselines = from_unit(jax.nn.sigmoid(tilt + slope * logit), low, high)
        info = {name: x for name, x in told.info.items() if name != "zero_share"}
        info["effective_rows"] = effective(jnp.sum(w), jnp.sum(w**2))
        info |= {"tilt": jnp.mean(maps.used[:, 0]), "slope": jnp.mean(maps.used[:, 1])}
        state = _learned(replace(state, inner=inner), _fit(state, logit, y, w), memory)
        return state, estimate(rewards - baselines, told.values, valid, baselines=baselines, **info)

    return estimator._replace(init=init, update=update, predict=_of_inner(estimator.predict))


def _of_inner(predict: Callable[[Any], Any] | None) -> Callable[[MapState], Any] | None:
    return None if predict is None else lambda state: predict(state.inner)


def _logit(values: Float[Array, " N"], low: float, high: float) -> Float[Array, " N"]:
    p = to_unit(values, low, high)
    bound = jax.nn.sigmoid(LARGEST_LOGIT)
    p = jnp.clip(p, 1 - bound, bound)
    return jnp.log(p) - jnp.log1p(-p)


def _fit(
    state: MapState,
    logit: Float[Array, " N"],
    y: Float[Array, " N"],
    w: Float[Array, " N"],
) -> Fitted:
    """The posterior of (tilt, slope) given the rows with w > 0 and the earlier steps."""
    known = jnp.isfinite(logit)  # an unknown problem has no value
    w = jnp.where(known, w, 0)
    x = jnp.stack([jnp.ones_like(logit), jnp.where(known, logit, 0)], 1)
    rows = w * divide(jnp.sum(w), jnp.sum(w**2))  # they sum to the effective rows
    prior = state.precision + _prior()

    def newton(free: Float[Array, " 2"]) -> tuple[Float[Array, " 2"], Float[Array, "2 2"]]:
        """(mean, precision) at the maximum over the free numbers; the other one stays 0."""

        def step(_: Any, carry: Any) -> Any:
            mean, _ = carry
            b = jax.nn.sigmoid(x @ mean)
            precision = jnp.matmul(x.T * (rows * b * (1 - b))[None], x, precision="highest") + prior
            slope = (x.T @ (rows * (y - b)) + state.information - prior @ mean) * free
            held = jnp.diag(1 - free) + precision * free[:, None] * free[None]
            move = jnp.linalg.solve(held, slope)
            return mean + jnp.clip(move, -LARGEST_MOVE, LARGEST_MOVE), precision

        return jax.lax.fori_loop(0, NEWTON_STEPS, step, (jnp.zeros(2), prior))

    mean, precision = newton(jnp.ones(2))
    constant, _ = newton(jnp.float32([1, 0]))
    return Fitted(mean, precision, jnp.where(mean[1] >= 0, mean, constant))


def _prior() -> Float[Array, "2 2"]:
    """The precision of the prior of (tilt, slope); its mean is 0."""
    return jnp.diag(jnp.float32([TILT_SD**-2, SLOPE_SD**-2]))


def _learned(state: MapState, fitted: Fitted, memory: float) -> MapState:
    """The state with what the posterior knows beyond the prior, discounted."""
    return replace(
        state,
        precision=memory * (fitted.precision - _prior()),
        information=memory * jnp.matmul(fitted.precision, fitted.mean, precision="highest"),
    )


def _check_own_reward_unseen(estimator: Estimator, low: float, high: float) -> None:
    """Raise ValueError where flipping a row's reward changes the row's own value."""
    rows = -(-TRIED_ROWS // estimator.group_size) * estimator.group_size
    random = np.random.default_rng(0)
    trials = np.full(TRIED_PROBLEMS, 4)
    successes = random.integers(0, 5, TRIED_PROBLEMS)
    ids = np.repeat(random.integers(0, TRIED_PROBLEMS, rows), estimator.group_size)[:rows]
    wins = random.random(rows) < 0.5
    signals = Signals(
        rewards=jnp.where(wins, jnp.float32(high), jnp.float32(low)),
        valid=jnp.ones(rows, bool),
        problem_ids=jnp.asarray(ids, jnp.int32),
        lengths=jnp.asarray(random.integers(1, 9, rows), jnp.int32),
        score_norms=jnp.asarray(random.random(rows), jnp.float32),
        logprob_sum=jnp.asarray(-random.random(rows), jnp.float32),
    )

    @jax.jit
    def values(flipped: Bool[Array, "K N"]) -> Float[Array, "K N"]:
        state = estimator.init(successes, trials)

        def one(flipped: Bool[Array, " N"]) -> Float[Array, " N"]:
            rewards = jnp.where(flipped, low + high - signals.rewards, signals.rewards)
            return estimator.update(state, replace(signals, rewards=rewards))[1].values

        return jax.vmap(one)(flipped)

    found = np.asarray(
        values(jnp.eye(rows + 1, rows, dtype=bool))
    )  # in the last row none is flipped
    if np.any(found[np.arange(rows), np.arange(rows)] != found[-1]):
        raise ValueError(
            "least_variance got an estimator whose value of a row depends on the row's own reward; "
            "give one that leaves it out, such as value_filter, basis (rule robust), spo or rloo"
        )
