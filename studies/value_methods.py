"""The methods of the value study, and how their values are scored against the truth.

A ``World`` holds R replicates of T steps over M problems with the true success probability of every
row. A ``Method`` is an estimator with n offline trials and G rollouts per prompt. All methods see
the same nested rewards: the single rollout is the first of the group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from basis_jax import estimators
from basis_jax.estimators import Estimator, Signals
from basis_jax.estimators.rows import estimate
from basis_jax.estimators.table import init_table

ROWS_AT_ONCE = 16_384  # rows of the replicates that one call runs together
BINS = (0.0, 0.2, 0.4, 0.6, 0.8)
RESAMPLES = 1000


@dataclass(frozen=True)
class World:
    """``ages`` has the name of every step's slice (an epoch, a checkpoint) and broadcasts to [R T].
    ``units`` is what the bootstrap draws: ``replicates`` or ``problems``."""

    truth: Float[np.ndarray, "R T B"]
    ids: Int[np.ndarray, "R T B"]
    rewards: Float[np.ndarray, "R T B G"]
    successes: dict[int, Float[np.ndarray, "R M"]]  # by offline trials n
    ages: np.ndarray
    units: str


@dataclass(frozen=True)
class Method:
    name: str  # as in the tables
    estimator: Estimator
    trials: int = 0  # offline rollouts per problem that it starts from
    group_size: int = 1


@dataclass(frozen=True)
class Outcome:
    errors: Float[np.ndarray, "R T B"]  # (V - value)^2, mean over a prompt's rollouts
    binary: Float[np.ndarray, "R T B"]  # share of a prompt's baselines that are exactly 0 or 1
    info: dict[str, np.ndarray]  # what the estimator reports, each [R T]


# ------------------------------------------------------------------------------------- methods
def own_reward() -> Estimator:
    """The "group mean" of one rollout: the baseline is the own reward (the paper's G = 1)."""

    def update(state, signals):
        rewards = signals.rewards
        return state, estimate(jnp.zeros_like(rewards), rewards, signals.valid)

    return Estimator(lambda successes, trials: (), update, False, False, 1)


def bare_table() -> Estimator:
    """The offline Jeffreys rate (k + 1/2) / (n + 1) alone, which shows how the table ages."""

    def update(table, signals):
        rate = (table.successes + 0.5) / (table.trials + 1)
        values = rate[signals.problem_ids]
        return table, estimate(signals.rewards - values, values, signals.valid)

    return Estimator(init_table, update, True, True, 1)


def methods(
    trials: Sequence[int],
    groups: Sequence[int],
    *,
    features: Float[np.ndarray, "M e"] | None = None,
    moved: bool = False,
) -> list[Method]:
    """Every method at the offline trials and group sizes that it takes; reinforce_pp comes first.

    ``moved``: the policy already differs from that of the table in the first step, so no filter can
    have followed it. A filter that expects this (both drifts 1) is added.
    """
    make = estimators.make
    tables = [n for n in trials if n]
    found = [Method("reinforce_pp", make("reinforce_pp")), Method("batch_mean", make("batch_mean"))]
    for g in groups:
        mean = make("dr_grpo", group_size=g) if g > 1 else own_reward()
        found.append(Method("grpo group mean", mean, 0, g))
    several = [g for g in groups if g > 1]
    for name in ("rloo", "james_stein"):
        found += [Method(name, make(name, group_size=g), 0, g) for g in several]
    found += [Method("v05", make("v05", group_size=g), n, g) for n in tables for g in several[-1:]]
    found += [Method(name, make(name), 0) for name in ("ema", "kae")]
    found.append(Method("dbb (own reward inside)", make("dbb")))
    found += [Method("spo", make("spo"), n) for n in trials]
    found += [Method("table alone", bare_table(), n) for n in tables]
    found += [Method("basis published", make("basis", rule="published"), n) for n in tables]
    found += [Method("basis robust", make("basis"), n) for n in tables]
    found += [Method("value_filter", make("value_filter"), n) for n in trials]
    if moved:
        drifting = make("value_filter", drift=1.0, table_drift=1.0)
        found += [Method("value_filter, drift 1", drifting, n) for n in tables]
    if features is not None:
        name = f"value_filter, {features.shape[1]} features"
        found += [Method(name, make("value_filter", features=features), n) for n in trials]
    return found


# ------------------------------------------------------------------------------------- running
def run(method: Method, world: World) -> Outcome:
    """The method's values on every step of every replicate, its state carried from step to step."""
    replicates, steps, prompts = world.ids.shape
    any_table = next(iter(world.successes.values()))
    successes = world.successes.get(method.trials, np.zeros_like(any_table))
    g = method.group_size

    def replicate(arrays):
        truth, ids, rewards, successes = arrays
        trials = jnp.full_like(successes, method.trials)

        def step(state, batch):
            truth, ids, rewards = batch
            rewards = rewards[:, :g].ravel()
            signals = Signals(
                rewards=rewards,
                valid=jnp.ones(rewards.shape, bool),
                problem_ids=jnp.repeat(ids, g),
                lengths=jnp.ones(rewards.shape, jnp.int32),
            )
            state, made = method.estimator.update(state, signals)
            values = made.values.reshape(-1, g)
            error = jnp.mean((values - truth[:, None]) ** 2, 1)
            binary = jnp.mean(((values == 0) | (values == 1)).astype(jnp.float32), 1)
            return state, (error, binary, made.info)

        start = method.estimator.init(successes, trials)
        return jax.lax.scan(step, start, (truth, ids, rewards))[1]

    at_once = max(1, min(replicates, ROWS_AT_ONCE // (prompts * g)))
    on_host = (world.truth, world.ids, world.rewards, successes)
    arrays = tuple(jnp.asarray(x, x.dtype) for x in on_host)
    errors, binary, info = jax.jit(lambda xs: jax.lax.map(replicate, xs, batch_size=at_once))(
        arrays
    )
    reported = {name: np.asarray(x) for name, x in info.items()}
    return Outcome(np.asarray(errors), np.asarray(binary), reported)


# ------------------------------------------------------------------------------------- scoring
def slices(world: World) -> dict[str, Bool[np.ndarray, "R T B"]]:
    """Name of a slice -> its rows: all, by age, by bin of the true value."""
    shape = world.truth.shape
    found = {"all": np.ones(shape, bool)}
    ages = np.broadcast_to(world.ages, shape[:2])[:, :, None]
    names = dict.fromkeys(ages.ravel().tolist())
    if len(names) > 1:
        found |= {age: np.broadcast_to(ages == age, shape) for age in names}
    for low in BINS:
        inside = (world.truth >= low) & (world.truth < low + 0.2)
        found[bin_name(low)] = inside | ((world.truth >= 1) & (low == BINS[-1]))
    return found


def bin_name(low: float) -> str:
    return f"V in [{low:.1f}, {low + 0.2:.1f}" + ("]" if low == BINS[-1] else ")")


def unit_sums(
    world: World, x: Float[np.ndarray, "R T B"], rows: Bool[np.ndarray, "R T B"]
) -> Float[np.ndarray, " U"]:
    """Sum of x over the chosen rows of every unit."""
    if world.units == "replicates":
        return np.where(rows, x, 0).sum(axis=(1, 2), dtype=np.float64)
    size = next(iter(world.successes.values())).shape[1]
    weights = x[rows].astype(np.float64)  # bincount of no rows at all is one of integers
    return np.bincount(world.ids[rows], weights=weights, minlength=size).astype(np.float64)


def score(
    world: World, outcomes: Sequence[Outcome], *, references: dict[str, int], seed: int = 0
) -> list[dict[str, dict]]:
    """For every method and slice the mean squared error with a 95 % bootstrap interval, and its
    ratio to each of ``references``, positions in ``outcomes``.

    Units are drawn with replacement, the same ones for all methods, so the interval of a ratio is
    that of paired data.
    """
    visits = unit_sums(world, np.ones_like(world.truth), np.ones(world.truth.shape, bool))
    draws = np.random.default_rng(seed).multinomial(
        len(visits), np.full(len(visits), 1 / len(visits)), RESAMPLES
    )
    scored: list[dict[str, dict]] = [{} for _ in outcomes]
    for name, rows in slices(world).items():
        counts = unit_sums(world, np.ones_like(world.truth), rows)
        if not counts.any():
            continue
        sums = [unit_sums(world, outcome.errors, rows) for outcome in outcomes]
        below = np.maximum(draws @ counts, 1)
        resampled = [draws @ s / below for s in sums]
        for into, total, means in zip(scored, sums, resampled, strict=True):
            into[name] = {"mse": float(total.sum() / counts.sum()), **interval(means)}
            if name.startswith("V in"):
                continue
            for label, k in references.items():
                ratio = total.sum() / sums[k].sum()
                spread = interval(means / np.maximum(resampled[k], 1e-12))
                into[name][f"ratio_to_{label}"] = {"ratio": float(ratio), **spread}
    return scored


def interval(samples: Float[np.ndarray, " K"]) -> dict[str, float]:
    low, high = np.quantile(samples, [0.025, 0.975])
    return {"low": float(low), "high": float(high)}
