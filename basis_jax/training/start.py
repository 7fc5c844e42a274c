"""What a run starts from: weights, optimizer, estimator state, and hashes of all of it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optax
from jaxtyping import PyTree

from basis_jax import estimators
from basis_jax.config import Config
from basis_jax.model.sharding import batch_shards
from basis_jax.opening.checks import rollouts_per_pass
from basis_jax.training.microbatches import updates_per_step
from basis_jax.training.session import (
    Session,
    estimator_state_shapes,
    first_estimator_state,
)
from basis_jax.training.update import (
    abstract_state,
    learning_rate,
    make_optimizer,
    make_state,
)
from basis_jax.types import TrainState
from basis_jax.verify import source_fingerprint
from basis_jax.weights import huggingface


def identity_of(session: Session) -> dict[str, str]:
    """Hashes of what the config only names: the model, the problems, a user's own estimator and
    reward functions."""
    config = session.config
    own = {
        "estimator.name": estimators.source_fingerprint(config.estimator.name),
        "data.verifier": source_fingerprint(config.data.verifier),
        **{f"data.rewards {name}": source_fingerprint(name) for name in config.data.rewards},
    }
    return {
        "model.path": huggingface.fingerprint(session.folder),
        "data.path": session.train_set.fingerprint(),
        **{field: found for field, found in own.items() if found is not None},
    }


def contents_of(session: Session, identity: Mapping[str, str]) -> dict[str, str]:
    """Hashes of all that several processes must have read alike; ``identity`` is the run's."""
    held_out = {f"eval.sets {name}": s.fingerprint() for name, s in session.held_out.items()}
    return {f"the hash of {k}": v for k, v in ({**identity, **held_out}).items()}


def objective_of(session: Session) -> dict[str, Any]:
    """What update and scoring of log-probabilities share."""
    config, shards = session.config, batch_shards(session.setup.mesh)
    return {
        "loss": config.loss,
        "temperature": config.sampling.temperature,
        "microbatch": rollouts_per_pass(config.train, shards),
    }


def total_updates(config: Config) -> int:
    """Optimizer updates of a whole run, in which no step is without signal."""
    return config.train.steps * updates_per_step(config)


def schedule_of(config: Config) -> optax.Schedule:
    return learning_rate(config.optim, updates=total_updates(config))


def optimizer_of(config: Config) -> Any:
    return make_optimizer(config.optim, updates=total_updates(config))


def first_state(
    session: Session, run_dir: Path, report: Callable[[str], None] = print
) -> TrainState:
    """The state before the first step: weights from the model folder, estimator state from the
    reference table where the estimator takes one (made at ``run_dir/reference.npz``)."""
    params = start_params(session)
    return make_state(
        params,
        optimizer_of(session.config),
        first_estimator_state(session, params, run_dir / "reference.npz", report),
        model_config=session.setup.model_config,
        mesh=session.setup.mesh,
    )


def state_shapes(session: Session) -> TrainState:
    """What a checkpoint is restored into: no weights are read and no table is made for it."""
    return abstract_state(
        optimizer_of(session.config),
        estimator_state_shapes(session),
        model_config=session.setup.model_config,
        mesh=session.setup.mesh,
    )


def start_params(session: Session) -> PyTree:
    """The model folder's weights: where training starts, and what a KL term refers to."""
    return huggingface.load_params(session.folder, session.setup.model_config, session.setup.mesh)
