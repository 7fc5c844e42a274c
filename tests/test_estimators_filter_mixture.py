"""value_filter with learned drift: against a float64 loop, exact independence, and truth in worlds
that stand still, drift, jump, or have left the table."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import sigmoid
from tiny import signals

from basis_jax import estimators
from basis_jax.estimators.filter_mixture import BLIND, OWN_DRIFTS, TABLE


# ------------------------------------------------------------------------------- against a loop
def as_reference(state):
    """Float64 arrays of the same names, changed in place by ``reference_step``."""
    arrays = {name: np.array(x) for name, x in vars(state).items()}
    return {k: x.astype(float) if x.dtype.kind == "f" else x for k, x in arrays.items()}


def reference_jump(y, phi, own_mean, own_variance, mean, covariance, surprise):
    """The covariance, its intercept wider by what the residuals exceed ``surprise`` sd."""
    shrink = 1 / np.sqrt(1 + np.pi / 8 * own_variance)
    p = sigmoid(shrink * (own_mean + phi @ mean))
    slope = (shrink * p * (1 - p)) @ phi
    variance = np.sum(p * (1 - p)) + slope @ covariance @ slope
    wider = covariance.copy()
    excess = np.sum(y - p) ** 2 - surprise**2 * variance
    wider[0, 0] += min(max(excess, 0) / slope[0] ** 2, 4)
    return wider


def reference_family(s, f, y, ids, folds):
    """Probabilities of the rows [N D]; the family's beliefs in ``s`` after the step."""
    phi = np.concatenate([np.ones((len(s["last"]), 1)), s["features"]], 1)[ids]
    phi[:, 1] *= f == TABLE
    m = s["own_mean"][ids, f]
    v = s["own_variance"][ids, f] + np.outer(s["step"] - s["last"][ids], OWN_DRIFTS)
    share = np.exp(s["score"][f]) / np.sum(np.exp(s["score"][f]))
    centre = m @ share
    spread = v @ share + m**2 @ share - centre**2
    prior = s["covariance"][f] + np.diag([0.003, 0.01] + [0.003] * (phi.shape[1] - 2))

    def fitted(rows):
        given = y[rows], phi[rows], centre[rows], spread[rows], s["mean"][f]
        jumped = reference_jump(*given, prior, 2.5 if s["step"] else 2.0)
        return reference.filter_fit(*given, jumped)

    every = np.arange(len(y))
    p, change = np.zeros(m.shape), {}
    for n, i in enumerate(ids):
        w, s_w = fitted(every[every % folds != n % folds])
        for d in range(len(OWN_DRIFTS)):
            shrink = 1 / np.sqrt(1 + np.pi / 8 * (v[n, d] + phi[n] @ s_w @ phi[n]))
            p[n, d] = sigmoid(shrink * (m[n, d] + phi[n] @ w))
            new_v = v[n, d] - v[n, d] ** 2 * shrink**2 * p[n, d] * (1 - p[n, d])
            new_m = m[n, d] + v[n, d] * shrink * (y[n] - p[n, d])
            told = change.setdefault((i, d), [1 / v[n, d], m[n, d] / v[n, d]])
            told[0] += 1 / new_v - 1 / v[n, d]
            told[1] += new_m / new_v - m[n, d] / v[n, d]
    s["mean"][f], s["covariance"][f] = fitted(every)
    for (i, d), (precision, pull) in change.items():
        s["own_mean"][i, f, d], s["own_variance"][i, f, d] = pull / precision, 1 / precision
    return p


