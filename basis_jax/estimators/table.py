"""The offline reference table: for every problem the number of its reference completions and of the
right ones among them, and their rewards if some are neither 0 nor 1."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from basis_jax.estimators.rows import check_rows
from basis_jax.pytree import pytree


@pytree
class Table:
    """Successes and trials of M problems, float32; ``init_table`` checks and makes it. The sum of
    fractional rewards counts as successes.

    >>> table = estimators.Table(successes=jnp.float32([4, 0]), trials=jnp.float32([8, 8]))
    >>> jax.tree.map(jnp.sum, table).trials.tolist()
    16.0
    """

    successes: Float[Array, " M"]
    trials: Float[Array, " M"]
    rewards: Float[Array, "M n"] | None = None  # of each completion, NaN where there is none


def table_rates(table: Table) -> Float[Array, " M"]:
    """Every problem's Jeffreys rate (k + 1/2) / (n + 1); 1/2 without trials.

    >>> print(estimators.table_rates(estimators.init_table(np.array([4, 0]), np.array([8, 0]))))
    [0.5 0.5]
    """
    return (table.successes + 0.5) / (table.trials + 1)


def init_table(
    successes: Num[ArrayLike, " M"],
    trials: Num[ArrayLike, " M"],
    *,
    reference_rewards: Num[ArrayLike, "M n"] | None = None,
) -> Table:
    """The table as estimator state. Raises ValueError unless 0 <= successes <= trials everywhere
    (not checked while tracing), and unless ``reference_rewards`` have one row per problem.

    >>> table = estimators.init_table(np.array([4, 0]), np.array([8, 8]))
    >>> table.successes.tolist(), table.trials.tolist()
    ([4.0, 0.0], [8.0, 8.0])
    """
    check_rows(successes=successes, trials=trials)
    if not isinstance(successes, jax.core.Tracer) and not isinstance(trials, jax.core.Tracer):
        k, n = np.asarray(successes, np.float64), np.asarray(trials, np.float64)
        bad = np.flatnonzero(~((k >= 0) & (k <= n) & np.isfinite(n)))
        if bad.size:
            raise ValueError(
                f"problem {bad[0]} has {k[bad[0]]:g} successes in {n[bad[0]]:g} trials; every "
                "problem needs 0 <= successes <= trials"
            )
    rewards = reference_rewards
    if rewards is not None and np.shape(rewards)[:-1] != np.shape(successes):
        raise ValueError(
            f"got reference_rewards {np.shape(rewards)} for {np.shape(successes)[0]} problems; "
            "give one row per problem"
        )
    return Table(
        successes=jnp.asarray(successes, jnp.float32),
        trials=jnp.asarray(trials, jnp.float32),
        rewards=None if rewards is None else jnp.asarray(rewards, jnp.float32),
    )
