"""What stays fixed during a run, built from its config: mesh, model, data, verifier."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from basis_jax import estimators, plans, processes
from basis_jax.config import Config, EstimatorSection
from basis_jax.data.encoding import EncodedProblems, encode_and_report, joined
from basis_jax.data.order import step_problems
from basis_jax.data.overlap import OVERLAP, overlapping
from basis_jax.data.sources import load_more, load_training
from basis_jax.evaluation.evaluate import load_held_out_set
from basis_jax.model.decoder import ModelConfig
from basis_jax.opening.checks import check, check_features, check_memory
from basis_jax.opening.ranges import check_ranges
from basis_jax.opening.rollout_plan import open_plan
from basis_jax.opening.rollout_setup import Verifiers, locate_model, open_setup, open_verifiers
from basis_jax.opening.sizes import with_sizes
from basis_jax.sampling.rollouts import RolloutSetup
from basis_jax.training.reference_table import (
    ReferenceTable,
    build,
    load,
    rows_for,
    table_origin,
    ungraded_warning,
)
from basis_jax.weights import huggingface


@dataclass(frozen=True)
class Session:
    config: Config
    folder: Path  # of the model
    setup: RolloutSetup
    estimator: estimators.Estimator
    train_set: EncodedProblems
    held_out: dict[str, EncodedProblems]
    plan: plans.Plan


@contextmanager
def open_session(
    config: Config, report: Callable[[str], None] = print, *, training: bool = False
) -> Iterator[Session]:
    """Yield the Session; its verifier's processes end with the block.

    Cheap checks come first: errors of the config are reported before weights are read.
    ``training``: whether memory for updates is needed too.
    """
    check_ranges(config)
    estimator = make_estimator(config.estimator, config.sampling.group_size)
    plans.find(config.sampling.plan, config.sampling.plan_options)
    folder, model_config, mesh = locate_model(config)
    check(config, model_config, mesh)
    check_normalised(config, estimator)
    tokenizer = huggingface.load_tokenizer(folder)
    with open_verifiers(config) as verifiers:
        train_set, held_out = load_sets(config, tokenizer, verifiers, report)
        config = sized(
            config, model_config, mesh, train_set, held_out, training=training, report=report
        )
        plan = open_plan(config, train_set.sizes, estimator, tokenizer)
        with open_setup(
            config, folder, model_config, mesh, tokenizer, verifiers=verifiers, report=report
        ) as setup:
            yield Session(config, folder, setup, estimator, train_set, held_out, plan)


def sized(
    config: Config,
    model_config: ModelConfig,
    mesh: Mesh,
    train_set: EncodedProblems,
    held_out: dict[str, EncodedProblems],
    *,
    training: bool,
    report: Callable[[str], None],
) -> Config:
    """The config with the sizes from ``with_sizes``, for the longest prompts, training or held-out.
    Raises ValueError if the problems are too few for a step or for the features, or too long for a
    rollout."""
    size = len(train_set.problems)
    problems_of_step(config, train_set, 0)  # raises ValueError if they are too few
    width = train_set.tokens.shape[1]
    widest = max([width, *(problems.tokens.shape[1] for problems in held_out.values())])
    rows = config.train.prompts_per_step * config.sampling.group_size
    config = with_sizes(
        config,
        model_config,
        mesh,
        prompt_width=widest,
        rows=rows,
        training=training,
        report=report,
    )
    check_memory(config, model_config, mesh, prompt_width=width, rows=rows, training=training)
    if widest > width:  # of the evaluations
        check_memory(config, model_config, mesh, prompt_width=widest, rows=rows)
    if config.estimator.features:
        check_features(config.estimator.features, size, model_config.embed)
    return config


def problems_of_step(config: Config, train_set: EncodedProblems, number: int) -> np.ndarray:
    """Rows of the problems of step ``number``. Raises ValueError if there are too few problems."""
    return step_problems(
        config.seed,
        number,
        batch_size=config.train.prompts_per_step,
        sizes=train_set.sizes,
        weights=(1.0, *config.data.more_sets.values()),
    )


def make_estimator(section: EstimatorSection, group_size: int) -> estimators.Estimator:
    """The config's estimator. Raises ValueError if its section does not fit it."""
    with field_named("estimator.name"):
        declared = estimators.definition(section.name)
    by_run = {"group_size": "sampling.group_size", "features": "estimator.features"}
    for option in by_run.keys() & section.options.keys() & set(declared.provided):
        raise ValueError(f"estimator.options has {option!r}; give it as {by_run[option]} instead")
    if "group_size" in declared.needs and group_size < 2:
        raise ValueError(
            f"{section.name} compares the rollouts of a prompt but sampling.group_size is "
            f"{group_size}; give 2 or more"
        )
    group = {"group_size": group_size} if "group_size" in declared.provided else {}
    with field_named("estimator.options"):
        estimator = estimators.make(declared, **section.options, **group)
    if section.features and "features" not in declared.provided:
        raise ValueError(
            f"estimator.features is {section.features} but {section.name} takes no features; set "
            "it to 0 or use value_filter"
        )
    if "features" in declared.needs and not section.features:
        raise ValueError(
            f"{section.name} needs prompt features but estimator.features is 0; give their number"
        )
    if estimator.needs_table and not (section.table or section.table_samples):
        raise ValueError(
            f"{section.name} needs a reference table but estimator.table_samples is 0 and "
            "estimator.table empty; give one of them"
        )
    return estimator


