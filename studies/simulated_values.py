"""Worlds for the value study: true values, visits, rewards and offline tables, drawn.

True values are made from logits: V = sigmoid(z). If the true values come from a model, only visits,
rewards and (on request) the table are drawn here.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import fsolve

from studies.value_methods import World

MOST_ROLLOUTS = 8
PUBLISHED = {"mean": 0.59, "variance": 0.065}  # of V; E[V(1-V)] = .59 - .065 - .59^2 = .177
SHIFT, SPREAD = 1.0, 0.5
"""The current policy's logit is the reference's + SHIFT + SPREAD x a standard normal of the
problem. SHIFT = 1 is a tilt with beta = 1, which the paper reports for its steps 20 to 25. SPREAD
is our choice: drift that differs between problems."""
LONG_RUN = {"mean": 1.5, "sd": 1.5, "shift": 1.6, "slope_sd": 0.9}
"""The long run: z_i = u_i + s_i t with u ~ N(mean, sd^2), s ~ N(shift, slope_sd^2), t from 0 to 1
over the run. The squared errors of the batch mean and of a group of 8 are then .036 and .013 over
the run, and .026 and .0096 in its last epoch. These levels were those of our first prototype; the
constants are a rounded solution."""
UNEQUAL_SLOPE_SD = 1.5
"""A harder run: one problem in seven gets worse while the policy improves."""


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def normal_moments(mean: float, sd: float) -> dict[str, float]:
    """Moments of V = sigmoid(N(mean, sd^2)) by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(61)
    v, weights = sigmoid(mean + sd * nodes), weights / weights.sum()
    first, second = float(weights @ v), float(weights @ v**2)
    return {"mean": first, "variance": second - first**2, "noise": first - second}


def solve_logits(mean: float, variance: float) -> tuple[float, float]:
    """Mean and sd of the normal logit whose V has these moments."""

    def gap(x):
        got = normal_moments(*x)
        return got["mean"] - mean, got["variance"] - variance

    centre, sd = fsolve(gap, (np.log(mean / (1 - mean)), 1.0))
    return float(centre), float(abs(sd))


def moments(v: Float[np.ndarray, "..."]) -> dict[str, float]:
    """Mean and variance of V, and E[V(1-V)], the error of a single reward."""
    v = np.asarray(v, np.float64)
    found = {"mean": v.mean(), "variance": v.var(), "noise": np.mean(v * (1 - v))}
    return {name: round(float(x), 5) for name, x in found.items()}


# -------------------------------------------------------------------------------------- drawing
def draw_world(
    rng: np.random.Generator,
    truth: Callable[[np.ndarray], np.ndarray],
    *,
    successes: dict[int, Float[np.ndarray, "R M"]],
    batch: int,
    epochs: int,
    units: str,
) -> World:
    """Epochs over the problems in batches, rewards drawn from ``truth(ids)`` [R T B]."""
    replicates, problems = next(iter(successes.values())).shape
    ids = draw_visits(rng, replicates, problems, batch=batch, epochs=epochs)
    values = truth(ids).astype(np.float32)
    shape = (*values.shape, MOST_ROLLOUTS)
    rewards = rng.random(shape, dtype=np.float32) < values[..., None]
    ages = np.array([f"epoch {1 + step // (problems // batch)}" for step in range(ids.shape[1])])
    return World(values, ids, rewards.astype(np.float32), successes, ages, units)


def draw_visits(
    rng: np.random.Generator, replicates: int, problems: int, *, batch: int, epochs: int
) -> Int[np.ndarray, "R T B"]:
    """Every epoch is a permutation in problems // batch batches; the rest of it is not used."""
    steps = problems // batch
    base = np.broadcast_to(np.arange(problems, dtype=np.int32), (replicates * epochs, problems))
    visits = rng.permuted(base, axis=1)[:, : steps * batch]
    return visits.reshape(replicates, epochs * steps, batch)


def draw_tables(
    rng: np.random.Generator, rates: Float[np.ndarray, "R M"], sizes: tuple[int, ...]
) -> dict[int, Float[np.ndarray, "R M"]]:
    """Successes in the first n offline rollouts. They are nested: the 8 are the first of the 64."""
    tables, successes, before = {}, np.zeros(rates.shape, np.float32), 0
    for n in sorted(sizes):
        successes = successes + rng.binomial(n - before, rates).astype(np.float32)
        tables[n], before = successes, n
    return tables


# --------------------------------------------------------------------------------- two settings
def published_world(
    replicates: int, *, sizes: tuple[int, ...], batch: int, seed: int
) -> tuple[World, dict]:
    """Batches of new problems under a frozen policy with the paper's moments, and a description."""
    rng = np.random.default_rng([seed, 1])
    mean, sd = solve_logits(**PUBLISHED)
    reference = rng.normal(mean - SHIFT, np.sqrt(sd**2 - SPREAD**2), (replicates, batch))
    logits = reference + SHIFT + SPREAD * rng.normal(size=reference.shape)
    tables = draw_tables(rng, sigmoid(reference), sizes)
    values = sigmoid(logits)

    def truth(ids):
        return np.take_along_axis(values[:, None], ids, 2)

    world = draw_world(rng, truth, successes=tables, batch=batch, epochs=1, units="replicates")
    about = {
        "construction": "z = z_ref + shift + spread e; z, z_ref and e normal; V = sigmoid(z)",
        "logit_mean": mean,
        "logit_sd": sd,
        "shift": SHIFT,
        "spread": SPREAD,
        "moments_solved": normal_moments(mean, sd),
        "moments_drawn": moments(values),
        "moments_of_reference": moments(sigmoid(reference)),
        "batches": replicates,
        "batch": batch,
    }
    return world, about


