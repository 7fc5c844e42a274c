"""The training loop. ``train(config)`` is a whole run; ``make_step(session)`` is one step of it."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from basis_jax import processes
from basis_jax.config import Config
from basis_jax.data.order import prompts_by_set
from basis_jax.evaluation.evaluate import evaluate, invalid_warning
from basis_jax.model import lora
from basis_jax.runs import checkpoint
from basis_jax.runs.compiles import count_compiles
from basis_jax.runs.identity import lock_run, open_run, start_facts
from basis_jax.runs.log import errors_logged, log_line
from basis_jax.runs.loggers import check_loggers
from basis_jax.runs.shared_records import SharedRecords
from basis_jax.runs.stopping import Stopper, StopRequested
from basis_jax.runs.terminal import announcement
from basis_jax.sampling.rollouts import Graded
from basis_jax.training import fork
from basis_jax.training.critic import make_critic
from basis_jax.training.microbatches import make_batches
from basis_jax.training.objective import make_score
from basis_jax.training.planned import make_sample_and_verify
from basis_jax.training.session import Session, open_session
from basis_jax.training.start import (
    contents_of,
    first_state,
    frozen_params,
    identity_of,
    objective_of,
    optimizer_of,
    policy,
    schedule_of,
    start_params,
    state_shapes,
)
from basis_jax.training.update import (
    finish_step,
    make_estimate,
    make_learn,
    make_update,
    merge_updates,
    newest_learning_rate,
    reward_metrics,
)
from basis_jax.training.watch import Watch, has_signal
from basis_jax.types import Batch, Estimate, TokenCredit, TrainState

Callback = Callable[[int, TrainState, Mapping[str, float]], None]
"""Called after every step with (steps done, state, metrics)."""


class Step(NamedTuple):
    """What one step returns: the next state, its metrics, its rollouts and their values."""

    state: TrainState
    metrics: dict[str, float]
    graded: Graded
    estimate: Estimate


def train(
    config: Config,
    *,
    fork_from: str = "",
    callbacks: Sequence[Callback] = (),
    report: Callable[[str], None] = print,
) -> Path:
    """Train as ``config`` says, or resume the run in its folder; returns the run folder.

    ``report`` is called with lines of text while model and data are opened. Raises ValueError for
    settings that cannot work, before weights are read. Raises StopRequested if SIGINT or SIGTERM
    stopped the run; all finished steps are saved then. ``fork_from``: see ``training.fork``.
    """
    opening = [announcement(config)]
    report = processes.spoken(report)

    def report_and_keep(line: str) -> None:
        report(line)
        opening.append(line)

    check_loggers(config.train.loggers)
    processes.check_same(lambda: start_facts(config) | {"--fork-from": fork_from})
    origin = fork.find(fork_from, config)
    opened = open_session(config, report_and_keep, training=True)
    with (
        opened as session,
        open_folder(session, opening, fork_from) as run_dir,
        jax.set_mesh(session.setup.mesh),
        checkpoint.open_checkpoints(run_dir, config.checkpoint) as checkpoints,
        Stopper(processes.largest if processes.count() > 1 else None) as stopper,
    ):
        run_steps(
            session,
            run_dir,
            checkpoints,
            origin=origin,
            stopper=stopper,
            callbacks=callbacks,
            report=report,
        )
    return run_dir


@contextmanager
def open_folder(session: Session, opening: Sequence[str], fork_from: str = "") -> Iterator[Path]:
    """Open the run's folder; only the first process locks it and writes to it."""
    config, identity = session.config, identity_of(session)
    processes.check_same(lambda: contents_of(session, identity))
    devices = [str(device) for device in jax.devices()]
    with ExitStack() as held:

        def hold() -> Path:
            run_dir = held.enter_context(lock_run(config.run_dir))
            held.enter_context(errors_logged(run_dir))
            log_line(run_dir, "\n".join(opening))
            open_run(config, devices=devices, identity=identity, fork_from=fork_from)
            return run_dir

        yield processes.by_first(hold)


def run_steps(
    session: Session,
    run_dir: Path,
    checkpoints: Any,
    *,
    origin: Path | None,
    stopper: Stopper,
    callbacks: Sequence[Callback],
    report: Callable[[str], None],
) -> None:
    """Take the remaining steps. Each is logged before its checkpoint is saved: see ``Records``."""
    try:
        restored = checkpoint.restore(checkpoints, state_shapes(session), report)
        if restored is None and origin is not None:
            restored = fork.begin(session, run_dir, origin, report)
            save_once(checkpoints, restored, session.config)
        with stopper.droppable():
            if restored is None:
                state = first_state(session, run_dir, report)
            else:
                state = dataclasses.replace(restored, frozen=frozen_params(session))
        resume_step = -1 if restored is None else int(state.step)
        train, settings = session.config.train, dataclasses.asdict(session.config)
        with SharedRecords(
            run_dir, train.steps, resume_step, loggers=train.loggers, config=settings
        ) as records:
            take_steps(session, state, records, checkpoints, stopper=stopper, callbacks=callbacks)
        checkpoint.finish(checkpoints)
    except StopRequested:
        checkpoint.finish(checkpoints)
        raise stopper.stopped_after(newest_step(checkpoints)) from None


