"""Evaluate a model, or a checkpoint of a run, on held-out sets.

    basis-jax evaluate --config configs/quickstart.py --out runs/eval_start
    basis-jax evaluate --config configs/quickstart.py --checkpoint runs/quickstart \\
        --out runs/eval_end --eval.samples 8

Without ``--checkpoint`` the config's model is evaluated (``--model.path FOLDER`` for any other).
With it, it is the newest checkpoint of the run, or the one given as RUN/checkpoints/STEP; adapters
are merged into the config's model. ``--eval.sets``, ``--eval.samples`` and ``--eval.temperature``
set the held-out sets, the completions per problem and the temperature (0: greedy), and
``--sampling.max-new-tokens`` the length limit. If the command was killed, the same command again
continues where it stopped. A set that cannot be loaded or graded is named at the end, with exit
code 1; the other sets have their results. OUT holds completions.jsonl (every rollout),
protocol.json, results.json (all metrics with 95 % intervals) and report.html (every problem, for
reading). On several machines: ``--processes`` and its companions, as in basis-jax train.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from basis_jax import command_line, processes
from basis_jax.config import Config
from basis_jax.evaluation.completions import results, write_completions
from basis_jax.evaluation.evaluate import Evaluation, open_evaluation, protocol
from basis_jax.evaluation.report import report, table, warnings
from basis_jax.files import replace_file
from basis_jax.runs.identity import start_facts
from basis_jax.runs.provenance import provenance
from basis_jax.weights import huggingface, trained
from basis_jax.weights.adapters import load_policy

OPTIONS = {
    "out FOLDER": "where the results are written",
    "checkpoint RUN": "evaluate the newest checkpoint of a run, or RUN/checkpoints/STEP",
    **command_line.PROCESSES,
}


def main() -> None:
    config, options = command_line.parse(__doc__, options=OPTIONS)
    model = dataclasses.replace(config.model, lora_rank=0)  # adapters are merged
    config = dataclasses.replace(config, model=model)
    out = check_out(options.out)
    with processes.joined(options.processes, options.coordinator, options.process_id):
        given = {"--checkpoint": options.checkpoint, "--out": options.out}
        processes.check_same(lambda: given | start_facts(config))
        failed = evaluate(config, options.checkpoint, out)
    if failed:
        sys.exit(f"error: no result for {', '.join(failed)}; see the reason above")


def evaluate(config: Config, checkpoint: str, out: Path) -> list[str]:
    """Evaluate, and write and print all results in the first process. Returns the sets without a
    result."""
    say = processes.spoken(print)
    say(announcement(config, checkpoint, out))
    with open_evaluation(config, say) as evaluation, jax.set_mesh(evaluation.setup.mesh):
        params, source = load(evaluation, checkpoint, say)
        say(f"weights: {source}")
        fixed = protocol(evaluation, params)
        processes.check_same(lambda: {**fixed, "failed sets": evaluation.failed})
        path = write_completions(params, evaluation, out, fixed, say)
        found = processes.by_first(lambda: results(path, evaluation))
    devices = [str(device) for device in jax.devices()]
    about = {"evaluated": source, "protocol": fixed, **provenance(), "devices": devices}
    processes.by_first(lambda: write_report(found, about, out, checkpoint))
    return list(found["failed"])


def announcement(config: Config, checkpoint: str, out: Path) -> str:
    """What the evaluation is about to do, in one line."""
    section = config.eval
    sets = ", ".join(
        f"{name} ({section.samples_of(name)} completions of each problem at temperature "
        f"{section.temperature_of(name):g})"
        for name in section.sets
    )
    begun = "continued" if (out / "completions.jsonl").exists() else "new"
    return f"evaluating {checkpoint or config.model.path} on {sets}; results go to {out} ({begun})"


def write_report(
    found: Mapping[str, Any], about: Mapping[str, Any], out: Path, checkpoint: str
) -> None:
    """Write results.json and report.html, and print the main metrics, the files' paths and what to
    do next."""
    replace_file(out / "results.json", json.dumps({**found, **about}, indent=2) + "\n")
    replace_file(out / "report.html", "".join(report(found, about, out / "completions.jsonl")))
    print("\n".join([*table(found), *warnings(found)]))
    for name in ("completions.jsonl", "protocol.json", "results.json", "report.html"):
        print(f"{name:18} {out / name}")
    print(f"next: open {out / 'report.html'} in a browser to read the completions")
    if checkpoint:
        start = command_line.arguments_without("--checkpoint", "--out")
        command = command_line.other_command("evaluate", *start, "--out", f"{out}_start")
        print(f"      evaluate the starting model, to compare: {command}")


def check_out(out: str) -> Path:
    """The folder to write to. Raises ValueError if none is given or if it is a file."""
    if not out or Path(out).is_file():
        raise ValueError(f"the evaluation's folder is --out {out or '(missing)'}; give a folder")
    return Path(out)


def load(
    evaluation: Evaluation, checkpoint: str, say: Callable[[str], None] = print
) -> tuple[PyTree, str]:
    """Parameters and the name of their source: the model folder or a checkpoint."""
    model_config, mesh = evaluation.setup.model_config, evaluation.setup.mesh
    if not checkpoint:
        return huggingface.load_params(evaluation.folder, model_config, mesh), str(
            evaluation.folder
        )
    step = trained.find_checkpoint(checkpoint)
    began, here = trained.model_path(step), evaluation.config.model.path
    if began != here:
        say(f"note: training began from {began}; config and tokenizer are those of {here}")
    return load_policy(step, evaluation.folder, model_config, mesh), str(step)
