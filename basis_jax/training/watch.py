"""Warn about problems of a run that raise no error: each once, with what to do about it.

If all valid rewards of a step are equal, the step does not show which completion was better. Its
advantages are then only the estimator's bias. AdamW scales even a small gradient to a step of full
size, so the policy is not updated in such a step (``has_signal``).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from basis_jax import estimators
from basis_jax.config import Config, WatchSection
from basis_jax.sampling.rollouts import Graded
from basis_jax.verify.verdicts import RIGHT_ABOVE

MIN_REWARDS = 32
"""So many equal rewards are unlikely by chance. With a pass rate of 0.2 or 0.8 they occur once in a
thousand steps, with 0.1 or 0.9 once in thirty."""
SHOWN = 3  # completions in the message that ends a run


def has_signal(graded: Graded) -> bool:
    """Whether the step's rewards can teach anything; if not, the policy is not updated.

    False if no reward is valid, or if at least ``MIN_REWARDS`` are valid and all are equal. True
    for equal rewards too if the plan's credit tells steps of the rollouts apart.
    """
    rewards = graded.rewards[graded.valid]
    if not rewards.size:
        return False
    if graded.credit is not None and np.any(graded.credit.advantages):
        return True
    return rewards.size < MIN_REWARDS or bool(np.any(rewards != rewards[0]))


def findings(
    metrics: Mapping[str, float], first: Mapping[str, float], limits: WatchSection
) -> dict[str, str]:
    """The metrics beyond their limits: a dict from fields of ``WatchSection`` to a sentence each.

    ``first``: the metrics of the run's first update. Some limits are relative to them.
    """

    def value(key: str) -> float:
        return metrics.get(key, np.nan)  # comparisons with nan are False: no finding

    def relative(key: str) -> float:
        return value(key) / first.get(key, np.nan) if first.get(key) else np.nan

    found = {}
    if value("estimate/zero_share") > limits.zero_share:
        found["zero_share"] = (
            f"{value('estimate/zero_share'):.0%} of the advantages are 0 and teach nothing; use "
            "problems that the model solves sometimes, or more rollouts per step"
        )
    if value("reward/invalid") > limits.invalid:
        found["invalid"] = (
            f"{value('reward/invalid'):.0%} of the rollouts could not be graded and are left out; "
            "look at the reasons in samples.jsonl"
        )
    if value("completion/truncated") > limits.truncated:
        found["truncated"] = (
            f"{value('completion/truncated'):.0%} of the completions are cut at the length limit; "
            "raise sampling.max_new_tokens, or check that the model ends its answers "
            "(sampling.stop_tokens)"
        )
    if relative("policy/entropy") < limits.entropy:
        found["entropy"] = (
            f"the policy's entropy fell to {relative('policy/entropy'):.1%} of the first step's: "
            "it hardly explores any more; lower optim.lr or raise loss.clip_high"
        )
    if relative("completion/length_mean") < limits.length:
        found["length"] = (
            f"completions shrank to {relative('completion/length_mean'):.0%} of the first step's "
            "length; look at samples.jsonl and lower optim.lr"
        )
    if value("sampler/logprob_gap_mean") > limits.logprob_gap:
        found["logprob_gap"] = (
            "the sampler's log-probabilities differ from the trainer's by "
            f"{value('sampler/logprob_gap_mean'):.3g} nats per token; set sampling.dtype to "
            "model.compute_dtype, or loss.sampler_correction to tis"
        )
    if relative("policy/grad_norm") < limits.grad_norm:
        found["grad_norm"] = (
            f"the gradient's norm fell to {relative('policy/grad_norm'):.2%} of the first step's: "
            "what is left is mostly noise, which the optimizer scales up; stop here or lower "
            "optim.lr"
        )
    return found


class Watch:
    """Gives each warning of a run once, and counts successive steps without signal.

    ``history``: the lines of metrics.jsonl so far, so that a resumed run continues the count.
    """

    def __init__(self, config: Config, history: Sequence[Mapping[str, Any]] = ()):
        self._config = config
        self._given: set[str] = set()
        self._first: Mapping[str, float] = {}
        self._alike: list[float] = []  # mean rewards of the latest steps, all without signal
        self._right: list[float] = []  # their shares of right completions
        for metrics in history:
            self.count(metrics)

    def count(self, metrics: Mapping[str, Any]) -> None:
        """Note a step's metrics, or the line before the first step."""
        if not self._first and "policy/grad_norm" in metrics:
            self._first = {k: float(v) for k, v in metrics.items() if v is not None}
        if metrics.get("estimate/no_signal"):
            self._alike.append(metrics["reward/mean"])
            known = float(metrics["reward/mean"] > RIGHT_ABOVE)
            self._right.append(metrics.get("reward/accuracy", known))
        else:
            self._alike.clear()
            self._right.clear()

    @property
    def solved(self) -> bool:
        """Whether every completion of the last ``train.patience`` steps was right. Always False if
        the verifier's verdict is not part of the reward."""
        return self._out_of_patience and self._rewards_verdicts and min(self._right) == 1

    @property
    def _rewards_verdicts(self) -> bool:
        return self._config.data.verifier_weight != 0

    @property
    def _out_of_patience(self) -> bool:
        return len(self._alike) >= self._config.train.patience

    def solved_message(self) -> str:
        return (
            f"solved: every completion of the last {len(self._alike)} steps was right, so the run "
            "ends; give harder problems to go on"
        )

    def warnings(
        self, metrics: Mapping[str, float], graded: Graded, answers: Sequence[str]
    ) -> Iterator[str]:
        """New warnings about the step that was counted last; ``answers`` are the right answers.

        Raises ValueError if the run must end: for a warning named in ``train.abort_on``, or after
        ``train.patience`` steps in a row without signal that are not ``solved``.
        """
        yield from self._signal_warnings(graded)
        yield from self._range_warning(graded.rewards[graded.valid])
        for name, sentence in findings(metrics, self._first, self._config.watch).items():
            if name in self._config.train.abort_on:
                raise ValueError(f"the run ends as train.abort_on has {name}: {sentence}")
            if name not in self._given:
                self._given.add(name)
                yield f"warning: {sentence} (limit: watch.{name})"
        if self._out_of_patience and not self.solved:
            raise ValueError(self._nothing_to_learn(graded, answers))

    def _signal_warnings(self, graded: Graded) -> Iterator[str]:
        rewards = graded.rewards[graded.valid]
        if len(self._alike) == 1 and rewards.size:
            yield (
                f"warning: all {rewards.size} valid rewards of this step are {rewards[0]:g}: there "
                "is nothing to learn from it, and the policy is left as it is"
            )
        elif len(self._alike) == 1:
            yield "warning: no rollout of this step could be graded; the policy is left as it is"
        elif not self._alike and rewards.size < MIN_REWARDS and np.ptp(rewards) == 0:
            if "few" not in self._given:
                self._given.add("few")
                yield (
                    f"warning: the {rewards.size} valid rewards of this step are all equal, too "
                    "few to say that there is no signal, so the policy is updated; raise "
                    "train.prompts_per_step"
                )

    def _range_warning(self, rewards: np.ndarray) -> Iterator[str]:
        section = self._config.estimator
        if "range" in self._given or not {"low", "high"} <= estimators.option_names(section.name):
            return
        low, high = (float(section.options.get(*end)) for end in (("low", 0.0), ("high", 1.0)))
        if np.any(rewards < low) or np.any(rewards > high):
            self._given.add("range")
            yield (
                f"warning: rewards of this step go from {rewards.min():g} to {rewards.max():g} and "
                f"{section.name} takes those beyond {low:g} to {high:g} as the nearer end; give "
                "the range as --estimator.options low LOW high HIGH"
            )

    def _nothing_to_learn(self, graded: Graded, answers: Sequence[str]) -> str:
        shown = "; ".join(
            f"{graded.completions[i][-80:]!r} ({graded.reasons[i]}; right answer {answers[i]!r})"
            for i in np.flatnonzero(graded.present)[:SHOWN]
        )
        if self._rewards_verdicts and not any(self._right):
            what = f"no completion of the last {len(self._alike)} steps was right"
            where = "data.verifier, the answers, the prompt format and sampling.max_new_tokens"
        else:
            what = f"all rewards were equal in each of the last {len(self._alike)} steps"
            where = "data.rewards and their weights, and at the prompts"
        return (
            f"{what} (mean reward {np.mean(self._alike):g}), so there is nothing to learn from; "
            f"look at {where}; the last completions were {shown}"
        )
