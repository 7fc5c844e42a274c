"""The methods of the gradient study: estimators on real batches, reduced to moments per problem.

A method updates on batches drawn from a pool of rollouts, and its state is carried from batch to
batch. A prompt's share of the batch gradient is U = sum_i a_i g_i over its rollouts i. All results
are linear in U or in U U^T, so only the first and second moments of the coefficients a are kept of
the batches (``Moments``).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from basis_jax import estimators
from basis_jax.estimators import Estimator, Signals, least_variance
from basis_jax.estimators.rows import estimate
from studies.gradient_pool import ESTIMATED, TABLE, Pool

HISTORY = 2  # visits of every problem before the batches that count
REPLICATES = 24  # times that every problem is visited in a batch that counts
WEIGHTS = ("free", "power", "exact", "exact_adamw", "surprise")


@dataclass(frozen=True)
class Method:
    """``scaled``: the advantages are not r - b with a b that leaves out the own reward, so the
    expected update is not the gradient itself."""

    name: str
    estimator: Estimator
    trials: int = 0  # offline rollouts per problem
    group_size: int = 1
    scaled: bool = False
    told_values: bool = False  # gets the true values in place of the table's successes


@dataclass(frozen=True)
class Draws:
    """R replicates of T batches of m prompts with G rollouts each. Only the batches of the last
    visit count. Over the replicates every rollout of every problem counts equally often."""

    ids: Int[np.ndarray, "R T m"]
    chosen: Int[np.ndarray, "R T m G"]
    counts: Bool[np.ndarray, " T"]


@dataclass(frozen=True)
class Moments:
    """E a_i, E a_i a_j and the mean of (r_i - b_i)^2 over the visits of a problem that count. A
    rollout that a visit does not take counts as 0."""

    mean: Float[np.ndarray, "P E"]
    products: Float[np.ndarray, "P E E"]
    squares: Float[np.ndarray, "P E"]


# ------------------------------------------------------------------------------------- methods
def knows() -> Estimator:
    """An estimator whose state is the problems' values, given in place of successes."""

    def update(state, signals):
        known = state[signals.problem_ids]
        return state, estimate(signals.rewards - known, known, signals.valid)

    return Estimator(lambda values, trials: jnp.asarray(values, jnp.float32), update, True, True, 1)


@functools.cache
def single_methods() -> tuple[Method, ...]:
    """Methods with one rollout per prompt."""
    make = estimators.make
    filtered, basis, spo = make("value_filter"), make("basis"), make("spo")
    tilted = least_variance(filtered)
    return (
        Method("none", make("reinforce")),
        Method("batch mean", make("batch_mean")),
        Method("REINFORCE++", make("reinforce_pp")),
        Method("value_filter", filtered),
        Method("value_filter", filtered, TABLE),
        Method("basis", basis, TABLE),
        Method("spo", spo),
        Method("spo", spo, TABLE),
        Method("weighted_mean", make("weighted_mean")),
        Method("least_variance value_filter", tilted),
        Method("least_variance value_filter", tilted, TABLE),
        Method("least_variance basis", least_variance(basis), TABLE),
        Method("least_variance true value", least_variance(knows()), told_values=True),
        Method("true value", knows(), told_values=True),
    )


@functools.cache
def group_methods() -> tuple[Method, ...]:
    make = estimators.make
    return (
        Method("grpo", make("grpo", group_size=8), group_size=8, scaled=True),
        *(Method("rloo", make("rloo", group_size=g), group_size=g) for g in (2, 4, 8)),
        *(Method("otb", make("otb", group_size=g), group_size=g, scaled=True) for g in (2, 4, 8)),
    )


def weights(pool: Pool, norms: Float[np.ndarray, "P S 2"], name: str) -> Float[np.ndarray, "P E"]:
    """Weights that estimators get as score norms: the sampler's (``free``), these to the power 1.5,
    the exact squared norms in either metric, or ``surprise``, the sum of (1 - probability)^2."""
    every = {
        "free": pool.score_norms,
        "power": pool.score_norms**1.5,
        "exact": norms[..., 0],
        "exact_adamw": norms[..., 1],
        "surprise": pool.surprises,
    }
    return every[name][:, :ESTIMATED].astype(np.float32)


