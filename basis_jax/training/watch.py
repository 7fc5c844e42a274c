"""What goes wrong in a run without an error: reported once, with what to do about it.

A step whose valid rewards are all equal says nothing about which completion was better. Its
advantages are at most the estimator's bias, and AdamW turns a small gradient into steps of full
size, so such a step must not move the policy (``has_signal``).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from basis_jax import estimators
from basis_jax.config import Config, WatchSection
from basis_jax.sampling.rollouts import Graded
from basis_jax.verify.verdicts import RIGHT_ABOVE

MIN_REWARDS = 32
"""So many equal rewards are no accident: with a pass rate of .2 or .8 it happens once in a thousand
steps, with .1 or .9 once in thirty."""
SHOWN = 3  # completions in the message that ends a run


def has_signal(graded: Graded) -> bool:
    """False where at least ``MIN_REWARDS`` rewards are valid and all are equal, or none is valid:
    the policy is then not updated."""
    rewards = graded.rewards[graded.valid]
    if not rewards.size:
        return False
    return rewards.size < MIN_REWARDS or bool(np.any(rewards != rewards[0]))


def findings(
    metrics: Mapping[str, float], first: Mapping[str, float], limits: WatchSection
) -> dict[str, str]:
    """What is beyond its limit: the names of ``WatchSection`` with a sentence each.

    ``first``: the metrics of the run's first update, which some limits are relative to.
    """

    def value(key: str) -> float:
        return metrics.get(key, np.nan)  # nan is beyond no limit

    def relative(key: str) -> float:
        return value(key) / first.get(key, np.nan) if first.get(key) else np.nan

    found = {}
    if value("estimate/zero_share") > limits.zero_share:
        found["zero_share"] = (
            f"{value('estimate/zero_share'):.0%} of the advantages are 0 and teach nothing; use "
            "problems that the model solves sometimes, or more rollouts a step"
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
            f"{value('sampler/logprob_gap_mean'):.3g} nats a token; set sampling.dtype to "
            "model.compute_dtype, or loss.tis_cap to 2"
        )
    if relative("policy/grad_norm") < limits.grad_norm:
        found["grad_norm"] = (
            f"the gradient's norm fell to {relative('policy/grad_norm'):.2%} of the first step's: "
            "what is left is mostly noise, which the optimizer scales up; stop here or lower "
            "optim.lr"
        )
    return found


class Watch:
    """The warnings of a run, each given once, and its count of steps without signal.

    ``history``: the lines of metrics.jsonl so far, so that a resumed run counts on.
    """

    def __init__(self, config: Config, history: Sequence[Mapping[str, Any]] = ()):
        self._config = config
        self._given: set[str] = set()
        self._first: Mapping[str, float] = {}
        self._alike: list[float] = []  # mean rewards of the latest steps, all without signal
        self._right: list[float] = []  # the share of right completions of these
        for metrics in history:
            self.count(metrics)

    def count(self, metrics: Mapping[str, Any]) -> None:
        """Note a step's metrics, or the line before the first step."""
        if not self._first and "policy/grad_norm" in metrics:
            self._first = {k: float(v) for k, v in metrics.items() if v is not None}
        if metrics.get("estimate/no_signal"):
            self._alike.append(metrics["reward/mean"])
            self._right.append(metrics.get("reward/accuracy", metrics["reward/mean"]))
        else:
            self._alike.clear()
            self._right.clear()

    @property
    def solved(self) -> bool:
        """Whether every completion of the last ``train.patience`` steps was right."""
        return self._out_of_patience and min(self._right) > RIGHT_ABOVE

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
        """New warnings about the step that was counted last; ``answers`` are the right ones.

        Raises ValueError where the run must end: a warning of ``train.abort_on``, or
        ``train.patience`` steps in a row without a right completion.
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
            for i in range(min(SHOWN, len(answers)))
        )
        return (
            f"no completion of the last {len(self._alike)} steps was right (mean reward "
            f"{np.mean(self._alike):g}), so there is nothing to learn from; look at data.verifier, "
            "the answers, the prompt format and sampling.max_new_tokens; the last completions "
            f"were {shown}"
        )
