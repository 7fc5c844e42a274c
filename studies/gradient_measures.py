"""How noisy a method's gradient is, from its moments and the rollouts' gradients.

With U a prompt's share (module ``gradient_methods``) and prompts drawn from an infinite population
of which the pool is a sample, a batch of N rollouts in groups of G has m = N / G independent U and
the gradient g = sum U / m:

    E |g|^2 = E|U|^2 / m + (1 - 1/m) |EU|^2,    E (g.t)^2 = E(U.t)^2 / m + (1 - 1/m) (EU.t)^2

with t the true gradient. Expectations over pairs of prompts leave out the pair of a prompt with
itself, so products of means come from disjoint parts and have no bias. The shared baseline makes
each pair of rows in a batch dependent by O(1/N^2), which is neglected.

- noise: E[w (r - b)^2] of a rollout, w its squared norm;
- rollouts: the N at which the squared cosine between g and t would be 1/2 if EU were parallel to t,
  G (E|U|^2 - |EU|^2) |t|^2 / (EU.t)^2. The number of rollouts that a method needs is proportional
  to it;
- spread: G (E|U|^2 - |EU|^2), the variance of g times N;
- cosine2: E (g.t)^2 / (E |g|^2 |t|^2);
- noise_share: 1 - |EU|^2 / E|g|^2 at N.

Intervals: percentiles over bootstrap samples of the problems, the same for all methods.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize

from studies.gradient_methods import Moments
from studies.gradient_pool import ESTIMATED, HELD_BACK, SPARE, Pool

RESAMPLES = 400
SIZES = (128, 512)
SHRINKAGES = (0.3, 1, 3, 10, 30, 100, 1e6)  # tried for the oracle, in rollouts of mean weight


@dataclass(frozen=True)
class Geometry:
    """The gradients of one update in one metric, as sketches."""

    norms: Float[np.ndarray, "P S"]  # squared, exact
    rows: Float[np.ndarray, "P E B"]  # rollouts that batches are drawn from
    products: Float[np.ndarray, "P E E"]  # inside a problem; the diagonal is exact
    true: Float[np.ndarray, "P B"]  # a problem's true gradient, estimated by all its rollouts
    truth: Float[np.ndarray, "P P"]  # inner products of the true gradients
    along: Float[np.ndarray, "2 P E"]  # products with t from two disjoint halves of the others


def make_geometry(
    norms: Float[np.ndarray, "P S"],
    sketches: Float[np.ndarray, "P S B"],
    pool: Pool,
    seed: int = 0,
) -> Geometry:
    """The baseline of the true gradients is made of the spare rollouts, so it does not depend on
    the rollouts themselves."""
    used = ESTIMATED + HELD_BACK
    lengths = np.sqrt(norms)[..., None].astype(np.float32)
    rows = sketches[:, :used].astype(np.float32) * lengths[:, :used]
    left = pool.rewards[:, :used] - neutral_baselines(pool)[:, None]
    true = np.einsum("ps,psb->pb", left.astype(np.float32), rows) / used
    rows = rows[:, :ESTIMATED]
    products = np.einsum("pib,pjb->pij", rows, rows).astype(np.float64)
    at = np.arange(ESTIMATED)
    products[:, at, at] = norms[:, :ESTIMATED]
    half = np.random.default_rng([seed, 8]).permutation(len(rows)) % 2
    along = np.zeros((2, *rows.shape[:2]))
    for h in range(2):
        total, count = true[half == h].sum(0), np.sum(half == h)
        own = np.where(half == h, 1, 0)[:, None].astype(np.float32)
        others = (total[None] - own * true) / np.maximum(count - own, 1)
        along[h] = np.einsum("pib,pb->pi", rows, others)
    return Geometry(norms, rows, products, true, (true @ true.T).astype(np.float64), along)


def neutral_baselines(pool: Pool) -> Float[np.ndarray, " P"]:
    """The mean reward of a problem's rollouts without tokens, weighted by their score norms."""
    w = pool.other_score_norms.astype(np.float64) + 1e-9
    return (w * pool.other_rewards).sum(1) / w.sum(1)


# ------------------------------------------------------------------------------------ statistics
@dataclass(frozen=True)
class Terms:
    """The terms of a method's statistics, by problem or by pair of problems."""

    noise: Float[np.ndarray, " P"]
    length: Float[np.ndarray, " P"]  # |U|^2
    along: Float[np.ndarray, " P"]  # (U.t)^2
    mean: Float[np.ndarray, "P P"]  # EU.EU
    with_true: Float[np.ndarray, "P P"]  # EU.t
    truth: Float[np.ndarray, "P P"]  # t.t
    group_size: int


