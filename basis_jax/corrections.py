"""Corrections for a sampler whose probabilities differ from the trainer's.

The gap of a token is old - sampler: the log-probabilities of the policy that sampled, by the
trainer and by the sampler. The objectives' ratio policy / old is a separate factor, so nothing is
counted twice. Exponents are clipped to [-20, 20], and nothing here has a gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from basis_jax.types import Batch

CORRECTIONS = ("none", "tis", "sequence_tis", "icepop", "mask", "ais")
OF_UPDATE = ("mask", "ais")
"""Those that need sums over the whole update first."""


def sampler_gap(logprobs: Float[Array, "N T"], batch: Batch) -> Float[Array, "N T"]:
    """old - sampler for every token in the mask, 0 elsewhere. In a strictly on-policy update old is
    ``logprobs``."""
    old = logprobs if batch.old_logprobs is None else batch.old_logprobs
    gap = jnp.where(batch.completion_mask, old - batch.sampler_logprobs, 0.0)
    return jax.lax.stop_gradient(gap)


def sampler_weights(
    logprobs: Float[Array, "N T"],
    batch: Batch,
    correction: str,
    *,
    cap: float,
    floor: float = 0.0,
) -> Float[Array, "N T"]:
    """The factor of every token's term in the loss; 1 outside the mask. rho = exp(gap).

    - ``tis``: min(rho, cap) (Yao et al. 2025).
    - ``sequence_tis``: min(the product of the row's rho, cap) on each of its tokens.
    - ``icepop``: rho if floor <= rho <= cap, else 0 (OpenRLHF's bounds are 0.5 and 5).
    - ``ais``: 1 + alpha (min(rho, cap) - 1) with alpha = ``batch.ais_alpha``, one per update
      (``ais_alpha``; arXiv 2605.13907, whose cap is 5).
    - ``none`` and ``mask``: 1. ``mask`` changes the loss weights instead: see ``kept_rows``.

    Raises ValueError for another correction, and for ``ais`` without ``batch.ais_alpha``.
    """
    mask, gap = jnp.asarray(batch.completion_mask), sampler_gap(logprobs, batch)
    if correction == "sequence_tis":
        gap = jnp.broadcast_to(jnp.sum(gap, axis=1, keepdims=True), gap.shape)
    ratio = jnp.exp(jnp.clip(gap, -20.0, 20.0))
    capped = jnp.minimum(ratio, cap)
    if correction in ("tis", "sequence_tis"):
        weights = capped
    elif correction == "icepop":
        weights = jnp.where((ratio >= floor) & (ratio <= cap), ratio, 0.0)
    elif correction == "ais":
        if batch.ais_alpha is None:
            raise ValueError("loss.sampler_correction ais needs batch.ais_alpha; give it")
        weights = 1 + batch.ais_alpha * (capped - 1)
    elif correction in ("none", "mask"):
        weights = jnp.ones_like(ratio)
    else:
        raise ValueError(
            f"loss.sampler_correction is {correction!r}; allowed are {', '.join(CORRECTIONS)}"
        )
    return jnp.where(mask, weights, 1.0)


def kept_rows(
    gap: Float[Array, "N T"], mask: Bool[Array, "N T"], *, floor: float, cap: float
) -> Bool[Array, " N"]:
    """Rows with tokens whose geometric mean of rho lies in [floor, cap].

    ``loss.sampler_correction`` mask leaves the others out of the loss and of its denominators, as
    verl's rejection by sequence does (its preset is .999 to 1.001).
    """
    lengths = jnp.sum(mask, axis=1).astype(jnp.float32)
    mean = jnp.sum(jnp.where(mask, gap, 0.0), axis=1) / jnp.maximum(lengths, 1.0)
    ratio = jnp.exp(jnp.clip(mean, -20.0, 20.0))
    return (lengths > 0) & (ratio >= floor) & (ratio <= cap)


def ais_sums(
    gap: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    cap: float,
) -> dict[str, Float[Array, ""]]:
    """Sums over the tokens in the mask of what ``ais_alpha`` needs. Sums of microbatches add up.

    w = min(rho, cap). Powers of w are those of w - 1, which loses fewer digits.
    """
    excess = jnp.minimum(jnp.exp(jnp.clip(gap, -20.0, 20.0)), cap) - 1
    terms = {
        "tokens": jnp.ones_like(gap),
        "excess": excess,
        "excess_squared": excess**2,
        "gap": jnp.abs(gap),
        "advantage": advantages,
        "advantage_squared": advantages**2,
        "weighted": advantages * (1 + excess),
        "weighted_squared": (advantages * (1 + excess)) ** 2,
    }
    return {name: jnp.sum(jnp.where(mask, x, 0.0)) for name, x in terms.items()}


def ais_alpha(
    sums: dict[str, Float[Array, ""]], *, mismatch: float, variance: float, beta: float
) -> Float[Array, ""]:
    """The strength of AIS in a whole update, 0 to 1. arXiv 2605.13907, eqs 9 to 19.

    alpha = clip(ess - beta var, 0, 1) mis, with sd of ddof 1 over tokens, w = min(rho, cap):
    ess = (1 + (sd(w) / mean(w))^2)^(-1/2), mis = min(1, mean |gap| / ``mismatch``), and
    var = max(0, (s - ``variance``) / ``variance``), s = sd(A w) / (sd(A) + 1e-6). The paper has
    mismatch 0.02 and variance 1.2. Its ``beta`` is not published: ours is a choice. Inferred: the
    paper writes one alpha per prompt, but computes one per update. Without tokens alpha is 0.
    """
    count = jnp.maximum(sums["tokens"], 1.0)

    def spread(name: str) -> Float[Array, ""]:
        mean = sums[name] / count
        square = sums[f"{name}_squared"] - count * mean**2
        return jnp.sqrt(jnp.maximum(square, 0.0) / jnp.maximum(count - 1, 1.0))

    mean_weight = 1 + sums["excess"] / count
    ess = (1 + (spread("excess") / mean_weight) ** 2) ** -0.5
    ratio = spread("weighted") / (spread("advantage") + 1e-6)
    over = jnp.maximum(0.0, (ratio - variance) / variance)
    mis = jnp.minimum(1.0, sums["gap"] / count / mismatch)
    return jnp.clip(ess - beta * over, 0.0, 1.0) * mis
