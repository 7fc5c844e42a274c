"""Seconds of a whole step (sample, verify, advantages, update), and of TRL's GRPOTrainer.

    python -m benchmarks.bench_step --model models/smollm2
    python -m benchmarks.bench_step --rollouts 64 --new 32 --out benchmarks/step.json

Both do equal work: the same model and problems as plain text, ``--rollouts`` completions of exactly
``--new`` tokens (no completion stops early), the same verifier, one AdamW update over microbatches
of ``--microbatch`` rollouts, float32, no KL term. Ours uses REINFORCE++ with one completion per
prompt; TRL uses GRPO with two, its minimum. They take turns, step by step, in one process. Figures
are medians of ``--steps`` steps; the first step, which compiles, is shown separately. Without TRL
only ours is measured. torch's threads sleep while they wait (OMP_WAIT_POLICY=PASSIVE, unless it is
set): if they spin beside another busy process, its small products take ten times as long.
"""

import argparse
import dataclasses
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from basis_jax import command_line
from basis_jax.config import (
    Config,
    DataSection,
    EstimatorSection,
    EvalSection,
    MeshSection,
    ModelSection,
    OptimSection,
    SamplingSection,
    TrainSection,
)
from basis_jax.training.loop import make_step
from basis_jax.training.session import Session, open_session
from basis_jax.training.start import first_state
from benchmarks.bench_models import write_result

PARTS = ("sample", "verify", "update", "step")


def main() -> None:
    options = parse()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
    with open_session(make_config(options)) as session, jax.set_mesh(session.setup.mesh):
        ours = our_step(session, options)
        seconds: dict[str, list[dict[str, float]]] = {"ours": []}
        if has_trl():
            seconds["TRL"] = trl_steps(session, options, lambda: seconds["ours"].append(ours()))
        else:
            print("TRL is not installed: ours alone")
            seconds["ours"] = [ours() for _ in range(options.steps + 1)]
    rows = [summary(name, taken) for name, taken in seconds.items()]
    print_table(rows, options)
    write_result(options, rows)


def parse() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--model", default="embedded:quickstart", metavar="FOLDER")
    parser.add_argument("--data", default="task:number_words", metavar="PATH")
    parser.add_argument("--verifier", default="exact")
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--microbatch", type=int, default=16)
    parser.add_argument("--new", type=int, default=32, help="tokens of a completion")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--torch-threads", type=int, default=os.cpu_count(), help="for TRL")
    parser.add_argument("--out", metavar="FILE.json")
    options = parser.parse_args()
    if (
        min(options.microbatch, options.new, options.steps, options.torch_threads) < 1
        or options.rollouts < 2
    ):
        raise SystemExit("error: numbers of bench_step.py are 1 or more, rollouts 2 or more")
    if options.rollouts % 2 or options.rollouts % options.microbatch:
        raise SystemExit("error: --rollouts must be even and a multiple of --microbatch")
    return options


def make_config(options: argparse.Namespace) -> Config:
    """The config of a run on plain-text problems, without table, held-out set or schedule."""
    return Config(
        run_dir="",
        model=ModelSection(path=options.model),
        data=DataSection(path=options.data, prompt_format="text", verifier=options.verifier),
        sampling=SamplingSection(max_new_tokens=options.new),
        estimator=EstimatorSection(name="reinforce_pp", table_samples=0),
        optim=OptimSection(lr=1e-6),
        train=TrainSection(
            steps=options.steps + 1,
            prompts_per_step=options.rollouts,
            minibatch_rollouts=options.rollouts,
            microbatch_rollouts=options.microbatch,
            sample_rollouts=options.rollouts,
        ),
        eval=EvalSection(sets=()),
        mesh=MeshSection(data=-1),
    )


def our_step(session: Session, options: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """A function that takes one training step and returns its seconds by part."""
    setup = dataclasses.replace(session.setup, eos_ids=(10**9,))  # no such token: nothing stops
    session = dataclasses.replace(session, setup=setup)
    take_step, state = make_step(session), first_state(session, Path())

    def step() -> dict[str, float]:
        nonlocal state
        started = time.perf_counter()
        state, metrics, graded, _ = take_step(state, int(state.step))
        seconds = time.perf_counter() - started
        check_work(np.asarray(graded.rollouts.completion_lengths), options)
        return {"step": seconds} | {name: metrics[f"time/{name}_s"] for name in PARTS[:3]}

    return step


def check_work(lengths: Sequence[int] | np.ndarray, options: argparse.Namespace) -> None:
    """Raise ValueError unless every rollout has all tokens: otherwise the work is not equal."""
    if list(lengths) != [options.new] * options.rollouts:
        raise ValueError(
            f"completions of {list(lengths)} tokens; {options.rollouts} x {options.new}"
        )


def has_trl() -> bool:
    return importlib.util.find_spec("trl") is not None


def trl_steps(
    session: Session, options: argparse.Namespace, between: Callable[[], None]
) -> list[dict[str, float]]:
    """Seconds of every step of a GRPOTrainer. ``between`` is called after each, and not counted."""
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(options.torch_threads)
    transformers.logging.set_verbosity_error()
    seconds, started = [], 0.0

    class Turns(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            nonlocal started
            started = time.perf_counter()

        def on_step_end(self, *_, **__):
            nonlocal started
            seconds.append({"step": time.perf_counter() - started})
            between()
            started = time.perf_counter()

    def reward(completions, answer, completion_ids, **_):
        check_work([len(row) for row in completion_ids], options)
        return [v.reward for v in session.setup.verifier.grade(completions, answer)]

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(
                session.folder, dtype=torch.float32
            ),
            processing_class=session.setup.tokenizer,
            reward_funcs=reward,
            train_dataset=datasets.Dataset.from_list(
                [{"prompt": p.prompt, "answer": p.answer} for p in session.train_set.problems]
            ),
            args=trl_config(folder, options),
            callbacks=[Turns()],
        )
        trainer.generation_config.eos_token_id = -1  # no such token
        trainer.eos_token_ids = [-1]
        trainer.train()
    return seconds


def trl_config(folder: str, options: argparse.Namespace) -> Any:
    import trl

    return trl.GRPOConfig(
        output_dir=folder,
        max_steps=options.steps + 1,
        per_device_train_batch_size=options.microbatch,
        gradient_accumulation_steps=options.rollouts // options.microbatch,
        num_generations=2,
        max_completion_length=options.new,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        beta=0.0,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=jax.default_backend() == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )


def summary(name: str, taken: list[dict[str, float]]) -> dict:
    """Medians by part over the steps after the first, and the seconds of these steps."""
    later = taken[1:]
    parts = {part: median(t[part] for t in later) for part in PARTS if part in later[0]}
    return {"trainer": name, "seconds": parts, "first_step_s": taken[0]["step"], "all": later}


def print_table(rows: list[dict], options: argparse.Namespace) -> None:
    print(f"{'':6}" + "".join(f"{part:>10}" for part in PARTS) + f"{'first':>10}   tokens/s")
    for row in rows:
        shown = [f"{row['seconds'][p]:10.3f}" if p in row["seconds"] else 10 * " " for p in PARTS]
        rate = options.rollouts * options.new / row["seconds"]["step"]
        print(f"{row['trainer']:6}" + "".join(shown) + f"{row['first_step_s']:10.1f} {rate:10.0f}")
    if len(rows) == 2:
        ratio = rows[1]["seconds"]["step"] / rows[0]["seconds"]["step"]
        print(f"ours is {ratio:.2f} x as fast a step")


if __name__ == "__main__":
    command_line.run(main)
