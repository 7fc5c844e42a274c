r"""Tokens per second of the update, and of torch's update of the same model.

    python -m benchmarks.bench_update --model models/smollm2
    python -m benchmarks.bench_update --model FOLDER --rows 32 --width 256 --microbatch 8
    python -m benchmarks.bench_update --model Qwen/Qwen3-0.6B --dtype bfloat16 --attention cudnn \
        --rows 8 --width 2048

There are two settings. ``equal``: every row fills the width. ``mixed``: lengths are long-tailed
(log-normal, with a median of a quarter of the width). Ours is ``make_batches`` and ``make_update``.
torch's is the forward pass of transformers, the log-softmax of the targets and the backward pass,
with rows in the same order and each microbatch padded to its longest row. Both clip the gradient's
norm and take an AdamW step at learning rate 0. Half of a row is prompt. MFU is ``costs.update`` of
the tokens, without padding, divided by what the machine can multiply (``ceilings``). Figures are
medians of ``--repeats`` runs in turn; the first call of each, which compiles, is shown separately.
Padding does not count as tokens. Without torch only ours is measured.
"""

import argparse
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from basis_jax import command_line
from basis_jax.config import Config, OptimSection, SamplingSection, TrainSection
from basis_jax.model import costs
from basis_jax.model.attention import KINDS
from basis_jax.model.decoder import REMAT, ModelConfig
from basis_jax.model.sharding import make_mesh
from basis_jax.sampling.rollouts import Graded
from basis_jax.training.microbatches import make_batches
from basis_jax.training.objective import make_score
from basis_jax.training.update import make_optimizer, make_state, make_update
from basis_jax.types import Estimate, Rollouts
from benchmarks import bench_models, ceilings


def main() -> None:
    options = parse()
    model_config = bench_models.named_model_config(
        options.model, compute_dtype=options.dtype, remat=options.remat, attention=options.attention
    )
    ours, theirs = our_gradient(model_config, options), torch_gradient(model_config, options)
    rows = []
    for name, lengths in row_lengths(options).items():
        rollouts = random_rollouts(lengths, options.width, model_config.vocab_size)
        runs = {"ours": partial(ours, rollouts)}
        if theirs is not None:
            runs["torch"] = partial(theirs, rollouts)
        rows += measure(name, lengths, runs, options.repeats)
    ceiling, plain = ceilings.measured(options.dtype), replace(model_config, remat="none")
    for row in rows:
        lengths = row_lengths(options)[row["setting"]]
        flops = sum(costs.update(plain, rows=1, width=int(width)).flops for width in lengths)
        row["mfu"] = flops / np.median(row["seconds"]) / ceiling["flops_per_s"]
    print_table(rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    bench_models.write_result(options, rows, ceiling=ceiling, peak_rss_gb=peak)


def parse() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--model", default="embedded:quickstart", help=bench_models.MODEL_HELP)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--attention", default="plain", choices=KINDS, help="ours")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--width", type=int, default=128, help="positions of the longest row")
    parser.add_argument("--microbatch", type=int, default=8, help="rows of a pass at full width")
    parser.add_argument("--remat", default="dots", choices=list(REMAT), help="of ours")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", metavar="FILE.json")
    options = parser.parse_args()
    if min(options.repeats, options.rows, options.microbatch) < 1 or options.width < 8:
        raise SystemExit("error: every number of bench_update.py is 1 or more, --width 8 or more")
    if options.rows % options.microbatch:
        raise SystemExit("error: --rows is not a multiple of --microbatch")
    return options


