r"""Tokens per second of the sampler, and of transformers' generate on the same prompts.

    python -m benchmarks.bench_sampling --model models/smollm2
    python -m benchmarks.bench_sampling --model FOLDER --rows 256 --slots 64 --new 256 \
        --stop . , the
    python -m benchmarks.bench_sampling --model Qwen/Qwen3-4B --dtype bfloat16 --equal 64 256 \
        --rows 0

There are two settings. ``equal``: no row stops early, every row gets ``--new`` tokens, and all rows
are in one batch. The time of one more token is the time of ``--new`` tokens minus that of 32,
divided by the difference. It is compared with what the machine can read and multiply
(``costs.decode_step``, ``ceilings``). ``mixed``: a row ends at the first of the ``--stop`` tokens,
so lengths differ widely. ``--rows`` prompts go through ``--slots`` slots, which are refilled as
rows end (ours), or batch after batch (ours without refilling; transformers and Tunix, which cannot
refill). Figures are medians of ``--repeats`` runs in turn; the first call of each, which compiles,
is shown separately. Prompts are random. Libraries that are not installed are left out.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from basis_jax import command_line
from basis_jax.config import SamplingSection
from basis_jax.model import costs
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.sharding import make_mesh
from basis_jax.sampling.draw import row_keys
from basis_jax.sampling.refill import MIN_REFILL_TOKENS, sample_rows
from basis_jax.types import Prompts
from basis_jax.weights import huggingface
from benchmarks import bench_models, ceilings
from benchmarks.bench_models import Sampler
from benchmarks.rival_tunix import tunix_sampler


def main() -> None:
    options = parse()
    model_config = bench_models.named_model_config(options.model, compute_dtype=options.dtype)
    settings = [("equal", n, n, (model_config.vocab_size + 10**6,)) for n in options.equal]
    if options.rows:
        tokenizer = huggingface.load_tokenizer(huggingface.resolve_folder(options.model))
        stop = tuple(tokenizer.encode(s, add_special_tokens=False)[0] for s in options.stop)
        settings.append(("mixed", options.rows, options.slots, stop))
    mesh = make_mesh(devices=jax.devices()[:1])
    params = bench_models.our_params(options.model, model_config, mesh)
    ours, rows = {"ours": our_sampler(params, model_config, mesh)}, []
    if options.scanned:
        scanned = replace(model_config, scan_decode=True)
        ours["ours, layers scanned"] = our_sampler(params, scanned, mesh)
    ceiling = ceilings.measured(options.dtype)
    rivals = {
        "transformers": transformers_sampler(options.model, model_config),
        "tunix": tunix_sampler(options.model, model_config),
    }
    for name, count, slots, eos_ids in settings:
        prompts = random_prompts(count, options.prompt, model_config.vocab_size)
        samplers = {key: partial(run, prompts, slots, eos_ids) for key, run in ours.items()}
        if count > slots:
            in_batches = partial(by_batches, ours["ours"], prompts, slots, eos_ids)
            samplers["ours, not refilled"] = in_batches
        for rival, sampler in rivals.items():
            if sampler is not None:
                samplers[rival] = partial(by_batches, sampler, prompts, slots, eos_ids)
        rows += measure(name, count, slots, samplers, options)
    for row in rows:
        if row["setting"] == "equal":
            context = options.prompt + (options.new + MIN_REFILL_TOKENS) // 2
            work = costs.decode_step(model_config, rows=row["rows"], context=context)
            row["share_of_bandwidth"] = work.bytes / row["step_s"] / ceiling["bytes_per_s"]
            row["share_of_flops"] = work.flops / row["step_s"] / ceiling["flops_per_s"]
    print_table(rows)
    bench_models.write_result(options, rows, ceiling=ceiling)


def parse() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--model", default="embedded:quickstart", help=bench_models.MODEL_HELP)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--equal", type=int, nargs="*", default=[16, 64], metavar="ROWS")
    parser.add_argument("--rows", type=int, default=128, help="of the mixed setting (0: without)")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="most tokens of a completion")
    parser.add_argument("--stop", nargs="+", default=["."], help="each stands for its first token")
    parser.add_argument("--scanned", action="store_true", help="also with the layers in a loop")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", metavar="FILE.json")
    options = parser.parse_args()
    later = options.new - MIN_REFILL_TOKENS
    if min(options.repeats, later, options.prompt, options.slots, *options.equal) < 1:
        raise SystemExit("error: every number of bench_sampling.py is 1 or more, --new 33 or more")
    return options


def random_prompts(rows: int, width: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, (rows, width)).astype(np.int32)


def our_sampler(params: PyTree, model_config: ModelConfig, mesh: Mesh) -> Sampler:
    def run(tokens: np.ndarray, slots: int, eos_ids: tuple[int, ...], new: int) -> np.ndarray:
        ids = np.arange(len(tokens), dtype=np.int32)
        lengths = np.full(len(tokens), tokens.shape[1], np.int32)
        with jax.set_mesh(mesh):
            rollouts = sample_rows(
                params,
                model_config,
                Prompts(tokens=tokens, lengths=lengths, problem_ids=ids),
                sampling=SamplingSection(max_new_tokens=new),
                eos_ids=eos_ids,
                keys=row_keys(
                    0, "train", 0, problem_ids=jnp.asarray(ids), samples=jnp.asarray(ids)
                ),
                mesh=mesh,
                rows_at_once=slots,
            )
        return np.asarray(rollouts.completion_lengths)

    return run


def transformers_sampler(name: str, model_config: ModelConfig) -> Sampler | None:
    found = bench_models.torch_model(name, model_config)
    if found is None:
        return None
    torch, loaded = found
    loaded.eval()

    def run(tokens: np.ndarray, slots: int, eos_ids: tuple[int, ...], new: int) -> np.ndarray:
        stops = [i for i in eos_ids if i < loaded.config.vocab_size]
        with torch.inference_mode():
            made = (
                loaded.generate(
                    torch.tensor(tokens.astype(np.int64), device=loaded.device),
                    attention_mask=torch.ones(
                        tokens.shape, dtype=torch.int64, device=loaded.device
                    ),
                    do_sample=True,
                    temperature=1.0,  # whatever the folder's generation_config.json says
                    top_k=0,
                    top_p=1.0,
                    repetition_penalty=1.0,
                    max_new_tokens=new,
                    eos_token_id=stops or -1,
                    pad_token_id=0,
                )[:, tokens.shape[1] :]
                .cpu()
                .numpy()
            )
        ended = np.isin(made, stops)
        first = np.where(ended.any(1), ended.argmax(1) + 1, made.shape[1])
        return first

    return run


def by_batches(
    sampler: Sampler, tokens: np.ndarray, slots: int, eos_ids: tuple[int, ...], new: int
) -> np.ndarray:
    parts = [tokens[i : i + slots] for i in range(0, len(tokens), slots)]
    return np.concatenate([sampler(part, slots, eos_ids, new) for part in parts])


def measure(
    setting: str,
    count: int,
    slots: int,
    samplers: Mapping[str, Callable[[int], np.ndarray]],
    options: argparse.Namespace,
) -> list[dict]:
    """One row per sampler. They take turns, so that a slow minute of the machine affects all."""
    lengths, first = {}, {}
    whole: dict[str, list[tuple[float, float]]] = {name: [] for name in samplers}
    fewer: dict[str, list[float]] = {name: [] for name in samplers}
    for name, sampler in samplers.items():
        first[name], lengths[name] = timed(sampler, options.new)
        if setting == "equal":
            timed(sampler, MIN_REFILL_TOKENS)
    for _ in range(options.repeats):
        for name, sampler in samplers.items():
            seconds, lengths[name] = timed(sampler, options.new)
            whole[name].append((seconds, float(lengths[name].sum())))
            if setting == "equal":
                if set(lengths[name].tolist()) != {options.new}:
                    raise ValueError(f"{name} wrote {lengths[name]} tokens, not {options.new} each")
                fewer[name].append(timed(sampler, MIN_REFILL_TOKENS)[0])
    rows = []
    for name in samplers:
        times = [seconds for seconds, _ in whole[name]]
        row = {
            "setting": setting,
            "rows": count,
            "slots": slots,
            "sampler": name,
            "tokens_per_s": float(np.median([n / s for s, n in whole[name]])),
            "seconds": times,
            "first_call_s": first[name],
            "length_mean": float(lengths[name].mean()),
            "length_max": int(lengths[name].max()),
        }
        if setting == "equal":
            more = np.median(np.array(times) - np.array(fewer[name]))
            row["step_s"] = float(more) / (options.new - MIN_REFILL_TOKENS)
        rows.append(row)
    return rows


def timed(sampler: Callable[[int], np.ndarray], new: int) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    lengths = sampler(new)
    return time.perf_counter() - started, lengths


def print_table(rows: list[dict]) -> None:
    print(f"{'':6}{'rows':>5}{'slots':>6}  {'sampler':20}{'tokens/s':>9}{'ratio':>7}{'ms/step':>9}")
    for row in rows:
        same = [r for r in rows if (r["setting"], r["rows"]) == (row["setting"], row["rows"])]
        ratio = row["tokens_per_s"] / next(
            (r["tokens_per_s"] for r in same if r["sampler"] == "transformers"),
            same[-1]["tokens_per_s"],
        )
        line = (
            f"{row['setting']:6}{row['rows']:5}{row['slots']:6}  {row['sampler']:20}"
            f"{row['tokens_per_s']:9.0f}{ratio:7.2f}"
        )
        if "step_s" in row:
            line += (
                f"{row['step_s'] * 1e3:9.1f}  {row['share_of_bandwidth']:.0%} of the bandwidth, "
                f"{row['share_of_flops']:.0%} of the multiplications;"
            )
        print(
            f"{line}  lengths: mean {row['length_mean']:.1f}, longest {row['length_max']}; first "
            f"call {row['first_call_s']:.1f} s"
        )


if __name__ == "__main__":
    command_line.run(main)