def make_terms(found: Moments, geometry: Geometry, *, group_size: int, scaled: bool) -> Terms:
    """If the method is not ``scaled``, its expected update is the true gradient."""
    mean = with_true = geometry.truth
    if scaled:
        updates = (found.mean.astype(np.float32)[:, None] @ geometry.rows)[:, 0]
        mean = (updates @ updates.T).astype(np.float64)
        with_true = (updates @ geometry.true.T).astype(np.float64)
    return Terms(
        noise=np.sum(found.squares * geometry.norms[:, :ESTIMATED], axis=1),
        length=np.einsum("pij,pij->p", found.products, geometry.products),
        along=np.einsum("pij,pi,pj->p", found.products, *geometry.along),
        mean=mean,
        with_true=with_true,
        truth=geometry.truth,
        group_size=group_size,
    )


def statistics(terms: Terms, counts: Float[np.ndarray, "K P"]) -> dict[str, np.ndarray]:
    """Every statistic [K] for K samples of the problems. ``counts`` says how often a problem is in
    each sample."""
    share = counts / counts.sum(1, keepdims=True)
    noise, length, along = (share @ x for x in (terms.noise, terms.length, terms.along))
    mean, with_true, truth = (
        over_pairs(x, counts) for x in (terms.mean, terms.with_true, terms.truth)
    )
    spread = terms.group_size * (length - mean)
    found = {"noise": noise, "signal": truth, "spread": spread}
    with np.errstate(divide="ignore", invalid="ignore"):  # nan where no problem has a signal
        found["rollouts"] = spread * truth / with_true**2
        for size in SIZES:
            m = size / terms.group_size
            whole = length / m + (1 - 1 / m) * mean
            ahead = along / m + (1 - 1 / m) * with_true**2
            found[f"cosine2_{size}"] = ahead / (whole * truth)
            found[f"noise_share_{size}"] = 1 - mean / whole
    return found


def over_pairs(x: Float[np.ndarray, "P P"], counts: Float[np.ndarray, "K P"]) -> np.ndarray:
    """[K] means of x over the pairs of different problems."""
    total = np.einsum("kp,kp->k", counts @ x, counts) - counts**2 @ np.diag(x)
    return total / (counts.sum(1) ** 2 - (counts**2).sum(1))


def resamples(problems: int, seed: int = 0) -> Float[np.ndarray, "K P"]:
    """The pool itself, then bootstrap samples of its problems."""
    random = np.random.default_rng([seed, 9])
    drawn = random.multinomial(problems, np.full(problems, 1 / problems), RESAMPLES)
    return np.concatenate([np.ones((1, problems)), drawn])


def interval(x: np.ndarray) -> list[float]:
    """[the value, the 2.5th and the 97.5th percentile] of a result of ``statistics``."""
    known = x[1:][np.isfinite(x[1:])]
    low, high = np.percentile(known, (2.5, 97.5)) if known.size else (np.nan, np.nan)
    return [float(x[0]), float(low), float(high)]


# --------------------------------------------------------------------------------------- oracles
def oracles(pool: Pool, norms: Float[np.ndarray, "P S"]) -> dict[str, Float[np.ndarray, " P"]]:
    """A baseline for every problem from what no estimator knows: held-back rollouts and their exact
    norms.

    - best constant: sum w r / sum w;
    - best map of the value: logit b = a + c logit V with the least sum w (r - b)^2, V the true
      value;
    - best per prompt: the problem's own sum w r / sum w, shrunk to that map. Leaving out one
      held-back rollout at a time decides how much.
    """
    held = slice(ESTIMATED, ESTIMATED + HELD_BACK)
    r, w = pool.rewards[:, held].astype(np.float64), norms[:, held].astype(np.float64)
    w = w / w.mean() + 1e-12
    value = (pool.values * SPARE + 0.5) / (SPARE + 1)
    logit = np.log(value / (1 - value))

    def mapped(ab):
        return 1 / (1 + np.exp(-np.clip(ab[0] + ab[1] * logit, -30, 30)))

    def loss(ab):
        return np.sum(w * (r - mapped(ab)[:, None]) ** 2)

    starts = [minimize(loss, start, method="Nelder-Mead") for start in ([0, 1], [-3, 0], [0, 0])]
    curve = mapped(min(starts, key=lambda s: s.fun).x)[:, None]

    def left_out(more):
        rest, weight = (w * r).sum(1, keepdims=True) - w * r, w.sum(1, keepdims=True) - w
        return np.sum(w * (r - (rest + more * curve) / (weight + more)) ** 2)

    more = min(SHRINKAGES, key=left_out)
    own = ((w * r).sum(1) + more * curve[:, 0]) / (w.sum(1) + more)
    return {
        "best constant": np.full(len(r), (w * r).sum() / w.sum()),
        "best map of the value": curve[:, 0],
        "best per prompt": own,
    }
