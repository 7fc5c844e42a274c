"""How far each estimator's values are from the true values: the mean of (V_i - value_i)^2.

    python -m studies.value_study simulate
    python -m studies.value_study still --config configs/smollm2_arithmetic.py
    python -m studies.value_study real --run runs/quickstart

``simulate`` simulates policies. ``still`` uses the first policy of a config, without training it.
``real`` uses the checkpoints of a run of scripts/train.py (``--checkpoint.keep 100``). Each prints
one table per setting and writes ``--out``.json and ``--out``.png.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from basis_jax import command_line
from basis_jax.config import Config
from basis_jax.runs.provenance import provenance
from basis_jax.training.prompt_features import prompt_features
from basis_jax.training.session import open_session
from basis_jax.weights import huggingface
from studies import policy_values
from studies.policy_values import Policies, exact_values, policies, rollout_rewards, run_config
from studies.simulated_values import (
    LONG_RUN,
    MOST_ROLLOUTS,
    UNEQUAL_SLOPE_SD,
    checkpoint_world,
    draw_tables,
    draw_world,
    long_world,
    moments,
    published_world,
    replay_world,
)
from studies.value_methods import Method, World, methods, run
from studies.value_report import Part, make_part, paper_table, table, write


@dataclass(frozen=True)
class Simulate:
    """Drawn policies: the paper's moments, one frozen policy; and long runs of an improving one."""

    out: str = "results/value_study_simulated"
    """Where the .json and the .png go."""
    seed: int = 0
    trials: tuple[int, ...] = (64, 32, 8, 4, 0)
    """Offline rollouts a problem."""
    groups: tuple[int, ...] = (1, 2, 4, 8)
    """Fresh rollouts a prompt of the group methods, at most 8."""
    batches: int = 2000
    """Batches of the published setting."""
    batch: int = 64
    runs: int = 16
    """Replicates of a long run."""
    long_problems: int = 8192
    long_batch: int = 512
    long_epochs: int = 5

    def study(self) -> list[Part]:
        sizes = tuple(n for n in self.trials if n)
        compared = methods(self.trials, self.groups, moved=True)
        world, about = published_world(self.batches, sizes=sizes, batch=self.batch, seed=self.seed)
        about["beside_paper"] = True
        parts = [measure("published moments, one batch a policy", about, world, compared)]
        compared = methods(self.trials, self.groups)
        for name, slope_sd in (
            ("long run", LONG_RUN["slope_sd"]),
            ("long run, unequal slopes", UNEQUAL_SLOPE_SD),
        ):
            world, about = long_world(
                self.runs,
                slope_sd=slope_sd,
                sizes=sizes,
                problems=self.long_problems,
                batch=self.long_batch,
                epochs=self.long_epochs,
                seed=self.seed,
            )
            parts.append(measure(name, about, world, compared))
        return parts


@dataclass(frozen=True)
class Still:
    """A config's first policy, held still: exact values, every reward drawn from them."""

    config: Path = Path("configs/smollm2_arithmetic.py")
    out: str = "results/value_study_still"
    """Where the .json and the .png go."""
    seed: int = 0
    trials: tuple[int, ...] = (64, 32, 8, 4, 0)
    groups: tuple[int, ...] = (1, 2, 4, 8)
    features: int = 32
    """Prompt features of the filter beside the one without (0: none); with at most 8 trials."""
    size: int = 0
    """Use this many problems (0: all of the config's task)."""
    batch: int = 64
    epochs: int = 8
    runs: int = 16
    """Replicates."""

    def study(self) -> list[Part]:
        config = command_line.load_config(self.config)
        config = replace(config, data=replace(config.data, size=self.size))
        with open_session(config) as session, jax.set_mesh(session.setup.mesh):
            setup, problems = session.setup, session.train_set
            params = huggingface.load_params(session.folder, setup.model_config, setup.mesh)
            check_exact(config)
            values = exact_values(params, setup, problems, config.sampling)
            features = (
                prompt_features(
                    params, setup.model_config, problems, mesh=setup.mesh, size=self.features
                )
                if self.features
                else None
            )
        rng = np.random.default_rng([self.seed, 3])
        rates = np.broadcast_to(values, (self.runs, len(values)))
        world = draw_world(
            rng,
            lambda ids: values[ids],
            successes=draw_tables(rng, rates, tuple(n for n in self.trials if n)),
            batch=self.batch,
            epochs=self.epochs,
            units="problems",
        )
        compared = methods(self.trials, self.groups)
        if features is not None:
            small_tables = [n for n in self.trials if n <= 8]
            compared += [m for m in methods(small_tables, (8,), features=features) if "," in m.name]
        about = {
            "policy": str(config.model.path),
            "problems": len(values),
            "truth": "exact, by teacher forcing",
            "rewards": "drawn from the exact values",
            "moments": moments(values),
            "runs": self.runs,
        }
        return [measure("first policy, held still", about, world, compared)]


