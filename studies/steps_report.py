"""Describe the regimes of the embedded model of worked steps: values, lengths, gradients.

Command:   python -m studies.steps_report [--model FOLDER] [--regimes free single guess]
Hardware:  2 CPU cores; below 10 minutes beside several other jobs
Result:    of 200 problems, 16 samples each, gradients of 400 rollouts a regime

                                                  noise under each baseline
regime   V     sd    greedy  tokens  m0 / m1   none   mean  value  constant
free     .518  .321   .585     24      1.78     660    449    283    413
single   .567  .298   .700     24      8.86      61    143    130     53
guess    .470  .248   .230     17       .35     593    216    214    165
hard     .105  .105   .110     31      1.10     293    261    261    260
easy     .912  .077  1.000     24      2.82     809    198    184    180
long     .583  .050  1.000    237      1.62    5355   2857   2946   2707

The wording of a line has an entropy of 3.19 nats (``single``: .01). No right completion of a prompt
with V >= .85 has a probability above .002 (``single``: .98).

For the held-out problems of each regime the table has the value V (share of right samples) and its
standard deviation between problems (without sampling noise), greedy accuracy, completion lengths,
the entropy of a line's wording, and the largest probability of a right completion where V >= .85.
From exact gradients g of whole completions' log-probabilities, with w = |g|^2, it has m0 / m1 =
E[w | wrong] / E[w | right], and the noise E[w (r - b)^2] of four baselines b: none, the mean
reward, the value (the mean of the problem's other samples), and the best constant.
"""

import argparse
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from basis_jax import command_line
from basis_jax.config import Config, SamplingSection
from basis_jax.data import tasks
from basis_jax.data.encoding import EncodedProblems, encode_prompts
from basis_jax.data.tasks.steps import REGIMES
from basis_jax.masked import completion_mask
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.logprobs import token_logprobs
from basis_jax.opening.rollout_setup import locate_model, open_setup
from basis_jax.sampling.rollouts import Graded, RolloutSetup, roll_out
from basis_jax.weights import huggingface
from studies.gradient_sketch import pieces
from studies.gradient_sketch import token_logprobs as plain_logprobs
from studies.make_steps_model import EQUALS, OPENERS, vocabulary

ROWS = 16  # rows whose gradients exist at once
LONG = 300  # tokens of the longest completion of ``long``


@functools.partial(jax.jit, static_argnums=1)
def squared_norms(
    params: PyTree,
    model_config: ModelConfig,
    tokens: Int[Array, "N T"],
    mask: Float[Array, "N T"],
) -> Float[Array, " N"]:
    """|gradient of the completion's log-probability|^2, by row."""

    def logprob(params, row, inside):
        return jnp.sum(plain_logprobs(params, model_config, row[None], 1.0)[0] * inside)

    gradients = jax.vmap(jax.grad(logprob), in_axes=(None, 0, 0))(params, tokens, mask)
    leaves = jax.tree.leaves(gradients)
    return jnp.sum(jnp.stack([jnp.sum(x**2, axis=range(1, x.ndim)) for x in leaves]), axis=0)


def mask_of(graded: Graded) -> np.ndarray:
    """Which tokens are a completion's: [N T]."""
    rollouts = graded.rollouts
    lengths = jnp.asarray(rollouts.prompt_lengths), jnp.asarray(rollouts.completion_lengths)
    return np.asarray(completion_mask(*lengths, rollouts.tokens.shape[1]))


def weights_of(
    params: PyTree, model_config: ModelConfig, graded: Graded, rows: np.ndarray
) -> np.ndarray:
    """``squared_norms`` of some rollouts; those of similar length are computed together."""
    mask, tokens = mask_of(graded)[rows], np.asarray(graded.rollouts.tokens)[rows]
    norms = np.zeros(len(rows))
    for at, width in pieces(mask, ROWS):
        part = jnp.asarray(tokens[at, :width]), jnp.asarray(mask[at, :width], jnp.float32)
        norms[at] = np.asarray(squared_norms(params, model_config, *part))
    return norms


def sample(
    params: PyTree,
    setup: RolloutSetup,
    problems: EncodedProblems,
    sampling: SamplingSection,
    n: int,
) -> Graded:
    """``n`` graded completions of every problem; those of a problem are adjacent."""
    size = len(problems.problems)
    ids = np.repeat(np.arange(size, dtype=np.int32), n)
    samples = np.tile(np.arange(n, dtype=np.int32), size)
    return roll_out(
        params,
        setup,
        problems,
        ids=ids,
        samples=samples,
        sampling=sampling,
        stream="evaluate",
        step=0,
    )


