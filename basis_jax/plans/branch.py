"""VinePPO: values of the steps of a completion, from fresh rollouts from the start of each step."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from basis_jax.estimators import vineppo
from basis_jax.plans.in_order import uniform
from basis_jax.plans.options import whole
from basis_jax.plans.plan import Belief, Plan, Requests, Setting
from basis_jax.sampling.rollouts import Graded, counted_tokens
from basis_jax.types import Rollouts, TokenCredit

State = tuple[int, tuple[int, ...]]
"""A problem and the tokens of a completion so far."""

gains = jax.jit(vineppo)  # without jit, its scan is compiled anew in every step


class Steps(NamedTuple):
    """``steps`` [N, T]: the step of every token, at most ``most``, 0 outside the completion.
    ``states``: for every rollout that could be graded, where its first ``most`` steps begin."""

    steps: np.ndarray
    states: list[list[State]]


def branch(
    setting: Setting, *, rollouts: int = 9, separator: str | float = "\n", most: int = 25
) -> Plan:
    """The rollouts of ``uniform``, and ``rollouts`` completions from the start of each step of each
    of them. The advantage of a step's tokens is the value after it minus the value before it
    (``estimators.vineppo``, arXiv 2410.01679).

    A step ends with a token whose text contains ``separator``; several in a row end one step. With
    an empty ``separator`` every token is a step. The value before a step is the mean reward of the
    completions from there; after the last step it is the rollout's own reward. Steps that begin
    with the same tokens of the same problem share their completions.

    The steps after the first ``most`` of a rollout count as one whose value is not estimated: its
    advantage is 0. So is that of a step if none of its completions could be graded. The published
    code has no limit for MATH and one of 25 for GSM8K.

    The completions are sampled by the same policy and are not trained on. If a rollout has s steps
    of equal length, its completions have ``rollouts`` (s + 1) / 2 times its tokens.
    """
    whole("rollouts", rollouts, least=1)
    whole("most", most, least=1)
    if separator and not str(separator).replace("\\n", ""):
        raise ValueError(
            f"got separator {separator}, a backslash and an n, which no line contains; give a line "
            "break, which is the default and in bash $'\\n'"
        )

    def more(
        rounds: Sequence[Requests], graded: Sequence[Graded], belief: Belief
    ) -> Requests | None:
        if len(rounds) > 1:
            return None
        states = [*dict.fromkeys(s for row in cut(graded[0]).states for s in row)]
        return continuations(states, rollouts, first=setting.group_size) if states else None

    def credit(rounds: Sequence[Requests], graded: Sequence[Graded]) -> TokenCredit:
        values = values_of(rounds[1:], graded[1:], rollouts)
        return credit_of(graded[0], cut(graded[0]), values, most)

    def cut(graded: Graded) -> Steps:
        if separator == "":
            return steps_of(graded, None, most)
        assert setting.decode is not None  # a run has a tokenizer
        used = np.unique(graded.rollouts.tokens)
        ends = used[[str(separator) in setting.decode([token]) for token in used.tolist()]]
        return steps_of(graded, ends, most)

    return Plan(uniform(setting).ask, more, credit=credit)


def steps_of(graded: Graded, ends: np.ndarray | None, most: int) -> Steps:
    """The steps of every rollout. A step begins with the first token and with every token that is
    none of ``ends`` and follows one of them; without ``ends`` every token is a step."""
    r: Rollouts = graded.rollouts
    mask = np.asarray(counted_tokens(graded))
    opens = np.pad(mask[:, 1:] & mask[:, :-1], ((0, 0), (1, 0)))
    if ends is not None:
        closing = np.isin(r.tokens, ends)
        opens[:, 1:] &= closing[:, :-1] & ~closing[:, 1:]
    steps = np.where(mask, np.minimum(np.cumsum(opens, axis=1), most), 0).astype(np.int32)
    states = []
    for row, start in enumerate(r.prompt_lengths.tolist()):
        begins = [start, *np.flatnonzero(opens[row]).tolist()][:most] if mask[row].any() else []
        tokens, problem = r.tokens[row].tolist(), int(r.problem_ids[row])
        states.append([(problem, tuple(tokens[start:begin])) for begin in begins])
    return Steps(steps, states)


def continuations(states: Sequence[State], rollouts: int, *, first: int) -> Requests:
    """``rollouts`` completions of every state; those of a problem are numbered from ``first``."""
    problems, tokens = zip(*states, strict=True)
    prefixes = [np.array(prefix, np.int32) for prefix in tokens]  # each held once
    count = dict.fromkeys(problems, first)
    samples: list[int] = []
    for problem in problems:
        samples += range(count[problem], count[problem] + rollouts)
        count[problem] += rollouts
    return Requests(
        np.repeat(problems, rollouts),
        np.array(samples),
        prefixes=[prefix for prefix in prefixes for _ in range(rollouts)],
    )


def values_of(
    rounds: Sequence[Requests], graded: Sequence[Graded], rollouts: int
) -> dict[State, float]:
    """The mean reward of the completions of every state, NaN if none could be graded."""
    values = {}
    for asked, found in zip(rounds, graded, strict=True):
        prefixes = asked.prefixes or ()
        for k in range(0, asked.problems.size, rollouts):
            valid = found.valid[k : k + rollouts]
            rewards = found.rewards[k : k + rollouts][valid]
            state = (int(asked.problems[k]), tuple(np.asarray(prefixes[k]).tolist()))
            values[state] = float(rewards.mean()) if rewards.size else float("nan")
    return values


def credit_of(
    graded: Graded, steps: Steps, values: Mapping[State, float], most: int
) -> TokenCredit:
    """``estimators.vineppo`` with the values of the first ``most`` steps of every rollout."""
    most = min(most, steps.steps.shape[1])
    table = np.full((len(steps.states), most + 1), np.nan, np.float32)
    for row, states in zip(table, steps.states, strict=True):
        row[: len(states)] = [values[state] for state in states]
    estimated, rewards = np.isfinite(table), graded.rewards
    advantages = gains(
        jnp.asarray(rewards),
        jnp.asarray(np.where(estimated, table, 0)),
        jnp.asarray(steps.steps),
        counted_tokens(graded),
        estimated=jnp.asarray(estimated),
    )
    start_values = np.where(estimated[:, 0], table[:, 0], rewards)
    return TokenCredit(advantages=np.asarray(advantages), start_values=start_values)
