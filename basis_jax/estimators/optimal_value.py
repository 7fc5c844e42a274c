"""Values of a KL-tilted policy from reference completions alone: A*-PO."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Num

from basis_jax.estimators.ranges import FINITE, NOT_NEGATIVE, Options, Rewards
from basis_jax.estimators.rows import estimate, from_unit, nan_reported, read, share
from basis_jax.types import Estimate


@nan_reported
@Options(beta=NOT_NEGATIVE, low=FINITE, high=FINITE)
def a_star_po(
    rewards: Num[ArrayLike, " N"],
    successes: Num[ArrayLike, " N"],
    trials: Num[ArrayLike, " N"],
    *,
    valid: Bool[ArrayLike, " N"] | None = None,
    beta: float = 0.5,
    low: float = 0.0,
    high: float = 1.0,
) -> Estimate:
    """A = r - V*(x), the soft value of the reference policy; see ``soft_value``. Brantley et al.
    2025, arXiv 2505.20686. The loss adds -beta2 * sum(logprobs - ref_logprobs) to the residual.

    Rewards are ``low`` or ``high``, 0 or 1 by default. Without trials V* is that of a success rate
    of 1/2 (``fallback_share``). A prompt without a success has V* = low, so its failures have A = 0
    (``zero_share``). ValueError for beta < 0, unless low < high, and for a reward outside [low,
    high] (not while tracing). Rows whose counts are NaN get NaN.

    >>> successes, trials = np.array([4, 0]), np.array([8, 8])  # of two prompts
    >>> print(estimators.a_star_po(np.float32([1, 0]), successes, trials).values)
    [0.717 0.   ]
    """
    Rewards(low, high).check("a_star_po", rewards, valid)
    rewards, valid = read(rewards, valid, successes=successes, trials=trials)
    successes, trials = jnp.asarray(successes, jnp.float32), jnp.asarray(trials, jnp.float32)
    none = trials <= 0
    rate = jnp.where(none, 0.5, jnp.clip(successes / jnp.where(none, 1, trials), 0, 1))
    values = from_unit(soft_value(rate, beta / (high - low)), low, high)
    return estimate(rewards - values, values, valid, fallback_share=share(none, valid))


@Options(beta=NOT_NEGATIVE)
def soft_value(rate: Float[Array, "*s"], beta: float) -> Float[Array, "*s"]:
    """V* = beta log E_ref[exp(r / beta)] for 0/1 rewards with success rate ``rate``.

    beta = 0 gives the rate itself, as in the authors' code (the limit would be 1). This is not
    BASIS's tilted value E_ref[r exp(r / beta)] / E_ref[exp(r / beta)]. ValueError for beta < 0.

    >>> print(estimators.soft_value(jnp.float32([0, 0.5, 1]), 0.5))
    [0.    0.717 1.   ]
    """
    if beta == 0:
        return rate
    return beta * jnp.logaddexp(jnp.log1p(-rate), jnp.log(rate) + 1 / beta)
