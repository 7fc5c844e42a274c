"""The runs of the policy study: methods, the settings that all share, and each run's config."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from basis_jax import command_line
from basis_jax.config import Config


class Method(NamedTuple):
    """An estimator with its published defaults, and what it is given."""

    estimator: str
    table: int | None = 0  # offline rollouts a problem; None: those of --table-samples
    group_size: int = 1
    features: int = 0
    options: tuple[str, ...] = ()


METHODS = {
    "reinforce": Method("reinforce"),
    "reinforce_pp": Method("reinforce_pp"),
    "grpo": Method("grpo", group_size=8),
    "rloo": Method("rloo", group_size=8),
    "spo": Method("spo"),
    "kae": Method("kae"),
    "basis_published": Method("basis", table=None, options=("rule", "published")),
    "basis_robust": Method("basis", table=None, options=("rule", "robust")),
    "value_filter_n0": Method("value_filter"),
    "value_filter_n0_features": Method("value_filter", features=32),
    "value_filter_n8": Method("value_filter", table=8),
}

COMMON_SETTINGS = {
    "optim.lr": "2.5e-4",  # of 2.5e-4, 5e-4, 1e-3: best for reinforce_pp, seed 100
    "optim.schedule": "constant",  # a curve may be cut anywhere: no step knows the last one
    "optim.max-grad-norm": "0",
    "eval.size": "240",
    "eval.samples": "2",
    "eval.every": "8",
    "checkpoint.every": "100000",  # the last step only
}


@dataclass(frozen=True)
class Run:
    method: str
    seed: int
    config: Config
    arguments: tuple[str, ...]  # of scripts/train.py

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def rollouts_per_step(self) -> int:
        return self.config.train.prompts_per_step * self.config.sampling.group_size


def plan(options: argparse.Namespace, overrides: Sequence[str]) -> list[Run]:
    """Every run, seed by seed."""
    runs = []
    for seed in range(options.seeds):
        for name in dict.fromkeys(options.methods):
            method = METHODS[name]
            arguments = ["--config", options.config, *flags(COMMON_SETTINGS), *overrides]
            arguments += flags(own_settings(method, options))
            if method.options:
                arguments += ["--estimator.options", *method.options]
            arguments += flags({"seed": seed, "run-dir": f"{options.out}/{name}/seed_{seed}"})
            config, _ = command_line.parse(__doc__, argv=arguments)
            steps = total_steps(method, options, config.eval.every)
            arguments += flags({"train.steps": steps})
            config, _ = command_line.parse(__doc__, argv=arguments)
            runs.append(Run(name, seed, config, tuple(arguments)))
    return runs


def flags(settings: Mapping[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def own_settings(method: Method, options: argparse.Namespace) -> dict[str, Any]:
    if options.rollouts % method.group_size:
        sys.exit(f"error: --rollouts is {options.rollouts}; give a multiple of {method.group_size}")
    return {
        "estimator.name": method.estimator,
        "estimator.table-samples": table_samples(method, options),
        "estimator.features": method.features,
        "sampling.group-size": method.group_size,
        "data.size": options.problems,
        "train.prompts-per-step": options.rollouts // method.group_size,
        "train.minibatch-rollouts": options.rollouts,
        "train.microbatch-rollouts": options.rollouts,
    }


def table_samples(method: Method, options: argparse.Namespace) -> int:
    return options.table_samples if method.table is None else method.table


def total_steps(method: Method, options: argparse.Namespace, every: int) -> int:
    """--steps and, in steps, what --table-samples costs beyond the method's own table; rounded up
    to an evaluation."""
    if options.steps < 1 or every < 1 or options.steps % every:
        sys.exit(f"error: --steps is {options.steps}; give a multiple of --eval.every, {every}")
    spared = (options.table_samples - table_samples(method, options)) * options.problems
    steps = options.steps + max(0, spared) / options.rollouts
    return math.ceil(steps / every) * every
