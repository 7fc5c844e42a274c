"""V_0.5: more rollouts of the problems whose first ones contradict the estimator's value."""

from collections.abc import Sequence

import numpy as np

from basis_jax.plans.in_order import problems_in_order
from basis_jax.plans.options import number, whole
from basis_jax.plans.plan import Belief, Plan, Requests, Setting, of_problems
from basis_jax.sampling.rollouts import Graded

COST = 0.0039  # of a rollout, in squared rewards of -1 and 1: about 1 / 16^2


def sequential(setting: Setting, *, first: int = 4, add: int = 4, cost: float = COST) -> Plan:
    """``first`` rollouts of every problem; then ``add`` at a time, up to ``group_size``, where one
    more is expected to reduce the squared error of the baseline by more than ``cost``.

    V_0.5, arXiv 2603.10848, whose ``group_size`` is 16, and which adds 1 at a time. The prior is
    the estimator's value of the problem before the step. See ``saving``. The published rule stops
    by R(k) = MSE(k) + cost k; its exact inequality could not be found, so this one is inferred.

    Problems count alike in the loss (``Plan.alike``). How many rollouts a problem gets depends on
    their rewards, so its mean reward and the baselines made of it have a bias that a fixed number
    of rollouts does not have.
    """
    whole("first", first, least=1, most=setting.group_size - 1)
    whole("add", add, least=1)
    number("cost", cost, above=0.0)
    span = setting.high - setting.low

    def ask(step: int, belief: Belief) -> Requests:
        return of_problems(problems_in_order(setting, step), first)

    def more(
        rounds: Sequence[Requests], graded: Sequence[Graded], belief: Belief
    ) -> Requests | None:
        assert belief.values is not None  # needs_values
        problems = rounds[0].problems[::first]
        asked = np.concatenate([r.problems for r in rounds])
        rewards = (np.concatenate([g.rewards for g in graded]) - setting.low) / span
        valid = np.concatenate([g.valid for g in graded])
        there, place = np.unique(asked, return_inverse=True)
        taken = np.bincount(place)
        count = np.bincount(place, valid)
        mean = np.bincount(place, valid * np.clip(rewards, 0, 1)) / np.maximum(count, 1)
        worth = (count > 0) & (saving(mean, belief.values[there], np.maximum(count, 1)) > cost)
        further = dict(
            zip(there, np.where(worth, np.minimum(add, setting.group_size - taken), 0), strict=True)
        )
        started = dict(zip(there, taken, strict=True))
        again = [
            (problem, started[problem] + k) for problem in problems for k in range(further[problem])
        ]
        if not again:
            return None
        chosen, samples = zip(*again, strict=True)
        return Requests(np.array(chosen), np.array(samples))

    return Plan(ask, more, needs_values=True, alike=True)


def saving(mean: np.ndarray, prior: np.ndarray, count: np.ndarray) -> np.ndarray:
    """How much one more rollout is expected to reduce the squared error of the fused baseline, for
    means and priors in 0..1, in units of rewards of -1 and 1.

    With D = max(0, (mean - prior)^2 - 1 / count) the error is MSE(count) = D / (count D + 1), and
    the saving MSE(count) - MSE(count + 1). It is 0 where the rollouts agree with the prior.
    """
    deviation = np.maximum(0.0, (2 * mean - 2 * prior) ** 2 - 1 / count)

    def error(count):
        return deviation / (count * deviation + 1)

    return error(count) - error(count + 1)
