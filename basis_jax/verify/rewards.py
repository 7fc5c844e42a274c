"""Several rewards with weights, and ready-made rewards for format and length."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import regex

from basis_jax.verify.verdicts import Submission, Verdict, Verifier, verdict_of

READY_MADE = ("format", "overlong")
THINK_THEN_ANSWER = r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*"
"""The format of R1 (arXiv 2501.12948)."""
MATCH_SECONDS = 1.0
"""Some patterns, such as (a+)+b, could take years. The completion then counts as not matching."""


class FormatReward(Verifier):
    """1 if the whole completion matches a regular expression, else 0. A dot matches any character,
    line breaks included. A completion whose matching takes more than MATCH_SECONDS gets 0 and the
    verdict "timeout".

    Raises ValueError for a pattern that is not a regular expression.
    """

    name = "format"

    def __init__(self, pattern: str = THINK_THEN_ANSWER):
        try:
            self.pattern = regex.compile(pattern, regex.DOTALL)
        except regex.error as error:
            raise ValueError(
                f"data.format_pattern is {pattern!r}, which is no regular expression ({error}); "
                "correct it"
            ) from error

    def judge(self, rows: Sequence[Submission]) -> list[Verdict]:
        return [self._of(row.completion) for row in rows]

    def _of(self, completion: str) -> Verdict:
        try:
            found = self.pattern.fullmatch(completion, timeout=MATCH_SECONDS)
        except TimeoutError:
            return verdict_of("timeout", "matching data.format_pattern takes too long")
        return (
            verdict_of("right", "has the format")
            if found
            else verdict_of("wrong", "does not have the format")
        )


class OverlongReward(Verifier):
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), in tokens: 0 up to
    limit - buffer, then falling linearly to -1 at ``limit``, and -1 beyond.

    Raises ValueError unless 0 < buffer <= limit.
    """

    name = "overlong"

    def __init__(self, limit: int, buffer: int = 0):
        """``buffer`` 0: a fifth of the limit, as in DAPO (4,096 of 20,480 tokens)."""
        buffer = buffer or max(1, limit // 5)
        if not 0 < buffer <= limit:
            raise ValueError(
                f"data.overlong_buffer is {buffer} tokens and the limit is {limit}; give a buffer "
                f"of 1 to {limit}"
            )
        self.limit, self.buffer = limit, buffer

    def judge(self, rows: Sequence[Submission]) -> list[Verdict]:
        return [self._of(row.tokens) for row in rows]

    def _of(self, tokens: int) -> Verdict:
        reward = overlong(tokens, limit=self.limit, buffer=self.buffer)
        return Verdict(reward, True, f"{tokens} tokens", "wrong" if reward else "right")


def overlong(tokens: int, *, limit: int, buffer: int) -> float:
    """max(-1, min(0, (limit - buffer - tokens) / buffer))."""
    return max(-1.0, min(0.0, (limit - buffer - tokens) / buffer))


class SeveralRewards(Verifier):
    """The weighted sum of the rewards r_k of a completion; the first is that of the verifier.

    A completion that one of them cannot grade is invalid. With ``normalised``, over the N valid
    completions of a step,

        r_i = sum_k w_k r_ki / s_k,    s_k^2 = mean_j (r_kj - m_k)^2,    m_k = mean_j r_kj,

    so that each reward varies in proportion to its weight. This is GDPO (arXiv 2601.05242) with the
    step in place of the group; the mean is left to the estimator's baseline. A reward that is the
    same for all (s_k = 0) adds 0. A completion's own reward is part of s_k: leaving it out changes
    s_k by a factor of about 1 + (1 - z^2) / (2 N) at z deviations from the mean. The factor is
    positive and the same for all rows of a step.
    """

    def __init__(
        self,
        rewards: Mapping[str, Verifier],
        weights: Sequence[float],
        *,
        normalised: bool = False,
    ):
        self.rewards, self.weights = tuple(rewards.values()), tuple(weights)
        self.part_names, self.normalised = tuple(rewards), normalised
        self.name = self.rewards[0].name
        self.whole_batches = any(reward.whole_batches for reward in self.rewards)
        self.required_columns = tuple({n for r in self.rewards for n in r.required_columns})
        wanted = [reward.columns for reward in self.rewards]
        every = any(columns is None for columns in wanted)
        self.columns = (
            None if every else tuple({name for columns in wanted for name in columns or ()})
        )

    def judge(self, rows: Sequence[Submission]) -> list[Verdict]:
        with ThreadPoolExecutor(len(self.rewards)) as threads:  # slow ones run at the same time
            graded = [*threads.map(lambda reward: reward.judge(rows), self.rewards)]
        return [self._sum(of_row) for of_row in zip(*graded, strict=True)]

    def _sum(self, verdicts: Sequence[Verdict]) -> Verdict:
        for name, verdict in zip(self.part_names, verdicts, strict=True):
            if not verdict.valid:
                return Verdict(0.0, False, f"{name}: {verdict.reason}", verdict.kind)
        parts = tuple(verdict.reward for verdict in verdicts)
        named = zip(self.part_names, parts, strict=True)
        single = ", ".join(f"{name} {reward:g}" for name, reward in named)
        return Verdict(
            _weighted(self.weights, parts),
            True,
            f"{verdicts[0].reason} ({single})",
            verdicts[0].kind,
            parts,
        )

    def settle(self, verdicts: list[Verdict]) -> list[Verdict]:
        if not self.normalised:
            return verdicts
        columns = zip(*(v.parts for v in verdicts if v.valid), strict=True)
        scales = [_deviation(column) for column in columns]
        weights = [w / s if s else 0.0 for w, s in zip(self.weights, scales, strict=False)]
        return [replace(v, reward=_weighted(weights, v.parts)) if v.valid else v for v in verdicts]

    def stop(self) -> None:
        for reward in self.rewards:
            reward.stop()

    def close(self) -> None:
        for reward in self.rewards:
            reward.close()


def _weighted(weights: Sequence[float], parts: Sequence[float]) -> float:
    """The weighted sum; NaN, which counts as not graded, if it is too large for a float."""
    try:
        return math.fsum(w * r for w, r in zip(weights, parts, strict=True))
    except (OverflowError, ValueError):  # a partial sum, or inf - inf
        return math.nan


def _deviation(values: Sequence[float]) -> float:
    """The root of the mean squared distance from the mean; 0 for values that are all the same.

    Values are divided by the largest first, because squares of 1e200 overflow.
    """
    if min(values) == max(values):
        return 0.0
    largest = max(map(abs, values))
    scaled = [value / largest for value in values]
    mean = math.fsum(scaled) / len(scaled)
    return largest * math.sqrt(math.fsum((x - mean) ** 2 for x in scaled) / len(scaled))
