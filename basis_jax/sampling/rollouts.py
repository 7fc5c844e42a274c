"""Sample completions and grade them, for training, evaluation and the reference table."""

import functools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, PyTree

from basis_jax import processes
from basis_jax.config import SamplingSection
from basis_jax.data.encoding import EncodedProblems
from basis_jax.data.problem import Problem
from basis_jax.masked import completion_mask
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.sharding import regrouped
from basis_jax.sampling.draw import row_keys
from basis_jax.sampling.refill import MIN_SLOTS, round_up, sample_rows
from basis_jax.types import Prompts, Rollouts, TokenCredit

ROWS_PER_SLOT = 8
"""Reference tables and evaluations sample this many times ``rows_at_once`` rows per call, so that
slots can be refilled."""


@dataclass(frozen=True)
class RolloutSetup:
    """What stays fixed for all rollouts of a run."""

    model_config: ModelConfig
    mesh: Mesh
    tokenizer: Any
    eos_ids: tuple[int, ...]
    verifier: Any
    seed: int
    rows_at_once: int
    sample_tensor: int = 0  # for sampling, see sharding.regrouped
    held_out_verifiers: Mapping[str, Any] = field(default_factory=dict)

    def for_set(self, name: str) -> "RolloutSetup":
        """The setup with the verifier of a held-out set."""
        return replace(self, verifier=self.held_out_verifiers.get(name, self.verifier))


@dataclass(frozen=True)
class Graded:
    """Rollouts (host arrays) with their texts and verdicts, row by row.

    A row whose reward is NaN or infinite is invalid: it counts as a failure of the verifier.
    """

    rollouts: Rollouts
    completions: list[str]
    rewards: np.ndarray  # [N] float32, finite; 0 where invalid
    valid: np.ndarray  # [N] bool: False where the verifier failed
    reasons: list[str]
    kinds: list[str]  # of verdicts: verify.verdicts.KINDS
    sample_seconds: float
    verify_seconds: float  # of grading after sampling had ended
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """If there are several rewards: each of them by name, [N], 0 where invalid."""
    present: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """[N] bool: False in rows that the rollout plan did not ask for. They are not valid either, and
    no metric counts them. By default all are present."""
    weights: np.ndarray | None = None
    """[N]: the plan's factors of the rollouts in the loss; None: all 1."""
    signals: Mapping[str, np.ndarray] = field(default_factory=dict)
    """[N], by field of ``Signals``: what the plan found out for the estimator."""
    credit: TokenCredit | None = None  # of the plan, if it credits every token
    more_tokens: int = 0  # of completions that are not trained on
    plan_metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.present.size:
            object.__setattr__(self, "present", np.ones(self.valid.shape, bool))
        failed = self.valid & ~np.isfinite(self.rewards)
        reasons, kinds = list(self.reasons), list(self.kinds)
        for i in np.flatnonzero(failed):
            reasons[i], kinds[i] = f"the verifier's reward is {self.rewards[i]}", "failure"
        rewards = np.where(np.isfinite(self.rewards), self.rewards, np.float32(0))
        mended = {"rewards": rewards, "valid": self.valid & ~failed}
        for name, value in (mended | {"reasons": reasons, "kinds": kinds}).items():
            object.__setattr__(self, name, value)

    @property
    def tokens(self) -> int:
        """Completion tokens generated."""
        return int(self.rollouts.completion_lengths.sum()) + self.more_tokens


def counted_tokens(graded: Graded) -> Bool[Array, "N T"]:
    """The tokens of completions that count in the loss and in its denominators: not those that the
    verifier could not grade, and not absent ones."""
    rollouts = graded.rollouts
    lengths = jnp.asarray(rollouts.prompt_lengths), jnp.asarray(rollouts.completion_lengths)
    mask = completion_mask(*lengths, rollouts.tokens.shape[1])
    return mask & jnp.asarray(graded.valid)[:, None]


Row = tuple[str, Any, Any]
"""Text, submission and verdict of a completion. The verdict comes later if all are judged at
once."""


