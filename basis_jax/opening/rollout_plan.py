"""The rollout plan of a run, built from its config, and whether its estimator fits it."""

from collections.abc import Sequence
from typing import Any

from basis_jax import estimators, plans
from basis_jax.config import Config
from basis_jax.losses import REGRESSIONS
from basis_jax.plans import Plan, Setting

CRITIC = "gae"
"""The estimator that needs a critic."""


def setting_of(config: Config, sizes: Sequence[int], tokenizer: Any = None) -> Setting:
    """What the plan is made for, with training sets of these sizes."""
    options = config.estimator.options
    return Setting(
        seed=config.seed,
        prompts=config.train.prompts_per_step,
        group_size=config.sampling.group_size,
        sizes=tuple(sizes),
        set_weights=(1.0, *config.data.more_sets.values()),
        low=float(options.get("low", 0.0)),
        high=float(options.get("high", 1.0)),
        decode=None if tokenizer is None else tokenizer.decode,
    )


def open_plan(
    config: Config, sizes: Sequence[int], estimator: estimators.Estimator, tokenizer: Any = None
) -> Plan:
    """The plan for training sets of these sizes. Raises ValueError for options that it refuses, and
    as ``check_plan``."""
    setting = setting_of(config, sizes, tokenizer)
    made = plans.make(config.sampling.plan, setting, config.sampling.plan_options)
    check_plan(config, made, estimator)
    return made


def check_plan(config: Config, plan: Plan, estimator: estimators.Estimator) -> None:
    """Raise ValueError unless plan and estimator provide what the other needs."""
    name, by = config.sampling.plan, config.estimator.name
    declared = estimators.definition(by)
    if "greedy_rewards" in declared.needs and not plan.greedy:
        raise ValueError(
            f"{by} needs greedy completions beside the sampled ones and sampling.plan is {name}; "
            "set it to greedy_beside"
        )
    if plan.greedy and "greedy_rewards" not in declared.provided:
        raise ValueError(
            f"sampling.plan {name} samples greedy completions and {by} does not use them; set "
            "estimator.name to remax, or sampling.plan to uniform"
        )
    check_credited(config, plan, declared)
    if plan.needs_values and estimator.predict is None:
        known = [n for n, d in estimators.ESTIMATORS.items() if d.predict is not None]
        raise ValueError(
            f"sampling.plan {name} needs the estimator's values before a step and {by} has none; "
            f"set estimator.name to one of {', '.join(known)}, or sampling.plan to uniform"
        )
    if plan.more is not None and config.data.normalise_rewards:
        raise ValueError(
            f"data.normalise_rewards puts all rewards of a step on one scale and sampling.plan "
            f"{name} grades a step in several rounds; set one of them to its default"
        )


def check_credited(config: Config, plan: Plan, declared: estimators.Definition) -> None:
    """Raise ValueError unless the estimator gets the credit by token that it needs, and estimator
    and loss use the credit that the plan gives."""
    name, by, objective = config.sampling.plan, config.estimator.name, config.loss.objective
    uses_credit = "start_values" in declared.provided and by != CRITIC
    if plan.credit is None:
        if uses_credit and "start_values" in declared.needs:
            raise ValueError(
                f"{by} needs a plan that samples from the middle of completions and sampling.plan "
                f"is {name}; set it to branch"
            )
        return
    if not uses_credit:
        raise ValueError(
            f"sampling.plan {name} credits every token and {by} does not use that; set "
            "estimator.name to vineppo, or sampling.plan to uniform"
        )
    if objective in REGRESSIONS:
        raise ValueError(
            f"loss.objective {objective} takes one advantage per rollout and sampling.plan {name} "
            "credits every token; set loss.objective to ppo_clip, or sampling.plan to uniform"
        )
