"""Estimators again, as float64 NumPy loops written from the papers; no code shared with basis_jax.

Slow and plain on purpose: explicit weight matrices, one prompt at a time.
"""

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
    """For one fold: the guarded loss of every beta on the rows of all other folds."""
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
        losses.append(sum(errors) / len(errors))
    return losses


def basis_robust_baseline(rewards, successes, trials, rows, i, beta, variant="unb"):
    """Row i's baseline under a given beta: own reward left out, clipped, Jeffreys fallback."""
    values = [tilted_value(k, n, beta) for k, n in zip(successes, trials, strict=True)]
    members = basis_members(values, rows)
    if i in members and len(members) > 1:
        w = basis_weights(values, members, variant)
        return min(1.0, max(0.0, sum(w[i, j] * rewards[j] for j in members)))
    p = (successes[i] + 0.5) / (trials[i] + 1)
    return 1 / (1 + (1 - p) / p * math.exp(-1 / beta))


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
