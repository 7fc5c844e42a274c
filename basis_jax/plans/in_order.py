"""Plans that visit all problems in turn, in the order of ``data.order``."""

import numpy as np

from basis_jax.data.order import step_problems
from basis_jax.plans.options import whole
from basis_jax.plans.plan import Belief, Plan, Requests, Setting, of_problems


def problems_in_order(setting: Setting, step: int) -> np.ndarray:
    """The problems of a step that visits them in turn."""
    return step_problems(
        setting.seed,
        step,
        batch_size=setting.prompts,
        sizes=setting.sizes,
        weights=setting.set_weights,
    )


def uniform(setting: Setting) -> Plan:
    """Every problem once an epoch, ``group_size`` rollouts of each."""
    return sticky(setting, hold=1)


def sticky(setting: Setting, *, hold: int = 8) -> Plan:
    """The problems of ``uniform``, each batch of them for ``hold`` successive steps.

    KAE (arXiv 2604.28005) reuses a batch for 8 steps on DAPO-Math-17K and for 10 on GSM8K and
    MATH. Its window of 5 steps is empty in the first of them only.
    """
    whole("hold", hold, least=1)

    def ask(step: int, belief: Belief) -> Requests:
        return of_problems(problems_in_order(setting, step // hold), setting.group_size)

    return Plan(ask, hold=hold)
