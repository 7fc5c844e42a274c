"""What the gradient study compares: estimators on real batches, reduced to moments a problem.

A method updates on batches drawn from a pool of rollouts, with its state carried from earlier
batches. A prompt's share of the batch gradient is U = sum_i a_i g_i over its rollouts i. Whatever
is asked of the gradients is linear in U or in U U^T, so that the first and second moments of the
coefficients a are all that is kept of the batches (``Moments``).
"""

from collections.abc import Sequence
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
WEIGHTS = ("free", "exact", "exact_adamw", "surprise")


@dataclass(frozen=True)
class Method:
    """``scaled``: its advantages are not r - b with a b that leaves the own reward out, so the
    expected update is not the gradient itself."""

    name: str
    estimator: Estimator
    trials: int = 0  # offline rollouts a problem
    group_size: int = 1
    scaled: bool = False


@dataclass(frozen=True)
class Draws:
    """R replicates of T batches of m prompts with G rollouts each; those of the last visit count.
    Over the replicates every rollout of every problem counts equally often."""

    ids: Int[np.ndarray, "R T m"]
    chosen: Int[np.ndarray, "R T m G"]
    counts: Bool[np.ndarray, " T"]


@dataclass(frozen=True)
class Moments:
    """Over the visits of a problem that count, the rollouts that a visit does not take being 0:
    E a_i, E a_i a_j, and the mean over its rollouts of (r_i - b_i)^2."""

    mean: Float[np.ndarray, "P E"]
    products: Float[np.ndarray, "P E E"]
    squares: Float[np.ndarray, "P E"]


# ------------------------------------------------------------------------------------- methods
def knows(values: Float[np.ndarray, " P"]) -> Estimator:
    """An estimator that returns ``values`` of the problems."""

    def update(state, signals):
        known = jnp.asarray(values, jnp.float32)[signals.problem_ids]
        return state, estimate(signals.rewards - known, known, signals.valid)

    return Estimator(lambda successes, trials: (), update, False, False, 1)


def single_methods(values: Float[np.ndarray, " P"]) -> list[Method]:
    """One rollout a prompt; ``values`` are the true ones."""
    make = estimators.make
    filtered, basis = make("value_filter"), make("basis")
    return [
        Method("none", make("reinforce")),
        Method("batch mean", make("batch_mean")),
        Method("REINFORCE++", make("reinforce_pp")),
        Method("value_filter", filtered),
        Method("value_filter", filtered, TABLE),
        Method("basis", basis, TABLE),
        Method("spo", make("spo")),
        Method("spo", make("spo"), TABLE),
        Method("weighted_mean", make("weighted_mean")),
        Method("least_variance value_filter", least_variance(filtered)),
        Method("least_variance value_filter", least_variance(filtered), TABLE),
        Method("least_variance basis", least_variance(basis), TABLE),
        Method("least_variance true value", least_variance(knows(values))),
        Method("true value", knows(values)),
    ]


def group_methods() -> list[Method]:
    make = estimators.make
    found = [Method("grpo", make("grpo", group_size=8), 0, 8, scaled=True)]
    found += [Method("rloo", make("rloo", group_size=g), 0, g) for g in (2, 4, 8)]
    found += [Method("otb", make("otb", group_size=g), 0, g, scaled=True) for g in (2, 4, 8)]
    return found


def weights(
    pool: Pool, norms: Float[np.ndarray, "P S 2"], name: str
) -> Float[np.ndarray, "P {ESTIMATED}"]:
    """What estimators are told as score norms: the sampler's ``free`` ones, the ``exact`` squared
    norms in either metric, or ``surprise``, sum (1 - probability)^2."""
    every = {
        "free": pool.score_norms,
        "exact": norms[..., 0],
        "exact_adamw": norms[..., 1],
        "surprise": pool.surprises,
    }
    return every[name][:, :ESTIMATED].astype(np.float32)


# ------------------------------------------------------------------------------------- batches
def draw_batches(
    seed: int, problems: int, *, batch: int, group_size: int, replicates: int = REPLICATES
) -> Draws:
    """Batches of ``batch`` rollouts in a random order of the problems a visit, as training has it.

    A visit before the last takes rollouts that the last does not: a history never holds the reward
    that it is judged by. Raises ValueError where no visit fits.
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


def run(
    method: Method, draws: Draws, pool: Pool, told: Float[np.ndarray, "P {ESTIMATED}"]
) -> Moments:
    """The method's updates on all batches, with the score norms ``told``."""
    rewards, successes = jnp.asarray(pool.rewards), jnp.asarray(pool.successes, jnp.float32)
    trials = jnp.full(len(successes), method.trials, jnp.float32)
    columns = (pool.lengths, told, pool.logprobs.astype(np.float32))
    lengths, norms, logprobs = (jnp.asarray(x) for x in columns)

    def replicate(ids, chosen):
        def step(state, batch):
            ids, chosen = batch
            where = (jnp.repeat(ids, chosen.shape[1]), chosen.ravel())
            r = rewards[where]
            signals = Signals(
                rewards=r,
                valid=jnp.ones(r.shape, bool),
                problem_ids=where[0],
                lengths=lengths[where],
                score_norms=norms[where],
                logprob_sum=logprobs[where],
            )
            state, made = method.estimator.update(state, signals)
            left = r - made.baselines
            used = made.advantages if method.scaled else left
            return state, (used.reshape(chosen.shape), left.reshape(chosen.shape))

        started = method.estimator.init(successes * (method.trials > 0), trials)
        return jax.lax.scan(step, started, (ids, chosen))[1]

    used, left = jax.jit(jax.vmap(replicate))(draws.ids, draws.chosen)
    return moments(draws, np.asarray(used), np.asarray(left))


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
    """A baseline a problem that knows no batch; all rollouts count alike, one a visit."""
    left = (pool.rewards[:, :ESTIMATED] - baselines[:, None]).astype(np.float64)
    squares = left**2 / ESTIMATED
    return Moments(left / ESTIMATED, squares[..., None] * np.eye(ESTIMATED), squares)