class BackgroundGrader:
    """Decodes texts and grades rows in a thread while the device works.

    Each row is owned by one process, and all processes use the text and verdict of its owner. Use
    it as a context manager: leaving it drops grading that has not begun, and leaving it by an
    exception also stops grading that has begun.
    """

    def __init__(self, setup: RolloutSetup, problems: Sequence[Problem]):
        self._setup, self._problems = setup, problems
        self._graded: dict[int, Row] = {}  # rows that this process owns
        self._parts: list[Future] = []
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> "BackgroundGrader":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._setup.verifier.stop()
        self._thread.shutdown(cancel_futures=True)

    def submit(self, rollouts: Rollouts, rows: np.ndarray) -> None:
        """Begin to grade those of the rows that this process owns.

        If grading of earlier rows failed, a single process raises that error here, before the rest
        is sampled. With several processes it is raised in ``wait``, because all processes must go
        on sampling together.
        """
        self._parts.append(self._thread.submit(self._grade, rollouts, processes.owned(rows)))
        if processes.count() == 1:
            for part in filter(Future.done, self._parts):
                part.result()

    def wait(self) -> list[tuple[str, Any]]:
        """Text and verdict of every row, the same in all processes. An error of one process is
        raised in all of them."""
        rows: dict[int, Row] = {}
        for part in processes.exchange(self._finish):
            rows |= part
        texts, submissions, verdicts = zip(
            *(rows[row] for row in range(len(self._problems))), strict=True
        )
        verifier = self._setup.verifier
        if verifier.whole_batches:  # grades all rows in one call
            judge = functools.partial(verifier.judge, submissions)
            verdicts = processes.by_first(lambda: self._thread.submit(judge).result())
        return [*zip(texts, verifier.settle([*verdicts]), strict=True)]

    def _finish(self) -> dict[int, Row]:
        for part in self._parts:
            part.result()
        return self._graded

    def _grade(self, rollouts: Rollouts, rows: np.ndarray) -> None:
        if not rows.size:
            return
        texts = completion_texts(jax.tree.map(lambda x: x[rows], rollouts), self._setup.tokenizer)
        submissions = [
            self._problems[row].submission(
                text,
                tokens=int(rollouts.completion_lengths[row]),
                terminated=bool(rollouts.terminated[row]),
            )
            for row, text in zip(rows, texts, strict=True)
        ]
        whole = self._setup.verifier.whole_batches
        verdicts = [None] * len(rows) if whole else self._setup.verifier.judge(submissions)
        for row, *found in zip(rows, texts, submissions, verdicts, strict=True):
            self._graded[int(row)] = tuple(found)


def roll_out(
    params: PyTree,
    setup: RolloutSetup,
    problems: EncodedProblems,
    *,
    ids: np.ndarray,
    samples: np.ndarray,
    sampling: SamplingSection,
    stream: str,
    step: int,
    any_number: bool = False,
    prefixes: Sequence[Sequence[int] | np.ndarray] | None = None,
) -> Graded:
    """Complete and grade the problems in rows ``ids`` [N]. ``samples`` [N] number the rollouts of a
    problem. The draws are a function of (seed, stream, step, problem, sample). ``any_number``: N
    changes from call to call, and few programs shall be compiled for it. ``prefixes``: the tokens
    with which the completions begin. The sampler records nothing about them."""
    started = time.perf_counter()
    prompts = Prompts(tokens=problems.tokens[ids], lengths=problems.lengths[ids], problem_ids=ids)
    if prefixes is not None:
        prompts = continued(prompts, prefixes, sampling.max_new_tokens)
    keyed = round_up(len(ids), MIN_SLOTS) if any_number else len(ids)
    keys = row_keys(
        setup.seed,
        stream,
        step,
        problem_ids=jnp.asarray(np.resize(ids, keyed)),
        samples=jnp.asarray(np.resize(samples, keyed)),
    )
    with BackgroundGrader(setup, [problems.problems[i] for i in ids]) as grader:
        rollouts = sample_rows(
            params,
            setup.model_config,
            prompts,
            sampling=sampling,
            eos_ids=setup.eos_ids,
            keys=keys,
            mesh=regrouped(setup.mesh, setup.sample_tensor),
            rows_at_once=setup.rows_at_once,
            any_number=any_number,
            on_ended=grader.submit,
        )
        sampled = time.perf_counter()
        graded = grader.wait()
    verdicts = [verdict for _, verdict in graded]
    with np.errstate(over="ignore"):  # 1e300 is infinite in float32
        rewards = np.array([v.reward if v.valid else 0.0 for v in verdicts]).astype(np.float32)
    return Graded(
        rollouts=rollouts,
        completions=[text for text, _ in graded],
        rewards=rewards,
        valid=np.array([v.valid for v in verdicts]),
        reasons=[v.reason for v in verdicts],
        kinds=[v.kind for v in verdicts],
        sample_seconds=sampled - started,
        verify_seconds=time.perf_counter() - sampled,
        parts=parts_of(verdicts, setup.verifier.part_names),
    )


def continued(
    prompts: Prompts, prefixes: Sequence[Sequence[int] | np.ndarray], new_tokens: int
) -> Prompts:
    """The prompts, each followed by the beginning of its completion. Raises ValueError if that
    leaves no token to sample."""
    begun = np.array([len(prefix) for prefix in prefixes], np.int32)
    if begun.max() >= new_tokens:
        raise ValueError(
            f"a completion is to begin with {begun.max()} tokens and sampling.max_new_tokens is "
            f"{new_tokens}; give fewer"
        )
    tokens = np.pad(np.asarray(prompts.tokens), ((0, 0), (0, new_tokens)))
    for row, start, prefix in zip(tokens, np.asarray(prompts.lengths), prefixes, strict=True):
        row[start : start + len(prefix)] = prefix
    return replace(prompts, tokens=tokens, lengths=prompts.lengths + begun, begun=begun)


def parts_of(verdicts: Sequence[Any], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Each reward by name if there are several, else {}."""
    rows = [v.parts if v.valid else (0.0,) * len(names) for v in verdicts] if names else []
    return {name: np.array([row[k] for row in rows], np.float32) for k, name in enumerate(names)}


def completion_texts(rollouts: Rollouts, tokenizer: Any) -> list[str]:
    """Completion texts without special tokens."""
    starts, lengths = rollouts.prompt_lengths, rollouts.completion_lengths
    ids = [
        row[start : start + length].tolist()
        for row, start, length in zip(rollouts.tokens, starts, lengths, strict=True)
    ]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)
