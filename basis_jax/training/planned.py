"""The rollouts of one step, as the run's plan asks for them.

However many rollouts a plan asks for, a step has train.prompts_per_step x sampling.group_size rows,
so that every step runs the same compiled programs. The g-th problem of the step has the rows
g x group_size + sample. Rows that the plan did not ask for are absent: they are not valid, so
neither estimators nor the update use them, and metrics do not count them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from basis_jax import processes, references
from basis_jax.opening.rollout_plan import setting_of
from basis_jax.plans import Belief, Plan, Requests, Setting
from basis_jax.plans.checks import check_credit, check_requests
from basis_jax.sampling.rollouts import Graded, roll_out
from basis_jax.training.session import Session
from basis_jax.types import TokenCredit

ABSENT = "absent"  # the kind of a row that the plan did not ask for


def make_sample_and_verify(session: Session) -> Callable[[PyTree, PyTree, int], Graded]:
    """Make the function (parameters, estimator state, step) -> the graded rollouts of the step."""
    plan, predict = session.plan, session.estimator.predict
    setting = setting_of(session.config, session.train_set.sizes, session.setup.tokenizer)
    values_of = jax.jit(predict) if plan.needs_values and predict is not None else None

    def sample_and_verify(params: PyTree, estimator_state: PyTree, number: int) -> Graded:
        belief = Belief(
            None if values_of is None else processes.on_host(values_of(estimator_state)),
            processes.on_host(estimator_state) if plan.needs_state else None,
        )
        rounds: list[Requests] = []
        graded: list[Graded] = []

        def ask() -> Requests | None:
            return next_round(plan, setting, number, rounds=rounds, graded=graded, belief=belief)

        asked = ask()
        while asked is not None:
            graded.append(sample_round(params, session, number, asked))
            rounds.append(asked)
            asked = ask()
        return as_rows(rounds, graded, plan, setting, number)

    return sample_and_verify


def next_round(
    plan: Plan,
    setting: Setting,
    number: int,
    *,
    rounds: Sequence[Requests],
    graded: Sequence[Graded],
    belief: Belief,
) -> Requests | None:
    """What the plan asks for next, or None at the end of the step. The first process decides.

    Raises ValueError if it asks for what a step cannot have, naming the plan and the step.
    """
    if rounds and plan.more is None:
        return None

    def decide() -> Requests | None:
        with naming(plan.name, number):
            asked: Requests | None = None
            if not rounds:
                asked = plan.ask(number, belief)
            elif plan.more is not None:
                asked = plan.more(rounds, graded, belief)
            if asked is not None or not rounds:
                check_requests(asked, rounds, plan, setting)
            return asked

    return processes.by_first(decide)


@contextmanager
def naming(name: str, number: int) -> Iterator[None]:
    """Put the plan and the step before an error's message. Errors of a user's own plan become a
    ValueError with the line in their file."""
    try:
        yield
    except Exception as error:
        if ":" not in name and not isinstance(error, ValueError):
            raise
        where = references.absolute(name, "plan").rpartition(":")[0] if ":" in name else ""
        said = " ".join(str(error).split())
        line = references.line_of(error, where) if where else ""
        kind = "" if isinstance(error, ValueError) else f" raised {type(error).__name__}{line}"
        raise ValueError(
            f"sampling.plan {name}{kind} in step {number + 1}: {said}" + "; correct it" * bool(kind)
        ) from error


def sample_round(params: PyTree, session: Session, number: int, asked: Requests) -> Graded:
    """Sample and grade the rollouts of one round."""
    config = session.config
    sampling = config.sampling
    return roll_out(
        params,
        session.setup,
        session.train_set,
        ids=asked.problems,
        samples=asked.samples,
        sampling=dataclasses.replace(sampling, temperature=0.0) if asked.greedy else sampling,
        stream="train",
        step=number,
        any_number=asked.prefixes is not None
        or asked.problems.size != config.train.prompts_per_step * sampling.group_size,
        prefixes=asked.prefixes,
    )


def as_rows(
    rounds: Sequence[Requests],
    graded: Sequence[Graded],
    plan: Plan,
    setting: Setting,
    step: int = 0,
) -> Graded:
    """All rollouts of the step in their rows, absent rows between them, with the plan's weights and
    metrics. Completions that are not trained on are only there as ``greedy_rewards`` and in the
    plan's ``credit``."""
    trained = [k for k, asked in enumerate(rounds) if not asked.aside]
    problems = np.concatenate([rounds[k].problems for k in trained])
    samples = np.concatenate([rounds[k].samples for k in trained])
    number = {problem: g for g, problem in enumerate(dict.fromkeys(problems.tolist()))}
    rows = np.array([number[p] for p in problems.tolist()]) * setting.group_size + samples
    total = setting.prompts * setting.group_size
    whole = graded[trained[0]]
    if len(trained) > 1 or not np.array_equal(rows, np.arange(total)):
        ids = np.repeat(np.resize([*number], setting.prompts), setting.group_size)
        whole = scattered([graded[k] for k in trained], rows, ids.astype(np.int32))
    added = [(asked, found) for asked, found in zip(rounds, graded, strict=True) if asked.aside]
    weights = weights_of([rounds[k] for k in trained], rows, total, alike=plan.alike)
    credit = credit_of_plan(plan, rounds, graded, step)
    signals = {"greedy_rewards": greedy_rewards(whole, added)} if plan.greedy else {}
    return dataclasses.replace(
        whole,
        weights=weights,
        signals=signals,
        credit=jax.tree.map(lambda x: placed(x, rows, total), credit),
        more_tokens=sum(found.tokens - begun_tokens(asked) for asked, found in added),
        sample_seconds=sum(found.sample_seconds for found in graded),
        verify_seconds=sum(found.verify_seconds for found in graded),
        plan_metrics=plan_metrics(rounds, whole, weights, added) if plan.name != "uniform" else {},
    )


