"""What a run starts from: weights, optimizer, estimator state, and hashes of all of it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from basis_jax import estimators, plans
from basis_jax.config import Config
from basis_jax.model import decoder, lora
from basis_jax.model.sharding import batch_shards, named_tree
from basis_jax.opening.checks import rollouts_per_pass
from basis_jax.training.critic import abstract_critic, first_critic
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
    """Hashes of what the config refers to by name: the model, the training and held-out problems,
    and a user's own estimator and reward functions."""
    config = session.config
    own = {
        "estimator.name": estimators.source_fingerprint(config.estimator.name),
        "sampling.plan": plans.source_fingerprint(config.sampling.plan),
        "data.verifier": source_fingerprint(config.data.verifier),
        **{f"data.rewards {name}": source_fingerprint(name) for name in config.data.rewards},
        **{
            f"eval.set_verifiers {name}": source_fingerprint(verifier)
            for name, verifier in config.eval.set_verifiers.items()
        },
        **{f"eval.sets {name}": of_set.fingerprint() for name, of_set in session.held_out.items()},
    }
    return {
        "model.path": huggingface.fingerprint(session.folder),
        "data.path": session.train_set.fingerprint(),
        **{field: found for field, found in own.items() if found is not None},
    }


def contents_of(session: Session, identity: Mapping[str, str]) -> dict[str, str]:
    """Hashes of all files that must be the same in every process; ``identity`` is the run's."""
    held_out = {f"eval.sets {name}": s.fingerprint() for name, s in session.held_out.items()}
    return {f"the hash of {k}": v for k, v in ({**identity, **held_out}).items()}


def objective_of(session: Session) -> dict[str, Any]:
    """The arguments that the update and the scoring of log-probabilities have in common."""
    config, shards = session.config, batch_shards(session.setup.mesh)
    return {
        "loss": config.loss,
        "temperature": config.sampling.temperature,
        "microbatch": rollouts_per_pass(config.train, shards),
    }


def total_updates(config: Config) -> int:
    """Optimizer updates of a whole run if every step has signal."""
    return config.train.steps * updates_per_step(config)


def schedule_of(config: Config) -> optax.Schedule:
    return learning_rate(config.optim, updates=total_updates(config))


def optimizer_of(config: Config) -> Any:
    return make_optimizer(config.optim, updates=total_updates(config))


def first_state(
    session: Session, run_dir: Path, report: Callable[[str], None] = print
) -> TrainState:
    """The state before the first step. Weights come from the model folder. If the estimator takes a
    reference table, its state comes from there (made at ``run_dir/reference.npz``)."""
    frozen, params = frozen_params(session), start_params(session)
    whole = lora.whole(frozen, params)
    setup = session.setup
    return make_state(
        params,
        optimizer_of(session.config),
        first_estimator_state(session, whole, run_dir / "reference.npz", report),
        model_config=setup.model_config,
        mesh=setup.mesh,
        frozen=frozen,
        critic=first_critic(session.config, setup.model_config, setup.mesh),
    )


def state_shapes(session: Session) -> TrainState:
    """Shapes and layout that a checkpoint is restored into. No weights are read and no table is
    made. Frozen parameters are not part of it: see ``frozen_params``."""
    setup = session.setup
    return abstract_state(
        optimizer_of(session.config),
        estimator_state_shapes(session),
        model_config=setup.model_config,
        mesh=setup.mesh,
        critic=abstract_critic(session.config, setup.model_config),
    )


def start_params(session: Session) -> PyTree:
    """The trained parameters before the first step: the model folder's weights, or adapters that
    change nothing yet. Together with ``frozen_params`` they are the reference policy of a KL
    term."""
    model_config, mesh = session.setup.model_config, session.setup.mesh
    if model_config.lora is None:
        return huggingface.load_params(session.folder, model_config, mesh)
    layout = named_tree(mesh, lora.trained(decoder.param_axes(model_config)))
    shapes = lora.trained(decoder.param_shapes(model_config))

    def start() -> PyTree:  # several processes do not share an array yet
        return lora.start(shapes, jax.random.key(session.config.seed))

    return jax.jit(start, out_shardings=layout)()


def frozen_params(session: Session) -> PyTree:
    """The model folder's weights if adapters are trained, otherwise None."""
    if session.setup.model_config.lora is None:
        return None
    return huggingface.load_params(session.folder, session.setup.model_config, session.setup.mesh)


def policy(state: TrainState) -> PyTree:
    """The parameters of the model: the trained and the frozen ones together."""
    return lora.whole(state.frozen, state.params)
