"""Estimators again, as float64 NumPy loops written from the papers; no code shared with basis_jax.

Slow and plain on purpose: explicit weight matrices, one prompt at a time.
"""

import itertools
import math

import numpy as np

BASIS_BETAS = [i / 100 for i in range(1, 201)] + [i / 10 for i in range(21, 51)]


# ------------------------------------------------------------------------------------------ BASIS
def tilted_value(successes, trials, beta):
    """Eq. 5 for binary rewards, from its definition E[r e^(r/beta)] / E[e^(r/beta)]."""
    if trials == 0:
        return math.nan
    p = successes / trials
    return p / (p + (1 - p) * math.exp(-1 / beta)) if p > 0 else 0.0


def tilted_mean(rewards, beta):
    """Eq. 5 of a list of reference rewards, from its definition; nan without any."""
    weights = [math.exp((r - max(rewards)) / beta) for r in rewards]
    return sum(w * r for w, r in zip(weights, rewards, strict=True)) / sum(weights or [math.nan])


def basis_weights(values, members, variant):
    """w[i][j] of App. B for i, j in members, as a dense matrix with a zero diagonal."""
    w = np.zeros((len(values), len(values)))
    for i in members:
        others = [k for k in members if k != i]
        if not others:
            continue
        variance = {k: values[k] * (1 - values[k]) for k in others}
        precision = sum(values[k] ** 2 / variance[k] for k in others)
        for j in others:
            if variant == "unb":
                w[i, j] = values[i] * values[j] / variance[j] / precision
            elif variant == "vop":
                w[i, j] = values[i] * values[j] / variance[j] / (1 + precision)
            elif variant == "rvg":
                w[i, j] = values[i] / values[j] / len(others)
    return w


def basis_members(values, rows, eps=1e-6):
    return [i for i in rows if eps < values[i] < 1 - eps]


def basis_published_losses(rewards, successes, trials, rows, variant="unb", betas=BASIS_BETAS):
    """Eq. 6 of every beta: (loss, baselines); loss inf for an empty active set."""
    results = []
    for beta in betas:
        values = [tilted_value(k, n, beta) for k, n in zip(successes, trials, strict=True)]
        members = basis_members(values, rows)
        w = basis_weights(values, members, variant)
        b = [sum(w[i, j] * rewards[j] for j in members) for i in range(len(rewards))]
        errors = [(rewards[i] - b[i]) ** 2 for i in members]
        results.append((sum(errors) / len(errors) if errors else math.inf, b))
    return results


def basis_robust_losses(rewards, successes, trials, rows, folds, fold, variant, betas):
    """For one fold: the guarded loss of every beta on the rows of all other folds, those outside
    the active set by their fallback."""
    fold_of = {row: j % folds for j, row in enumerate(rows)}
    score_rows = [i for i in rows if fold_of[i] != fold]
    mixed = sum(1 for i in score_rows if 0 < successes[i] < trials[i])
    losses = []
    for beta in betas:
        values = [tilted_value(k, n, beta) for k, n in zip(successes, trials, strict=True)]
        members = basis_members(values, score_rows)
        if len(members) < max(2, mixed / 2):
            losses.append(math.inf)
            continue
        errors = []
        for i in members:
            fit_rows = [j for j in members if fold_of[j] != fold_of[i]]
            w = basis_weights(values, [i, *fit_rows], variant)
            errors.append((rewards[i] - sum(w[i, j] * rewards[j] for j in fit_rows)) ** 2)
        for i in set(score_rows) - set(members):
            errors.append((rewards[i] - jeffreys_tilted(successes[i], trials[i], beta)) ** 2)
        losses.append(sum(errors) / len(errors))
    return losses


def jeffreys_tilted(successes, trials, beta):
    p = (successes + 0.5) / (trials + 1)
    return 1 / (1 + (1 - p) / p * math.exp(-1 / beta))


def basis_robust_baseline(rewards, successes, trials, rows, i, beta, variant="unb"):
    """Row i's baseline under a given beta: own reward left out, clipped, Jeffreys fallback."""
    values = [tilted_value(k, n, beta) for k, n in zip(successes, trials, strict=True)]
    members = basis_members(values, rows)
    if i in members and len(members) > 1:
        w = basis_weights(values, members, variant)
        return min(1.0, max(0.0, sum(w[i, j] * rewards[j] for j in members)))
    return jeffreys_tilted(successes[i], trials[i], beta)


# ------------------------------------------------------------------------------ batch and groups
def leave_one_out_mean(rewards):
    n = len(rewards)
    return [sum(rewards[j] for j in range(n) if j != i) / (n - 1) for i in range(n)]


