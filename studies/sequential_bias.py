"""How far the rollout plan ``sequential`` biases mean rewards and gradients, by simulation.

    python -m studies.sequential_bias                # print the table; write results/
    python -m studies.sequential_bias --draws 2000   # faster

Every problem has rewards of 0 and 1 with P(1) = p. The plan is used as in a run, with a prior value
that is right or wrong by 0.2. For every p and prior the study draws many problems and computes:

- the bias of the mean reward of a problem's rollouts, E[mean r] - p;
- the gradient coefficient G = E[sum_i A_i s_i / k] over the k rollouts of a problem. Problems count
  alike (``Plan.alike``), and s = (r - p) / (p (1 - p)) is the expected score of a completion with
  reward r, in units of the gradient of p. Without a bias G is 1. As the plan sees nothing but
  rewards, G times the gradient of p is the expected gradient for every policy.

A is the advantage of the named estimator, with the prior as its value of the problem. The same
figures with 4 and with 16 rollouts of every problem show what the plan adds. Intervals are 95 %.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from basis_jax import command_line
from basis_jax.estimators.shrinkage import fuse
from basis_jax.plans import Belief, Plan, Requests, Setting, make, of_problems
from basis_jax.sampling.rollouts import Graded
from basis_jax.types import Rollouts

RESULT = Path(__file__).parent.parent / "results" / "sequential_bias.json"
RATES = tuple(n / 10 for n in range(1, 10))
PRIORS = {"right": 0.0, "too high": 0.2, "too low": -0.2}
FIRST, ADD, MOST = 4, 4, 16
PLANS = {"sequential": 0, "4 rollouts": FIRST, "16 rollouts": MOST}
ESTIMATORS = ("v05_filter", "v05", "value_filter")

Group = Float[np.ndarray, "problems most"]


def plan_of(name: str, problems: int) -> Plan:
    setting = Setting(seed=0, prompts=problems, group_size=MOST, sizes=(problems,))
    if fixed := PLANS[name]:
        return Plan(lambda step, belief: of_problems(np.arange(problems), fixed))
    return make("sequential", setting, {"first": FIRST, "add": ADD})


def sampled(
    plan: Plan, p: float, prior: float, problems: int, random: np.random.Generator
) -> tuple[Group, Bool[np.ndarray, "problems most"]]:
    """Rewards of ``problems`` problems, and a mask of the rollouts that the plan asked for."""
    belief = Belief(np.full(problems, prior))
    rewards = np.zeros((problems, MOST))
    there = np.zeros(rewards.shape, bool)
    rounds: list[Requests] = []
    graded: list[Graded] = []
    asked: Requests | None = plan.ask(0, belief)
    while asked is not None:
        drawn = random.random(asked.problems.size) < p
        rewards[asked.problems, asked.samples] = drawn
        there[asked.problems, asked.samples] = True
        rounds.append(asked)
        graded.append(graded_as(drawn))
        asked = None if plan.more is None else plan.more(rounds, graded, belief)
    return rewards, there


def graded_as(right: Bool[np.ndarray, " n"]) -> Graded:
    """Rollouts without tokens, with these rewards."""
    zeros = np.zeros(right.size, np.int32)
    return Graded(
        rollouts=Rollouts(
            tokens=zeros[:, None],
            prompt_lengths=zeros,
            completion_lengths=zeros,
            sampler_logprobs=zeros[:, None].astype(np.float32),
            score_norms=zeros.astype(np.float32),
            terminated=right,
            problem_ids=zeros,
        ),
        completions=[""] * right.size,
        rewards=right.astype(np.float32),
        valid=np.ones(right.size, bool),
        reasons=[""] * right.size,
        kinds=[""] * right.size,
        sample_seconds=1.0,
        verify_seconds=0.0,
    )


def baselines(
    estimator: str, rewards: Group, there: Bool[np.ndarray, "problems most"], prior: float
) -> Group:
    """The baseline of every rollout: for ``v05_filter`` the others' mean fused with the prior, for
    ``v05`` that of all, for ``value_filter`` the prior."""
    if estimator == "value_filter":
        return np.full(rewards.shape, prior)
    total, count = (np.sum(x, axis=1, keepdims=True) for x in (rewards * there, there))
    if estimator == "v05_filter":
        total, count = total - rewards, count - there
    count = np.broadcast_to(count, rewards.shape)
    mean = total / np.maximum(count, 1)
    known = (jnp.asarray(x, jnp.float32) for x in (mean, np.full(mean.shape, prior), count))
    _, fused = fuse(*known, spread=0.5)
    return np.asarray(fused, np.float64)


def interval(values: Float[np.ndarray, " problems"]) -> dict[str, float]:
    """Their mean, and half the width of its 95 % interval."""
    half = 1.96 * values.std(ddof=1) / np.sqrt(values.size)
    return {"mean": round(float(values.mean()), 5), "half_width": round(float(half), 5)}


def measured(plan: str, case: str, p: float, draws: int) -> dict[str, Any]:
    """The results for one plan, one kind of prior and one p."""
    prior = float(np.clip(p + PRIORS[case], 0.01, 0.99))
    key = [[*PLANS].index(plan), [*PRIORS].index(case), RATES.index(p)]
    random = np.random.default_rng(key)
    rewards, there = sampled(plan_of(plan, draws), p, prior, draws, random)
    count = there.sum(axis=1)
    score = (rewards - p) / (p * (1 - p)) * there / count[:, None]
    gradient = {
        name: interval(np.sum((rewards - baselines(name, rewards, there, prior)) * score, axis=1))
        for name in ESTIMATORS
    }
    return {
        **{"plan": plan, "prior": case, "p": p, "value": round(prior, 2)},
        "rollouts": round(float(count.mean()), 2),
        "mean_reward_bias": interval(rewards.sum(axis=1) / count - p),
        "gradient": gradient,
    }


def text(cell: dict[str, Any]) -> str:
    """A line of the table."""
    found = [cell["mean_reward_bias"], *cell["gradient"].values()]
    numbers = " ".join(f"{x['mean']:8.3f} +-{x['half_width']:.3f}" for x in found)
    return f"{cell['plan']:12} {cell['prior']:9} {cell['p']:.1f} {cell['rollouts']:8.2f} {numbers}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=50_000, help="problems for every p and prior")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    names = " ".join(f"{name:>15}" for name in ("bias of mean", *ESTIMATORS))
    print(f"{'plan':12} {'prior':9} {'p':3} {'rollouts':8} {names}")
    cells = []
    for plan in PLANS:
        for case in PRIORS:
            for p in RATES:
                cells.append(measured(plan, case, p, options.draws))
                print(text(cells[-1]), flush=True)
    settings = {"draws": options.draws, "first": FIRST, "add": ADD, "most": MOST}
    head = json.dumps({"command": "python -m studies.sequential_bias", **settings}, indent=1)
    lines = ",\n  ".join(map(json.dumps, cells))
    options.out.write_text(f'{head[:-2]},\n "cells": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    command_line.run(main)
