"""Choose the rollouts per pass and the rollouts decoded at once if the config says ``auto``.

``auto`` is 0 in a config. The largest size is chosen that fits the devices according to
``costs.py``.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from basis_jax import processes
from basis_jax.config import Config
from basis_jax.files import read_json
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.sharding import batch_shards
from basis_jax.opening import checks
from basis_jax.opening.plan import memory_needs

FILLED = 0.85
"""Largest share of a device's memory that a chosen size may need, because needs are estimates."""


def with_sizes(
    config: Config,
    model_config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    *,
    prompt_width: int,
    rows: int,
    training: bool = False,
    memory: int = 0,
    report: Callable[[str], None] = print,
) -> Config:
    """The config with numbers for ``train.microbatch_rollouts`` and ``train.sample_rollouts``.

    Numbers recorded in the run folder are used again if they fit these devices. The choice is
    reported. ``memory``: bytes of a device (0: the device's own figure). If not even one rollout
    per device fits, the number is 1, which ``check_memory`` refuses.
    """
    train, shards = config.train, batch_shards(mesh)
    if 0 not in (train.microbatch_rollouts, train.sample_rollouts):
        return config
    if not memory:  # that of the first process's devices: all have to choose alike
        memory = processes.by_first(lambda: checks.device_memory(list(mesh.local_devices)))
    available = FILLED * memory
    wanted: dict[str, Any] = {"prompt_width": prompt_width, "rows": rows, "training": training}

    def needed(name, count):
        tried = replace(config, train=replace(train, **{name: count}))
        return memory_needs(tried, model_config, mesh, **wanted)

    def pass_fits(count):
        return not training or needed("microbatch_rollouts", count)[-1].total <= available

    def sampling_fits(count):
        sampling = needed("sample_rollouts", count)[:2]
        return max(need.total for need in sampling) <= available

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
    """Divisors of ``count``, the largest first."""
    return [size for size in range(count, 0, -1) if count % size == 0]


def recorded_sizes(run_dir: str) -> dict[str, int]:
    """The sizes in the run folder's config.json, or {} if there are none."""
    try:
        train = read_json(Path(run_dir) / "config.json")["config"]["train"]
        return {name: int(train[name]) for name in ("microbatch_rollouts", "sample_rollouts")}
    except (ValueError, KeyError, TypeError, OverflowError):  # open_run reports the error
        return {}