def row_lengths(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Tokens of every row, prompt and completion together."""
    tail = np.random.default_rng(0).lognormal(np.log(options.width / 4), 0.8, options.rows)
    mixed = np.clip(tail.astype(np.int32), 8, options.width)
    mixed[options.rows // 2] = options.width
    return {"equal": np.full(options.rows, options.width, np.int32), "mixed": mixed}


def random_rollouts(lengths: np.ndarray, width: int, vocabulary: int) -> Rollouts:
    rng = np.random.default_rng(1)
    inside = np.arange(width)[None] < lengths[:, None]
    prompts = lengths // 2
    return Rollouts(
        tokens=np.where(inside, rng.integers(0, vocabulary, inside.shape), 0).astype(np.int32),
        prompt_lengths=prompts,
        completion_lengths=lengths - prompts,
        sampler_logprobs=np.full(inside.shape, -10, np.float32),
        score_norms=np.ones(len(lengths), np.float32),
        terminated=np.ones(len(lengths), bool),
        problem_ids=np.arange(len(lengths), dtype=np.int32),
    )


def our_gradient(
    model_config: ModelConfig, options: argparse.Namespace
) -> Callable[[Rollouts], None]:
    mesh = make_mesh(devices=jax.devices()[:1])
    config = Config(
        run_dir="",
        sampling=SamplingSection(max_new_tokens=options.width),
        train=TrainSection(
            prompts_per_step=options.rows,
            minibatch_rollouts=options.rows,
            microbatch_rollouts=options.microbatch,
        ),
    )
    common = {"loss": config.loss, "temperature": 1.0, "microbatch": options.microbatch}
    optimizer = make_optimizer(OptimSection(lr=0.0), updates=10**6)
    update = make_update(model_config, optimizer, **common)
    score = make_score(model_config, **common)
    advantages = jnp.asarray(np.random.default_rng(2).normal(size=options.rows), jnp.float32)
    estimate = Estimate(advantages=advantages, values=advantages, baselines=advantages, info={})
    with jax.set_mesh(mesh):
        params = bench_models.our_params(options.model, model_config, mesh)
        state = [make_state(params, optimizer, (), model_config=model_config, mesh=mesh)]

    def run(rollouts: Rollouts) -> None:
        graded = Graded(
            rollouts=rollouts,
            completions=[],
            rewards=np.zeros(options.rows, np.float32),
            valid=np.ones(options.rows, bool),
            reasons=[],
            kinds=[],
            sample_seconds=1.0,
            verify_seconds=0.0,
        )
        with jax.set_mesh(mesh):
            (microbatches,) = make_batches(
                graded, estimate, config=config, score=score, params=state[0].params, mesh=mesh
            )
            state[0], metrics = update(state[0], microbatches)
            jax.block_until_ready((state[0].params, metrics))

    return run


def torch_gradient(
    model_config: ModelConfig, options: argparse.Namespace
) -> Callable[[Rollouts], None] | None:
    found = bench_models.torch_model(options.model, model_config)
    if found is None:
        return None
    torch, loaded = found
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.0)

    def run(rollouts: Rollouts) -> None:
        ends = rollouts.prompt_lengths + rollouts.completion_lengths
        total = float(rollouts.completion_lengths.sum())
        for start in range(0, options.rows, options.microbatch):
            part = slice(start, start + options.microbatch)
            width = int(ends[part].max())
            tokens = torch.tensor(
                rollouts.tokens[part, :width].astype(np.int64), device=loaded.device
            )
            steps = np.arange(width)[None]
            counts = (steps >= rollouts.prompt_lengths[part, None]) & (steps < ends[part, None])
            logits = loaded(tokens, use_cache=False).logits[:, :-1].float()
            logp = torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, 1:, None])[..., 0]
            (-(logp * torch.tensor(counts[:, 1:], device=loaded.device)).sum() / total).backward()
        torch.nn.utils.clip_grad_norm_(loaded.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def measure(
    setting: str, lengths: np.ndarray, runs: Mapping[str, Callable[[], None]], repeats: int
) -> list[dict]:
    """One row per library. They take turns, so that a slow minute of the machine affects all."""
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        started = time.perf_counter()
        run()
        first[name] = time.perf_counter() - started
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return [
        {
            "setting": setting,
            "library": name,
            "rows": len(lengths),
            "tokens": int(lengths.sum()),
            "length_mean": float(lengths.mean()),
            "length_max": int(lengths.max()),
            "tokens_per_s": float(lengths.sum() / np.median(seconds[name])),
            "seconds": seconds[name],
            "first_call_s": first[name],
        }
        for name in runs
    ]


def print_table(rows: list[dict]) -> None:
    print(f"{'':8}{'rows':>6}{'tokens':>8}  {'':6}{'tokens/s':>10}{'ratio':>7}")
    for row in rows:
        last = [r for r in rows if r["setting"] == row["setting"]][-1]
        ratio = np.median(np.array(last["seconds"]) / np.array(row["seconds"]))
        print(
            f"{row['setting']:8}{row['rows']:6}{row['tokens']:8}  {row['library']:6}"
            f"{row['tokens_per_s']:10.0f}{ratio:7.2f}  MFU {row['mfu']:.0%}; lengths: mean "
            f"{row['length_mean']:.1f}, longest {row['length_max']}; first call "
            f"{row['first_call_s']:.1f} s"
        )


if __name__ == "__main__":
    command_line.run(main)
