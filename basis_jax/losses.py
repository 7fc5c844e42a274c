"""Policy objectives, KL terms and sequence regressions as weighted sums.

The loss is ``jnp.sum(loss_weights * per_token)``. ``loss_weights`` are computed once from the mask
of the whole update and include all denominators, so microbatches and devices only add up. A
regression has one term per row, whose weight is the sum of the row's ``loss_weights``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from basis_jax.types import Batch

AGGREGATIONS = ("token_mean", "sequence_mean", "constant_length")
TOKEN_OBJECTIVES = ("ppo_clip", "gspo", "cispo", "gpg")
REGRESSIONS = ("a_star_po", "rebel", "tbrm")
OBJECTIVES = (*TOKEN_OBJECTIVES, *REGRESSIONS)
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


def token_advantages(batch: Batch) -> Float[Array, "N T"]:
    """The batch's advantages by token; those of a row are the same for each of its tokens."""
    advantages = jnp.asarray(batch.advantages)
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], batch.completion_mask.shape)
    return advantages


def policy_loss(
    logprobs: Float[Array, "N T"],
    batch: Batch,
    objective: str = "ppo_clip",
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
    factors: Float[Array, "N T"] | None = None,
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
    with respect to logp. ``factors``, such as ``corrections.sampler_weights``, multiply every
    token's term and have no gradient. Raises ValueError for another objective.
    """
    mask, a = jnp.asarray(batch.completion_mask), token_advantages(batch)
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
        raise ValueError(
            f"loss.objective is {objective!r}; allowed are {', '.join(TOKEN_OBJECTIVES)}"
        )
    if factors is not None:
        terms = terms * jax.lax.stop_gradient(factors)
    return jnp.sum(batch.loss_weights * terms), mask & clipped


def regression_loss(
    logprobs: Float[Array, "N T"],
    batch: Batch,
    objective: str,
    *,
    beta: float,
    start_lse: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, " N"]]:
    """The loss, sum over rows of w e^2, and the residuals e. w: sum of the row's ``loss_weights``.

    x is the sum over a completion's tokens of logp - anchor, A the row's advantage.

    - ``a_star_po``: e = beta x - A, anchor ref. A = r - V*, by the estimator ``a_star_po``
      (Brantley et al. 2025, arXiv 2505.20686; beta = 1e-3).
    - ``rebel``: e = x - A / beta - (the mean of that over the rows of the prompt), anchor old.
      A = r, and the paper's eta is 1 / beta (Gao et al. 2024, arXiv 2404.16767). For two rows a
      prompt the authors' loss, the mean over pairs of (x_1 - x_2 - eta (r_1 - r_2))^2, is 4 times
      this one. More than two rows are our reading of it. The mean is ``batch.row_offsets``, which
      may be a constant: the residuals of a prompt sum to 0, so its gradient adds up to 0.
    - ``tbrm``: e = x + V - A / beta, anchor ref, A = r. V is ``start_lse``, the log of the sum of
      exp(logits / temperature) at the first token of the completion (arXiv 2505.15311, as described
      in arXiv 2603.23355; its beta is not published).

    Without ``row_offsets`` no mean is subtracted from e. The value of x is 0 if the update is
    strictly on-policy and the anchor is old. Raises ValueError for another objective, for a batch
    without ``ref_logprobs`` if the anchor is ref, and for tbrm without ``start_lse``.
    """
    if objective not in REGRESSIONS:
        raise ValueError(f"loss.objective is {objective!r}; allowed are {', '.join(REGRESSIONS)}")
    anchor = batch.old_logprobs if objective == "rebel" else batch.ref_logprobs
    if objective == "rebel" and anchor is None:
        anchor = jax.lax.stop_gradient(logprobs)
    values = start_lse if objective == "tbrm" else jnp.zeros(logprobs.shape[0])
    if anchor is None or values is None:
        missing = "ref_logprobs, the log-probabilities of the reference"
        missing = missing if anchor is None else "start_lse, of the logits at the first token"
        raise ValueError(f"loss.objective {objective} needs {missing}; give them")
    mask = jnp.asarray(batch.completion_mask)
    x = jnp.sum(jnp.where(mask, logprobs - anchor, 0.0), axis=1)
    if objective == "a_star_po":
        residuals = beta * x - batch.advantages
    else:
        residuals = x + values - batch.advantages / beta
    if batch.row_offsets is not None:
        residuals = residuals + batch.row_offsets
    weights = jnp.sum(batch.loss_weights, axis=1)
    residuals = jnp.where(weights > 0, residuals, 0.0)
    return jnp.sum(weights * residuals**2), residuals


def value_loss(values: Float[Array, "N T"], batch: Batch, *, clip: float) -> Float[Array, ""]:
    """PPO's value loss, sum of w / 2 max((V - R)^2, (V' - R)^2) over the tokens in the mask.

    R = ``batch.returns``, V' = V_old + clip(V - V_old, -clip, clip), V_old = ``batch.old_values``.
    Without clipping (0) V' = V (Schulman et al. 2017; 0.5 in verl and OpenRLHF, 0.2 in tunix). w
    are the loss weights: with ``token_mean`` it is half the mean over tokens. Raises ValueError for
    a batch without returns or old values.
    """
    if batch.returns is None or batch.old_values is None:
        raise ValueError("the batch has no returns or old_values, which a value loss needs")
    values, returns, old = (
        jnp.where(batch.completion_mask, x, 0.0) for x in (values, batch.returns, batch.old_values)
    )
    errors = (values - returns) ** 2
    if clip:
        near = old + jnp.clip(values - old, -clip, clip)
        errors = jnp.maximum(errors, (near - returns) ** 2)
    return 0.5 * jnp.sum(batch.loss_weights * errors)


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
