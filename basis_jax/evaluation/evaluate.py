"""Held-out accuracy while training, and the stand-alone evaluation of a model or a checkpoint.

Both draw the same completions, because random numbers depend only on seed, problem and sample. The
files of the stand-alone evaluation are written in ``completions.py``.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from basis_jax import verify
from basis_jax.config import Config, DataSection, EvalSection, SamplingSection
from basis_jax.data.encoding import EncodedProblems, encode_and_report
from basis_jax.data.sources import load_held_out
from basis_jax.evaluation import scores
from basis_jax.evaluation.scores import bootstrap_interval
from basis_jax.model.decoder import ModelConfig, computed_in
from basis_jax.opening.checks import check_evaluation, check_memory
from basis_jax.opening.ranges import check_ranges
from basis_jax.opening.rollout_setup import locate_model, open_setup, open_verifiers
from basis_jax.opening.sizes import with_sizes
from basis_jax.sampling.rollouts import Graded, RolloutSetup, roll_out
from basis_jax.verify.verdicts import Verifier, shares
from basis_jax.weights import huggingface, layout


def problem_scores(rewards: np.ndarray, valid: np.ndarray, samples: int) -> np.ndarray:
    """Mean reward per problem. A problem's ``samples`` rows are adjacent, and rows that are not
    valid count as wrong."""
    shape = (-1, samples)
    return scores.average(scores.counted_rewards(rewards.reshape(shape), valid.reshape(shape)))


def invalid_warning(metrics: Mapping[str, float]) -> str:
    """A warning if some completions of ``evaluate`` could not be graded, else ""."""
    if not metrics.get("eval/invalid"):
        return ""
    ungraded = metrics.get("eval/verify/ungraded", 0.0)
    return (
        f"warning: {metrics['eval/invalid']:.2%} of the held-out completions could not be graded "
        f"and count as wrong (eval/invalid): {metrics['eval/verify/gold']:.2%} because the right "
        f"answer cannot be read, {metrics['eval/verify/failure']:.2%} because the verifier failed"
        + (f", {ungraded:.2%} because the reward function gave None" if ungraded else "")
    )


def complete(
    params: PyTree,
    setup: RolloutSetup,
    problems: EncodedProblems,
    *,
    units: np.ndarray,
    samples: int,
    sampling: SamplingSection,
) -> Graded:
    """The rollouts ``units`` of a set, numbered with a problem's ``samples`` adjacent.

    Random numbers are the same in every call, so results before and after training differ only by
    the policy.
    """
    return roll_out(
        params,
        setup,
        problems,
        ids=(units // samples).astype(np.int32),
        samples=(units % samples).astype(np.int32),
        sampling=sampling,
        stream="evaluate",
        step=0,
    )


def evaluate(
    params: PyTree,
    setup: RolloutSetup,
    sets: dict[str, EncodedProblems],
    *,
    section: EvalSection,
    sampling: SamplingSection,
) -> dict[str, float]:
    """Held-out accuracy, sampled (``eval/accuracy``) and greedy (``eval/greedy_accuracy``).

    Accuracy is the mean reward: the share of right completions if rewards are 0 and 1. It is the
    average over sets, with a 95 % interval, and also given for each set if there are several.
    Sampling uses each set's own number of samples and temperature; a set with temperature 0 is
    completed once for both. ``eval/invalid`` is the share of all completions that could not be
    graded; they count as wrong. ``eval/verify/...`` is the share of each kind of verdict
    (``verify.verdicts.shares``).

    Raises ValueError if no completion of a set could be graded.
    """
    metrics, valid, kinds = {}, [], []
    found: dict[tuple[str, float], np.ndarray] = {}
    for prefix in ("", "greedy_"):
        scores_by_set = {}
        for name, problems in sets.items():
            samples = 1 if prefix else section.samples_of(name)
            temperature = 0.0 if prefix else section.temperature_of(name)
            if (name, temperature) not in found:
                graded = complete(
                    params,
                    setup.for_set(name),
                    problems,
                    units=np.arange(len(problems.problems) * samples),
                    samples=samples,
                    sampling=dataclasses.replace(sampling, temperature=temperature),
                )
                scores.check_graded(graded.valid, name)
                valid.append(graded.valid)
                kinds += graded.kinds
                found[name, temperature] = problem_scores(graded.rewards, graded.valid, samples)
            scores_by_set[name] = found[name, temperature]
            if len(sets) > 1:
                metrics[f"eval/{name}/{prefix}accuracy"] = float(scores_by_set[name].mean())
        low, high = bootstrap_interval(list(scores_by_set.values()))
        metrics[f"eval/{prefix}accuracy"] = float(
            np.mean([s.mean() for s in scores_by_set.values()])
        )
        metrics[f"eval/{prefix}accuracy_low"] = low
        metrics[f"eval/{prefix}accuracy_high"] = high
    metrics |= {f"eval/{name}": share for name, share in shares(kinds).items()}
    return metrics | {"eval/invalid": 1.0 - float(np.concatenate(valid).mean())}


@dataclass(frozen=True)
class Evaluation:
    """What stays fixed in a stand-alone evaluation, apart from the parameters. ``failed`` has the
    sets that could not be loaded, with the reason."""

    config: Config
    folder: Path  # of the model
    setup: RolloutSetup
    sets: dict[str, EncodedProblems]
    failed: dict[str, str] = dataclasses.field(default_factory=dict)

    def sampling(self, name: str) -> SamplingSection:
        """The sampling settings of training, with the temperature of this set."""
        temperature = self.config.eval.temperature_of(name)
        return dataclasses.replace(self.config.sampling, temperature=temperature)


@contextmanager
def open_evaluation(config: Config, report: Callable[[str], None] = print) -> Iterator[Evaluation]:
    """Yield the Evaluation; its verifier's processes end with the block. Needs no training data.

    A set that cannot be loaded or does not fit is left out, and reported. Raises ValueError for
    settings that cannot be evaluated, before weights are read, and if no set is left.
    """
    check_ranges(config)
    folder, model_config, mesh = locate_model(config)
    check_evaluation(config, model_config, mesh)
    tokenizer = huggingface.load_tokenizer(folder)
    sets, failed = {}, {}
    with open_verifiers(config) as verifiers:
        for name in config.eval.sets:
            try:
                verifier = verifiers.held_out[name]
                problems = load_held_out_set(name, config, tokenizer, verifier, report)
                shape: dict[str, Any] = {
                    "prompt_width": problems.tokens.shape[1],
                    "rows": len(problems.problems) * config.eval.samples_of(name),
                }
                sized = with_sizes(config, model_config, mesh, **shape, report=lambda line: None)
                check_memory(sized, model_config, mesh, **shape)
                sets[name] = problems
            except ValueError as error:
                failed[name] = str(error)
                if len(failed) == len(set(config.eval.sets)):
                    raise
                report(f"warning: {name} is left out: {error}")
        config = with_sizes(
            config,
            model_config,
            mesh,
            prompt_width=max(problems.tokens.shape[1] for problems in sets.values()),
            rows=max(len(p.problems) * config.eval.samples_of(name) for name, p in sets.items()),
            report=report,
        )
        with open_setup(
            config, folder, model_config, mesh, tokenizer, verifiers=verifiers, report=report
        ) as setup:
            yield Evaluation(config, folder, setup, sets, failed)


def load_held_out_set(
    name: str,
    config: Config,
    tokenizer: Any,
    verifier: Verifier,
    report: Callable[[str], None],
) -> EncodedProblems:
    """A set of ``eval.sets`` as tokens. Problems left out are reported."""
    section = config.held_out_data(name)
    return encode_and_report(
        f"held-out {name}",
        load_held_out(name, config.eval.folder, section, verifier),
        section,
        tokenizer,
        size=config.eval.size,
        report=report,
    )


def protocol(evaluation: Evaluation, params: PyTree) -> dict[str, Any]:
    """What must be equal in two evaluations for the same results, up to rounding.

    ``weights`` is a hash of the parameters. It is the same for a checkpoint and its float32 export.
    """
    config, setup, sampling = evaluation.config, evaluation.setup, evaluation.config.sampling
    described = dataclasses.asdict(computed_in(setup.model_config, sampling.dtype))
    apart = ("remat", "attention", "scan_decode", "lora")
    described = {k: v for k, v in described.items() if k not in apart}
    return {
        "sets": {
            name: {
                "problems": len(problems.problems),
                "data_sha256": sha256([[p.prompt, p.answer] for p in problems.problems]),
                "prompts_sha256": sha256(
                    [
                        row[:length].tolist()
                        for row, length in zip(problems.tokens, problems.lengths, strict=True)
                    ]
                ),
                **set_protocol(config, name),
            }
            for name, problems in evaluation.sets.items()
        },
        "samples": config.eval.samples,
        "temperature": config.eval.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_new_tokens": sampling.max_new_tokens,
        "eos_ids": list(setup.eos_ids),
        "seed": setup.seed,
        "verifier": verifier_version(config.data),
        "model": described,
        "weights_sha256": params_sha256(params, setup.model_config),
    }


def set_protocol(config: Config, name: str) -> dict[str, Any]:
    """The config's settings for this set only."""
    section = config.eval
    own: dict[str, Any] = {}
    if name in section.set_samples:
        own["samples"] = section.set_samples[name]
    if name in section.set_temperatures:
        own["temperature"] = section.set_temperatures[name]
    if name in section.set_verifiers:
        own["verifier"] = verifier_version(config.held_out_data(name))
    return own


def sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def params_sha256(params: PyTree, model_config: ModelConfig) -> str:
    """Hash of names, shapes and float32 values, with the names and layouts of Hugging Face's
    files."""
    digest = hashlib.sha256()
    for name, tensor in layout.stored_tensors(params, model_config):
        digest.update(f"{name}\0{tensor.shape}\0".encode())
        digest.update(np.ascontiguousarray(tensor, np.float32).data)
    return digest.hexdigest()


def verifier_version(section: DataSection) -> dict[str, str]:
    """The verifier's name, its answer mode, a hash of the source of ``verify/``, and the versions
    of packages it uses."""
    digest = hashlib.sha256()
    for path in sorted(Path(verify.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    mathematics = ("math-verify", "latex2sympy2-extended", "sympy")
    packages = {"exact": (), "gym": ("reasoning-gym",)}.get(section.verifier, mathematics)
    own = verify.source_fingerprint(section.verifier)
    packages = packages if own is None else ()
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {
        **({} if own is None else {"own_sha256": own}),
        "name": section.verifier,
        "answer_mode": section.answer_mode,
        "source_sha256": digest.hexdigest(),
        **versions,
    }
