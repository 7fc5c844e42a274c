"""Advantage estimators: pure functions of rewards, usable under ``jax.jit`` without a trainer.

There are two interfaces. As a library, every estimator is one function, such as
``basis(rewards, successes, trials) -> Estimate``. For a trainer, ``make(name, **options)`` returns
an ``Estimator``, whose update takes a state and returns the next one:

>>> signals = estimators.Signals(
...     rewards=jnp.float32([1, 0, 1]),
...     valid=jnp.array([True, True, True]),
...     problem_ids=jnp.array([4, 0, 2]),
...     lengths=jnp.array([7, 5, 9]),
... )
>>> estimator = estimators.make("basis")
>>> state = estimator.init(np.array([1, 3, 5, 2, 4]), np.full(5, 8))  # successes, trials: offline
>>> state, estimate = estimator.update(state, signals)
>>> isinstance(state, estimators.Table) and isinstance(estimate, estimators.Estimate)
True

You declare an estimator of your own with ``stateless`` or ``stateful`` (module ``declare``) and
make it by reference: ``make("my_file.py:my_estimator")``. The module ``rows`` has what most
estimators do first and last. ``ESTIMATORS`` lists the built-in ones:

>>> [name for name, declared in estimators.ESTIMATORS.items() if "table" in declared.needs]
['a_star_po', 'basis', 'v05']

``measured_mean`` also learns from a measurement that the training step makes in an update:
``estimator.learn(state, measurement)`` with ``estimators.Measurement(product=..., square=...)``.

The examples in the docstrings begin after these lines:

    import jax
    import jax.numpy as jnp
    import numpy as np
    from basis_jax import estimators
    np.set_printoptions(precision=3, suppress=True)
"""

from basis_jax.estimators import rows
from basis_jax.estimators.batchwise import basis
from basis_jax.estimators.critic import (
    gae,
    length_trace_decay,
    remax_original,
    returns_to_go,
    sr_ppo,
    terminal_rewards,
    vineppo,
    whiten,
)
from basis_jax.estimators.declare import Definition, Estimator, stateful, stateless
from basis_jax.estimators.filter_mixture import (
    MixtureState,
    filter_predict,
    filter_values,
    value_filter_init,
    value_filter_update,
)
from basis_jax.estimators.group import dr_grpo, gpg, grpo, opo, reinforce_pp_baseline, rloo
from basis_jax.estimators.group_best import best_of_group, pass_at_k, ucpo
from basis_jax.estimators.history import (
    Evidence,
    dbb_init,
    dbb_update,
    ema,
    ema_init,
    ema_update,
    evidence_rates,
    problem_sums,
    spo_decay,
    spo_init,
    spo_pp_update,
    spo_update,
    spo_weights,
)
from basis_jax.estimators.kernel import KernelHistory, kae_init, kae_update
from basis_jax.estimators.measured import (
    MeasuredMean,
    measured_mean_init,
    measured_mean_learn,
    measured_mean_update,
)
from basis_jax.estimators.noise import noise_report
from basis_jax.estimators.optimal_value import a_star_po, soft_value
from basis_jax.estimators.registry import (
    ESTIMATORS,
    definition,
    make,
    option_names,
    source_fingerprint,
)
from basis_jax.estimators.shrinkage import fuse, james_stein, v05, v05_filter_update
from basis_jax.estimators.single import batch_mean, reinforce, reinforce_pp, remax, standardise
from basis_jax.estimators.table import Table, init_table, table_rates
from basis_jax.estimators.value_filter import FilterState
from basis_jax.estimators.value_map import MapState, least_variance
from basis_jax.estimators.weighted import (
    WeightedSums,
    otb,
    weighted_mean_init,
    weighted_mean_update,
)
from basis_jax.types import Estimate, Measurement, Signals

__all__ = [
    "ESTIMATORS",
    "Definition",
    "Estimate",
    "Estimator",
    "Evidence",
    "FilterState",
    "KernelHistory",
    "MapState",
    "MeasuredMean",
    "Measurement",
    "MixtureState",
    "Signals",
    "Table",
    "WeightedSums",
    "a_star_po",
    "basis",
    "batch_mean",
    "best_of_group",
    "dbb_init",
    "dbb_update",
    "definition",
    "dr_grpo",
    "ema",
    "ema_init",
    "ema_update",
    "evidence_rates",
    "filter_predict",
    "filter_values",
    "fuse",
    "gae",
    "gpg",
    "grpo",
    "init_table",
    "james_stein",
    "kae_init",
    "kae_update",
    "least_variance",
    "length_trace_decay",
    "make",
    "measured_mean_init",
    "measured_mean_learn",
    "measured_mean_update",
    "noise_report",
    "opo",
    "option_names",
    "otb",
    "pass_at_k",
    "problem_sums",
    "reinforce",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "remax_original",
    "returns_to_go",
    "rloo",
    "rows",
    "soft_value",
    "source_fingerprint",
    "spo_decay",
    "spo_init",
    "spo_pp_update",
    "spo_update",
    "spo_weights",
    "sr_ppo",
    "standardise",
    "stateful",
    "stateless",
    "table_rates",
    "terminal_rewards",
    "ucpo",
    "v05",
    "v05_filter_update",
    "value_filter_init",
    "value_filter_update",
    "vineppo",
    "weighted_mean_init",
    "weighted_mean_update",
    "whiten",
]
