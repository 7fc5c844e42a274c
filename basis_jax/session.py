"""Everything that a run holds fixed, built from its config: mesh, model, data, verifier."""

import dataclasses
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import PyTree

from basis_jax import estimators, hf
from basis_jax.config import Config
from basis_jax.data import (
    EncodedProblems,
    batch_indices,
    encode_prompts,
    load_held_out,
    load_training,
)
from basis_jax.reference_table import build, counts_for, load, made_by
from basis_jax.rollouts import Setting
from basis_jax.sampling import check_trainable
from basis_jax.sharding import make_mesh
from basis_jax.train import check
from basis_jax.verify import make_verifier


@dataclass(frozen=True)
class Session:
    config: Config
    folder: Path  # of the model
    setting: Setting
    estimator: estimators.Estimator
    train_set: EncodedProblems
    held_out: dict[str, EncodedProblems]


@contextmanager
def open_session(config: Config, report=print):
    """Yield the Session; its verifier's processes end with the block.

    Cheap checks come first: everything wrong with the config is said before weights are read.
    """
    check_trainable(config.sampling)
    options = dict(config.estimator.options)
    if "group_size" in estimators.option_names(config.estimator.name):
        options["group_size"] = config.sampling.group_size
    estimator = estimators.make(config.estimator.name, **options)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    folder = hf.resolve_folder(config.model.path)
    architecture = hf.model_config(
        folder, compute_dtype=config.model.compute_dtype, remat=config.model.remat
    )
    check(config, architecture, mesh)
    tokenizer = hf.load_tokenizer(folder)
    train_set, held_out = load_sets(config, tokenizer, report)
    size = len(train_set.problems)
    batch_indices(config.seed, 0, batch_size=config.train.prompts_per_step, size=size)  # fits?
    with make_verifier(config.data.verifier) as verifier:
        setting = Setting(
            model=architecture,
            mesh=mesh,
            tokenizer=tokenizer,
            eos_ids=hf.eos_ids(folder, tokenizer) + stop_ids(config, tokenizer),
            verifier=verifier,
            seed=config.seed,
            rows_at_once=config.train.sample_rollouts,
        )
        yield Session(config, folder, setting, estimator, train_set, held_out)


def stop_ids(config: Config, tokenizer) -> tuple[int, ...]:
    """Token ids of ``sampling.stop_tokens``. Raises ValueError where one is not one token."""
    ids = []
    for text in config.sampling.stop_tokens:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            raise ValueError(
                f"sampling.stop_tokens holds {text!r}, which is {len(tokens)} tokens of this "
                "model; only strings of one token can stop a completion"
            )
        ids += tokens
    return tuple(ids)


def load_sets(
    config: Config, tokenizer, report
) -> tuple[EncodedProblems, dict[str, EncodedProblems]]:
    """Training problems and the held-out sets by name, as tokens; what was left out is reported."""

    def encode(name, problems, size):
        encoded = encode_prompts(problems, config.data, tokenizer, size=size)
        report(f"{name} problems: {', '.join(f'{v} {k}' for k, v in encoded.counts.items() if v)}")
        return encoded

    train_set = encode("training", load_training(config.data), config.data.size)
    known = {p.uid for p in train_set.problems}
    held_out = {}
    for name in config.eval.sets:
        problems = load_held_out(name, config.eval.folder)
        held_out[name] = encode(f"held-out {name}", problems, config.eval.size)
        shared = sum(p.uid in known for p in held_out[name].problems)
        if shared:
            report(f"warning: {shared} held-out problems of {name} are also training problems")
    return train_set, held_out


def reference_table(session: Session, params: PyTree, path: Path, report=print):
    """Successes and trials [M]: read from ``estimator.table``, or made or finished at ``path``."""
    config = session.config
    wanted = made_by(
        session.setting,
        model=hf.fingerprint(session.folder),
        sampling=config.sampling,
        verifier=config.data.verifier,
    )
    if config.estimator.table:
        table_path = Path(config.estimator.table)
        return counts_for(load(table_path), session.train_set, wanted, table_path)
    table = build(
        params,
        session.setting,
        session.train_set,
        samples=config.estimator.table_samples,
        sampling=config.sampling,
        wanted=wanted,
        path=path,
        report=report,
    )
    return table.successes, table.trials
