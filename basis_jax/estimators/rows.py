"""What every estimator does first and last: read the rows of a batch, return an Estimate.

Invalid rows are those that could not be graded. They may hold anything, NaN included: their reward
is replaced by 0 here, their weight is 0 everywhere, and their advantage and value are 0. A row
whose reward is NaN or infinite counts as invalid. A problem id outside 0..M-1 reads NaN and writes
nothing: such a row has the advantage and value NaN, and other rows treat it as invalid.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from basis_jax.estimators.ranges import GROUP
from basis_jax.types import Estimate, Signals

__all__ = [
    "at",
    "centre",
    "check_rows",
    "divide",
    "estimate",
    "fold_of",
    "from_unit",
    "inside",
    "join",
    "nan_reported",
    "others_sum",
    "problem_others",
    "problem_total",
    "read",
    "share",
    "split",
    "to_unit",
    "total",
    "visit",
]

Function = TypeVar("Function", bound=Callable)


def check_rows(**arrays: ArrayLike) -> None:
    """Raise ValueError unless all arrays are [N] with one N.

    >>> estimators.rows.check_rows(rewards=np.zeros(3), lengths=np.ones(3))  # both [3]: accepted
    """
    shapes = {name: jnp.shape(x) for name, x in arrays.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"got shapes {given}; give one value a row, all of one length")


def read(
    rewards: Num[ArrayLike, " N"], valid: Bool[ArrayLike, " N"] | None, **others: ArrayLike
) -> tuple[Float[Array, " N"], Bool[Array, " N"]]:
    """float32 rewards (0 in invalid rows) and the validity mask (None: all rows are valid). A row
    whose reward is NaN or infinite is invalid.

    ``others`` are only checked. Raises ValueError unless all arrays are [N] with one N.

    >>> rewards, valid = estimators.rows.read(np.array([1, 7]), np.array([True, False]))
    >>> rewards.tolist(), valid.tolist()
    ([1.0, 0.0], [True, False])
    """
    check_rows(rewards=rewards, **others, **({} if valid is None else {"valid": valid}))
    rewards = jnp.asarray(rewards, jnp.float32)
    finite = jnp.isfinite(rewards)
    valid = finite if valid is None else jnp.asarray(valid, bool) & finite
    return jnp.where(valid, rewards, 0), valid


def nan_reported(function: Function) -> Function:
    """A decorator: ``info["nan_share"]`` of the Estimate is the share of valid rows whose reward is
    NaN or infinite. The function's first argument is the rewards, or its second the Signals; it
    returns an Estimate, or a pair with one.

    >>> @estimators.rows.nan_reported
    ... def plain(rewards, *, valid=None):
    ...     rewards, valid = estimators.rows.read(rewards, valid)
    ...     return estimators.rows.estimate(rewards, jnp.zeros_like(rewards), valid)
    >>> estimate = plain(np.float32([1, np.nan]))
    >>> estimate.advantages.tolist(), float(estimate.info["nan_share"])
    ([1.0, 0.0], 0.5)
    """

    @functools.wraps(function)
    def reporting(*args: Any, **options: Any) -> Any:
        returned = function(*args, **options)
        signals = next((x for x in (*args, *options.values()) if isinstance(x, Signals)), None)
        if signals is None:
            rewards = args[0] if args else options["rewards"]
            valid = options.get("valid")
        else:
            rewards, valid = signals.rewards, signals.valid
        finite = jnp.isfinite(jnp.asarray(rewards, jnp.float32))
        valid = jnp.ones(finite.shape, bool) if valid is None else jnp.asarray(valid, bool)
        told = returned[1] if isinstance(returned, tuple) else returned
        told = replace(told, info={**told.info, "nan_share": share(~finite, valid)})
        return (returned[0], told) if isinstance(returned, tuple) else told

    return cast(Function, reporting)


def to_unit(rewards: Float[Array, "*s"], low: float, high: float) -> Float[Array, "*s"]:
    """(reward - low) / (high - low), clipped into [0, 1].

    >>> estimators.rows.to_unit(jnp.float32([-1, 0, 1, 7]), -1.0, 1.0).tolist()
    [0.0, 0.5, 1.0, 1.0]
    """
    return jnp.clip((rewards - low) / (high - low), 0, 1)


def from_unit(values: Float[Array, "*s"], low: float, high: float) -> Float[Array, "*s"]:
    """low + (high - low) value. For low 0 and high 1 the values are returned without rounding.

    >>> estimators.rows.from_unit(jnp.float32([0, 0.5, 1]), -1.0, 1.0).tolist()
    [-1.0, 0.0, 1.0]
    """
    unit = isinstance(low, float) and isinstance(high, float) and (low, high) == (0.0, 1.0)
    return values if unit else low + (high - low) * values


def fold_of(valid: Bool[Array, " N"], folds: int) -> Int[Array, " N"]:
    """The fold of every row for cross-fitting: the j-th valid row is in fold j mod ``folds``. The
    entries of invalid rows have no meaning.

    >>> estimators.rows.fold_of(jnp.array([True, True, True, False]), 2)[:3].tolist()
    [0, 1, 0]
    """
    return (jnp.cumsum(valid.astype(jnp.int32)) - 1) % folds


# ---------------------------------------------------------------------- rows and their problems
def at(
    x: Shaped[Array, "M ..."], ids: Int[Array, " N"], *, fill: float | None = None
) -> Shaped[Array, "N ..."]:
    """x[ids]; ``fill`` (by default NaN, 0 for whole numbers) where an id is not in 0..M-1.

    >>> estimators.rows.at(jnp.float32([5, 6, 7]), jnp.array([1, 3, -1])).tolist()
    [6.0, nan, nan]
    """
    if fill is None:
        fill = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0
    return x.at[ids].get(mode="fill", fill_value=fill, wrap_negative_indices=False)


def visit(
    last: Int[Array, " M"], ids: Int[Array, " N"], *, live: Bool[Array, " N"], step: Int[Array, ""]
) -> Int[Array, " M"]:
    """``last`` with ``step`` written at the live rows' problems. ``step`` is no earlier than
    ``last``. Ids outside 0..M-1 write nothing.

    >>> last, live = jnp.array([0, 2, 1]), jnp.array([True, False])
    >>> estimators.rows.visit(last, jnp.array([0, 1]), live=live, step=jnp.int32(3)).tolist()
    [3, 2, 1]
    """
    written = jnp.where(live & inside(ids, last.size), ids, last.size)  # out of range: dropped
    # The maximum is always ``step``. It makes what is written depend on what the update reads from
    # ``last``, so that XLA does not copy a donated ``last``.
    return last.at[written].set(jnp.maximum(at(last, ids), step), mode="drop")


def inside(ids: Int[Array, " N"], size: int) -> Bool[Array, " N"]:
    """Which ids are in 0..size-1.

    >>> estimators.rows.inside(jnp.array([1, 3, -1]), 3).tolist()
    [True, False, False]
    """
    return (ids >= 0) & (ids < size)


def problem_total(
    x: Float[Array, " N"], ids: Int[Array, " N"], *, least: bool = False
) -> Float[Array, " N"]:
    """For every row the sum (or the ``least``) of x over the rows of its problem; O(N log N), for
    any number of problems.

    >>> ids = jnp.array([3, 8, 3])
    >>> estimators.rows.problem_total(jnp.float32([1, 2, 3]), ids).tolist()
    [4.0, 2.0, 4.0]
    """
    order = jnp.argsort(ids, stable=True)
    _, place = _runs(ids[order])
    if least:
        found = jnp.full_like(x, jnp.inf).at[place].min(x[order])
    else:
        found = jnp.zeros_like(x).at[place].add(x[order])
    return jnp.zeros_like(x).at[order].set(found[place])


def problem_others(x: Float[Array, " N"], ids: Int[Array, " N"]) -> Float[Array, " N"]:
    """For every row the sum of x over the *other* rows of its problem: those before it plus those
    after it. The result does not depend on the own x, not even by rounding. O(N log N).

    >>> ids = jnp.array([3, 8, 3])
    >>> estimators.rows.problem_others(jnp.float32([1, 2, 3]), ids).tolist()
    [3.0, 0.0, 1.0]
    """
    order = jnp.argsort(ids, stable=True)
    first, _ = _runs(ids[order])
    last = jnp.append(first[1:], True)
    before = _sum_before(x[order], first)
    behind = _sum_before(x[order][::-1], last[::-1])[::-1]
    return jnp.zeros_like(x).at[order].set(before + behind)


def _runs(ids: Int[Array, " N"]) -> tuple[Bool[Array, " N"], Int[Array, " N"]]:
    """(is this the first of a run of equal ids, the number of the run) for sorted ids."""
    first = jnp.concatenate([jnp.ones(min(1, ids.size), bool), ids[1:] != ids[:-1]])
    return first, jnp.cumsum(first.astype(jnp.int32)) - 1


def _sum_before(x: Float[Array, " N"], first: Bool[Array, " N"]) -> Float[Array, " N"]:
    """For every entry, the sum of the entries before it in its run."""

    def add(left, right):
        (left_first, left_sum), (right_first, right_sum) = left, right
        total = jnp.where(right_first, right_sum, left_sum + right_sum)
        return left_first | right_first, total

    _, sums = jax.lax.associative_scan(add, (first, x))
    shifted = jnp.concatenate([jnp.zeros(min(1, x.size), x.dtype), sums[:-1]])
    return jnp.where(first, 0, shifted)


# ------------------------------------------------------------------------------------ estimates


def estimate(
    advantages: Float[Array, " N"],
    values: Float[Array, " N"],
    valid: Bool[Array, " N"],
    *,
    baselines: Float[Array, " N"] | None = None,
    **info: Array,
) -> Estimate:
    """Estimate with 0 in invalid rows. ``info["zero_share"]`` is the share of valid rows with
    advantage 0. The baselines are the values unless ``baselines`` are given.

    >>> advantages, valid = jnp.float32([0.5, 9]), jnp.array([True, False])
    >>> estimate = estimators.rows.estimate(advantages, advantages, valid, rate=jnp.float32(0.1))
    >>> estimate.advantages.tolist(), sorted(estimate.info)
    ([0.5, 0.0], ['rate', 'zero_share'])
    """
    advantages = jnp.where(valid, advantages, 0)
    info["zero_share"] = share(advantages == 0, valid)
    values = jnp.where(valid, values, 0)
    baselines = values if baselines is None else jnp.where(valid, baselines, 0)
    return Estimate(advantages=advantages, values=values, baselines=baselines, info=info)


def share(chosen: Bool[Array, " N"], valid: Bool[Array, " N"]) -> Float[Array, ""]:
    """Fraction of the valid rows that are chosen; 0 without valid rows.

    >>> chosen, valid = jnp.array([True, False, True]), jnp.array([True, True, False])
    >>> float(estimators.rows.share(chosen, valid))
    0.5
    """
    count = jnp.sum(valid).astype(jnp.float32)
    return jnp.sum(chosen & valid).astype(jnp.float32) / jnp.maximum(count, 1)


def divide(numerator: Float[Array, "*s"], denominator: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """numerator / denominator, 0 where the denominator (>= 0) is 0.

    >>> estimators.rows.divide(jnp.float32([1, 1]), jnp.float32([2, 0])).tolist()
    [0.5, 0.0]
    """
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), 0)


def others_sum(x: Float[Array, " N"], *, block: int = 64) -> Float[Array, " N"]:
    """Sum over j != i of x_j, in O(N). The result does not depend on x_i, not even by rounding.

    ``sum(x) - x_i`` would: its rounding depends on x_i, and if one entry is much larger than the
    others, all their digits are lost. Instead, the other entries of the same block are added to the
    sums of the other blocks.

    >>> estimators.rows.others_sum(jnp.float32([1, 2, 3])).tolist()
    [5.0, 4.0, 3.0]
    """
    if x.size < 2:
        return jnp.zeros_like(x)
    blocks = jnp.pad(x, (0, -x.size % block)).reshape(-1, block)
    inside = jnp.matmul(blocks, 1 - jnp.eye(block, dtype=x.dtype), precision="highest")
    outside = others_sum(jnp.sum(blocks, 1), block=block)
    return (inside + outside[:, None]).ravel()[: x.size]


def split(
    rewards: Num[ArrayLike, " N"],
    valid: Bool[ArrayLike, " N"] | None,
    group_size: int,
    **others: ArrayLike,
) -> tuple[Float[Array, "B G"], Float[Array, "B G"]]:
    """(rewards, weights: 1 valid, 0 invalid) [B G], one row for each prompt.

    Raises ValueError for group_size < 2, for rows that do not fill whole groups, and as ``read``.

    >>> r, w = estimators.rows.split(np.float32([1, 0, 1, 1]), None, 2)
    >>> r.tolist(), w.tolist()
    ([[1.0, 0.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]])
    """
    GROUP.checked("a group estimator", "group_size", group_size)
    rewards, valid = read(rewards, valid, **others)
    if rewards.size % group_size:
        raise ValueError(
            f"got {rewards.size} rewards for group_size={group_size}; give whole groups, the "
            "rollouts of a prompt adjacent"
        )
    return rewards.reshape(-1, group_size), valid.astype(jnp.float32).reshape(-1, group_size)


def join(
    advantages: Float[Array, "B G"],
    values: Float[Array, "B G"],
    r: Float[Array, "B G"],
    w: Float[Array, "B G"],
    *,
    baselines: Float[Array, "B G"] | None = None,
    **info: Array,
) -> Estimate:
    """The Estimate of rows [N] from arrays [B G], as ``estimate`` makes it.

    ``info["degenerate_share"]``: the share of valid rows whose group has equal rewards only.

    >>> r, w = estimators.rows.split(np.float32([1, 0, 1, 1]), None, 2)
    >>> values = estimators.rows.total(r) / 2
    >>> estimate = estimators.rows.join(r - values, values, r, w)
    >>> estimate.advantages.tolist(), float(estimate.info["degenerate_share"])
    ([0.5, -0.5, 0.0, 0.0], 0.5)
    """
    low = jnp.min(jnp.where(w > 0, r, jnp.inf), 1, keepdims=True)
    high = jnp.max(jnp.where(w > 0, r, -jnp.inf), 1, keepdims=True)
    degenerate = jnp.broadcast_to(low >= high, r.shape).ravel()
    valid = w.ravel() > 0
    info["degenerate_share"] = share(degenerate, valid)
    subtracted = None if baselines is None else baselines.ravel()
    return estimate(advantages.ravel(), values.ravel(), valid, baselines=subtracted, **info)


def total(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The sum over the last axis, at every entry of it.

    >>> estimators.rows.total(jnp.float32([[1, 2], [3, 4]])).tolist()
    [[3.0, 3.0], [7.0, 7.0]]
    """
    return jnp.broadcast_to(jnp.sum(x, -1, keepdims=True), x.shape)


def centre(
    x: Float[Array, "*s"], weights: Float[Array, "*s"]
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """(x - mean, mean) over the last axis under weights >= 0; (0, mean) where the weight is 0.

    Exactly 0 where all x are equal: they are first taken relative to one of themselves.

    >>> deviations, mean = estimators.rows.centre(jnp.float32([1, 0, 9]), jnp.float32([1, 1, 0]))
    >>> deviations.tolist(), mean.tolist()
    ([0.5, -0.5, 0.0], [0.5, 0.5, 0.5])
    """
    live = weights > 0
    top = jnp.max(jnp.where(live, x, -jnp.inf), -1, keepdims=True, initial=-jnp.inf)
    shift = jnp.where(jnp.isfinite(top), top, 0)
    x = jnp.where(live, x - shift, 0)
    mean = divide(total(weights * x), total(weights))
    return jnp.where(live, x - mean, 0), mean + shift