def take_steps(
    session: Session,
    state: TrainState,
    records: SharedRecords,
    checkpoints: Any,
    *,
    stopper: Stopper,
    callbacks: Sequence[Callback],
) -> None:
    """Take the steps after ``state``, with evaluations. Raises StopRequested if the run was asked
    to stop, after everything is saved."""
    config, start, last = session.config, int(state.step), session.config.train.steps
    step = make_step(session, droppable=stopper.droppable)
    with count_compiles() as compiled:
        if start == 0:
            with stopper.droppable():
                before = evaluate_now(policy(state), session)
            log_step(records, 0, before | compiled.take())
        watch = Watch(config, records.lines())
        if start and evaluation_due(config, start, watch):
            evaluate_again(state, session, records, stopper)
        for done in range(start + 1, last + 1):
            if watch.solved:
                break
            try:
                state, metrics, graded, estimate = step(state, done - 1)
            except StopRequested:
                save_once(checkpoints, state, config)
                raise
            watch.count(metrics)
            if evaluation_due(config, done, watch):
                metrics |= evaluate_unless_stopped(policy(state), session, stopper)
            records.samples(done, shown_rows(session, graded, estimate, config.train.log_samples))
            log_step(records, done, metrics | compiled.take())
            at_end = stopper.agreed() or done == last or watch.solved
            if at_end or done % config.checkpoint.every == 0:
                save_once(checkpoints, state, config)
            for callback in callbacks:
                callback(done, state, metrics)
            for warning in watch.warnings(metrics, graded, answers_of(session, graded)):
                records.message(warning)
    if stopper.agreed():
        raise StopRequested
    if watch.solved:
        records.message(watch.solved_message())


def save_once(checkpoints: Any, state: TrainState, config: Config) -> None:
    """Save the state unless the newest checkpoint already has it."""
    if int(state.step) > (newest_step(checkpoints) or 0):
        checkpoint.save(checkpoints, state, dataclasses.asdict(config))


def newest_step(checkpoints: Any) -> int | None:
    """The step of the newest checkpoint, or None if there is none."""
    return processes.by_first(checkpoints.latest_step)


def evaluation_due(config: Config, step: int, watch: Watch) -> bool:
    """Whether to evaluate after this step: after the last one, and every ``eval.every`` steps."""
    every = config.eval.every
    return step == config.train.steps or watch.solved or bool(every and step % every == 0)


def evaluate_unless_stopped(params: PyTree, session: Session, stopper: Stopper) -> dict[str, float]:
    """``evaluate_now``, or {} if the run is asked to stop. The resumed run then evaluates first."""
    try:
        with stopper.droppable():
            return evaluate_now(params, session)
    except StopRequested:
        return {}


def evaluate_again(
    state: TrainState, session: Session, records: SharedRecords, stopper: Stopper
) -> None:
    """Add the evaluation to the newest step's line if a stop had prevented it."""
    newest = records.lines()[-1:]
    if newest and newest[0]["step"] == int(state.step) and "eval/accuracy" not in newest[0]:
        with stopper.droppable():
            metrics = evaluate_now(policy(state), session)
        records.complete(metrics)


def log_step(records: SharedRecords, step: int, metrics: Mapping[str, float]) -> None:
    """Log the step, and warn if held-out completions could not be graded."""
    records.log(step, metrics)
    if warning := invalid_warning(metrics):
        records.message(warning)


