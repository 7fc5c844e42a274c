"""KAE, kernelised advantage estimation (arXiv 2604.28005): a problem's recent rewards, weighted by
age, with the other rollouts of this step."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from basis_jax.estimators.history import problem_sums
from basis_jax.estimators.rows import divide, estimate, read, share
from basis_jax.estimators.single import batch_mean
from basis_jax.estimators.table import init_table
from basis_jax.pytree import pytree
from basis_jax.types import Estimate, Signals


@pytree
class KernelHistory:
    """The last W steps of every problem; step s lives in row s mod W.

    >>> history = estimators.KernelHistory(sums=jnp.zeros((5, 9)), counts=jnp.zeros((5, 9)),
    ...                                    step=jnp.int32(0))
    >>> history.sums.shape  # five steps of nine problems
    (5, 9)
    """

    sums: Float[Array, "W M"]  # of the rewards seen in that step
    counts: Float[Array, "W M"]
    step: Int[Array, ""]


def kae_init(
    successes: Num[ArrayLike, " M"], trials: Num[ArrayLike, " M"], *, window: int = 5
) -> KernelHistory:
    """Empty histories of the last ``window`` steps; the offline table is checked (``init_table``)
    and not used. ValueError for window < 1.

    >>> history = estimators.kae_init(np.zeros(9), np.zeros(9), window=5)
    >>> history.sums.shape
    (5, 9)
    """
    if window < 1:
        raise ValueError(f"got window={window}; the kernel needs 1 step or more")
    empty = jnp.zeros((window, init_table(successes, trials).trials.size))
    return KernelHistory(sums=empty, counts=empty, step=jnp.zeros((), jnp.int32))


def kae_update(state: KernelHistory, signals: Signals) -> tuple[KernelHistory, Estimate]:
    """A = r - V, V = sum K Z / sum K over the problem's earlier rewards Z and the other rollouts of
    the problem in this step (K = 1). K(age) = max(0, 1 - age / window), age in updates.

    The Nadaraya-Watson normaliser is that of the paper's section 5 (its Algorithm 1 prints
    another); the window of 5 steps is read off its section 5.1. Undefined in the paper: a problem
    alone in the batch without recent history has the mean of the batch's other rows
    (``fallback_share``). Any number of rows a problem; the own reward is in no V. Invalid rows are
    not remembered.

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
    age = (state.step - 1 - jnp.arange(window)) % window + 1  # of each row: 1..window
    kernel = 1 - age.astype(jnp.float32) / window
    own, ids = valid.astype(jnp.float32), signals.problem_ids
    new_sums = problem_sums(rewards, signals, problems)
    new_counts = problem_sums(own, signals, problems)
    rewarded = (kernel @ state.sums)[ids] + (new_sums[ids] - rewards)
    weight = (kernel @ state.counts)[ids] + (new_counts[ids] - own)
    known = weight > 0
    fallback = batch_mean(rewards, valid=valid).values
    values = jnp.where(known, divide(rewarded, weight), fallback)
    row = state.step % window  # held the step of window updates ago, by now of weight 0
    state = KernelHistory(
        sums=state.sums.at[row].set(new_sums),
        counts=state.counts.at[row].set(new_counts),
        step=state.step + 1,
    )
    return state, estimate(rewards - values, values, valid, fallback_share=share(~known, valid))
