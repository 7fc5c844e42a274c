"""The range of every number in a config."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from basis_jax.config import Config


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``, and the single number ``or_else``.

    Both ends are included unless they are named in ``without`` ("low", "high"). NaN and infinity
    are in no range.
    """

    low: int | float
    high: int | float = math.inf
    without: tuple[str, ...] = ()
    or_else: int | float | None = None

    def __contains__(self, value: int | float) -> bool:
        if self.or_else is not None and value == self.or_else:
            return True
        inside = self.low <= value <= self.high and math.isfinite(value)
        at_excluded_end = (value == self.low and "low" in self.without) or (
            value == self.high and "high" in self.without
        )
        return inside and not at_excluded_end

    def __str__(self) -> str:
        low, high = f"{self.low:g}", f"{self.high:.10g}"
        if not self.without:
            allowed = f"{low} or more" if math.isinf(self.high) else f"{low} to {high}"
        else:
            allowed = f"more than {low}" if "low" in self.without else f"{low} or more"
            if not math.isinf(self.high):
                end = "less than" if "high" in self.without else "at most"
                allowed += f" and {end} {high}"
        return allowed if self.or_else is None else f"{self.or_else:g}, or {allowed}"


COUNT, COUNT_OR_NONE = Range(1), Range(0)
POSITIVE, NOT_NEGATIVE = Range(0, without=("low",)), Range(0)
SHARE = Range(0, 1)
ANY = Range(-1e6, 1e6)
TEMPERATURE = Range(0.01, 100, or_else=0)

RANGES = {
    "seed": Range(0, 2**32 - 1),  # random keys use 32 bits of it
    "model.lora_rank": COUNT_OR_NONE,
    "model.lora_alpha": POSITIVE,
    "data.size": COUNT_OR_NONE,
    "data.max_prompt_tokens": COUNT,
    "data.verifier_weight": NOT_NEGATIVE,
    "data.reward_workers": COUNT_OR_NONE,
    "data.reward_seconds": NOT_NEGATIVE,
    "data.overlong_limit": COUNT_OR_NONE,
    "data.overlong_buffer": COUNT_OR_NONE,
    "sampling.temperature": TEMPERATURE,
    "sampling.top_p": Range(0, 1, without=("low",)),
    "sampling.top_k": COUNT_OR_NONE,
    "sampling.max_new_tokens": COUNT,
    "sampling.group_size": COUNT,
    "estimator.table_samples": COUNT_OR_NONE,
    "estimator.features": COUNT_OR_NONE,
    "estimator.measure_every": COUNT,
    "loss.clip_low": SHARE,
    "loss.clip_high": NOT_NEGATIVE,
    "loss.dual_clip": Range(1, without=("low",), or_else=0),
    "loss.beta": POSITIVE,
    "loss.sampler_cap": POSITIVE,
    "loss.sampler_floor": NOT_NEGATIVE,
    "loss.ais_mismatch": POSITIVE,
    "loss.ais_variance": POSITIVE,
    "loss.ais_beta": NOT_NEGATIVE,
    "loss.kl_coef": NOT_NEGATIVE,
    "loss.logprob_chunk": COUNT,
    "critic.lr": Range(0, 100),
    "critic.warmup_steps": COUNT_OR_NONE,
    "critic.clip": NOT_NEGATIVE,
    "critic.discount": SHARE,
    "critic.trace_decay": SHARE,
    "optim.lr": Range(0, 100),
    "optim.warmup_steps": COUNT_OR_NONE,
    "optim.b1": Range(0, 1, without=("high",)),
    "optim.b2": Range(0, 1, without=("high",)),
    "optim.eps": Range(0, 1, without=("low",)),
    "optim.weight_decay": Range(0, 100),
    "optim.max_grad_norm": NOT_NEGATIVE,
    "train.steps": COUNT,
    "train.prompts_per_step": COUNT,
    "train.minibatch_rollouts": COUNT,
    "train.microbatch_rollouts": COUNT_OR_NONE,  # 0: auto
    "train.sample_rollouts": COUNT_OR_NONE,
    "train.log_samples": COUNT_OR_NONE,
    "train.patience": COUNT,
    "watch.zero_share": SHARE,
    "watch.invalid": SHARE,
    "watch.truncated": SHARE,
    "watch.entropy": SHARE,
    "watch.length": SHARE,
    "watch.logprob_gap": NOT_NEGATIVE,
    "watch.grad_norm": SHARE,
    "eval.size": COUNT_OR_NONE,
    "eval.every": COUNT_OR_NONE,
    "eval.samples": COUNT,
    "eval.temperature": TEMPERATURE,
    "mesh.data": Range(1, or_else=-1),
    "mesh.fsdp": Range(1, or_else=-1),
    "mesh.tensor": Range(1, or_else=-1),
    "mesh.sample_tensor": COUNT_OR_NONE,
    "checkpoint.every": COUNT,
    "checkpoint.keep": COUNT,
    "checkpoint.keep_best": COUNT_OR_NONE,
}
"""The allowed range of every number in a config. Integer fields take integers only."""


def numbers(section: Any, prefix: str = "") -> Iterator[tuple[str, type, Any]]:
    """(dotted name, ``int`` or ``float``, value) of every numeric field."""
    for field in fields(section):
        value, name = getattr(section, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            yield from numbers(value, f"{name}.")
        elif field.type in (int, float):
            yield name, field.type, value


def check_ranges(config: Config) -> None:
    """Raise ValueError for the first number outside its range."""
    for name, kind, value in numbers(config):
        check_number(name, value, kind, RANGES[name])
    for name, kind, values in (
        ("eval.samples", int, config.eval.set_samples),
        ("eval.temperature", float, config.eval.set_temperatures),
    ):
        for of_set, value in values.items():
            check_number(f"{name} of {of_set}", value, kind, RANGES[name])
    for field, weights, allowed in (
        ("data.rewards", config.data.rewards, ANY),
        ("data.more_sets", config.data.more_sets, POSITIVE),
    ):
        for name, weight in weights.items():
            check_number(f"the weight of {name} in {field}", weight, float, allowed)


def check_number(name: str, value: Any, kind: type, allowed: Range) -> None:
    """Raise ValueError unless the value is of this kind, ``int`` or ``float``, and in the range."""
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} is {value!r}; give {what}, {allowed}")
    if value not in allowed:
        raise ValueError(f"{name} is {value}; give {allowed}")
