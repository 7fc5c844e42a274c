"""KAE, kernelised advantage estimation (arXiv 2604.28005): a problem's recent rewards, weighted by
age, with the other rollouts of this step."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from basis_jax.estimators.ranges import Options, Whole
from basis_jax.estimators.rows import (
    at,
    divide,
    estimate,
    inside,
    nan_reported,
    problem_others,
    problem_total,
    read,
    share,
    visit,
)
from basis_jax.estimators.single import batch_mean
from basis_jax.estimators.table import init_table
from basis_jax.pytree import pytree
from basis_jax.types import Estimate, Signals


@pytree
class KernelHistory:
    """The last W steps of every problem; step s is stored in row s mod W. For steps after ``last``
    the rows still hold older steps, which count as 0.

    >>> history = estimators.KernelHistory(sums=jnp.zeros((5, 9)), counts=jnp.zeros((5, 9)),
    ...                                    last=jnp.zeros(9, jnp.int32), step=jnp.int32(0))
    >>> history.sums.shape  # five steps of nine problems
    (5, 9)
    """

    sums: Float[Array, "W M"]  # of the rewards seen in that step
    counts: Float[Array, "W M"]
    last: Int[Array, " M"]  # step of the last visit
    step: Int[Array, ""]


@Options(window=Whole(1))
def kae_init(
    successes: Num[ArrayLike, " M"], trials: Num[ArrayLike, " M"], *, window: int = 5
) -> KernelHistory:
    """Empty histories of the last ``window`` steps; the offline table is checked (``init_table``)
    and not used. ValueError for window < 1.

    >>> history = estimators.kae_init(np.zeros(9), np.zeros(9), window=5)
    >>> history.sums.shape
    (5, 9)
    """
    size = init_table(successes, trials).trials.size
    return KernelHistory(
        sums=jnp.zeros((window, size)),
        counts=jnp.zeros((window, size)),
        last=jnp.zeros(size, jnp.int32),
        step=jnp.zeros((), jnp.int32),
    )


@nan_reported
def kae_update(state: KernelHistory, signals: Signals) -> tuple[KernelHistory, Estimate]:
    """A = r - V, V = sum K Z / sum K over the problem's earlier rewards Z and the other rollouts of
    the problem in this step (K = 1). K(age) = max(0, 1 - age / window), age in updates.

    The normaliser is that of the paper's section 5 (its Algorithm 1 prints another one). The
    default window of 5 steps is from its section 5.1. The paper does not define the value of a
    problem that is alone in the batch and has no recent history; here it is the mean of the batch's
    other rows (``fallback_share``). A problem may have any number of rows, and no V contains the
    own reward. Invalid rows are not remembered. An id outside 0..M-1 reads NaN and writes nothing.

    >>> history = estimators.kae_init(np.zeros(9), np.zeros(9))
    >>> signals = estimators.Signals(rewards=jnp.float32([1, 0]), valid=jnp.array([True, True]),
    ...                              problem_ids=jnp.array([3, 7]), lengths=jnp.array([5, 6]))
    >>> history, estimate = estimators.kae_update(history, signals)  # no history: the other row
    >>> history, estimate = estimators.kae_update(history, signals)  # each problem's last reward
    >>> estimate.values.tolist()
    [1.0, 0.0]
    """
    rewards, valid = read(signals.rewards, signals.valid)
    window, problems = state.sums.shape
    ids = signals.problem_ids
    live = valid & inside(ids, problems)
    age = (state.step - 1 - jnp.arange(window)) % window + 1  # of each row: 1..window
    seen = (state.step - age)[:, None] <= at(state.last, ids)[None]  # else older than the window
    sums, counts = (
        jnp.where(seen, x.at[:, ids].get(mode="fill", fill_value=0, wrap_negative_indices=False), 0)
        for x in (state.sums, state.counts)
    )
    own, rewards = live.astype(jnp.float32), jnp.where(live, rewards, 0)
    kernel = 1 - age.astype(jnp.float32) / window
    rewarded = kernel @ sums + problem_others(rewards, ids)
    weight = kernel @ counts + problem_others(own, ids)
    known = weight > 0
    fallback = batch_mean(rewards, valid=live).values
    values = jnp.where(known, divide(rewarded, weight), fallback)
    values = jnp.where(inside(ids, problems), values, jnp.nan)
    now = jnp.arange(window)[:, None] == state.step % window  # replaces the oldest step
    sums = jnp.where(now, problem_total(rewards, ids)[None], sums)
    counts = jnp.where(now, problem_total(own, ids)[None], counts)
    written = jnp.where(live, ids, problems)  # out of range: dropped
    state = KernelHistory(
        sums=state.sums.at[:, written].set(sums, mode="drop"),
        counts=state.counts.at[:, written].set(counts, mode="drop"),
        last=visit(state.last, ids, live=live, step=state.step),
        step=state.step + 1,
    )
    fallback_share = share(~known, live)
    return state, estimate(rewards - values, values, valid, fallback_share=fallback_share)
