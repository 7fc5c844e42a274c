"""What every estimator does first and last: read the rows of a batch, return an Estimate.

Invalid rows (the verifier failed) may hold anything, NaN included: their reward is replaced by 0
here, their weight is 0 everywhere, and their advantage and value are 0.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Num

from basis_jax.types import Estimate

__all__ = [
    "centre",
    "check_rows",
    "divide",
    "estimate",
    "join",
    "others_sum",
    "read",
    "share",
    "split",
    "total",
]


def check_rows(**arrays) -> None:
    """Raise ValueError unless all arrays are [N] with one N.

    >>> estimators.rows.check_rows(rewards=np.zeros(3), lengths=np.ones(3))  # both [3]: accepted
    """
    shapes = {name: jnp.shape(x) for name, x in arrays.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"got shapes {given}; give one value a row, all of one length")


def read(
    rewards: Num[ArrayLike, " N"], valid: Bool[ArrayLike, " N"] | None, **others
) -> tuple[Float[Array, " N"], Bool[Array, " N"]]:
    """float32 rewards (0 in invalid rows) and the validity mask (None: all rows are valid).

    ``others`` are only checked. Raises ValueError unless all arrays are [N] with one N.

    >>> rewards, valid = estimators.rows.read(np.array([1, 7]), np.array([True, False]))
    >>> rewards.tolist(), valid.tolist()
    ([1.0, 0.0], [True, False])
    """
    check_rows(rewards=rewards, **others, **({} if valid is None else {"valid": valid}))
    rewards = jnp.asarray(rewards, jnp.float32)
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid, bool)
    return jnp.where(valid, rewards, 0), valid


def estimate(
    advantages: Float[Array, " N"], values: Float[Array, " N"], valid: Bool[Array, " N"], **info
) -> Estimate:
    """Estimate with 0 in invalid rows; ``info["zero_share"]``: valid rows with advantage 0.

    >>> advantages, valid = jnp.float32([0.5, 9]), jnp.array([True, False])
    >>> estimate = estimators.rows.estimate(advantages, advantages, valid, rate=jnp.float32(0.1))
    >>> estimate.advantages.tolist(), sorted(estimate.info)
    ([0.5, 0.0], ['rate', 'zero_share'])
    """
    advantages = jnp.where(valid, advantages, 0)
    info["zero_share"] = share(advantages == 0, valid)
    return Estimate(advantages=advantages, values=jnp.where(valid, values, 0), info=info)


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
    """Sum over j != i of x_j, of which not one bit depends on x_i; O(N).

    ``sum(x) - x_i`` does not serve: its rounding remembers x_i, and where one entry dwarfs the
    others it loses every digit of them. Here: the others of the block, and the other blocks.

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
    rewards: Num[ArrayLike, " N"], valid: Bool[ArrayLike, " N"] | None, group_size: int, **others
) -> tuple[Float[Array, "B G"], Float[Array, "B G"]]:
    """(rewards, weights: 1 valid, 0 invalid) [B G], one row for each prompt.

    Raises ValueError for group_size < 2, for rows that do not fill whole groups, and as ``read``.

    >>> r, w = estimators.rows.split(np.float32([1, 0, 1, 1]), None, 2)
    >>> r.tolist(), w.tolist()
    ([[1.0, 0.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]])
    """
    if group_size < 2:
        raise ValueError(f"got group_size={group_size}; a group estimator needs 2 or more rollouts")
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
    **info,
) -> Estimate:
    """The Estimate of rows [N] from arrays [B G], as ``estimate`` makes it.

    ``info["degenerate_share"]``: valid rows whose group holds no two different rewards.

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
    return estimate(advantages.ravel(), values.ravel(), valid, **info)


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
