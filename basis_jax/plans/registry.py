"""The plans by name or by reference, with their options."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from basis_jax import references
from basis_jax.plans.branch import branch
from basis_jax.plans.greedy_beside import greedy_beside
from basis_jax.plans.in_order import sticky, uniform
from basis_jax.plans.plan import Maker, Plan, Setting
from basis_jax.plans.sequential import sequential
from basis_jax.plans.weighted import weighted
from basis_jax.references import near

PLANS: dict[str, Maker] = {
    "branch": branch,
    "greedy_beside": greedy_beside,
    "sequential": sequential,
    "sticky": sticky,
    "uniform": uniform,
    "weighted": weighted,
}


def find(name: str, options: Mapping[str, Any]) -> Maker:
    """The function that makes the plan: of ``PLANS``, or a user's own (``FILE.py:NAME`` or
    ``package.module:NAME``). Raises ValueError for an unknown name or option, and for a reference
    that cannot be loaded."""
    if ":" in name:
        maker = references.load(name, "plan")
        if not callable(maker):
            raise ValueError(
                f"sampling.plan {name} is of type {type(maker).__name__}; name a function "
                "(setting, **options) that returns a plans.Plan"
            )
    elif name in PLANS:
        maker = PLANS[name]
    else:
        raise ValueError(
            f"sampling.plan is {name!r}, which is no plan"
            f"{near(name, [*PLANS, *references.FORMS.split(' or ')])}"
        )
    parameters = inspect.signature(maker).parameters.values()
    allowed = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"sampling.plan_options: {name} has no option {option!r}{near(option, allowed)}"
            )
    return maker


def make(name: str, setting: Setting, options: Mapping[str, Any] | None = None) -> Plan:
    """The plan for a run. Raises ValueError as ``find``, for an option with a value that the plan
    refuses, and for a function that does not return a Plan."""
    options = options or {}
    maker = find(name, options)
    try:
        plan = maker(setting, **options)
    except ValueError as error:
        raise ValueError(f"sampling.plan_options: {name} {error}") from error
    if not isinstance(plan, Plan):
        raise ValueError(
            f"sampling.plan {name} returned a {type(plan).__name__}; return a plans.Plan"
        )
    return dataclasses.replace(plan, name=name)


def source_fingerprint(name: str) -> str | None:
    """SHA-256 in hex of the file of a user's own plan; None for the built-in ones."""
    return references.fingerprint(name, "plan") if ":" in name else None
