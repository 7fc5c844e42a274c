"""The rollouts of a gradient study: drawn once with the project's own sampler and verifier.

Every problem has ``ESTIMATED`` rollouts that batches are drawn from, ``HELD_BACK`` rollouts for
true gradients and oracles, and one for the optimizer step between the two updates. These keep their
tokens, because their gradients are needed. The rollouts of the offline table, and spare ones that
give the problem's true value, keep only what the sampler records.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, PyTree

from basis_jax.config import SamplingSection
from basis_jax.data.encoding import EncodedProblems
from basis_jax.data.problem import content_hash
from basis_jax.sampling.rollouts import Graded, RolloutSetup, roll_out

ESTIMATED = HELD_BACK = 8
KEPT = ESTIMATED + HELD_BACK + 1  # rollouts per problem with tokens; the last is for the step
TABLE = 16  # rollouts of the offline table
SPARE = 48
ROWS_A_CALL = 4096


@dataclass(frozen=True)
class Pool:
    """P problems; S = KEPT rollouts of each, and X = TABLE + SPARE that have no tokens."""

    problems: Int[np.ndarray, " P"]  # rows of the training set
    tokens: Int[np.ndarray, "P S T"]
    prompt_lengths: Int[np.ndarray, " P"]
    lengths: Int[np.ndarray, "P S"]  # of completions
    rewards: Float[np.ndarray, "P S"]
    score_norms: Float[np.ndarray, "P S"]  # as the sampler records them
    surprises: Float[np.ndarray, "P S"]  # sum over tokens of (1 - probability)^2
    logprobs: Float[np.ndarray, "P S"]  # of completions
    other_rewards: Float[np.ndarray, "P X"]
    other_score_norms: Float[np.ndarray, "P X"]

    @property
    def masks(self) -> Bool[np.ndarray, "P S T"]:
        """True on the tokens of completions."""
        at = np.arange(self.tokens.shape[2])
        start = self.prompt_lengths[:, None, None]
        return (at >= start) & (at < start + self.lengths[..., None])

    @property
    def successes(self) -> Float[np.ndarray, " P"]:
        """Sum of the rewards of the table's rollouts."""
        return self.other_rewards[:, :TABLE].sum(1)

    @property
    def values(self) -> Float[np.ndarray, " P"]:
        """The mean reward of the spare rollouts."""
        return self.other_rewards[:, TABLE:].mean(1)

    def unreachable(self, lost: Bool[np.ndarray, " P"]) -> "Pool":
        """The same rollouts, with no right answer to the ``lost`` problems."""
        return replace(
            self,
            rewards=np.where(lost[:, None], 0, self.rewards),
            other_rewards=np.where(lost[:, None], 0, self.other_rewards),
        )


def draw_pool(
    params: PyTree,
    setup: RolloutSetup,
    problems: EncodedProblems,
    *,
    sampling: SamplingSection,
    size: int,
    report: Callable[[str], None] = print,
) -> Pool:
    """Rollouts of ``size`` random problems. Their random numbers are used by this study only: none
    is a rollout of training or evaluation. Raises ValueError if there are fewer problems."""
    if size > len(problems.problems):
        raise ValueError(
            f"the study was to take {size} problems but the training set has "
            f"{len(problems.problems)}; give fewer with --problems"
        )
    chosen = np.random.default_rng([setup.seed, 5]).permutation(len(problems.problems))[:size]
    setup = replace(setup, seed=content_hash(f"gradient study {setup.seed}") % 2**31)
    ids = np.tile(chosen.astype(np.int32), KEPT + TABLE + SPARE)
    samples = np.repeat(np.arange(KEPT + TABLE + SPARE, dtype=np.int32), size)
    parts = []
    for start in range(0, len(ids), ROWS_A_CALL):
        rows = slice(start, start + ROWS_A_CALL)
        part = roll_out(
            params,
            setup,
            problems,
            ids=ids[rows],
            samples=samples[rows],
            sampling=sampling,
            stream="evaluate",
            step=0,
        )
        if not part.valid.all():
            raise ValueError(
                f"{np.mean(~part.valid):.1%} of the rollouts could not be graded; the study needs "
                "a verifier that grades all of them"
            )
        parts.append(part)
        report(f"{start + len(part.rewards)} of {len(ids)} rollouts")
    return arrange(chosen, parts)


def arrange(chosen: Int[np.ndarray, " P"], parts: Sequence[Graded]) -> Pool:
    """A ``Pool`` from parts that each hold one sample of all problems."""

    def gather(name: str) -> np.ndarray:  # [P rollouts ...]
        found = [getattr(p if name == "rewards" else p.rollouts, name) for p in parts]
        whole = np.concatenate([np.asarray(x) for x in found])
        return np.swapaxes(whole.reshape(-1, len(chosen), *whole.shape[1:]), 0, 1)

    logprobs = gather("sampler_logprobs")[:, :KEPT]
    lengths = gather("completion_lengths")[:, :KEPT]
    prompt_lengths = gather("prompt_lengths")[:, 0]
    rewards, score_norms = gather("rewards"), gather("score_norms")
    return Pool(
        problems=chosen,
        tokens=gather("tokens")[:, :KEPT, : int((prompt_lengths[:, None] + lengths).max())],
        prompt_lengths=prompt_lengths,
        lengths=lengths,
        rewards=rewards[:, :KEPT],
        score_norms=score_norms[:, :KEPT],
        surprises=np.sum(np.where(logprobs != 0, 1 - np.exp(logprobs), 0) ** 2, axis=2),
        logprobs=logprobs.sum(2),
        other_rewards=rewards[:, KEPT:],
        other_score_norms=score_norms[:, KEPT:],
    )


def read(path: Path) -> Pool:
    with np.load(path) as file:
        return Pool(**{field.name: file[field.name] for field in fields(Pool)})
