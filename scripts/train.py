"""Train a language model on verifiable problems with one rollout per prompt.

    python scripts/train.py --config configs/quickstart.py
    python scripts/train.py --config configs/qwen_math.py --model.path /models/Qwen3-4B

Any field of the config can be overridden (``--optim.lr 3e-6``; ``--help`` lists all). The same
command again resumes the run in ``--run-dir`` from its newest checkpoint.
"""

import dataclasses
import functools
import time

import jax
import numpy as np

from basis_jax import command_line
from basis_jax.data.order import batch_indices
from basis_jax.evaluation.evaluate import evaluate
from basis_jax.runs import checkpoint, plots
from basis_jax.runs.compiles import count_compiles
from basis_jax.runs.identity import lock_run, open_run
from basis_jax.runs.metrics import Records, read_metrics
from basis_jax.sampling.rollouts import roll_out
from basis_jax.training.microbatches import make_batches, updates_per_step
from basis_jax.training.session import estimator_state_shapes, first_estimator_state, open_session
from basis_jax.training.update import (
    abstract_state,
    finish_step,
    make_estimate,
    make_optimizer,
    make_score,
    make_state,
    make_update,
    merge_updates,
    reward_metrics,
)
from basis_jax.weights import huggingface


def main() -> None:
    config, _ = command_line.parse(__doc__)
    opened = open_session(config, training=True)
    with opened as session, lock_run(config.run_dir) as run_dir:
        identity = {
            "model.path": huggingface.fingerprint(session.folder),
            "data.path": session.train_set.fingerprint(),
        }
        open_run(config, devices=[str(d) for d in jax.devices()], identity=identity)
        with (
            jax.set_mesh(session.setup.mesh),
            checkpoint.open_checkpoints(run_dir, config.checkpoint) as checkpoints,
        ):
            train(session, run_dir, checkpoints)
    summarise(run_dir)


def train(session, run_dir, checkpoints) -> None:
    config, setup = session.config, session.setup
    plan, sampling = config.train, config.sampling
    common = {
        "loss": config.loss,
        "temperature": sampling.temperature,
        "microbatch": plan.microbatch_rollouts,
    }
    optimizer = make_optimizer(config.optim, updates=plan.steps * updates_per_step(config))
    estimate_values = make_estimate(session.estimator)
    update = make_update(setup.model_config, optimizer, **common)
    batches_of = functools.partial(
        make_batches,
        config=config,
        score=make_score(setup.model_config, **common),
        reference=start_params(session) if config.loss.kl_coef else None,
        mesh=setup.mesh,
    )
    restored = checkpoint.restore(checkpoints, state_shapes(session, optimizer))
    state = first_state(session, run_dir, optimizer) if restored is None else restored
    start = int(state.step)

    resume_step = -1 if restored is None else start
    with count_compiles() as compiled, Records(run_dir, plan.steps, resume_step) as records:
        if restored is None:
            records.log(0, evaluate_now(state.params, session) | compiled.take())
        for step in range(start, plan.steps):
            ids = batch_indices(
                config.seed,
                step,
                batch_size=plan.prompts_per_step,
                size=len(session.train_set.problems),
            )
            graded = roll_out(
                state.params,
                setup,
                session.train_set,
                ids=np.repeat(ids, sampling.group_size),
                samples=np.tile(np.arange(sampling.group_size, dtype=np.int32), len(ids)),
                sampling=sampling,
                stream="train",
                step=step,
            )
            started = time.perf_counter()
            estimator_state, estimate = estimate_values(state.estimator_state, graded)
            outcomes = []
            for microbatches in batches_of(graded, estimate, params=state.params):
                state, outcome = update(state, microbatches)
                outcomes.append(outcome)
            state = finish_step(state, estimator_state)
            metrics = reward_metrics(graded, estimate) | merge_updates(outcomes)
            metrics["time/update_s"] = time.perf_counter() - started
            done = step + 1
            if done == plan.steps or (config.eval.every and done % config.eval.every == 0):
                metrics |= evaluate_now(state.params, session)
            records.samples(done, shown_rows(session, graded, estimate, plan.log_samples))
            records.log(done, metrics | compiled.take())
            if done == plan.steps or done % config.checkpoint.every == 0:
                checkpoint.save(checkpoints, state, dataclasses.asdict(config))


def first_state(session, run_dir, optimizer):
    """The state before the first step: weights from the model folder, estimator state from the
    reference table where the estimator takes one."""
    params = start_params(session)
    return make_state(
        params,
        optimizer,
        first_estimator_state(session, params, run_dir / "reference.npz"),
        model_config=session.setup.model_config,
        mesh=session.setup.mesh,
    )


def state_shapes(session, optimizer):
    """What a checkpoint is restored into: no weights are read and no table is made for it."""
    return abstract_state(
        optimizer,
        estimator_state_shapes(session),
        model_config=session.setup.model_config,
        mesh=session.setup.mesh,
    )


def start_params(session):
    """The model folder's weights: where training starts, and what a KL term refers to."""
    return huggingface.load_params(session.folder, session.setup.model_config, session.setup.mesh)


def evaluate_now(params, session) -> dict[str, float]:
    """Held-out accuracy, and the seconds it took; nothing where eval.sets is empty."""
    if not session.held_out:
        return {}
    started = time.perf_counter()
    config = session.config
    metrics = evaluate(
        params, session.setup, session.held_out, section=config.eval, sampling=config.sampling
    )
    return metrics | {"time/eval_s": time.perf_counter() - started}


def shown_rows(session, graded, estimate, count) -> list[dict]:
    """The first ``count`` rollouts of the step, for a person to look at."""
    problems = session.train_set.problems
    return [
        {
            "problem": problems[graded.rollouts.problem_ids[i]].prompt,
            "answer": problems[graded.rollouts.problem_ids[i]].answer,
            "completion": graded.completions[i],
            "reward": float(graded.rewards[i]),
            "valid": bool(graded.valid[i]),
            "reason": graded.reasons[i],
            "value": float(estimate.values[i]),
            "advantage": float(estimate.advantages[i]),
            "terminated": bool(graded.rollouts.terminated[i]),
        }
        for i in range(min(count, len(graded.completions)))
    ]


def summarise(run_dir) -> None:
    """Print held-out accuracy before and after, and where everything lies."""
    curves = plots.draw([run_dir], run_dir / "curves.png")
    evaluated = [m for m in read_metrics(run_dir) if "eval/accuracy" in m]
    for line in evaluated[:1] + evaluated[1:][-1:]:
        print(
            f"held-out accuracy {'after' if line['step'] else 'before'} (step {line['step']}): "
            f"{line['eval/accuracy']:.1%} [{line['eval/accuracy_low']:.1%}, "
            f"{line['eval/accuracy_high']:.1%}], greedy {line['eval/greedy_accuracy']:.1%} "
            f"[{line['eval/greedy_accuracy_low']:.1%}, {line['eval/greedy_accuracy_high']:.1%}]"
        )
    print("intervals: 95 % bootstrap over held-out problems")
    for name in ("metrics.jsonl", "samples.jsonl", "checkpoints"):
        print(f"{name:14} {run_dir / name}")
    print(f"{'curves':14} {curves}")


if __name__ == "__main__":
    command_line.run(main)
