"""Make the offline reference table of a config: pass counts and features of every training problem.

    basis-jax reference-stats --config configs/quickstart.py --out tables/quickstart.npz
    basis-jax train --config configs/quickstart.py --estimator.table tables/quickstart.npz

The reference policy is the config's model. If the command was killed, the same command again
continues where it stopped. Every field of the config can be overridden as in basis-jax train:
``--estimator.table-samples`` sets the rollouts per problem, ``--estimator.features 32`` adds the
prompt features that value_filter can start from (one prefill per problem). With
``--estimator.table-samples 0`` the table holds only features and nothing is generated. On several
machines: ``--processes`` and its companions, as in basis-jax train.
"""

from pathlib import Path

import jax
import numpy as np

from basis_jax import command_line, processes
from basis_jax.config import Config
from basis_jax.model import lora
from basis_jax.runs.identity import start_facts
from basis_jax.training.reference_table import ReferenceTable
from basis_jax.training.session import open_session, reference_table
from basis_jax.training.start import contents_of, frozen_params, identity_of, start_params

OPTIONS = {"out FILE": "the table, a .npz file", **command_line.PROCESSES}


def main() -> None:
    config, options = command_line.parse(__doc__, options=OPTIONS)
    if not options.out or config.estimator.table:
        raise SystemExit(
            f"error: the table's file is --out {options.out or '(missing)'} and --estimator.table "
            f"{config.estimator.table or '(empty)'}; give --out FILE.npz and no --estimator.table"
        )
    with processes.joined(options.processes, options.coordinator, options.process_id):
        table = make_table(config, Path(options.out))
        if processes.is_first():
            print_summary(table)
            print(f"reference table: {options.out}")
            print("next:")
            arguments = command_line.arguments_without("--out")
            use = ("--estimator.table", options.out)
            print(f"  {command_line.other_command('train', *arguments, *use)}")


def make_table(config: Config, path: Path) -> ReferenceTable:
    report = processes.spoken(print)
    report(announcement(config, path))
    processes.check_same(lambda: {"--out": str(path), **start_facts(config)})
    with open_session(config, report) as session, jax.set_mesh(session.setup.mesh):
        processes.check_same(lambda: contents_of(session, identity_of(session)))
        params = lora.whole(frozen_params(session), start_params(session))
        return reference_table(session, params, path, report)


def announcement(config: Config, path: Path) -> str:
    """What the command is about to do, in one line."""
    section = config.estimator
    features = f" and {section.features} prompt features" if section.features else ""
    return (
        f"making the reference table of {config.model.path} on {config.data.path}: "
        f"{section.table_samples} completions{features} of each problem; file {path} "
        f"({'continued' if path.exists() else 'new'})"
    )


def print_summary(table: ReferenceTable) -> None:
    """Print mean and spread of the pass rates, and the share of problems that were always or never
    solved. Problems without a graded rollout are left out."""
    graded = table.trials > 0
    if not graded.any():
        return
    rates = table.successes[graded] / table.trials[graded]
    print(
        f"{len(rates)} problems, {table.trials.sum()} graded rollouts: "
        f"{'mean reward' if table.fractional else 'pass rate'} mean {rates.mean():.3f}, sd "
        f"{rates.std():.3f}; never {'above 0' if table.fractional else 'solved'} "
        f"{np.mean(rates == 0):.1%}, always {'1' if table.fractional else 'solved'} "
        f"{np.mean(rates == 1):.1%}"
    )
