"""Single-rollout estimators that remember: a running mean, and evidence per problem.

Every baseline is read *before* the rewards of the step enter the state, unless a docstring says
otherwise. If a problem occurs several times in a batch, its rows share the old value, and their
rewards enter the evidence together, so the order of rows does not matter. Invalid rows leave the
state as it is. Problem ids outside 0..M-1 read NaN and write nothing.

A reward in [``low``, ``high``] counts as (r - low) / (high - low) successes. A reward outside
raises ValueError; under jit it is clipped for the evidence, while A keeps the reward. An update
reads and writes only the problems of its rows, so with a donated state its cost does not grow with
M.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Num

from basis_jax.estimators.ranges import (
    BETWEEN,
    FINITE,
    POSITIVE,
    SHARE,
    SWITCH,
    OneOf,
    Options,
    Rewards,
)
from basis_jax.estimators.rows import (
    at,
    divide,
    estimate,
    from_unit,
    inside,
    nan_reported,
    problem_total,
    read,
    to_unit,
    visit,
)
from basis_jax.estimators.single import CONVENTIONS, standardise
from basis_jax.estimators.table import init_table
from basis_jax.masked import masked_mean
from basis_jax.pytree import pytree
from basis_jax.types import Estimate, Signals

SCALINGS = OneOf((*CONVENTIONS, "none"))


# ------------------------------------------------------------------------------- moving average
@nan_reported
@Options(rate=SHARE)
def ema(
    rewards: Num[ArrayLike, " N"],
    baseline: Float[ArrayLike, ""],
    *,
    rate: float = 0.1,
    valid: Bool[ArrayLike, " N"] | None = None,
) -> tuple[Float[Array, ""], Estimate]:
    """A = r - b, and then b <- (1 - rate) b + rate mean(r): (new b, Estimate). Williams 1992.

    b is used before it is updated. Every rollout counts once. Without valid rows b stays.
    ValueError unless 0 <= rate <= 1.

    >>> baseline, estimate = estimators.ema(np.float32([1, 0, 1, 1]), 0.5, rate=0.1)
    >>> print(baseline, estimate.advantages)
    0.525 [ 0.5 -0.5  0.5  0.5]
    """
    rewards, valid = read(rewards, valid)
    old = jnp.asarray(baseline, jnp.float32)
    new = jnp.where(jnp.any(valid), (1 - rate) * old + rate * masked_mean(rewards, valid), old)
    values = jnp.broadcast_to(old, rewards.shape)
    return new, estimate(rewards - values, values, valid, baseline=old)


def ema_init(successes: Num[ArrayLike, " M"], trials: Num[ArrayLike, " M"]) -> Float[Array, ""]:
    """The pooled offline success rate (K + 1/2) / (n + 1); 1/2 without an offline table. Raises the
    errors of ``init_table``.

    >>> successes, trials = np.array([4, 2, 6]), np.full(3, 8)  # of three problems
    >>> float(estimators.ema_init(successes, trials))
    0.5
    """
    table = init_table(successes, trials)
    return (jnp.sum(table.successes) + 0.5) / (jnp.sum(table.trials) + 1)


@nan_reported
@Options(rate=SHARE)
def ema_update(
    state: Float[Array, ""], signals: Signals, *, rate: float = 0.1
) -> tuple[Float[Array, ""], Estimate]:
    """``ema`` as the update of an estimator: the state is the baseline, one number.

    >>> baseline = estimators.ema_init(np.zeros(9), np.zeros(9))
    >>> signals = estimators.Signals(rewards=jnp.float32([1, 0]), valid=jnp.array([True, True]),
    ...                              problem_ids=jnp.array([3, 7]), lengths=jnp.array([5, 6]))
    >>> baseline, estimate = estimators.ema_update(baseline, signals)
    >>> float(baseline), estimate.advantages.tolist()
    (0.5, [0.5, -0.5])
    """
    return ema(signals.rewards, state, rate=rate, valid=signals.valid)


# ------------------------------------------------------------------------------- Beta evidence
@pytree
class Evidence:
    """Discounted counts of every problem: value = successes / (successes + failures).

    >>> evidence = estimators.Evidence(successes=jnp.ones(3), failures=jnp.ones(3),
    ...                                last=jnp.zeros(3, jnp.int32), step=jnp.int32(0))
    >>> (evidence.successes / (evidence.successes + evidence.failures)).tolist()
    [0.5, 0.5, 0.5]
    """

    successes: Float[Array, " M"]
    failures: Float[Array, " M"]
    last: Int[Array, " M"]  # step whose policy the counts are discounted to
    step: Int[Array, ""]


@Options(decay=BETWEEN)
def spo_init(
    successes: Num[ArrayLike, " M"], trials: Num[ArrayLike, " M"], *, decay: float = 0.875
) -> Evidence:
    """1 / (1 - decay) pseudo-counts at the Jeffreys rate (k + 1/2) / (n + 1), SPO's recipe; half a
    success and half a failure where trials are 0. ValueError unless 0 < decay < 1, and as
    ``init_table``.

    >>> evidence = estimators.spo_init(np.array([4, 0]), np.array([8, 0]))  # of two problems
    >>> evidence.successes.tolist(), evidence.failures.tolist()
    ([4.0, 0.5], [4.0, 0.5])
    """
    table = init_table(successes, trials)
    weight = jnp.where(table.trials > 0, 1 / (1 - decay), 1)
    rate = (table.successes + 0.5) / (table.trials + 1)
    return _evidence(weight * rate, weight * (1 - rate))


@nan_reported
@Options(decay=BETWEEN, convention=SCALINGS, low=FINITE, high=FINITE)
def spo_update(
    state: Evidence,
    signals: Signals,
    *,
    decay: float = 0.875,
    convention: str = "sequence",
    low: float = 0.0,
    high: float = 1.0,
    divergence: Float[Array, " N"] | None = None,
) -> tuple[Evidence, Estimate]:
    """SPO: A = r - a / (a + b), standardised over the batch. Xu, Ding 2025, arXiv 2509.13232.

    Then a <- d a + r, b <- d b + 1 - r. A problem's counts decay once in every step that visits it.
    d is ``decay``, or ``spo_decay(divergence)`` if ``divergence`` is given: how far the policy has
    moved on each row's problem since its last visit. If a problem has several rows, the least d
    counts. Rewards are in [``low``, ``high``]. ``convention``: one of ``standardise``, or ``none``
    for unscaled advantages. ValueError for another one, and unless 0 < decay < 1.

    >>> evidence = estimators.spo_init(np.full(9, 4), np.full(9, 8))
    >>> signals = estimators.Signals(rewards=jnp.float32([1, 0]), valid=jnp.array([True, True]),
    ...                              problem_ids=jnp.array([3, 7]), lengths=jnp.array([5, 6]))
    >>> evidence, estimate = estimators.spo_update(evidence, signals)
    >>> estimate.values.tolist(), evidence.successes[signals.problem_ids].tolist()
    ([0.5, 0.5], [4.5, 3.5])
    """
    Rewards(low, high).check("spo", signals.rewards, signals.valid)
    live = read(signals.rewards, signals.valid)[1]
    factor = jnp.full(live.shape, decay, jnp.float32)
    if divergence is not None:
        own = jnp.where(live, spo_decay(divergence), 1)
        factor = problem_total(own, signals.problem_ids, least=True)
    state, values, _ = _observe(state, signals, factor, jnp.ones(live.shape), (low, high))
    return state, _standardised(values, signals, convention)


@Options(half=POSITIVE, least=SHARE, most=SHARE)
def spo_decay(
    divergence: Float[Array, "*s"], *, half: float = 0.06, least: float = 0.875, most: float = 0.96
) -> Float[Array, "*s"]:
    """SPO's decay clip(2^(-D / half), least, most), D = mean |logprob now - then| of the problem's
    previous rollout. arXiv 2509.13232. ValueError unless half > 0 and 0 <= least <= most <= 1.

    >>> print(estimators.spo_decay(jnp.float32([0, 0.01, 1])))
    [0.96  0.891 0.875]
    """
    if least > most:
        raise ValueError(f"spo_decay got least={least}, most={most}; least may not exceed most")
    return jnp.clip(2 ** (-divergence / half), least, most)


def evidence_rates(state: Evidence) -> Float[Array, " M"]:
    """Every problem's success rate a / (a + b).

    >>> evidence = estimators.spo_init(np.array([4, 0]), np.array([8, 8]))
    >>> print(estimators.evidence_rates(evidence))
    [0.5   0.056]
    """
    return divide(state.successes, state.successes + state.failures)


def spo_weights(state: Evidence) -> Float[Array, " M"]:
    """SPO's weights for drawing problems without replacement: sqrt(v (1 - v)) + 0.05, v the value.
    arXiv 2509.13232.

    >>> evidence = estimators.spo_init(np.array([4, 0]), np.array([8, 8]))
    >>> print(estimators.spo_weights(evidence))
    [0.55  0.279]
    """
    v = evidence_rates(state)
    return jnp.sqrt(v * (1 - v)) + 0.05


@nan_reported
@Options(decay=BETWEEN, convention=SCALINGS, low=FINITE, high=FINITE)
def spo_pp_update(
    state: Evidence,
    signals: Signals,
    *,
    decay: float = 0.875,
    convention: str = "spo_pp",
    low: float = 0.0,
    high: float = 1.0,
    staleness: Int[Array, " N"] | None = None,
) -> tuple[Evidence, Estimate]:
    """SPO++: evidence fades with every published policy, not with every visit. arXiv 2608.24870.

    a = decay^(q - z_0) a_0 + sum_i decay^(q - z_i) r_i, b likewise with 1 - r_i: q is this step,
    z_i the step whose policy wrote rollout i (``staleness`` = q - z_i, 0 if not given), so the
    order in which rollouts arrive does not matter. The default ``convention`` weights by tokens.
    Rewards and errors as in ``spo_update``.

    >>> evidence = estimators.spo_init(np.full(9, 4), np.full(9, 8))
    >>> signals = estimators.Signals(rewards=jnp.float32([1, 0]), valid=jnp.array([True, True]),
    ...                              problem_ids=jnp.array([3, 7]), lengths=jnp.array([5, 6]))
    >>> staleness = jnp.array([0, 2])  # row 1 was written two policies ago
    >>> evidence, estimate = estimators.spo_pp_update(evidence, signals, staleness=staleness)
    >>> print(estimate.values, evidence.failures[signals.problem_ids])
    [0.5 0.5] [4.    4.766]
    """
    Rewards(low, high).check("spo_pp", signals.rewards, signals.valid)
    age = (state.step - at(state.last, signals.problem_ids)).astype(jnp.float32)
    late = jnp.zeros(age.shape) if staleness is None else staleness.astype(jnp.float32)
    state, values, _ = _observe(state, signals, decay**age, decay**late, (low, high))
    return state, _standardised(values, signals, convention)


def dbb_init(successes: Num[ArrayLike, " M"], trials: Num[ArrayLike, " M"]) -> Evidence:
    """Beta(1, 1) for every problem; the offline table is checked (``init_table``) and not used.

    >>> evidence = estimators.dbb_init(np.zeros(3), np.zeros(3))  # three problems
    >>> evidence.successes.tolist(), evidence.failures.tolist()
    ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    """
    size = init_table(successes, trials).trials.size
    return _evidence(jnp.ones(size), jnp.ones(size))  # two buffers: each is donated


@nan_reported
@Options(decay=SHARE, scale=SWITCH, low=FINITE, high=FINITE)
def dbb_update(
    state: Evidence,
    signals: Signals,
    *,
    decay: float = 0.5,
    scale: bool = True,
    low: float = 0.0,
    high: float = 1.0,
) -> tuple[Evidence, Estimate]:
    """GRPO-DBB: A = (r - p) / sqrt(p (1 - p)), or r - p without ``scale``. arXiv 2603.18444.

    p = a / (a + b) *after* a <- decay a + S, b <- decay b + N - S with this step's S successes in
    N rollouts of the problem: the own reward is inside p, a bias. Paper: decay .5 (1.7B), .75 (8B).
    With rewards in [``low``, ``high``], A is that of (r - low) / (high - low), times high - low
    without ``scale``. ValueError unless 0 <= decay <= 1.

    >>> evidence = estimators.dbb_init(np.zeros(9), np.zeros(9))
    >>> signals = estimators.Signals(rewards=jnp.float32([1, 0]), valid=jnp.array([True, True]),
    ...                              problem_ids=jnp.array([3, 7]), lengths=jnp.array([5, 6]))
    >>> evidence, estimate = estimators.dbb_update(evidence, signals)
    >>> print(estimate.values, estimate.advantages)
    [0.75 0.25] [ 0.577 -0.577]
    """
    Rewards(low, high).check("dbb", signals.rewards, signals.valid)
    rewards, valid = read(signals.rewards, signals.valid)
    factor = jnp.full(rewards.shape, decay, jnp.float32)
    state, _, p = _observe(state, signals, factor, jnp.ones_like(rewards), (low, high))
    values = from_unit(p, low, high)
    advantages = rewards - values
    if scale:
        scaled = divide(advantages, (high - low) * jnp.sqrt(p * (1 - p)))
        advantages = jnp.where(jnp.isnan(p), jnp.nan, scaled)
    return state, estimate(advantages, values, valid)


def _evidence(successes: Float[Array, " M"], failures: Float[Array, " M"]) -> Evidence:
    return Evidence(
        successes=successes,
        failures=failures,
        last=jnp.zeros(successes.shape, jnp.int32),
        step=jnp.zeros((), jnp.int32),
    )


def _observe(
    state: Evidence,
    signals: Signals,
    factor: Float[Array, " N"],
    weights: Float[Array, " N"],
    reward_range: tuple[float, float],
) -> tuple[Evidence, Float[Array, " N"], Float[Array, " N"]]:
    """(the state with visited problems' counts times ``factor`` plus the weighted new rewards, the
    values before on the scale of the rewards, the success rates after)."""
    low, high = reward_range
    rewards, valid = read(signals.rewards, signals.valid)
    ids, size = signals.problem_ids, state.last.size
    weights = jnp.where(valid & inside(ids, size), weights, 0)
    y = to_unit(rewards, low, high)
    a, b = at(state.successes, ids), at(state.failures, ids)
    new_a = factor * a + problem_total(weights * y, ids)
    new_b = factor * b + problem_total(weights * (1 - y), ids)
    written = jnp.where(valid & inside(ids, size), ids, size)  # out of range: dropped
    new = Evidence(
        successes=state.successes.at[written].set(new_a, mode="drop"),
        failures=state.failures.at[written].set(new_b, mode="drop"),
        last=visit(state.last, ids, live=valid, step=state.step),
        step=state.step + 1,
    )
    return new, from_unit(a / (a + b), low, high), new_a / (new_a + new_b)


def problem_sums(x: Float[Array, " N"], signals: Signals, size: int) -> Float[Array, " {size}"]:
    """Sum of the rows' x over each of ``size`` problems, 0 for those without a row.

    >>> signals = estimators.Signals(rewards=jnp.float32([1, 0]), valid=jnp.array([True, True]),
    ...                              problem_ids=jnp.array([3, 3]), lengths=jnp.array([5, 6]))
    >>> estimators.problem_sums(jnp.float32([1, 2]), signals, 5).tolist()
    [0.0, 0.0, 0.0, 3.0, 0.0]
    """
    sums = jnp.zeros(size).at[signals.problem_ids]
    return sums.add(x, mode="drop", wrap_negative_indices=False)


def _standardised(values: Float[Array, " N"], signals: Signals, convention: str) -> Estimate:
    """r - values, standardised over the valid rows whose value is known; NaN in the others."""
    rewards, valid = read(signals.rewards, signals.valid)
    advantages, known = rewards - values, valid & ~jnp.isnan(values)
    if convention != "none":
        lengths = jnp.where(known, signals.lengths.astype(jnp.float32), 0)
        scaled, _ = standardise(jnp.where(known, advantages, 0), lengths, convention)
        advantages = jnp.where(jnp.isnan(values), jnp.nan, scaled)
    return estimate(advantages, values, valid)