def long_world(
    replicates: int,
    *,
    slope_sd: float,
    sizes: tuple[int, ...],
    problems: int,
    batch: int,
    epochs: int,
    seed: int,
) -> tuple[World, dict]:
    """Runs over the same problems while the policy improves, each problem at its own rate."""
    rng = np.random.default_rng([seed, 2])
    start = rng.normal(LONG_RUN["mean"], LONG_RUN["sd"], (replicates, problems))
    slope = rng.normal(LONG_RUN["shift"], slope_sd, (replicates, problems))
    tables = draw_tables(rng, sigmoid(start), sizes)
    which = np.arange(replicates)[:, None, None]

    def truth(ids):
        time = (np.arange(ids.shape[1]) / ids.shape[1])[None, :, None]
        return sigmoid(start[which, ids] + slope[which, ids] * time)

    world = draw_world(rng, truth, successes=tables, batch=batch, epochs=epochs, units="replicates")
    about = {
        "construction": "z = u + s t; u and s normal, t from 0 to 1 over the run; V = sigmoid(z)",
        **LONG_RUN,
        "slope_sd": slope_sd,
        "moments_at_start": moments(sigmoid(start)),
        "moments_at_end": moments(sigmoid(start + slope)),
        "runs": replicates,
        "problems": problems,
        "batch": batch,
        "epochs": epochs,
    }
    return world, about


# -------------------------------------------------------------------------------- real policies
def checkpoint_world(
    rng: np.random.Generator,
    steps: Sequence[int],
    values: Float[np.ndarray, "C M"],
    rewards: Float[np.ndarray, "C M G"],
    reference: Float[np.ndarray, "M n"],
    *,
    sizes: tuple[int, ...],
    batch: int,
    batches: int,
) -> World:
    """``batches`` random batches of every checkpoint, each a replicate of one step. Rewards are
    those recorded, or drawn from the values if there are none."""
    count, problems = values.shape
    if batch > problems:
        raise SystemExit(f"error: --batch is {batch} and there are {problems} problems")
    which = np.repeat(np.arange(count), batches)
    ids = draw_visits(rng, len(which), problems, batch=batch, epochs=1)[:, :1]
    truth = values[which[:, None, None], ids].astype(np.float32)
    if not rewards.size:
        drawn = rng.random((*truth.shape, MOST_ROLLOUTS), dtype=np.float32) < truth[..., None]
    else:
        drawn = rewards[which[:, None, None], ids]
    ages = np.array([f"step {step}" for step in steps])[which][:, None]
    tables = reference_tables(rng, values[0], reference, len(which), sizes)
    return World(truth, ids, drawn.astype(np.float32), tables, ages, "problems")


def replay_world(
    rng: np.random.Generator,
    steps: Sequence[int],
    values: Float[np.ndarray, "C M"],
    reference: Float[np.ndarray, "M n"],
    *,
    sizes: tuple[int, ...],
    batch: int,
    epochs: int,
    runs: int,
) -> World:
    """A replay of the run. The checkpoints' steps are spread evenly over the epochs. Between two
    checkpoints the logits of the values are interpolated, and rewards are drawn from these."""
    logits = np.log(np.clip(values, 1e-6, 1 - 1e-6))
    logits -= np.log1p(-np.clip(values, 1e-6, 1 - 1e-6))

    def truth(ids):
        at = np.linspace(steps[0], steps[-1], ids.shape[1])
        following = np.clip(np.searchsorted(steps, at), 1, len(steps) - 1)
        known = np.asarray(steps)
        share = (at - known[following - 1]) / (known[following] - known[following - 1])
        rise = logits[following] - logits[following - 1]
        between = logits[following - 1] + share[:, None] * rise  # [T M]
        return sigmoid(between[np.arange(len(at))[None, :, None], ids])

    tables = reference_tables(rng, values[0], reference, runs, sizes)
    return draw_world(rng, truth, successes=tables, batch=batch, epochs=epochs, units="problems")


def reference_tables(
    rng: np.random.Generator,
    first: Float[np.ndarray, " M"],
    reference: Float[np.ndarray, "M n"],
    replicates: int,
    sizes: tuple[int, ...],
) -> dict[int, Float[np.ndarray, "R M"]]:
    """The recorded table for every replicate, or one drawn for each."""
    if not reference.size:
        return draw_tables(rng, np.broadcast_to(first, (replicates, len(first))), sizes)
    counts = {n: reference[:, :n].sum(axis=1).astype(np.float32) for n in sizes}
    return {n: np.broadcast_to(k, (replicates, len(k))) for n, k in counts.items()}