def check_normalised(config: Config, estimator: estimators.Estimator) -> None:
    """Raise ValueError if rewards are normalised in each step and the estimator remembers rewards
    of earlier steps."""
    if not config.data.normalise_rewards:
        return
    none = np.zeros(0, np.int32)
    if estimator.needs_table or jax.tree.leaves(jax.eval_shape(estimator.init, none, none)):
        raise ValueError(
            "data.normalise_rewards puts rewards on the scale of each step, and "
            f"{config.estimator.name} remembers rewards of earlier steps; use reinforce_pp, grpo "
            "or rloo, or set it to False"
        )


@contextmanager
def field_named(name: str) -> Iterator[None]:
    """Put a field's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def load_sets(
    config: Config, tokenizer: Any, verifiers: Verifiers, report: Callable[[str], None]
) -> tuple[EncodedProblems, dict[str, EncodedProblems]]:
    """Training problems, and the held-out sets by name, as tokens; reports problems left out."""
    loaded = {"training": load_training(config.data, verifiers.training)}
    for path in config.data.more_sets:
        loaded[f"training ({path})"] = load_more(path, config.data, verifiers.training)
    encoded = [
        encode_and_report(
            name, problems, config.data, tokenizer, size=config.data.size, report=report
        )
        for name, problems in loaded.items()
    ]
    train_set = encoded[0] if len(encoded) == 1 else joined(encoded)
    held_out = {
        name: load_held_out_set(name, config, tokenizer, verifiers.held_out[name], report)
        for name in config.eval.sets
    }
    report_overlap(train_set, held_out, report)
    return train_set, held_out


def report_overlap(
    train_set: EncodedProblems,
    held_out: dict[str, EncodedProblems],
    report: Callable[[str], None],
) -> None:
    """Warn about every held-out set that shares problems or texts with the training problems."""
    training_uids = {p.uid for p in train_set.problems}
    held_out_problems = [p for problems in held_out.values() for p in problems.problems]
    words = {p: shared for p, _, shared in overlapping(held_out_problems, train_set.problems)}
    for name, problems in held_out.items():
        same = [p for p in problems.problems if p.uid in training_uids]
        alike = [p for p in problems.problems if p in words and p.uid not in training_uids]
        of_set = f"held-out problems of {name}"
        sharing = (
            f"share {OVERLAP} words in a row, or all of a shorter text, with a training problem, "
            f"such as {words[alike[0]]!r}"
            if alike
            else ""
        )
        if same:
            more = f", and {len(alike)} others {sharing}" if alike else ""
            report(f"warning: {len(same)} {of_set} are also training problems{more}")
        elif alike:
            report(f"warning: {len(alike)} of {len(problems.problems)} {of_set} {sharing}")


def reference_table(
    session: Session, params: PyTree, path: Path, report: Callable[[str], None] = print
) -> ReferenceTable:
    """The training problems' table: read from ``estimator.table``, or made or finished at ``path``.

    The share of its rollouts that could not be graded is reported. Call under ``jax.set_mesh``.
    Raises ValueError if the table on disk does not fit the run.
    """
    section = session.config.estimator
    origin = table_origin(
        session.setup,
        model_fingerprint=huggingface.fingerprint(session.folder),
        sampling=session.config.sampling,
        data=session.config.data,
    )
    if section.table:
        table_path = Path(section.table)
        if section.features:
            origin["features"] = section.features
        table = processes.by_first(
            lambda: rows_for(load(table_path), session.train_set, origin, table_path)
        )
    else:
        table = build(
            params,
            session.setup,
            session.train_set,
            samples=section.table_samples,
            features=section.features,
            sampling=session.config.sampling,
            origin=origin,
            path=path,
            report=report,
        )
    if warning := ungraded_warning(table):
        report(warning)
    return table


def estimator_state_shapes(session: Session) -> PyTree:
    """The shapes of the estimator's state. No reference table and no array is needed."""
    size, features = len(session.train_set.problems), session.config.estimator.features
    counts = jax.ShapeDtypeStruct((size,), np.int32)
    options = {"features": jax.ShapeDtypeStruct((size, features), np.float32)} if features else {}
    samples = processes.by_first(lambda: _rewards_on_disk(session))
    if samples:
        options["reference_rewards"] = jax.ShapeDtypeStruct((size, samples), np.float32)
    return jax.eval_shape(session.estimator.init, counts, counts, **options)


def _rewards_on_disk(session: Session) -> int:
    """Number of reference rewards per problem that this run's estimator started from, or 0."""
    config, section = session.config, session.config.estimator
    path = Path(section.table or Path(config.run_dir) / "reference.npz")
    uses = session.estimator.takes_rewards and (section.table or section.table_samples)
    if not (uses and path.is_file()):
        return 0
    table = load(path)
    return table.rewards.shape[1] if table.rewards is not None and table.fractional else 0


def first_estimator_state(
    session: Session, params: PyTree, path: Path, report: Callable[[str], None] = print
) -> PyTree:
    """The estimator's state before the first step, from the reference table if it takes one.

    No two of its arrays share a buffer, because the training step donates each of them.
    """
    section = session.config.estimator
    uses_table = section.table or section.table_samples or section.features
    if not (uses_table and session.estimator.takes_table):
        zeros = np.zeros(len(session.train_set.problems), np.int32)
        return _own_buffers(session.estimator.init(zeros, zeros))
    table = reference_table(session, params, path, report)
    options = {"features": table.features} if section.features else {}
    if session.estimator.takes_rewards and table.rewards is not None and table.fractional:
        options["reference_rewards"] = table.rewards
    return _own_buffers(session.estimator.init(table.successes, table.trials, **options))


def _own_buffers(state: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, state)