# ------------------------------------------------------------------------------------- batches
def draw_batches(
    seed: int, problems: int, *, batch: int, group_size: int, replicates: int = REPLICATES
) -> Draws:
    """Batches of ``batch`` rollouts. Every visit has a random order of problems, as in training.

    Visits before the last take other rollouts than the last one, so a history never contains the
    reward that it is judged by. Raises ValueError if there are too few problems for a batch.
    """
    prompts = batch // group_size
    if prompts > problems:
        raise ValueError(
            f"a batch of {batch} rollouts in groups of {group_size} needs {prompts} problems but "
            f"there are {problems}; give more with --problems or a smaller --batch"
        )
    visits = 1 + (HISTORY if group_size == 1 else 0)
    steps = problems // prompts
    random = np.random.default_rng([seed, group_size, 7])
    ids = np.zeros((replicates, visits * steps, prompts), np.int32)
    chosen = np.zeros((*ids.shape, group_size), np.int32)
    cycle = ESTIMATED // group_size
    for replicate in range(replicates):
        if replicate % cycle == 0:
            order = np.argsort(random.random((problems, ESTIMATED)), axis=1)
        for visit in range(visits):
            at = (replicate + visits - 1 - visit) % cycle * group_size
            rollouts = order[:, at : at + group_size]
            visited = random.permutation(problems)[: steps * prompts].reshape(steps, prompts)
            rows = slice(visit * steps, (visit + 1) * steps)
            ids[replicate, rows] = visited
            chosen[replicate, rows] = rollouts[visited]
    return Draws(ids, chosen, np.arange(visits * steps) >= (visits - 1) * steps)


def run(method: Method, draws: Draws, pool: Pool, told: Float[np.ndarray, "P E"]) -> Moments:
    """The method's updates on all batches, with the score norms ``told``."""
    used = "values" if method.told_values else "successes"
    started = getattr(pool, used) if method.trials or method.told_values else 0 * pool.successes
    columns = (pool.rewards, pool.lengths, told, pool.logprobs)
    found = replicates_of(method.estimator, method.scaled)(
        (draws.ids, draws.chosen),
        tuple(x if x.dtype.kind == "i" else np.float32(x) for x in columns),
        np.float32(started),
        np.full(len(started), method.trials, np.float32),
    )
    return moments(draws, *(np.asarray(x, np.float64) for x in found))


@functools.cache
def replicates_of(estimator: Estimator, scaled: bool) -> Callable:
    """(batches of all replicates, rewards, lengths, score norms and log-probabilities of all
    rollouts, successes, trials) -> advantages (``scaled``) or r - b, and r - b, of every row."""

    def replicate(batches, columns, successes, trials):
        def step(state, batch):
            ids, chosen = batch
            where = (jnp.repeat(ids, chosen.shape[1]), chosen.ravel())
            rewards, lengths, norms, logprobs = (x[where] for x in columns)
            signals = Signals(
                rewards=rewards,
                valid=jnp.ones(rewards.shape, bool),
                problem_ids=where[0],
                lengths=lengths,
                score_norms=norms,
                logprob_sum=logprobs,
            )
            state, made = estimator.update(state, signals)
            left = rewards - made.baselines
            used = made.advantages if scaled else left
            return state, (used.reshape(chosen.shape), left.reshape(chosen.shape))

        return jax.lax.scan(step, estimator.init(successes, trials), batches)[1]

    return jax.jit(jax.vmap(replicate, in_axes=(0, None, None, None)))


def moments(
    draws: Draws, used: Float[np.ndarray, "R T m G"], left: Float[np.ndarray, "R T m G"]
) -> Moments:
    """``used`` are the advantages, ``left`` r - b, of every row of the batches."""
    ids, chosen, used, left = (x[:, draws.counts] for x in (draws.ids, draws.chosen, used, left))
    problems, size = int(draws.ids.max()) + 1, chosen.shape[3]
    share = 1 / np.bincount(ids.ravel(), minlength=problems)[ids][..., None]  # of a visit
    mean, squares = np.zeros((2, problems, ESTIMATED))
    products = np.zeros((problems, ESTIMATED, ESTIMATED))
    np.add.at(mean, (ids[..., None], chosen), share * used / size)
    np.add.at(squares, (ids[..., None], chosen), share * left**2 / size)
    pairs = used[..., :, None] * used[..., None, :] / size**2
    at = (ids[..., None, None], chosen[..., :, None], chosen[..., None, :])
    np.add.at(products, at, share[..., None] * pairs)
    return Moments(mean, products, squares)


def fixed(baselines: Float[np.ndarray, " P"], pool: Pool) -> Moments:
    """Moments of fixed baselines, one per problem. All rollouts count equally, one per visit."""
    left = (pool.rewards[:, :ESTIMATED] - baselines[:, None]).astype(np.float64)
    squares = left**2 / ESTIMATED
    return Moments(left / ESTIMATED, squares[..., None] * np.eye(ESTIMATED), squares)
