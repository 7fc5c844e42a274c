"""How many rollouts a pass takes and how many are decoded at once, where the config says ``auto``.

``auto`` is 0 in a config. The largest size that fits the devices by ``costs.py`` is chosen.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from basis_jax.config import Config
from basis_jax.model import costs
from basis_jax.model.decoder import ModelConfig, computed_in
from basis_jax.model.sharding import batch_shards
from basis_jax.opening import checks

FILLED = 0.85
"""Of a device's memory: as much as a chosen size may need, as an estimate is no promise."""


def with_sizes(
    config: Config,
    model_config: ModelConfig,
    mesh: Mesh,
    *,
    prompt_width: int,
    rows: int,
    training: bool = False,
    report: Callable[[str], None] = print,
) -> Config:
    """The config with numbers for ``train.microbatch_rollouts`` and ``train.sample_rollouts``.

    A run folder's own numbers are taken again where they fit these devices; what is chosen is
    reported. Where not even one rollout a device fits, it is 1, which ``check_memory`` refuses.
    """
    train, shards = config.train, batch_shards(mesh)
    available = FILLED * checks.device_memory(list(mesh.devices.ravel()))
    length = prompt_width + config.sampling.max_new_tokens
    weights = costs.parameter_bytes(model_config, mesh)
    moment = jnp.dtype(config.optim.moments_dtype).itemsize
    beside = weights if training and config.loss.kl_coef else 0

    def pass_fits(count):
        parts = costs.update_memory(
            model_config,
            mesh,
            rows=count * shards,
            width=length,
            chunk=config.loss.logprob_chunk,
            moment=moment,
        )
        return sum(parts.values()) + beside <= available

    def sampling_fits(count):
        sampler = computed_in(model_config, config.sampling.dtype)
        parts = costs.sampling_memory(sampler, mesh, slots=count, length=length, width=prompt_width)
        moments = weights * moment // 2 if training else 0
        return sum(parts.values()) + beside + moments <= available

    passes = divisors(max(1, train.minibatch_rollouts // shards))
    slots = [shards * count for count in divisors(-(-rows // shards))]
    recorded = recorded_sizes(config.run_dir) if training else {}
    chosen: dict[str, Any] = {}
    for name, allowed, fits in (
        ("microbatch_rollouts", passes, pass_fits),
        ("sample_rollouts", slots, sampling_fits),
    ):
        if getattr(train, name) == 0:
            before = recorded.get(name, 0)
            again = before > 0 and (name == "sample_rollouts" or before in allowed) and fits(before)
            size = before if again else next(filter(fits, allowed), allowed[-1])
            chosen[name] = size
            if before and not again:
                report(f"train.{name} was {before} in {config.run_dir} and is {size} from now on, "
                       "as these devices need another choice")  # fmt: skip
            else:
                report(f"train.{name}: {size} (auto)")
    return replace(config, train=replace(train, **chosen))


def divisors(count: int) -> list[int]:
    """Of ``count``, the largest first."""
    return [size for size in range(count, 0, -1) if count % size == 0]


def recorded_sizes(run_dir: str) -> dict[str, int]:
    """The sizes that a run folder's config.json holds; {} where it holds none."""
    try:
        train = json.loads((Path(run_dir) / "config.json").read_text())["config"]["train"]
        return {name: int(train[name]) for name in ("microbatch_rollouts", "sample_rollouts")}
    except (OSError, ValueError, KeyError, TypeError):  # open_run says what is wrong with it
        return {}