def scattered(graded: Sequence[Graded], rows: np.ndarray, ids: np.ndarray) -> Graded:
    """The rollouts at ``rows`` of a step whose rows have the problems ``ids``; the rest absent."""

    def put(*parts: Any) -> np.ndarray:
        parts = tuple(map(np.asarray, parts))
        array = np.zeros((ids.size, *parts[0].shape[1:]), parts[0].dtype)
        array[rows] = np.concatenate(parts)
        return array

    def put_words(field: str, absent: str) -> list[str]:
        words = [absent] * ids.size
        for row, word in zip(rows, [w for g in graded for w in getattr(g, field)], strict=True):
            words[row] = word
        return words

    present = np.zeros(ids.size, bool)
    present[rows] = True
    rollouts = jax.tree.map(put, *(g.rollouts for g in graded))
    return dataclasses.replace(
        graded[0],
        rollouts=dataclasses.replace(rollouts, problem_ids=ids),
        completions=put_words("completions", ""),
        rewards=put(*(g.rewards for g in graded)),
        valid=put(*(g.valid for g in graded)),
        reasons=put_words("reasons", "the plan did not ask for it"),
        kinds=put_words("kinds", ABSENT),
        parts={name: put(*(g.parts[name] for g in graded)) for name in graded[0].parts},
        present=present,
    )


def begun_tokens(asked: Requests) -> int:
    """The tokens that the completions began with, which were not sampled."""
    return sum(map(len, asked.prefixes or ()))


def credit_of_plan(
    plan: Plan, rounds: Sequence[Requests], graded: Sequence[Graded], step: int
) -> TokenCredit | None:
    """The plan's credit of the rollouts that are trained on; None if it gives none."""
    if plan.credit is None:
        return None
    trained = sum(asked.problems.size for asked in rounds if not asked.aside)
    with naming(plan.name, step):
        credit = plan.credit(rounds, graded)
        check_credit(credit, trained, graded[0].rollouts.tokens.shape[1])
    return credit


def placed(found: Any, rows: np.ndarray, total: int) -> np.ndarray:
    """The numbers ``found`` at ``rows`` of ``total``, 0 elsewhere."""
    array = np.zeros((total, *found.shape[1:]), np.float32)
    array[rows] = found
    return array


def weights_of(
    rounds: Sequence[Requests], rows: np.ndarray, total: int, *, alike: bool
) -> np.ndarray | None:
    """The rows' factors in the loss, [total], 0 where absent; None if all are 1."""
    if not alike and all(asked.weights is None for asked in rounds):
        return None
    given = [
        np.ones(r.problems.size, np.float32) if r.weights is None else r.weights for r in rounds
    ]
    weights = np.concatenate(given)
    if alike:
        _, place = np.unique(np.concatenate([r.problems for r in rounds]), return_inverse=True)
        counts = np.bincount(place)
        weights = weights * (counts.mean() / counts[place]).astype(np.float32)
    return placed(weights, rows, total)


def greedy_rewards(whole: Graded, added: Sequence[tuple[Requests, Graded]]) -> np.ndarray:
    """For every row the reward of its problem's greedy completion, NaN where there is none."""
    found = {
        problem: reward if valid else np.nan
        for asked, graded in added
        if asked.greedy
        for problem, reward, valid in zip(
            asked.problems.tolist(), graded.rewards, graded.valid, strict=True
        )
    }
    ids = whole.rollouts.problem_ids.tolist()
    return np.array([found.get(problem, np.nan) for problem in ids], np.float32)


def plan_metrics(
    rounds: Sequence[Requests],
    whole: Graded,
    weights: np.ndarray | None,
    added: Sequence[tuple[Requests, Graded]],
) -> dict[str, float]:
    """Metrics of what the plan asked for."""
    metrics = {
        "plan/rollouts": float(sum(asked.problems.size for asked in rounds)),
        "plan/rounds": float(len(rounds)),
        "plan/absent": float(1 - whole.present.mean()),
    }
    for name, of_kind in (
        ("greedy", [graded for asked, graded in added if asked.greedy]),
        ("branch", [graded for asked, graded in added if not asked.greedy]),
    ):
        if of_kind:
            valid = np.concatenate([graded.valid for graded in of_kind])
            rewards = np.concatenate([graded.rewards for graded in of_kind])[valid]
            metrics[f"plan/{name}_reward"] = float(rewards.mean()) if rewards.size else 0.0
            metrics[f"plan/{name}_invalid"] = float(1 - valid.mean())
    if weights is not None:
        used = weights[whole.present].astype(np.float64)
        metrics["plan/weight_max"] = float(used.max())
        metrics["plan/effective_rows"] = float(used.sum() ** 2 / max((used**2).sum(), 1e-300))
    return metrics
