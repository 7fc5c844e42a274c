"""True values of a real policy: exactly, by teacher forcing, or as the mean of many rollouts."""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, Bool, Float, Int, PyTree

from basis_jax.config import Config, SamplingSection
from basis_jax.data.encoding import EncodedProblems
from basis_jax.data.problem import content_hash
from basis_jax.model import decoder
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.sharding import batch_shards, put_rows
from basis_jax.runs import checkpoint
from basis_jax.sampling.rollouts import RolloutSetup, roll_out
from basis_jax.saved_config import config_from

LEADS = ("", " ")  # what may stand before the answer in a completion that is taken as right
ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Policies:
    """What the study knows of C policies and M problems."""

    steps: Int[np.ndarray, " C"]
    values: Float[np.ndarray, "C M"]
    rewards: Float[np.ndarray, "C M S"]  # S = 0: none were decoded
    reference: Float[np.ndarray, "M n"]  # of the first policy; empty: none were decoded


# ------------------------------------------------------------------------------- a run's policies
def run_config(run_dir: Path) -> Config:
    """The config that a run folder was made with. Exits with a sentence where there is none."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise SystemExit(f"error: no config.json in {run_dir}; give --run the folder of a run")
    return config_from(json.loads(path.read_text())["config"])


def steps(run_dir: Path, config: Config) -> list[int]:
    """0 and the steps of the checkpoints that were kept."""
    with checkpoint.open_checkpoints(run_dir, config.checkpoint) as checkpoints:
        return [0, *checkpoints.all_steps()]


def read(path: Path, measured_as: list) -> Policies | None:
    """The policies at ``path`` if they were measured as ``measured_as``."""
    if not path.is_file():
        return None
    with np.load(path) as file:
        if str(file["wanted"]) != json.dumps(measured_as):
            return None
        return Policies(*(file[field.name] for field in fields(Policies)))


def write(path: Path, measured_as: list, policies: Policies) -> None:
    np.savez_compressed(path, wanted=json.dumps(measured_as), **vars(policies))


def policies(run_dir: Path, config: Config, first: PyTree) -> Iterator[tuple[int, PyTree]]:
    """(step, parameters): step 0 is ``first``, then every checkpoint that was kept."""
    yield 0, first
    with checkpoint.open_checkpoints(run_dir, config.checkpoint) as checkpoints:
        for step in checkpoints.all_steps():
            items = ocp.args.Composite(state=ocp.args.StandardRestore())
            saved = checkpoints.restore(step, args=items)["state"]
            names = sorted(name for name in saved if ".params[" in name)  # numbered in leaf order
            leaves = [
                jax.device_put(saved[name], like.sharding)
                for name, like in zip(names, jax.tree.leaves(first), strict=True)
            ]
            yield step, jax.tree.unflatten(jax.tree.structure(first), leaves)


# --------------------------------------------------------------------------------------- rollouts
def rollout_rewards(
    params: PyTree,
    setup: RolloutSetup,
    problems: EncodedProblems,
    *,
    sampling: SamplingSection,
    samples: int,
    stream: str,
    step: int,
) -> Float[np.ndarray, "M S"]:
    """Rewards of ``samples`` rollouts of every problem. ``stream`` names draws of this study's own:
    it makes another seed, so none of them is a rollout of training or evaluation."""
    seed = content_hash(f"value study {stream} {setup.seed}") % 2**31
    size = len(problems.problems)
    graded = roll_out(
        params,
        replace(setup, seed=seed),
        problems,
        ids=np.tile(np.arange(size, dtype=np.int32), samples),
        samples=np.repeat(np.arange(samples, dtype=np.int32), size),
        sampling=sampling,
        stream="evaluate",
        step=step,
    )
    if not graded.valid.all():
        raise SystemExit(
            f"error: {np.mean(~graded.valid):.1%} of the rollouts could not be graded; the study "
            "needs a verifier that grades all of them"
        )
    return graded.rewards.reshape(samples, size).T


# ------------------------------------------------------------------------------------ exact values
def exact_values(
    params: PyTree, setup: RolloutSetup, problems: EncodedProblems, sampling: SamplingSection
) -> Float[np.ndarray, " M"]:
    """P(the completion is right) under the verifier ``exact``, by teacher forcing.

    Sum over the encodings of the answer, with and without a leading space, of the product of their
    token probabilities at the sampling temperature times the probability that the next token ends
    the completion (any of ``eos_ids`` that leaves the text right); an answer of ``max_new_tokens``
    tokens needs no end. Other ways to write it (more spaces, another tokenisation, an end token
    inside the answer) are left out: the mean of rollouts beside it shows what that costs.
    """
    values = np.zeros(len(problems.problems))
    seen: list[set] = [set() for _ in problems.problems]
    for lead in LEADS:
        answers = [
            setup.tokenizer.encode(lead + p.answer, add_special_tokens=False)
            for p in problems.problems
        ]
        counts = np.array([
            0 < len(answer) <= sampling.max_new_tokens
            and tuple(answer) not in known
            and not set(answer) & set(setup.eos_ids)
            for answer, known in zip(answers, seen, strict=True)
        ])  # fmt: skip
        if counts.any():
            probabilities = path_probabilities(params, setup, problems, answers, sampling)
            values += np.where(counts, probabilities, 0)
        for known, answer in zip(seen, answers, strict=True):
            known.add(tuple(answer))
    return values


def path_probabilities(
    params: PyTree,
    setup: RolloutSetup,
    problems: EncodedProblems,
    answers: Sequence[Sequence[int]],
    sampling: SamplingSection,
) -> Float[np.ndarray, " M"]:
    """Probability of the answer's tokens followed by an end of the completion."""
    ends = right_ends(setup, problems, answers)
    shards = batch_shards(setup.mesh)
    rows = -(-min(ROWS_AT_ONCE, len(answers)) // shards) * shards
    longest = max(map(len, answers))
    tokens = np.pad(problems.tokens, ((0, 0), (0, longest)))
    for row, length, answer in zip(tokens, problems.lengths, answers, strict=True):
        row[length : length + len(answer)] = answer
    lengths = np.array([len(answer) for answer in answers], np.int32)
    parts = []
    for start in range(0, len(answers), rows):
        index = np.minimum(np.arange(start, start + rows), len(answers) - 1)
        arrays = put_rows(
            setup.mesh, (tokens[index], problems.lengths[index], lengths[index], ends[index])
        )
        part = answer_probability(
            params,
            setup.model_config,
            *arrays,
            longest=longest,
            eos_ids=setup.eos_ids,
            temperature=sampling.temperature,
            limit=sampling.max_new_tokens,
        )
        parts.append(np.asarray(part)[: len(answers) - start])
    return np.concatenate(parts)


def right_ends(
    setup: RolloutSetup, problems: EncodedProblems, answers: Sequence[Sequence[int]]
) -> Bool[np.ndarray, "M E"]:
    """Which end tokens after the answer leave a completion that the verifier takes as right."""
    rows = [[*answer, end] for answer in answers for end in setup.eos_ids]
    texts = setup.tokenizer.batch_decode(rows, skip_special_tokens=True)
    answers_expected = [p.answer for p in problems.problems for _ in setup.eos_ids]
    verdicts = setup.verifier.grade(texts, answers_expected)
    return np.array([v.reward > 0.5 for v in verdicts]).reshape(len(answers), -1)


@functools.partial(
    jax.jit, static_argnames=("model_config", "longest", "eos_ids", "temperature", "limit")
)
def answer_probability(
    params: PyTree,
    model_config: ModelConfig,
    tokens: Int[Array, "N T"],
    prompt_lengths: Int[Array, " N"],
    answer_lengths: Int[Array, " N"],
    ends: Bool[Array, "N E"],
    *,
    longest: int,
    eos_ids: tuple[int, ...],
    temperature: float,
    limit: int,
) -> Float[Array, " N"]:
    hidden, _ = decoder.forward(params, model_config, tokens)
    at = jnp.arange(longest + 1, dtype=jnp.int32)[None]
    position = jnp.minimum(prompt_lengths[:, None] - 1 + at, tokens.shape[1] - 1)  # predicts at
    hidden = jnp.take_along_axis(hidden, position[:, :, None], axis=1)
    logprobs = jax.nn.log_softmax(
        decoder.logits(params, model_config, hidden) / temperature, axis=-1
    )
    following = jnp.minimum(position + 1, tokens.shape[1] - 1)
    answer = jnp.take_along_axis(tokens, following, axis=1)
    picked = jnp.take_along_axis(logprobs, answer[:, :, None], axis=2)[:, :, 0]
    written = jnp.sum(jnp.where(at < answer_lengths[:, None], picked, 0), 1)
    last = jnp.take_along_axis(logprobs, answer_lengths[:, None, None], axis=1)[:, 0]
    ended = jnp.sum(jnp.where(ends, jnp.exp(last[:, jnp.array(eos_ids)]), 0), 1)
    return jnp.exp(written) * jnp.where(answer_lengths == limit, 1, ended)