def make_step(
    session: Session, *, droppable: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Callable[[TrainState, int], Step]:
    """Make the function (state, step number) -> ``Step``. The first step has number 0.

    Call it under ``jax.set_mesh(session.setup.mesh)``. The given state is donated and must not be
    used again. ``droppable()`` is entered around work that a stop may abandon without loss.

        with open_session(config, training=True) as session, jax.set_mesh(session.setup.mesh):
            step, state = make_step(session), first_state(session, Path("scratch"))
            for number in range(10):
                state, metrics, graded, estimate = step(state, number)
    """
    estimate_values = make_estimate(
        session.estimator,
        aggregation=session.config.loss.aggregation,
        score_norms=session.config.estimator.score_norms,
    )
    sample_and_verify = make_sample_and_verify(session)
    make_microbatches = microbatch_maker(session)
    schedule = schedule_of(session.config)
    update = make_policy_update(session)
    learn = make_learn(session.estimator)
    critic = make_critic(session.config, session.setup.model_config, session.setup.mesh)

    def step(state: TrainState, number: int) -> Step:
        with droppable():
            graded = sample_and_verify(policy(state), state.estimator_state, number)
        started = time.perf_counter()
        credit = critic.credit(state, graded)
        estimator_state, estimate = estimate_values(state.estimator_state, graded, credit)
        estimate = processes.on_host(estimate)
        outcomes = []
        if has_signal(graded):
            measured = measuring(session, number)
            for microbatches in make_microbatches(graded, estimate, credit, state=state):
                state, of_critic = critic.update(state, microbatches)
                if critic.alone(number):
                    outcomes.append(of_critic)
                    continue
                state, outcome = update(state, microbatches, measured=measured)
                if measured:
                    estimator_state = learn(estimator_state, outcome.pop("measurement"))
                    measured = False  # later updates of a step are off-policy
                outcomes.append(outcome | of_critic)
        state = finish_step(state, estimator_state)
        metrics = reward_metrics(graded, estimate, credit) | merge_updates(outcomes)
        metrics["estimate/no_signal"] = float(not outcomes)
        metrics["optim/learning_rate"] = newest_learning_rate(schedule, state.opt_state)
        metrics["data/epoch"] = epochs(session, number + 1)
        metrics["time/update_s"] = time.perf_counter() - started
        return Step(state, metrics, graded, estimate)

    return step


def make_policy_update(session: Session) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """``make_update`` as the session says."""
    return make_update(
        session.setup.model_config,
        optimizer_of(session.config),
        optim=session.config.optim,
        group_size=session.config.sampling.group_size,
        rollouts=session.config.train.minibatch_rollouts,
        **objective_of(session),
    )


def measuring(session: Session, number: int) -> bool:
    """Whether the estimator needs a measurement in step ``number`` (the first is 0)."""
    every = session.config.estimator.measure_every
    return session.estimator.learn is not None and number % every == 0


def epochs(session: Session, steps: int) -> float:
    """How many times all problems of ``data.path`` have been visited after ``steps`` steps."""
    config, size = session.config, session.train_set.sizes[0]
    weights = (1.0, *config.data.more_sets.values())
    of_set = prompts_by_set(weights, config.train.prompts_per_step)[0]
    return steps / session.plan.hold / (size // of_set)


def microbatch_maker(session: Session) -> Callable[..., list[list[Batch]]]:
    """Make a function (graded, estimate, credit, state) -> the microbatches of
    every update of a step."""
    config = session.config
    score = make_score(session.setup.model_config, **objective_of(session))
    start = start_params(session) if config.loss.needs_reference else None

    def make(
        graded: Graded, estimate: Estimate, credit: TokenCredit | None, *, state: TrainState
    ) -> list[list[Batch]]:
        return make_batches(
            graded,
            estimate,
            config=config,
            score=score,
            params=policy(state),
            reference=None if start is None else lora.whole(state.frozen, start),
            credit=credit,
            mesh=session.setup.mesh,
        )

    return make


def evaluate_now(params: PyTree, session: Session) -> dict[str, float]:
    """Held-out accuracy and the seconds it took; {} if eval.sets is empty."""
    if not session.held_out:
        return {}
    started = time.perf_counter()
    config = session.config
    metrics = evaluate(
        params, session.setup, session.held_out, section=config.eval, sampling=config.sampling
    )
    return metrics | {"time/eval_s": time.perf_counter() - started}


def answers_of(session: Session, graded: Graded) -> list[str]:
    """The right answer of every rollout."""
    return [session.train_set.problems[i].answer for i in graded.rollouts.problem_ids]


def shown_rows(session: Session, graded: Graded, estimate: Estimate, count: int) -> list[dict]:
    """The first ``count`` rollouts of the step that are present, for a person to look at."""
    problems = session.train_set.problems
    return [
        {
            "problem": problems[graded.rollouts.problem_ids[i]].prompt,
            "answer": problems[graded.rollouts.problem_ids[i]].answer,
            "completion": graded.completions[i],
            "reward": float(graded.rewards[i]),
            "valid": bool(graded.valid[i]),
            "reason": graded.reasons[i],
            "kind": graded.kinds[i],
            "value": float(estimate.values[i]),
            "advantage": float(estimate.advantages[i]),
            "terminated": bool(graded.rollouts.terminated[i]),
        }
        for i in np.flatnonzero(graded.present)[:count]
    ]
