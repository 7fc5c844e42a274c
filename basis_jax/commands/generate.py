"""Show what a trained model answers.

    basis-jax generate runs/quickstart "What is two plus three?"
    basis-jax generate runs/quickstart/checkpoints/40 "What is two plus three?" --samples 8

The model is the newest checkpoint of a run, or the one given as RUN/checkpoints/STEP. Each sample
is printed with its log-probability: the sum over its tokens, in nats, at the sampling temperature.
If the right answer is known, each sample has a verdict, and the value of the prompt is the share of
right samples. The answer is known if it is given with --answer, or if the prompt is one of the
run's own problems and these can be read without a download.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from basis_jax import command_line
from basis_jax.config import Config, DataSection, EvalSection
from basis_jax.data.encoding import encode_prompts
from basis_jax.data.problem import Problem
from basis_jax.data.sources import load_held_out, load_training
from basis_jax.opening.ranges import check_ranges
from basis_jax.opening.rollout_setup import Verifiers, locate_model, open_setup, open_verifiers
from basis_jax.opening.sizes import with_sizes
from basis_jax.sampling.rollouts import Graded, roll_out
from basis_jax.saved_config import config_from
from basis_jax.training import reference_table
from basis_jax.weights import huggingface, trained
from basis_jax.weights.adapters import load_policy


def main() -> None:
    options = parse()
    checkpoint = trained.find_checkpoint(options.run)
    config = config_from(trained.saved_config(checkpoint))
    if options.temperature is not None:
        sampling = replace(config.sampling, temperature=options.temperature)
        config = replace(config, sampling=sampling)
    model = replace(config.model, lora_rank=0)  # adapters are merged
    config = replace(config, seed=options.seed, model=model)
    check_ranges(config)
    problem, section = find_problem(config, options.prompt, options.answer)
    print(
        f"{options.samples} samples of {checkpoint} at temperature "
        f"{config.sampling.temperature:g}, for the prompt: {options.prompt}",
        flush=True,
    )
    asked = problem or Problem(prompt=options.prompt, answer="(unknown)")
    graded, unknown_tokens = generate(replace(config, data=section), checkpoint, asked, options)
    if unknown_tokens:
        print(f"warning: {unknown_tokens} tokens of the prompt are unknown to this model")
    print("\n".join(sample_lines(graded, problem is not None)))
    if problem is not None:
        print(value_line(graded, problem, checkpoint))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, or RUN/checkpoints/STEP")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--temperature", type=float, help="default: the run's; 0 is greedy")
    parser.add_argument("--answer", metavar="TEXT", help="the right answer")
    parser.add_argument("--seed", type=int, default=0)
    command_line.add_debug(parser)
    options = parser.parse_args()
    options.prompt = options.prompt.strip()
    if options.samples < 1 or not options.prompt:
        raise ValueError(
            f"--samples is {options.samples} and the prompt {options.prompt!r}; give 1 or more "
            "samples and a prompt that is not empty"
        )
    return options


def find_problem(
    config: Config, prompt: str, answer: str | None
) -> tuple[Problem | None, DataSection]:
    """The problem of this prompt, and how it is graded; None if no right answer is known.

    If the run has a problem with this prompt, it is that one, graded as its set is; ``answer``
    replaces its right answer. If the run's problems or verifiers cannot be opened, this is printed.
    Raises ValueError if an answer is given and cannot be graded.
    """
    ungraded = replace(config.data, verifier="exact", answer_mode="")
    try:
        with open_verifiers(config) as verifiers:
            needed = verifiers.training.required_columns
            for problem, section in own_problems(config, verifiers):
                if problem.prompt == prompt:
                    return (problem if answer is None else replace(problem, answer=answer)), section
    except ValueError as error:
        if answer is not None:
            raise
        print(f"note: samples are not graded: {error}")
        return None, ungraded
    if answer is None:
        return None, ungraded
    if needed:
        raise ValueError(
            f"{config.data.verifier} asks for the columns {', '.join(needed)}, which only the "
            "run's own problems have; give one of their prompts, or leave out --answer"
        )
    return Problem(prompt=prompt, answer=answer), config.data


def own_problems(config: Config, verifiers: Verifiers) -> Iterator[tuple[Problem, DataSection]]:
    """Problems of the run that can be read without a download, each with how its set is graded."""
    data, folder = config.data, config.eval.folder
    if readable(data.path):
        for problem in load_training(data, verifiers.training):
            yield problem, data
    for name in filter(readable, config.eval.sets):
        section = config.held_out_data(name)
        for problem in load_held_out(name, folder, section, verifiers.held_out[name]):
            yield problem, section


def readable(path: str) -> bool:
    return path.startswith("task:") or Path(path).is_file()


def generate(
    config: Config, checkpoint: Path, problem: Problem, options: argparse.Namespace
) -> tuple[Graded, int]:
    """``options.samples`` completions, and the number of prompt tokens that the tokenizer does not
    know."""
    folder, model_config, mesh = locate_model(config)
    room = model_config.max_positions - config.sampling.max_new_tokens
    data = replace(config.data, max_prompt_tokens=room, rewards={}, verifier_weight=1.0)
    config = replace(config, data=data, eval=EvalSection(sets=()))
    tokenizer = huggingface.load_tokenizer(folder)
    encoded = encode_prompts([problem], data, tokenizer)
    sizes = {"prompt_width": encoded.tokens.shape[1], "rows": options.samples}
    config = with_sizes(config, model_config, mesh, **sizes, report=lambda line: None)
    with (
        open_setup(config, folder, model_config, mesh, tokenizer) as setup,
        jax.set_mesh(mesh),
    ):
        graded = roll_out(
            load_policy(checkpoint, folder, model_config, mesh),
            setup,
            encoded,
            ids=np.zeros(options.samples, np.int32),
            samples=np.arange(options.samples, dtype=np.int32),
            sampling=config.sampling,
            stream="evaluate",
            step=0,
        )
    unknown = tokenizer.unk_token_id
    return graded, 0 if unknown is None else int(np.sum(encoded.tokens == unknown))


def sample_lines(graded: Graded, known: bool) -> Iterator[str]:
    rollouts = graded.rollouts
    for i, text in enumerate(graded.completions):
        length = int(rollouts.completion_lengths[i])
        about = f"log-prob {rollouts.sampler_logprobs[i].sum():.2f}, {length} tokens"
        if not rollouts.terminated[i]:
            about += ", cut at the limit"
        if known:
            right = "right" if graded.rewards[i] > 0.5 else "wrong"
            about += f", {right if graded.valid[i] else 'not graded'} ({graded.reasons[i]})"
        yield f"{i + 1:3}. {text.strip()}   [{about}]"


def value_line(graded: Graded, problem: Problem, checkpoint: Path) -> str:
    """The share of right samples, and the pass rate before training if the run measured it. If some
    rewards are neither 0 nor 1, these are mean rewards."""
    rewards = graded.rewards[graded.valid]
    if np.isin(rewards, (0, 1)).all():
        value = f"{int(rewards.sum())} of {rewards.size} samples right"
    else:
        value = f"mean reward {rewards.mean():.3f} of {rewards.size} samples"
    line = f"right answer: {problem.answer}; value: {value}" if problem.answer else value
    path = checkpoint.parent.parent / "reference.npz"
    if path.is_file():
        table = reference_table.load(path)
        for row in np.flatnonzero((table.uids == problem.uid) & (table.trials > 0)):
            successes, trials = table.successes[row], table.trials[row]
            mean = f"mean reward {successes / trials:.3f} of {trials}"
            line += f"; before training {mean if table.fractional else f'{successes} of {trials}'}"
    return line
