"""The runs of the policy study: which are there, and doing those that are missing.

Several workers may share a folder: a run that one of them has claimed is left to it.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from basis_jax.config import Config
from basis_jax.evaluation.evaluate import complete, open_evaluation
from basis_jax.evaluation.scores import pass_at_k
from basis_jax.files import lock, replace_file
from basis_jax.runs.metrics import read_metrics
from basis_jax.training.loop import train
from basis_jax.weights import huggingface, trained
from studies.policy_plan import (
    METHODS,
    POWERS,
    SAMPLES,
    TUNING_SEEDS,
    WIDER,
    Found,
    Job,
    config_of,
    jobs_of,
    powers_of,
)

FINAL = "final.json"
COOLER = (0.25, 0.5, 0.75)  # other temperatures at which a last policy is evaluated
COOLER_SAMPLES = 4


Reported = Mapping[str, Any]
"""What a report holds of one regime (``start`` and ``methods``), or nothing."""


def found_in(out: str, regime: str, reported: Reported | None = None) -> Mapping[str, Found]:
    """Accuracies of the finished runs of a regime, by method: those of a report and those in the
    folder, which win."""
    methods = (reported or {}).get("methods", {})
    found = {name: accuracies(name, methods.get(name, {})) for name in METHODS}
    powers = (*POWERS, *powers_of(regime))
    for name in METHODS:
        for power in range(min(powers) - WIDER, max(powers) + WIDER + 1):
            for folder in Path(out, Job(regime, name, power, 0).name).parent.glob("seed_*"):
                accuracy = accuracy_of(folder)
                if accuracy is not None:
                    found[name][power, int(folder.name.removeprefix("seed_"))] = accuracy
    return found


def accuracies(method: str, told: Mapping[str, Any]) -> dict[tuple[int, int], float]:
    """Accuracies of the runs of a method that a report holds."""

    def power(rate: float) -> int:
        return round(2 * np.log10(rate / METHODS[method].rate))

    found = {
        (power(float(rate)), seed): accuracy
        for rate, tuned in told.get("rates", {}).items()
        for seed, accuracy in zip(TUNING_SEEDS, tuned, strict=False)  # the second may be missing
    }
    tested = zip(told.get("seeds", ()), told.get("per seed", {}).get("accuracy", ()), strict=True)
    return found | {(power(told["rate"]), seed): accuracy for seed, accuracy in tested}


def accuracy_of(folder: Path) -> float | None:
    """Of a finished run; None where it is not finished."""
    if not (folder / FINAL).is_file():
        return None
    return float(json.loads((folder / FINAL).read_text())["accuracy"])


def work(
    out: str,
    regimes: Sequence[str],
    overrides: Sequence[str],
    report: Callable[[str], None],
    *,
    known: Mapping[str, Reported],
) -> None:
    """Do what is missing and not claimed, until nothing is. Runs of ``known`` are not missing."""
    while True:
        jobs = [
            job
            for regime in regimes
            for job in jobs_of(regime, found_in(out, regime, known.get(regime)))
        ]
        for job in jobs:
            with claimed(Path(out, "claims", job.name.replace("/", "+"))) as ours:
                folder = Path(out, job.name)
                if ours and accuracy_of(folder) is None:
                    do(job, out, overrides)
                    report(f"{job.name}: {accuracy_of(folder):.1%}")
                    break
        else:
            return


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """True inside where this process alone has the claim; a claim ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            lock(file, str(path), "--out")
        except ValueError:
            yield False
            return
        yield True


def do(job: Job, out: str, overrides: Sequence[str]) -> None:
    """The run, and the evaluation of its last policy."""
    config = config_of(job, out, overrides)
    train(config, report=lambda line: None)
    found = evaluate_last(config, thorough=not job.tuning)
    replace_file(Path(config.run_dir, FINAL), json.dumps(found) + "\n")
    jax.clear_caches()


def evaluate_last(config: Config, *, thorough: bool) -> dict[str, Any]:
    """Accuracy of the last policy at temperature 1; where ``thorough``, from SAMPLES completions a
    problem, with pass@8, greedy accuracy and that at other temperatures."""
    if not thorough:
        evaluated = [row for row in read_metrics(config.run_dir) if "eval/accuracy" in row]
        return {"accuracy": evaluated[-1]["eval/accuracy"]}
    checkpoint = trained.find_checkpoint(config.run_dir)
    return measure(config, checkpoint)


def measure(config: Config, checkpoint: Path | None) -> dict[str, Any]:
    """All accuracies of a checkpoint, or (None) of the policy before training."""
    with (
        open_evaluation(config, lambda line: None) as opened,
        jax.set_mesh(opened.setup.mesh),
    ):
        model_config, mesh = opened.setup.model_config, opened.setup.mesh
        if checkpoint is None:
            params = huggingface.load_params(opened.folder, model_config, mesh)
        else:
            params = trained.load_checkpoint_params(checkpoint, model_config, mesh)
        (problems,) = opened.sets.values()

        def rewards(temperature: float, samples: int) -> np.ndarray:
            graded = complete(
                params,
                opened.setup,
                problems,
                units=np.arange(len(problems.problems) * samples),
                samples=samples,
                sampling=dataclasses.replace(config.sampling, temperature=temperature),
            )
            return graded.rewards.reshape(-1, samples)

        at_one = rewards(1.0, SAMPLES)
        solved = at_one.sum(1).astype(np.int32)
        return {
            "accuracy": float(at_one.mean()),
            "by_problem": at_one.mean(1).round(4).tolist(),
            "pass@8": float(np.mean(pass_at_k(solved, SAMPLES, 8))),
            "greedy": float(rewards(0.0, 1).mean()),
            "cooler": {str(t): float(rewards(t, COOLER_SAMPLES).mean()) for t in COOLER},
        }
