"""Rolling prompts out and having the completions graded: what training, evaluation and the
reference table share."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from basis_jax.config import SamplingSection
from basis_jax.data.encoding import EncodedProblems
from basis_jax.model.decoder import ModelConfig
from basis_jax.sampling.draw import row_keys
from basis_jax.sampling.refill import sample_rows
from basis_jax.types import Prompts, Rollouts

ROUNDS = 8  # times ``rows_at_once`` that a table or an evaluation asks for: slots can be refilled


@dataclass(frozen=True)
class Setting:
    """What stays fixed for all rollouts of a run."""

    model_config: ModelConfig
    mesh: Mesh
    tokenizer: Any
    eos_ids: tuple[int, ...]
    verifier: Any
    seed: int
    rows_at_once: int


@dataclass(frozen=True)
class Graded:
    """Rollouts (host arrays) with their texts and verdicts, row by row."""

    rollouts: Rollouts
    completions: list[str]
    rewards: np.ndarray  # [N] float32; 0 where invalid
    valid: np.ndarray  # [N] bool: False where the verifier failed
    reasons: list[str]
    sample_seconds: float
    verify_seconds: float  # that grading took beyond sampling

    @property
    def tokens(self) -> int:
        """Completion tokens generated."""
        return int(self.rollouts.completion_lengths.sum())


def roll_out(
    params: PyTree,
    setting: Setting,
    problems: EncodedProblems,
    *,
    ids: np.ndarray,
    samples: np.ndarray,
    sampling: SamplingSection,
    stream: str,
    step: int,
) -> Graded:
    """Complete and grade the problems in rows ``ids`` [N]; ``samples`` [N] number the rollouts of a
    problem. The draws are a function of (seed, stream, step, problem, sample)."""
    started = time.perf_counter()
    prompts = Prompts(tokens=problems.tokens[ids], lengths=problems.lengths[ids], problem_ids=ids)
    keys = row_keys(
        setting.seed, stream, step, problem_ids=jnp.asarray(ids), samples=jnp.asarray(samples)
    )
    completions, verdicts = [""] * len(ids), [None] * len(ids)

    def grade(rollouts, rows):
        texts = decode(jax.tree.map(lambda x: x[rows], rollouts), setting.tokenizer)
        found = setting.verifier.grade(texts, [problems.problems[i].answer for i in ids[rows]])
        for row, text, verdict in zip(rows, texts, found, strict=True):
            completions[row], verdicts[row] = text, verdict

    under_way: list[Future] = []

    def ended(rollouts, rows):
        under_way.append(grader.submit(grade, rollouts, rows))
        for part in filter(Future.done, under_way):
            part.result()  # what went wrong is known before the rest is sampled

    grader = ThreadPoolExecutor(1)  # texts and verdicts while the device works
    try:
        rollouts = sample_rows(
            params,
            setting.model_config,
            prompts,
            sampling=sampling,
            eos_ids=setting.eos_ids,
            keys=keys,
            mesh=setting.mesh,
            rows_at_once=setting.rows_at_once,
            ended=ended,
        )
        sampled = time.perf_counter()
        for part in under_way:
            part.result()
    finally:
        grader.shutdown(cancel_futures=True)
    return Graded(
        rollouts=rollouts,
        completions=completions,
        rewards=np.array([v.reward if v.valid else 0.0 for v in verdicts], np.float32),
        valid=np.array([v.valid for v in verdicts]),
        reasons=[v.reason for v in verdicts],
        sample_seconds=sampled - started,
        verify_seconds=time.perf_counter() - sampled,
    )


def decode(rollouts: Rollouts, tokenizer) -> list[str]:
    """Completion texts without special tokens."""
    starts, lengths = rollouts.prompt_lengths, rollouts.completion_lengths
    ids = [
        row[start : start + length].tolist()
        for row, start, length in zip(rollouts.tokens, starts, lengths, strict=True)
    ]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)
