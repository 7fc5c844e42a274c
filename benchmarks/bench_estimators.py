"""Time of one estimator call, compiled, against the number of rollouts.

    python -m benchmarks.bench_estimators
    python -m benchmarks.bench_estimators --sizes 2048 4096 --out benchmarks/estimators.json

``basis`` scores its 230 betas; ``value_filter`` holds M problems, with and without 32 features per
problem. For comparison there are ``batch_mean``, which only adds, and BASIS as printed in the
paper, with N x N weights for every beta (up to 1,024 rollouts, because its time grows with N^2).
Milliseconds are medians over the calls; compile time is shown separately.
"""

import argparse
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from basis_jax import command_line, estimators
from basis_jax.estimators import Signals
from basis_jax.estimators.batchwise import BETAS
from basis_jax.runs.provenance import provenance

PRINTED_LIMIT = 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--problems", type=int, default=131_072)
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--out", metavar="FILE.json")
    options = parser.parse_args()
    if options.calls < 5 or min(options.sizes) < 2 or max(options.sizes) > options.problems:
        raise SystemExit(
            f"error: --calls {options.calls}, --sizes {options.sizes}, "
            f"--problems {options.problems}; give 5 calls or more and sizes from 2 to the problems"
        )
    rows = [row for name in CASES for row in measure(name, options)]
    device = str(jax.devices()[0])
    print(f"median of {options.calls} calls, {options.problems} problems, {device}")
    print_table(rows, options.sizes)
    if options.out:
        about = {"device": device, "cores": os.cpu_count(), "problems": options.problems}
        about |= {"calls": options.calls, **provenance()}
        Path(options.out).write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")
        print(options.out)


def printed(rewards, successes, trials):
    """Eq. 2, 3 and 6 with their N x N weights: a direct transcription of the paper."""
    odds = successes / (trials - successes)

    def of_beta(beta):
        value = odds * jnp.exp(1 / beta) / (1 + odds * jnp.exp(1 / beta))
        ratio = value / (1 - value)
        others = 1 - jnp.eye(value.size)
        weights = value[:, None] / (1 - value)[None] / (others @ ratio)[:, None] * others
        baseline = weights @ rewards
        return jnp.mean((rewards - baseline) ** 2), baseline

    errors, baselines = jax.lax.map(of_beta, jnp.asarray(BETAS[20:]))  # above 0.2: all are active
    return baselines[jnp.argmin(errors)]


def lifted(name, *, features=0):
    """The estimator's update and its first state over the offline counts."""

    def make(problems, successes, trials):
        options = {"features": normal(problems, features)} if features else {}
        estimator = estimators.make(name)
        return estimator.update, estimator.init(successes, trials, **options)

    return make


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def as_printed(problems, successes, trials):
    def update(state, signals):
        k, n = (jnp.asarray(x, jnp.float32)[signals.problem_ids] for x in state)
        return state, printed(signals.rewards, k, n)

    return update, (jnp.asarray(successes), jnp.asarray(trials))


CASES = {
    "batch_mean": lifted("batch_mean"),
    "basis": lifted("basis"),
    "value_filter": lifted("value_filter"),
    "value_filter, 32 features": lifted("value_filter", features=32),
    "basis with N x N weights": as_printed,
}


def measure(name: str, options: argparse.Namespace) -> list[dict]:
    """One row per size: milliseconds of a call, with quartiles, and seconds of its compilation."""
    trials = np.full(options.problems, 8, np.float32)
    successes = np.random.default_rng(1).integers(1, 8, options.problems).astype(np.float32)
    update, first = CASES[name](options.problems, successes, trials)
    rows = []
    for size in options.sizes:
        if CASES[name] is as_printed and size > PRINTED_LIMIT:
            continue
        state = jax.tree.map(jnp.copy, first)
        signals = batch(size, options.problems)
        started = time.perf_counter()
        call = jax.jit(update, donate_argnums=0).lower(state, signals).compile()
        compiled = time.perf_counter() - started
        times = []
        for _ in range(options.calls + 3):  # the first three warm up
            started = time.perf_counter()
            state, result = jax.block_until_ready(call(state, signals))
            times.append(1e3 * (time.perf_counter() - started))
        low, middle, high = np.percentile(times[3:], [25, 50, 75])
        rows.append(
            {"name": name, "rollouts": size, "ms": middle, "ms_quartiles": [low, high]}
            | {"compile_s": compiled}
        )
    return rows


def batch(size: int, problems: int) -> Signals:
    """Rewards of ``size`` different problems."""
    rng = np.random.default_rng(2)
    return Signals(
        rewards=jnp.asarray(rng.integers(0, 2, size), jnp.float32),
        valid=jnp.ones(size, bool),
        problem_ids=jnp.asarray(rng.permutation(problems)[:size], jnp.int32),
        lengths=jnp.ones(size, jnp.int32),
        score_norms=jnp.ones(size),
    )


def print_table(rows: list[dict], sizes: list[int]) -> None:
    print(f"{'ms a call, rollouts':28}" + "".join(f"{size:>10}" for size in sizes) + "   compile")
    for name in CASES:
        found = {row["rollouts"]: row for row in rows if row["name"] == name}
        cells = (f"{found[s]['ms']:10.2f}" if s in found else f"{'-':>10}" for s in sizes)
        compile_s = max(row["compile_s"] for row in found.values()) if found else float("nan")
        print(f"{name:28}" + "".join(cells) + f"   {compile_s:.1f} s")


if __name__ == "__main__":
    command_line.run(main)