@dataclass(frozen=True)
class Real:
    """The kept checkpoints of a run, and a replay of the run between them."""

    run: Path
    """Run folder of scripts/train.py, with --checkpoint.keep 100."""
    out: str = "results/value_study_real"
    """Where the .json and the .png go."""
    seed: int = 0
    trials: tuple[int, ...] = (64, 32, 8, 4, 0)
    groups: tuple[int, ...] = (1, 2, 4, 8)
    rewards: Literal["decoded", "drawn"] = "decoded"
    """``drawn``: rewards and offline table are drawn from the exact values, nothing is decoded."""
    truth: Literal["exact", "rollouts"] = "exact"
    """``exact`` needs the verifier exact; ``rollouts``: mean of --truth-samples disjoint ones."""
    truth_samples: int = 256
    batch: int = 64
    batches: int = 100
    """Random batches a checkpoint."""
    epochs: int = 0
    """Epochs of the replay (0: as many as the run's steps are at this batch size)."""
    runs: int = 16
    """Replicates of the replay."""

    def study(self) -> list[Part]:
        if self.rewards == "drawn" and self.truth == "rollouts":
            raise SystemExit("error: --rewards drawn needs exact values; use --truth exact")
        config = run_config(self.run)
        real = self.true_values(config)
        steps, values = real.steps.tolist(), real.values
        rng = np.random.default_rng([self.seed, 4])
        sizes = tuple(n for n in self.trials if n)
        about = {
            "policy": str(config.model.path),
            "problems": values.shape[1],
            "checkpoints": steps,
            "truth": self.truth if self.truth == "exact" else f"{self.truth_samples} rollouts",
            "rewards": self.rewards,
            "moments": {step: moments(v) for step, v in zip(steps, values, strict=True)},
        }
        world = checkpoint_world(
            rng,
            steps,
            values,
            real.rewards,
            real.reference,
            sizes=sizes,
            batch=self.batch,
            batches=self.batches,
        )
        compared = methods(self.trials, self.groups, moved=True)
        parts = [measure("real checkpoints, one batch each", about, world, compared)]
        epochs = self.epochs or max(1, steps[-1] // (values.shape[1] // self.batch))
        world = replay_world(
            rng,
            steps,
            values,
            real.reference,
            sizes=sizes,
            batch=self.batch,
            epochs=epochs,
            runs=self.runs,
        )
        about = {
            **about,
            "rewards": "drawn from values interpolated between the checkpoints in logits",
            "epochs": epochs,
            "runs": self.runs,
        }
        compared = methods(self.trials, self.groups)
        parts.append(measure("replay of the run", about, world, compared))
        return parts

    def true_values(self, config: Config) -> Policies:
        """The true values of every policy of the run, kept in the run folder for later studies."""
        if self.truth == "exact":
            check_exact(config)
        steps = policy_values.steps(self.run, config)
        measured_as = [self.truth, self.truth_samples, self.rewards, max(self.trials), steps]
        path = self.run / "value_study.npz"
        found = policy_values.read(path, measured_as)
        if found is None:
            found = self.measure_values(config)
            policy_values.write(path, measured_as, found)
        for step, truth, drawn in zip(found.steps, found.values, found.rewards, strict=True):
            print(f"step {step}: mean value {truth.mean():.4f}{agreement(truth, drawn)}")
        return found

    def measure_values(self, config: Config) -> Policies:
        """Values, rewards and table; rewards and table are empty if they are to be drawn."""
        steps, values, rewards, reference = [], [], [], np.zeros((0, 0))
        with open_session(config) as session, jax.set_mesh(session.setup.mesh):
            setup, problems = session.setup, session.train_set
            first = huggingface.load_params(session.folder, setup.model_config, setup.mesh)
            for step, params in policies(self.run, config, first):
                rolled = partial(
                    rollout_rewards, params, setup, problems, sampling=config.sampling, step=step
                )
                if self.truth == "exact":
                    truth = exact_values(params, setup, problems, config.sampling)
                else:
                    truth = rolled(samples=self.truth_samples, stream="truth").mean(axis=1)
                drawn = np.zeros((len(truth), 0))
                if self.rewards == "decoded":
                    drawn = rolled(samples=MOST_ROLLOUTS, stream="group")
                    if step == 0:
                        reference = rolled(samples=max(self.trials), stream="table")
                steps.append(step)
                values.append(truth)
                rewards.append(drawn)
        return Policies(np.array(steps), np.stack(values), np.stack(rewards), reference)


def check_exact(config: Config) -> None:
    if config.data.verifier != "exact":
        raise SystemExit(
            f"error: data.verifier is {config.data.verifier!r}; exact values exist for 'exact' "
            "alone, use --truth rollouts of the command real"
        )


def agreement(truth: np.ndarray, rewards: np.ndarray) -> str:
    """The mean of the rollouts, and its distance from the true mean in standard errors."""
    if not rewards.size:
        return ""
    noise = np.sqrt((truth * (1 - truth)).sum() / rewards.shape[1]) / len(truth)
    gap = rewards.mean() - truth.mean()
    return f", mean of {rewards.size} rollouts {rewards.mean():.4f} ({gap / noise:+.1f} s.e.)"


def measure(name: str, about: dict, world: World, compared: Sequence[Method]) -> Part:
    """Run all methods on the world, score them and print the table."""
    started = time.perf_counter()
    print(f"\n{name}: " + ", ".join(f"{k} {v}" for k, v in about.items()), flush=True)
    outcomes = [run(method, world) for method in compared]
    part = make_part(name, about, world, compared, outcomes)
    print(table(part), f"\n({time.perf_counter() - started:.0f} s)", flush=True)
    return part


COMMANDS: dict[str, Callable[..., Simulate | Real | Still]] = {
    "simulate": Simulate,
    "real": Real,
    "still": Still,
}


def main() -> None:
    chosen = tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__)
    made_with = provenance()  # at the start: others may commit while it runs
    parts = chosen.study()
    if any(part.about.get("beside_paper") for part in parts):
        print("\n" + paper_table())
    write(Path(chosen.out), parts, asdict(chosen), made_with)
    print(f"\n{chosen.out}.json, {chosen.out}.png")


if __name__ == "__main__":
    command_line.run(main)