def sample_std(xs):
    mean = sum(xs) / len(xs)
    return math.sqrt(sum((x - mean) ** 2 for x in xs) / (len(xs) - 1))


def reinforce_pp(rewards, lengths, convention):
    """Whitening done on the list of all tokens, each carrying its rollout's reward."""
    if convention == "sequence":
        tokens = list(rewards)
    else:
        tokens = [r for r, n in zip(rewards, lengths, strict=True) for _ in range(n)]
    mean = sum(tokens) / len(tokens)
    population = sum((t - mean) ** 2 for t in tokens) / len(tokens)
    bessel = population * len(tokens) / (len(tokens) - 1) if len(tokens) > 1 else 0.0
    scale = {
        "openrlhf": math.sqrt(max(population, 1e-8)),
        "verl": math.sqrt(bessel + 1e-8),
        "spo_pp": math.sqrt(bessel) + 1e-8,
        "sequence": math.sqrt(bessel) + 1e-8,
    }[convention]
    return [(r - mean) / scale for r in rewards]


def grpo(rewards, eps):
    mean = sum(rewards) / len(rewards)
    return [(r - mean) / (sample_std(rewards) + eps) for r in rewards]


def nemo_grpo(rewards):
    """Mean and sd of the others; no division where that sd is 0 or undefined."""
    advantages = []
    for i, r in enumerate(rewards):
        others = [x for j, x in enumerate(rewards) if j != i]
        std = sample_std(others) if len(others) > 1 else 0.0
        gap = r - sum(others) / len(others)
        advantages.append(gap / (std + 1e-6) if std > 0 else gap)
    return advantages


def james_stein(groups, convention):
    """arXiv 2511.03710, eq. 10-16, for groups of two or more rewards each: rows of advantages."""
    n = len(groups)
    means = [sum(g) / len(g) for g in groups]
    noises = [sample_std(g) ** 2 / len(g) for g in groups]
    advantages = []
    for i, group in enumerate(groups):
        others = [k for k in range(n) if k != i]
        pooled = sum(means[k] for k in others) / (n - 1)
        v = sum(noises[k] for k in others) / (n - 1)
        s = sum((means[k] - pooled) ** 2 for k in others) / (n - 1)
        if convention == "code":
            shrink = v / (v + s + 1e-6)
        else:
            shrink = (n - 1) / n * v / (v + s) if v + s > 0 else 0.0
        row = []
        for j, r in enumerate(group):
            rest = (sum(group) - group[j]) / (len(group) - 1)
            row.append(r - (1 - shrink) * rest - shrink * pooled)
        advantages.append(row)
    return advantages


def pass_at_k(rewards, k):
    """By enumeration of all subsets of k rollouts; reward of a subset: does it hold a success."""
    n = len(rewards)
    subsets = list(itertools.combinations(range(n), k))
    score = {s: float(any(rewards[i] > 0 for i in s)) for s in subsets}
    mean = sum(score.values()) / len(subsets)
    std = math.sqrt(sum((x - mean) ** 2 for x in score.values()) / len(subsets))
    own = [[score[s] for s in subsets if i in s] for i in range(n)]
    return [(sum(x) / len(x) - mean) / (std + 1e-6) for x in own]


# ------------------------------------------------------------------------------------- histories
def spo(steps, successes, trials, decay):
    """Raw advantages of every step: a list of (rewards, ids) in, Beta evidence kept in dicts."""
    weight = [1 / (1 - decay) if n else 1 for n in trials]
    rate = [(k + 0.5) / (n + 1) for k, n in zip(successes, trials, strict=True)]
    a = [w * p for w, p in zip(weight, rate, strict=True)]
    b = [w * (1 - p) for w, p in zip(weight, rate, strict=True)]
    advantages = []
    for rewards, ids in steps:
        advantages.append([r - a[i] / (a[i] + b[i]) for r, i in zip(rewards, ids, strict=True)])
        for i in set(ids):
            mine = [r for r, j in zip(rewards, ids, strict=True) if j == i]
            a[i] = decay * a[i] + sum(mine)
            b[i] = decay * b[i] + sum(1 - r for r in mine)
    return advantages


def kae(steps, window):
    """Values of every step with unbounded histories of (step, reward) a problem; nan: undefined."""
    history, values = {}, []
    for now, (rewards, ids) in enumerate(steps):
        row = []
        for n, i in enumerate(ids):
            pairs = [(1 - (now - s) / window, z) for s, z in history.get(i, [])]
            pairs = [(max(0.0, w), z) for w, z in pairs]
            pairs += [(1.0, rewards[k]) for k, j in enumerate(ids) if j == i and k != n]
            total = sum(w for w, _ in pairs)
            row.append(sum(w * z for w, z in pairs) / total if total > 0 else math.nan)
        values.append(row)
        for r, i in zip(rewards, ids, strict=True):
            history.setdefault(i, []).append((now, r))
    return values


