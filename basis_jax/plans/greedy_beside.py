"""ReMax: the reward of a greedy completion is the baseline of the sampled ones."""

from collections.abc import Sequence

import numpy as np

from basis_jax.plans.in_order import uniform
from basis_jax.plans.plan import Belief, Plan, Requests, Setting
from basis_jax.sampling.rollouts import Graded


def greedy_beside(setting: Setting) -> Plan:
    """The rollouts of ``uniform``, and one greedy completion of every problem of the step
    (arXiv 2310.10505). The greedy ones are not trained on. The estimator ``remax`` subtracts their
    rewards. They are sampled after the others, by the same policy."""

    def more(
        rounds: Sequence[Requests], graded: Sequence[Graded], belief: Belief
    ) -> Requests | None:
        if len(rounds) > 1:
            return None
        problems = rounds[0].problems[:: setting.group_size]
        return Requests(problems, np.zeros(len(problems), np.int32), greedy=True)

    return Plan(uniform(setting).ask, more, greedy=True)
