"""A rollout plan of your own: hard problems come back before it is their turn.

    basis-jax train --config quickstart --run-dir runs/own_plan --estimator.name value_filter \
        --estimator.table-samples 0 --sampling.plan examples/own_plan.py:hard_again
"""

import numpy as np

from basis_jax import plans


def hard_again(setting, *, share=0.25):
    """A share of the step are the problems with the lowest values; the others come in order."""
    again = round(share * setting.prompts)

    def ask(step, belief):
        in_order = plans.problems_in_order(setting, step)[again:]
        hardest = np.argsort(belief.values, kind="stable")
        hardest = hardest[~np.isin(hardest, in_order)][:again]
        return plans.of_problems(np.concatenate([hardest, in_order]), setting.group_size)

    return plans.Plan(ask, needs_values=True)