# ---------------------------------------------------------------------------------- token level
def gae(token_rewards, values, mask, discount, trace_decay, across):
    """One row. skip: only True tokens exist; count: the others are steps of reward and value 0."""
    live = [t for t, m in enumerate(mask) if m]
    chain = live if across == "skip" else list(range(len(mask)))
    advantages = [0.0] * len(mask)
    following, next_value = 0.0, 0.0
    for t in reversed(chain):
        value = values[t] if mask[t] else 0.0
        reward = token_rewards[t] if mask[t] else 0.0
        delta = reward + discount * next_value - value
        following = delta + discount * trace_decay * following
        next_value = value
        advantages[t] = following if mask[t] else 0.0
    return advantages


# ---------------------------------------------------------------------------------- value filter
def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def filter_fit(y, phi, own_mean, own_variance, mean, covariance):
    """Posterior mode and Laplace covariance of w by damped Newton steps to convergence."""
    prior = np.linalg.inv(covariance)
    shrink = 1 / np.sqrt(1 + np.pi / 8 * own_variance)
    w = mean.copy()

    def precision_and_slope(w):
        precision, slope = prior.copy(), -prior @ (w - mean)
        for i in range(len(y)):
            p = sigmoid(shrink[i] * (own_mean[i] + phi[i] @ w))
            slope += shrink[i] * (y[i] - p) * phi[i]
            precision += shrink[i] ** 2 * p * (1 - p) * np.outer(phi[i], phi[i])
        return precision, slope

    for _ in range(200):
        precision, slope = precision_and_slope(w)
        w = w + 0.5 * np.linalg.solve(precision, slope)
    return w, np.linalg.inv(precision_and_slope(w)[0])


def filter_jump(y, phi, own_mean, own_variance, mean, covariance):
    """The covariance, its intercept wider where the rows' residuals add up to 2.5 sd or more."""
    shrink = 1 / np.sqrt(1 + np.pi / 8 * own_variance)
    p = np.array(
        [sigmoid(k * (m + f @ mean)) for k, m, f in zip(shrink, own_mean, phi, strict=True)]
    )
    slope = sum(k * q * (1 - q) * f for k, q, f in zip(shrink, p, phi, strict=True))
    variance = np.sum(p * (1 - p)) + slope @ covariance @ slope
    gap = np.sum(np.asarray(y) - p)
    wider = covariance.copy()
    if gap**2 > 2.5**2 * variance:
        wider[0, 0] += min((gap**2 - variance) / slope[0] ** 2, 4)
    return wider


def filter_step(state, y, ids, drift, table_drift, own_drift, folds):
    """One step of the value filter; ``state`` is a dict of arrays and is changed in place."""
    m, v, phi = state["own_mean"], state["own_variance"], state["phi"]
    idle = state["step"] - state["last"]
    wide = v + own_drift * idle
    widened = np.full(len(state["mean"]), drift)
    widened[1] = table_drift
    covariance = state["covariance"] + np.diag(widened)
    values, change = [], {}
    for n, i in enumerate(ids):
        rows = [k for k in range(len(ids)) if k % folds != n % folds]
        other = [ids[k] for k in rows]
        given = [y[k] for k in rows], phi[other], m[other], wide[other], state["mean"]
        w, s_w = filter_fit(*given, filter_jump(*given, covariance))
        a, s = m[i] + phi[i] @ w, wide[i] + phi[i] @ s_w @ phi[i]
        shrink = 1 / math.sqrt(1 + math.pi / 8 * s)
        p = sigmoid(shrink * a)
        values.append(p)
        new_v = wide[i] - wide[i] ** 2 * shrink**2 * p * (1 - p)
        new_m = m[i] + wide[i] * shrink * (y[n] - p)
        precision, pull = change.setdefault(i, [1 / wide[i], m[i] / wide[i]])
        change[i] = [precision + 1 / new_v - 1 / wide[i], pull + new_m / new_v - m[i] / wide[i]]
    given = y, phi[ids], m[ids], wide[ids], state["mean"]
    state["mean"], state["covariance"] = filter_fit(*given, filter_jump(*given, covariance))
    for i, (precision, pull) in change.items():
        m[i], v[i], state["last"][i] = pull / precision, 1 / precision, state["step"]
    state["step"] += 1
    return values