def values(params: PyTree, model_config: ModelConfig, graded: Graded, n: int) -> dict[str, float]:
    """Values, lengths, wordings and the likeliest right completion of ``sample``'s rollouts."""
    rollouts = graded.rollouts
    passed = graded.rewards.reshape(-1, n).mean(axis=1)
    spread = passed.var() - np.mean(passed * (1 - passed)) / (n - 1)
    lengths = np.quantile(rollouts.completion_lengths, [0.1, 0.25, 0.5, 0.75, 0.9])
    logprobs = np.asarray(rollouts.sampler_logprobs)
    probability = np.exp(np.where(mask_of(graded), logprobs, 0).sum(axis=1))
    probability = probability.reshape(-1, n)
    sure = passed >= 0.85
    likeliest = np.where(graded.rewards.reshape(-1, n) > 0, probability, 0)[sure]
    return {
        "value": passed.mean(),
        "value_sd": np.sqrt(max(spread, 0)),
        "solved_share": (passed == 1).mean(),
        "never_share": (passed == 0).mean(),
        "cut": 1 - np.mean(rollouts.terminated),
        **{f"length_{q}": x for q, x in zip((10, 25, 50, 75, 90), lengths, strict=True)},
        "line_wording_nats": wording_entropy(params, model_config, graded),
        "likeliest_right": likeliest.max() if sure.any() else np.nan,
    }


def wording_entropy(params: PyTree, model_config: ModelConfig, graded: Graded) -> float:
    """Entropy (nats) of a line's opener and of its word for "is", over the first 256 rollouts."""
    tokens = np.asarray(graded.rollouts.tokens)[:256]
    inside = mask_of(graded)[:256]
    score = jax.jit(token_logprobs, static_argnums=1)
    _, entropy = score(params, model_config, jnp.asarray(tokens))
    ids = vocabulary().index
    parts = [[ids(o) for o in OPENERS], [ids(f" {e}") for e in EQUALS]]
    return sum(float(np.asarray(entropy)[inside & np.isin(tokens, part)].mean()) for part in parts)


def gradients(
    weights: np.ndarray, rewards: np.ndarray, lengths: np.ndarray, others: np.ndarray
) -> dict[str, float]:
    """m0 / m1 (also of norms per token) and the noise under each baseline."""
    right = rewards > 0

    def ratio(w):
        return w[~right].mean() / w[right].mean()

    best = np.sum(weights * rewards) / np.sum(weights)
    baselines = {"none": 0.0, "mean": rewards.mean(), "value": others, "constant": best}
    noise = {f"noise_{k}": np.mean(weights * (rewards - b) ** 2) for k, b in baselines.items()}
    return {
        "m0/m1": ratio(weights),
        "m0/m1_per_token": ratio(weights / lengths),
        "m1": weights[right].mean(),
        "constant": best,
        "effective_rows": weights.sum() ** 2 / np.sum(weights**2),
        **noise,
    }


def report(options: argparse.Namespace, regime: str) -> dict[str, float]:
    """All figures of a regime."""
    config = config_of(options.model, regime)
    folder, model_config, mesh = locate_model(config)
    tokenizer = huggingface.load_tokenizer(folder)
    params = huggingface.load_params(folder, model_config, mesh)
    made = tasks.problems(f"steps/{regime}", held_out=True)
    problems = encode_prompts(made, config.data, tokenizer, size=options.problems)
    n, size = options.samples, len(problems.problems)
    greedy = dataclasses.replace(config.sampling, temperature=0.0)
    with open_setup(config, folder, model_config, mesh, tokenizer) as setup, jax.set_mesh(mesh):
        graded = sample(params, setup, problems, config.sampling, n)
        mastered = sample(params, setup, problems, greedy, 1).rewards.mean()
    figures = values(params, model_config, graded, n) | {"greedy": mastered}
    kept = min(n, max(1, options.gradients // size))
    rows = (np.arange(size)[:, None] * n + np.arange(kept)).reshape(-1)
    others = (graded.rewards.reshape(-1, n).sum(axis=1).repeat(n) - graded.rewards) / (n - 1)
    weights = weights_of(params, model_config, graded, rows)
    lengths = np.asarray(graded.rollouts.completion_lengths)[rows]
    figures |= gradients(weights, graded.rewards[rows], lengths, others[rows])
    return {k: float(x) for k, x in figures.items()}


def config_of(model: str, regime: str) -> Config:
    """The regime's config: that of ``configs/steps.py`` with longer completions for ``long``."""
    config = command_line.load_config("steps")
    sampling = config.sampling
    if regime == "long":
        sampling = dataclasses.replace(sampling, max_new_tokens=LONG)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=model),
        data=dataclasses.replace(config.data, path=f"task:steps/{regime}"),
        sampling=sampling,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded:steps", metavar="FOLDER")
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--gradients", type=int, default=400, help="rollouts of each regime")
    options = parser.parse_args()
    for regime in options.regimes:
        figures = {k: round(x, 4) for k, x in report(options, regime).items()}
        print(json.dumps({"regime": regime} | figures), flush=True)


if __name__ == "__main__":
    main()
