"""The study of the plan ``sequential`` measures what the exact distribution of rewards says."""

import json
import math
from collections import defaultdict
from itertools import product

import pytest

from studies.sequential_bias import ESTIMATORS, PLANS, PRIORS, RATES, RESULT, main, measured

SIGMAS = 5  # a false alarm has probability 6e-7 a number


def drawn(n, k, p):
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def goes_on(n, k, prior):
    """Whether the squared error of the fused baseline, in rewards of -1 and 1, falls by more than
    .0039 with one more rollout."""
    d = max(0.0, (2 * k / n - 2 * prior) ** 2 - 1 / n)
    return n < 16 and d / (n * d + 1) - d / ((n + 1) * d + 1) > 0.0039


def endings(plan, p, prior):
    """Probability of (rollouts, right ones) of a problem."""
    n = 16 if plan.startswith("16") else 4
    states, ended = {(n, k): drawn(n, k, p) for k in range(n + 1)}, defaultdict(float)
    while states:
        later = defaultdict(float)
        for (n, k), chance in states.items():
            if plan != "sequential" or not goes_on(n, k, prior):
                ended[n, k] += chance
                continue
            for more in range(5):
                later[n + 4, k + more] += chance * drawn(4, more, p)
        states = later
    return ended


def fused(right, count, prior):
    noise = 0.25 / count
    d = max(0.0, (right / count - prior) ** 2 - noise)
    return prior + d / (d + noise) * (right / count - prior)


def baselines_by_hand(estimator, n, k, prior):
    """Of a right and of a wrong rollout of (n, k)."""
    if estimator == "value_filter":
        return prior, prior
    if estimator == "v05":
        return (fused(k, n, prior),) * 2
    return fused(k - 1, n - 1, prior), fused(k, n - 1, prior)


def exact(cell):
    """Mean and standard deviation of the rollouts, bias of the mean and gradient coefficients,
    without a drawing."""
    p, prior = cell["p"], cell["value"]
    found = defaultdict(float)
    for (n, k), chance in endings(cell["plan"], p, prior).items():
        found["rollouts"] += chance * n
        found["squared"] += chance * n**2
        found["bias"] += chance * (k / n - p)
        for name in ESTIMATORS:
            of_right, of_wrong = baselines_by_hand(name, n, k, prior)
            slope = k * (1 - of_right) / p + (n - k) * of_wrong / (1 - p)
            found[name] += chance * slope / n
    found["spread"] = math.sqrt(max(0.0, found["squared"] - found["rollouts"] ** 2))
    return found


def check(cell, draws):
    expected = exact(cell)
    told = {"bias": cell["mean_reward_bias"], **cell["gradient"]}
    for name, interval in told.items():
        error = abs(interval["mean"] - expected[name])
        assert error < SIGMAS / 1.96 * interval["half_width"] + 2e-5, (cell, name, expected[name])
    error = abs(cell["rollouts"] - expected["rollouts"])
    assert error < SIGMAS * expected["spread"] / math.sqrt(draws) + 0.006, (cell, expected)


@pytest.mark.parametrize("case", ["right", "too high", "too low"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_cell_has_the_exact_biases(plan, case):
    """The intervals of 3,000 problems: the plan as a run uses it, against its Markov chain."""
    cell = measured(plan, case, 0.3, 3000)
    about = {"plan": plan, "prior": case, "p": 0.3, "value": round(0.3 + PRIORS[case], 2)}
    assert {name: cell[name] for name in about} == about
    check(cell, 3000)
    for interval in cell["gradient"].values():
        assert 0.002 < interval["half_width"] < 0.05


def test_the_recorded_biases_are_the_exact_ones():
    """All cells of results/sequential_bias.json."""
    content = json.loads(RESULT.read_text())
    cells = content["cells"]
    assert {(c["plan"], c["prior"], c["p"]) for c in cells} == {*product(PLANS, PRIORS, RATES)}
    for cell in cells:
        check(cell, content["draws"])


def test_the_study_writes_what_it_prints(monkeypatch, capsys, tmp_path):
    out = tmp_path / "bias.json"
    monkeypatch.setattr("sys.argv", ["sequential_bias", "--draws", "50", "--out", str(out)])
    main()
    cells = json.loads(out.read_text())["cells"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(cells) == 82
    for line, cell in zip(lines[1:], cells, strict=True):
        assert f"{cell['mean_reward_bias']['mean']:8.3f}" in line and cell["plan"] in line
