"""Checks of a plan's requests and of its credit. Each raises a ValueError of one sentence; the
caller puts the plan and the step before it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from basis_jax.plans.plan import Plan, Requests, Setting
from basis_jax.types import TokenCredit


def check_requests(asked: Any, rounds: Sequence[Requests], plan: Plan, setting: Setting) -> None:
    """Raise ValueError unless the plan asks for rollouts that a step has room for."""
    if not isinstance(asked, Requests):
        raise ValueError(f"it returned a {type(asked).__name__}; return plans.Requests")
    if not asked.problems.size:
        raise ValueError("it asks for no rollout; ask for at least one, or return None from more")
    check_range("problem", asked.problems, setting.problems)
    if asked.prefixes is not None:
        check_prefixes(asked, rounds, plan, setting)
        return
    check_range("sample", asked.samples, setting.group_size)
    weights = asked.weights
    if weights is not None and not np.all(np.isfinite(weights) & (weights >= 0)):
        raise ValueError("it gives a weight that is negative or not finite; give 0 or more")
    if asked.greedy:
        check_greedy(asked, rounds, plan)
        return
    sampled = [(p, s) for r in (*rounds, asked) if not r.aside for p, s in pairs(r)]
    if len({*sampled}) < len(sampled):
        raise ValueError("it asks for the same sample of a problem twice; number them 0, 1, ...")
    count = len({problem for problem, _ in sampled})
    if count > setting.prompts:
        raise ValueError(
            f"it asks for {count} problems; a step has room for train.prompts_per_step = "
            f"{setting.prompts}"
        )


def check_range(name: str, given: np.ndarray, limit: int) -> None:
    """Raise ValueError unless all numbers are 0 to ``limit`` - 1."""
    outside = given[(given < 0) | (given >= limit)]
    if outside.size:
        raise ValueError(f"it asks for {name} {outside[0]}; give 0 to {limit - 1}")


def pairs(asked: Requests) -> list[tuple[int, int]]:
    """(problem, sample) of every rollout."""
    return [*zip(asked.problems.tolist(), asked.samples.tolist(), strict=True)]


def check_greedy(asked: Requests, rounds: Sequence[Requests], plan: Plan) -> None:
    """Raise ValueError for greedy completions that no rollout uses."""
    if not plan.greedy:
        raise ValueError("it asks for greedy completions; declare them with Plan(greedy=True)")
    before = {p for r in rounds if r.greedy for p in r.problems.tolist()}
    problems = asked.problems.tolist()
    if len({*problems} | before) < len(problems) + len(before):
        raise ValueError("it asks for two greedy completions of a problem; they would be the same")
    check_sampled("a greedy completion", asked, rounds)


def check_prefixes(
    asked: Requests, rounds: Sequence[Requests], plan: Plan, setting: Setting
) -> None:
    """Raise ValueError for completions from a prefix that no rollout uses, or whose random numbers
    are those of others."""
    if plan.credit is None:
        raise ValueError("it asks for completions from prefixes; give Plan a function credit")
    if asked.greedy or asked.weights is not None:
        raise ValueError("completions from prefixes are neither greedy nor have weights; leave out")
    low = int(asked.samples.min())
    if low < setting.group_size:
        raise ValueError(
            f"it asks for sample {low} from a prefix, which has the random numbers of a rollout; "
            f"number them from {setting.group_size} on"
        )
    before = [pair for r in rounds if r.prefixes is not None for pair in pairs(r)]
    if len({*before, *pairs(asked)}) < len(before) + asked.problems.size:
        raise ValueError("it asks for the same sample of a problem twice; number them in turn")
    check_sampled("completions from a prefix", asked, rounds)


def check_sampled(what: str, asked: Requests, rounds: Sequence[Requests]) -> None:
    """Raise ValueError unless all problems have rollouts that are trained on."""
    sampled = {p for r in rounds if not r.aside for p in r.problems.tolist()}
    if not {*asked.problems.tolist()} <= sampled:
        raise ValueError(f"it asks for {what} of a problem without rollouts; ask for those first")


def check_credit(credit: Any, rollouts: int, width: int) -> None:
    """Raise ValueError unless it has a finite number for every token of the rollouts."""
    if not isinstance(credit, TokenCredit):
        raise ValueError(f"credit returned a {type(credit).__name__}; return types.TokenCredit")
    if credit.returns is not None or credit.values is not None:
        raise ValueError("credit returned returns or values, which are a critic's; leave them out")
    shapes = {"advantages": (rollouts, width), "start_values": (rollouts,)}
    for name, shape in shapes.items():
        found = np.asarray(getattr(credit, name))
        if found.shape != shape:
            raise ValueError(f"credit returned {name} {list(found.shape)}; give {list(shape)}")
        if not np.all(np.isfinite(found)):
            raise ValueError(f"credit returned {name} that are not finite; give numbers")
