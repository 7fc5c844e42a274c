"""Rollout plans: which problems a step samples, how often, and with which weights.

``PLANS`` are the built-in ones. A plan of your own is a function (setting, **options) -> ``Plan``
in a file, given as ``sampling.plan FILE.py:NAME``.
"""

from basis_jax.plans.in_order import problems_in_order
from basis_jax.plans.plan import Belief, Plan, Requests, Setting, of_problems
from basis_jax.plans.registry import PLANS, find, make, source_fingerprint

__all__ = [
    "PLANS",
    "Belief",
    "Plan",
    "Requests",
    "Setting",
    "find",
    "make",
    "of_problems",
    "problems_in_order",
    "source_fingerprint",
]
