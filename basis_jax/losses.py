"""Policy objectives and KL terms as weighted sums of per-token terms.

The loss is ``jnp.sum(loss_weights * per_token)``. ``loss_weights`` are computed once from the mask
of the whole update and include all denominators, so microbatches and devices only add up.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from basis_jax.types import Batch

AGGREGATIONS = ("token_mean", "sequence_mean", "constant_length")
OBJECTIVES = ("ppo_clip", "gspo", "cispo", "gpg")
KL_FORMS = ("k1", "k2", "k3", "k3+")


def loss_weights(
    completion_mask: Bool[Array, "N T"], aggregation: str, *, max_length: int
) -> Float[Array, "N T"]:
    """Weight of every token. Live rows are rows with at least one token in the mask.

    ``token_mean`` (DAPO): 1 / tokens in the update. ``sequence_mean`` (GRPO): 1 / (live rows x
    the row's tokens). ``constant_length`` (Dr. GRPO): 1 / (live rows x ``max_length``).
    A mask without tokens gives zeros.
    """
    mask = completion_mask.astype(jnp.float32)
    lengths = jnp.sum(mask, axis=1, keepdims=True)
    rows = jnp.maximum(jnp.sum(lengths > 0), 1).astype(jnp.float32)
    if aggregation == "token_mean":
        return mask / jnp.maximum(jnp.sum(mask), 1.0)
    if aggregation == "sequence_mean":
        return mask / (rows * jnp.maximum(lengths, 1.0))
    if aggregation == "constant_length":
        return mask / (rows * max_length)
    raise ValueError(f"loss.aggregation is {aggregation!r}; allowed are {', '.join(AGGREGATIONS)}")


def policy_loss(
    logprobs: Float[Array, "N T"],
    batch: Batch,
    objective: str = "ppo_clip",
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
    tis_cap: float = 0.0,
) -> tuple[Float[Array, ""], Bool[Array, "N T"]]:
    """The loss, sum of w x over tokens, and the tokens whose clipped branch was active.

    x is a function of the advantage A, logp = logprobs and rho = exp(logp - old); sg is the
    stopped gradient.

    - ``ppo_clip``: max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)). If A < 0 and
      ``dual_clip`` = c > 1, it is at most -c A (Schulman et al. 2017; Ye et al., arXiv 1912.09729).
      DAPO's clip-higher is clip_high > clip_low (arXiv 2503.14476).
    - ``gspo``: the same, with the sequence's geometric mean s = exp(mean_t (logp - old)) for rho.
      By token it is sg(s) exp(logp - sg(logp)). Its clips are about 3e-4 (arXiv 2507.18071).
    - ``cispo``: -sg(clip(rho, 1 - clip_low, 1 + clip_high)) A logp, so that a clipped token keeps
      its gradient. clip_low = 1 means no lower bound (arXiv 2506.13585, bounds as in verl).
    - ``gpg``: -A logp (arXiv 2504.02546). A is scaled by the estimator.

    Exponents are clipped to [-20, 20]. Without ``old_logprobs`` the update is strictly on-policy:
    rho has the value 1 and the gradient of logp, and all four objectives have the gradient -w A
    with respect to logp. If ``tis_cap`` is above 0, every token's term is also multiplied by
    ``sampler_weights``. Raises ValueError for another objective.
    """
    mask, a = jnp.asarray(batch.completion_mask), jnp.asarray(batch.advantages)[:, None]
    logprobs = jnp.where(mask, logprobs, 0.0)
    fixed = jax.lax.stop_gradient(logprobs)
    old = fixed if batch.old_logprobs is None else jnp.where(mask, batch.old_logprobs, 0.0)
    log_ratio = logprobs - old
    if objective == "gspo":
        lengths = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1).astype(jnp.float32)
        of_row = jnp.sum(log_ratio, axis=1, keepdims=True) / lengths
        log_ratio = jax.lax.stop_gradient(of_row) + logprobs - fixed
    ratio = jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))
    bounded = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    if objective in ("ppo_clip", "gspo"):
        terms = jnp.maximum(-a * ratio, -a * bounded)
        clipped = -a * bounded > -a * ratio
        if dual_clip:
            over = (a < 0) & (terms > -dual_clip * a)
            terms, clipped = jnp.where(over, -dual_clip * a, terms), clipped | over
    elif objective == "cispo":
        terms, clipped = -jax.lax.stop_gradient(bounded) * a * logprobs, bounded != ratio
    elif objective == "gpg":
        terms, clipped = -a * logprobs, jnp.zeros_like(mask)
    else:
        raise ValueError(f"loss.objective is {objective!r}; allowed are {', '.join(OBJECTIVES)}")
    if tis_cap:
        terms = terms * sampler_weights(fixed, batch, cap=tis_cap)
    return jnp.sum(batch.loss_weights * terms), mask & clipped


def sampler_weights(
    logprobs: Float[Array, "N T"], batch: Batch, *, cap: float
) -> Float[Array, "N T"]:
    """Truncated importance weights: min(exp(old - sampler), cap) in the mask, 1 elsewhere.

    They correct for a sampler whose probabilities differ slightly from the trainer's (TIS, Yao et
    al. 2025). old is the trainer's log-probability under the policy that sampled. In a strictly
    on-policy update it is ``logprobs``. The objectives' ratio policy / old is a separate factor, so
    nothing is counted twice. The weights have no gradient, and the exponent is clipped to
    [-20, 20].
    """
    old = logprobs if batch.old_logprobs is None else batch.old_logprobs
    gap = jnp.where(batch.completion_mask, old - batch.sampler_logprobs, 0.0)
    weights = jnp.minimum(jnp.exp(jnp.clip(gap, -20.0, 20.0)), cap)
    return jax.lax.stop_gradient(jnp.where(batch.completion_mask, weights, 1.0))


def kl_loss(
    logprobs: Float[Array, "N T"], batch: Batch, form: str
) -> tuple[Float[Array, ""], Float[Array, "N T"]]:
    """The KL loss, sum of w k over tokens, and k for each token in the mask.

    k is an estimate of KL(policy || reference). With x = logp - ref: ``k1`` = x, ``k2`` = x^2 / 2,
    ``k3`` = exp(-x) - 1 + x (Schulman 2020). As a *value*, k1 and k3 are unbiased. As a *loss* on
    the policy's own samples, only k2 has the gradient of KL(policy || reference). k3 has the
    gradient of KL(reference || policy). The gradient of k1 has mean zero, so it does not constrain
    the policy. ``k3+`` has the value of k3 and the gradient of k2.

    x is clipped to [-20, 20]. k3 is clipped at 10 and has no gradient there (verl's bounds). Raises
    ValueError for another form and for a batch without ``ref_logprobs``.
    """
    if batch.ref_logprobs is None:
        raise ValueError(
            "the batch has no ref_logprobs; give the log-probabilities of the reference, or leave "
            "out the KL term"
        )
    x = jnp.where(batch.completion_mask, logprobs - batch.ref_logprobs, 0.0)
    x = jnp.clip(x, -20.0, 20.0)
    terms = {"k1": x, "k2": x**2 / 2, "k3": jnp.minimum(jnp.exp(-x) - 1 + x, 10.0)}
    terms["k3+"] = terms["k2"] + jax.lax.stop_gradient(terms["k3"] - terms["k2"])
    if form not in terms:
        raise ValueError(f"loss.kl is {form!r}; allowed are {', '.join(KL_FORMS)}")
    return jnp.sum(batch.loss_weights * terms[form]), terms[form]
