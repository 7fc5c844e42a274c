"""Steps of a configured run: seconds by part, shares of the device's peak rates, memory.

    python -m benchmarks.random_model Qwen/Qwen3-4B models/random
    python -m benchmarks.bench_run --config configs/qwen_math_1gpu.py --model.path models/random \\
        --data.path FILE --data.prompt-format text --model.lora-rank 16 --train.steps 3

It takes ``train.steps`` steps as ``basis-jax train`` does, but writes no run folder, evaluates
nothing, and grades at random, so that rewards differ and every step has an update. The first step,
which compiles, is shown separately; for the others the medians are shown.

- share of bandwidth: bytes of all decode steps (``costs.decode_step`` at the mean context) over the
  seconds of sampling, prefills included, and over what the device was measured to read;
- model FLOPs: those of ``costs.update`` without recomputation over the seconds of the update, and
  over what the device was measured to multiply;
- memory: the most held after sampling and after the update, where the backend counts it, beside
  ``plan.memory_needs``.
"""

import json
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from basis_jax import command_line
from basis_jax.config import Config
from basis_jax.model import costs
from basis_jax.model.decoder import computed_in
from basis_jax.model.sharding import batch_shards
from basis_jax.opening.plan import memory_needs, rollouts_per_pass
from basis_jax.runs.provenance import provenance
from basis_jax.sampling.rollouts import Graded
from basis_jax.training.loop import make_step
from basis_jax.training.session import Session, open_session
from basis_jax.training.start import first_state
from benchmarks import ceilings
from benchmarks.bench_models import peak_bytes


def coin(prompts: list[str], completions: list[str], answers: list[str], **_: Any) -> list[float]:
    """A reward of 0 or 1 from a hash of the text."""
    texts = zip(prompts, completions, strict=True)
    return [float(zlib.crc32((p + c).encode()) % 2) for p, c in texts]


def main() -> None:
    config, out = read_arguments()
    ceiling = ceilings.measured(config.model.compute_dtype)
    peaks: dict[str, int | None] = {}
    with open_session(config, training=True) as session, jax.set_mesh(session.setup.mesh):
        config = session.config  # sizes are chosen
        take_step, state = make_step(session), first_state(session, Path())
        peaks["weights and moments"] = peak_bytes()
        rows = []
        for number in range(config.train.steps):
            started = time.perf_counter()
            state, metrics, graded, _ = take_step(state, number)
            jax.block_until_ready(state)
            row = {"step": time.perf_counter() - started}
            rows.append(row | {p: metrics[f"time/{p}_s"] for p in ("sample", "update")})
            rows[-1] |= shares(session, graded, rows[-1], ceiling)
            print({name: round(value, 4) for name, value in rows[-1].items()}, flush=True)
        peaks["steps"] = peak_bytes()
        needs = planned(session)
    summary = {name: median(row[name] for row in rows[1:] or rows) for name in rows[0]}
    print_table(summary, needs, peaks)
    if out:
        about = {"device": str(jax.devices()[0]), "arguments": sys.argv[1:], **provenance()}
        found = {"ceiling": ceiling, "planned_bytes": needs, "peak_bytes": peaks, "steps": rows}
        Path(out).write_text(json.dumps({"about": about, **found}, indent=2) + "\n")


def read_arguments() -> tuple[Config, str]:
    """The config without held-out sets, graded by ``coin``; and the file for results, if given."""
    config, options = command_line.parse(
        __doc__, options={"out FILE": "where the results are written"}
    )
    data = replace(config.data, verifier="benchmarks.bench_run:coin", answer_mode="")
    return replace(config, run_dir="", data=data, eval=replace(config.eval, sets=())), options.out


def shares(
    session: Session, graded: Graded, seconds: dict[str, float], ceiling: dict[str, float]
) -> dict[str, float]:
    """Tokens per second and shares of the ceilings, for a step whose slots are filled at once."""
    rollouts, model_config = graded.rollouts, session.setup.model_config
    prompts, lengths = np.asarray(rollouts.prompt_lengths), np.asarray(rollouts.completion_lengths)
    decoded = computed_in(model_config, session.config.sampling.dtype)
    slots = min(session.config.train.sample_rollouts, len(lengths))
    turns = int(lengths.sum() / slots)
    context = int(prompts.mean() + lengths.mean() / 2)
    work = costs.decode_step(decoded, rows=slots, context=context)
    plain = replace(model_config, remat="none")
    flops = sum(costs.update(plain, rows=1, width=int(w)).flops for w in prompts + lengths)
    return {
        "sampled_tokens_per_s": float(lengths.sum()) / seconds["sample"],
        "decode_step_ms": 1e3 * seconds["sample"] / turns,
        "share_of_bandwidth": turns * work.bytes / seconds["sample"] / ceiling["bytes_per_s"],
        "updated_tokens_per_s": float((prompts + lengths).sum()) / seconds["update"],
        "model_flops": flops / seconds["update"] / ceiling["flops_per_s"],
    }


def planned(session: Session) -> dict[str, int]:
    config, setup = session.config, session.setup
    rows = config.train.prompts_per_step * config.sampling.group_size
    width = session.train_set.tokens.shape[1]
    needs = memory_needs(
        config, setup.model_config, setup.mesh, prompt_width=width, rows=rows, training=True
    )
    passes = rollouts_per_pass(config.train, batch_shards(setup.mesh))
    print(f"{passes} rollouts a pass, {config.train.sample_rollouts} slots")
    return {need.what: need.total for need in needs}


def print_table(summary: dict[str, float], needs: dict[str, int], peaks: dict[str, Any]) -> None:
    for name, value in summary.items():
        shown = f"{value:.1%}" if name.startswith(("share", "model")) else f"{value:.4g}"
        print(f"{name:22} {shown}")
    for what, size in needs.items():
        print(f"planned {size / 1e9:8.2f} GB  {what}")
    for what, peak in peaks.items():
        print(f"peak    {'unknown' if peak is None else f'{peak / 1e9:8.2f} GB'}  {what}")


if __name__ == "__main__":
    command_line.run(main)