def reference_step(s, y, ids, folds):
    weights = np.exp(s["score"]) / np.exp(s["score"]).sum()
    p = np.stack([reference_family(s, f, y, ids, folds) for f in (TABLE, BLIND)], 1)
    told = y[:, None, None] * np.log(p) + (1 - y)[:, None, None] * np.log(1 - p)
    s["score"] = 0.9 * s["score"] + told.sum(0)
    s["last"][ids] = s["step"]
    s["step"] += 1
    return (weights * p).sum((1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("dimension", [0, 3])
def test_five_steps_equal_the_float64_loop_duplicates_included(dimension):
    rng = np.random.default_rng(dimension)
    features = rng.normal(size=(20, dimension)).astype(np.float32) if dimension else None
    est = estimators.make("value_filter", features=features, folds=3)
    trials = rng.integers(0, 9, 20)
    state = est.init(rng.binomial(trials, 0.7), trials)
    expected, update = as_reference(state), jax.jit(est.update)
    for _ in range(5):
        rewards, ids = rng.integers(0, 2, 12).astype(float), rng.integers(0, 20, 12)
        state, e = update(state, signals(rewards, ids))
        np.testing.assert_allclose(e.values, reference_step(expected, rewards, ids, 3), atol=3e-4)
        for name in ("own_mean", "own_variance", "covariance", "score"):
            np.testing.assert_allclose(getattr(state, name), expected[name], rtol=3e-3, atol=3e-3)
        np.testing.assert_array_equal(state.last, expected["last"])


# ------------------------------------------------------------------------------------ own reward
@pytest.mark.slow
def test_the_own_reward_is_in_no_value_and_reaches_the_next_step():
    """After four steps, so that the weights are uneven; problems occur twice, rewards are any."""
    rng = np.random.default_rng(0)
    est = estimators.make("value_filter", features=rng.normal(size=(32, 4)).astype(np.float32))
    state, update = est.init(rng.binomial(8, 0.5, 32), np.full(32, 8)), jax.jit(est.update)
    for _ in range(4):
        state, _ = update(state, signals(rng.random(24), rng.integers(0, 32, 24)))
    ids, rewards = rng.integers(0, 32, 24), rng.random(24)
    after, before = update(state, signals(rewards, ids))
    assert np.ptp(before.info["mixture"]) > 1e-3
    for i in range(24):
        for new in (1 - rewards[i], 0.0, 1.0):
            changed = signals(np.where(np.arange(24) == i, new, rewards), ids)
            other, e = update(state, changed)
            assert e.values[i] == before.values[i]
            np.testing.assert_array_equal(e.info["mixture"], before.info["mixture"])
            assert np.all(other.score != after.score)


# ----------------------------------------------------------------------------- fixed or learned
@pytest.mark.slow
def test_a_fixed_own_drift_is_the_single_filter_and_a_state_of_the_other_kind_is_refused():
    learned, fixed = estimators.make("value_filter"), estimators.make("value_filter", own_drift=0.0)
    counts, batch = (np.int32([3, 5, 0]), np.int32([8, 8, 0])), signals([1, 0], [0, 2])
    states = learned.init(*counts), fixed.init(*counts)
    assert isinstance(states[0], estimators.MixtureState)
    assert isinstance(states[1], estimators.FilterState)
    with pytest.raises(ValueError, match="own_drift=0.0 and a state whose drift is learned; give"):
        fixed.update(states[0], batch)
    with pytest.raises(ValueError, match="own_drift=None and a state whose drift is fixed; give"):
        learned.update(states[1], batch)


# ----------------------------------------------------------------------------------------- truth
RUNS, PROBLEMS, ROWS, EPOCHS = 4, 1024, 128, 8
STEPS = EPOCHS * PROBLEMS // ROWS


def draw(logits, rng, *, table=None):
    """(ids, rewards, true values) of a run, each [R T B], and successes of 64 trials [R M]."""
    ids = np.stack(
        [
            np.concatenate([rng.permutation(PROBLEMS) for _ in range(EPOCHS)]).reshape(STEPS, ROWS)
            for _ in range(RUNS)
        ]
    )
    rates = sigmoid(np.take_along_axis(logits, ids, 2))
    rewards = (rng.random(rates.shape) < rates).astype(np.float32)
    return ids, rewards, rates, rng.binomial(64, sigmoid(logits[:, 0] if table is None else table))


@functools.cache
def runner():
    """Values [R T B] and info of whole runs; compiled once for all worlds."""
    est = estimators.make("value_filter")

    def step(state, batch):
        state, e = est.update(state, signals(*batch))
        return state, (e.values, e.info)

    def one(ids, rewards, successes, trials):
        return jax.lax.scan(step, est.init(successes, trials), (rewards, ids))[1]

    return jax.jit(jax.vmap(one))


def run(ids, rewards, successes, trials):
    given = jnp.full(successes.shape, trials)
    return runner()(ids, rewards, jnp.asarray(successes if trials else 0 * successes), given)


def start(rng, mean):
    return rng.normal(mean, 1.5, (RUNS, 1, PROBLEMS))


def walk(rng, variance):
    """Every logit drifts by N(0, variance) a step."""
    moves = np.sqrt(variance) * rng.normal(size=(RUNS, STEPS - 1, PROBLEMS))
    return np.cumsum(np.concatenate([start(rng, 0.5), moves], 1), 1)


def jumps(rng, rate):
    """Every logit is drawn anew with this probability a step."""
    z = np.repeat(start(rng, 0.5), STEPS, 1)
    for t in range(1, STEPS):
        new = rng.random((RUNS, PROBLEMS)) < rate
        z[:, t] = np.where(new, rng.normal(0.5, 1.5, new.shape), z[:, t - 1])
    return z


def exact_values(ids, rewards, successes, *, variance=0.0, rate=0.0):
    """Bayes' rule on a grid of logits for one run, told the law and the prior N(.5, 1.5^2)."""
    z = np.linspace(-8, 9, 171)
    p, prior = sigmoid(z), np.exp(-((z - 0.5) ** 2) / (2 * 1.5**2))
    prior /= prior.sum()
    log_density = np.outer(successes, np.log(p)) + np.outer(64 - successes, np.log1p(-p))
    belief = prior * np.exp(log_density - log_density.max(1, keepdims=True))
    last, values = np.zeros(PROBLEMS, int), []
    for t, (i, y) in enumerate(zip(ids, rewards, strict=True)):
        idle, x = t - last[i], belief[i] / belief[i].sum(1, keepdims=True)
        for gap in set(idle[idle > 0]) if variance else ():
            kernel = np.exp(-((z[:, None] - z[None]) ** 2) / (2 * variance * gap))
            x[idle == gap] @= kernel / kernel.sum(1, keepdims=True)
        kept = ((1 - rate) ** idle)[:, None]
        x = kept * x + (1 - kept) * prior
        values.append(x @ p)
        belief[i], last[i] = x * np.where(y[:, None] > 0.5, p, 1 - p), t
    return np.array(values)


def still_error(seed):
    rng = np.random.default_rng(seed)
    ids, rewards, rates, successes = draw(np.repeat(start(rng, 1.5), STEPS, 1), rng)
    values, info = run(ids, rewards, successes, 64)
    epoch = STEPS // EPOCHS
    return np.mean((values - rates)[:, -epoch:] ** 2), info


@pytest.mark.slow
def test_where_nothing_moves_the_drift_goes_and_the_table_stays():
    """Last epoch; .0024 +- .0001 over eight seeds, so a false alarm is beyond 9 sd."""
    error, info = still_error(0)
    assert error < 0.0035
    assert np.all(info["own_drift"][:, -1] < 0.002) and np.all(info["table_trust"][:, -1] > 0.99)


def wrong_table_errors(seed):
    rng = np.random.default_rng(seed)
    logits, others = np.repeat(start(rng, 0.5), STEPS, 1), start(rng, 0.5)[:, 0]
    ids, rewards, rates, successes = draw(logits, rng, table=others)
    (values, info), (without, _) = (run(ids, rewards, successes, n) for n in (64, 0))
    return np.mean((values - rates) ** 2) / np.mean((without - rates) ** 2), info


@pytest.mark.slow
def test_a_table_of_other_problems_costs_at_most_a_twentieth():
    """Of the whole run's error without a table; 2.2 +- .2 % over eight seeds: 13 sd."""
    ratio, info = wrong_table_errors(0)
    assert ratio < 1.05
    assert np.all(info["table_trust"][:, -1] < 0.01)


LAWS = {"walk": (walk, {"variance": 0.007}), "jumps": (jumps, {"rate": 0.02})}


def exact_ratio(law, seed):
    """Error of the filter over that of the exact one, which knows the law."""
    rng = np.random.default_rng(seed)
    drawn, known = LAWS[law]
    ids, rewards, rates, successes = draw(drawn(rng, *known.values()), rng)
    values, info = run(ids, rewards, successes, 64)
    exact = [exact_values(ids[r], rewards[r], successes[r], **known) for r in range(RUNS)]
    return np.mean((values - rates) ** 2) / np.mean((np.array(exact) - rates) ** 2), info


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_within_a_tenth_of_the_exact_filter_that_knows_the_law_of_drift(law):
    """Eight seeds: 1.077 +- .015 (largest 1.11) on the walk, 1.069 +- .005 on the jumps; with this
    seed 1.076 and 1.066."""
    ratio, _ = exact_ratio(law, 0)
    assert ratio < 1.10


MANY_ROWS = """
import jax, numpy as np
from basis_jax import estimators

n = 8192
rng = np.random.default_rng(0)
features = rng.normal(size=(n, 32)).astype(np.float32)
estimator = estimators.make("value_filter")
state = estimator.init(rng.integers(1, 8, n), np.full(n, 8), features=features)
signals = estimators.Signals(
    rewards=rng.integers(0, 2, n).astype(np.float32),
    valid=np.ones(n, bool),
    problem_ids=rng.permutation(n),
    lengths=np.ones(n, int),
)
update = jax.jit(estimator.update)
for _ in range(8):
    state, _ = jax.block_until_ready(update(state, signals))
"""


@pytest.mark.slow
def test_updates_with_many_rows_and_features_end():
    """The families' two loops, when independent, waited for each other in the first calls on two
    cores (jaxlib 0.10.2): in a process of its own, because nothing else can end such a wait."""
    subprocess.run([sys.executable, "-c", MANY_ROWS], timeout=300, check=True)
