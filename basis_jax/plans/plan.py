"""What a rollout plan is: which problems a step samples, how often, and with which weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from basis_jax.sampling.rollouts import Graded
from basis_jax.types import TokenCredit


@dataclass(frozen=True)
class Setting:
    """What a plan is made for, fixed during a run.

    A step has room for ``prompts`` problems with ``group_size`` rollouts each. The problems of all
    training sets are numbered 0..M-1, set after set; ``sizes`` are those of the sets.
    """

    seed: int
    prompts: int  # train.prompts_per_step
    group_size: int  # sampling.group_size
    sizes: tuple[int, ...]
    set_weights: tuple[float, ...] = (1.0,)
    low: float = 0.0  # the range of the rewards
    high: float = 1.0
    decode: Callable[[Sequence[int]], str] | None = None  # tokens -> text, of the tokenizer

    @property
    def problems(self) -> int:
        """M, the number of training problems."""
        return sum(self.sizes)


class Belief(NamedTuple):
    """What the estimator knows before the step.

    ``values`` [M] are the expected rewards of all problems, scaled from the range of the rewards to
    0..1; None unless the plan has ``needs_values``. ``state`` is the estimator's state as NumPy
    arrays; None unless the plan has ``needs_state``.
    """

    values: np.ndarray | None = None
    state: Any = None


@dataclass(frozen=True)
class Requests:
    """Rollouts that a plan asks for, [n].

    Rollout ``samples[k]`` of problem ``problems[k]``. The number, 0..group_size - 1, decides the
    rollout's random numbers; a step has each at most once. ``weights``: factors of the rollouts in
    the loss (None: 1). ``greedy``: completions at temperature 0 of problems of the step, one each.
    They are not trained on. Their rewards are the ``greedy_rewards`` of the problem's rollouts.
    ``prefixes``: the tokens that each completion begins with. These completions are not trained on
    either; a ``Plan`` with ``credit`` uses their rewards. Their ``samples`` are numbers from
    group_size on, so that their random numbers are not those of the rollouts they branch off.

    Raises ValueError unless the arrays have one length and hold whole numbers.
    """

    problems: np.ndarray
    samples: np.ndarray
    weights: np.ndarray | None = None
    greedy: bool = False
    prefixes: Sequence[Sequence[int] | np.ndarray] | None = None

    @property
    def aside(self) -> bool:
        """Whether the rollouts are not trained on."""
        return self.greedy or self.prefixes is not None

    def __post_init__(self) -> None:
        for name in ("problems", "samples"):
            array = np.asarray(getattr(self, name))
            if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
                raise ValueError(
                    f"Requests got {name} {array.dtype}{list(array.shape)}; give one whole number "
                    "per rollout"
                )
            object.__setattr__(self, name, array.astype(np.int32))
        if self.weights is not None:
            object.__setattr__(self, "weights", np.asarray(self.weights, np.float32))
        arrays = (self.samples, self.problems if self.weights is None else self.weights)
        if any(array.shape != self.problems.shape for array in arrays):
            raise ValueError(
                f"Requests got arrays of {self.problems.size}, {self.samples.size} and "
                f"{arrays[1].size} entries; give one per rollout in each"
            )
        if self.prefixes is not None and len(self.prefixes) != self.problems.size:
            raise ValueError(
                f"Requests got {self.problems.size} problems and {len(self.prefixes)} prefixes; "
                "give one per rollout"
            )


def of_problems(problems: np.ndarray, rollouts: int, weights: np.ndarray | None = None) -> Requests:
    """Requests for ``rollouts`` rollouts of each problem; ``weights`` are those of the problems."""
    return Requests(
        np.repeat(problems, rollouts),
        np.tile(np.arange(rollouts), len(problems)),
        None if weights is None else np.repeat(weights, rollouts),
    )


@dataclass(frozen=True)
class Plan:
    """A plan as functions. All must be pure, so that a resumed run asks for the same rollouts.

    ``ask(step, belief)`` returns the first Requests of the step, which is counted from 0.
    ``more(rounds, graded, belief)`` gets all Requests of the step so far and what came of each (a
    ``Graded``), and returns further Requests, or None when the step has all its rollouts.
    """

    ask: Callable[[int, Belief], Requests]
    more: Callable[[Sequence[Requests], Sequence[Graded], Belief], Requests | None] | None = None
    needs_values: bool = False  # of the estimator, in Belief
    needs_state: bool = False
    greedy: bool = False  # whether it asks for greedy completions
    credit: Callable[[Sequence[Requests], Sequence[Graded]], TokenCredit] | None = None
    """credit(rounds, graded) -> what is learnt from every token of the rollouts that are trained
    on, in the order in which they were asked for. For estimators that need ``start_values``."""
    alike: bool = False
    """Whether problems count alike in the loss, however many rollouts each has: a rollout of a
    problem with k of them gets the weight 1 / k, up to a factor that makes the mean weight 1."""
    hold: int = 1  # steps for which the same problems are kept
    name: str = ""  # in messages; ``plans.make`` sets it


Maker = Callable[..., Plan]
"""maker(setting, **options) -> Plan. Its keyword-only parameters are ``sampling.plan_options``."""
