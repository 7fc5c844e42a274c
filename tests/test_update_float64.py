"""The gradient of whole updates, against formulas written out in float64.

The oracle is a decoder of its own in float64, and for every loss the slopes with respect to the
log-probabilities, derived by hand and summed over all rows of the update at once. The library
computes in float32, in microbatches of two widths.

Tolerances are shares of the largest entry of each parameter's gradient. Float32 has a unit of 6e-8
and an entry is a sum over some hundreds of terms: errors of up to 4e-6 were seen. A regression's
residual is of size 1 and a sum over up to 118 log-probabilities. Each is off by up to 2e-6 and
their sum was seen to be off by 1.3e-5, and so is the gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from basis_jax.config import (
    Config,
    CriticSection,
    LossSection,
    SamplingSection,
    TrainSection,
)
from basis_jax.losses import AGGREGATIONS, OBJECTIVES, REGRESSIONS
from basis_jax.model.sharding import make_mesh
from basis_jax.sampling.rollouts import Graded
from basis_jax.training.critic import CriticState, make_critic_update, make_optimizer
from basis_jax.training.microbatches import make_batches
from basis_jax.training.objective import make_score
from basis_jax.training.update import make_state, make_update
from basis_jax.types import Estimate, Rollouts, TokenCredit

TOLERANCE, OF_RESIDUALS = 1e-5, 4e-5
ROWS, WIDTH, UPDATE, GROUP, MAX_NEW = 12, 128, 6, 2, 110
TEMPERATURE, CHUNK, MICROBATCH = 0.7, 24, 2
NO_VERDICT = 4
OF_SEQUENCES = ("gspo", *REGRESSIONS)
TOTALS = np.array([128, 41, 50, 120, 40, 64, 46, 115, 44, 60, 126, 38])  # 2 of an update above 64
PROMPTS = np.array([20, 3, 11, 7, 15, 9, 5, 17, 2, 13, 8, 6])


# ------------------------------------------------------------------------------- the oracle's model
def states64(params, tokens):
    """Qwen3's final hidden states [N T D], written out: pre-norm layers, normed queries and keys,
    rotary pairs (i, i + 4), two query heads a key head, SwiGLU."""

    def normed(x, scale):
        size = jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        return x / size * jnp.expand_dims(scale, range(x.ndim - 1))

    steps = np.arange(tokens.shape[1], dtype=np.float64)
    angles = steps[:, None] * 10_000.0 ** -(np.arange(4) / 4)
    phase = np.exp(1j * angles)[None, :, None]

    def turned(x):
        pairs = jax.lax.complex(x[..., :4], x[..., 4:]) * phase
        return jnp.concatenate([pairs.real, pairs.imag], axis=-1)

    future = np.triu(np.ones((len(steps),) * 2, bool), 1)[None, None]
    x = params["embedding"][tokens]
    for n in range(tiny.TINY.layers):
        w = {name: leaf[n] for name, leaf in params["layers"].items()}
        h = normed(x, w["attention_norm"])
        q = turned(normed(jnp.einsum("ntd,dhk->nthk", h, w["q_proj"]), w["q_norm"]))
        k = turned(normed(jnp.einsum("ntd,dhk->nthk", h, w["k_proj"]), w["k_norm"]))
        v = jnp.einsum("ntd,dhk->nthk", h, w["v_proj"])
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        scores = jnp.einsum("nthk,nshk->nhts", q, k) / np.sqrt(8.0)
        weights = jax.nn.softmax(jnp.where(future, -jnp.inf, scores), axis=-1)
        x = x + jnp.einsum("nhts,nshk,hkd->ntd", weights, v, w["o_proj"])
        h = normed(x, w["mlp_norm"])
        gate, up = h @ w["gate_proj"], h @ w["up_proj"]
        x = x + (gate / (1 + jnp.exp(-gate)) * up) @ w["down_proj"]
    return normed(x, params["norm"])


def scores64(params, tokens, starts):
    """log p of every token [N T], and the log of the sum of exp(logits / temperature) before each
    completion [N]."""
    logits = states64(params, tokens) @ params["embedding"].T / TEMPERATURE
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(picked - lse[:, :-1], ((0, 0), (1, 0))), lse[np.arange(ROWS), starts - 1]


def in_float64(function):
    """The function of NumPy arrays, compiled in float64; it returns NumPy arrays."""
    compiled = jax.jit(function)

    def call(*arrays):
        with jax.enable_x64(True):
            return jax.device_get(compiled(*arrays))

    return call


scored = in_float64(scores64)
pulled_back = in_float64(lambda params, tokens, starts, slopes: vjp(params, tokens, starts)(slopes))


def vjp(params, tokens, starts):
    back = jax.vjp(lambda params: scores64(params, tokens, starts), params)[1]
    return lambda slopes: back(slopes)[0]


# ----------------------------------------------------------------------------------------- the data
@dataclasses.dataclass
class Step:
    """The rollouts of a step, and what three policies and a critic make of them."""

    tokens: np.ndarray
    mask: np.ndarray  # of tokens that count
    advantages: np.ndarray
    weights: np.ndarray  # the plan's
    sampler: np.ndarray
    policies: dict  # parameters in float32
    logp: dict  # in float64
    lse: np.ndarray  # of the new policy, which is updated
    states: np.ndarray  # its final hidden states
    credit: TokenCredit

    def graded(self):
        return Graded(
            rollouts=Rollouts(
                tokens=self.tokens,
                prompt_lengths=PROMPTS.astype(np.int32),
                completion_lengths=(TOTALS - PROMPTS).astype(np.int32),
                sampler_logprobs=self.sampler,
                score_norms=np.ones(ROWS, np.float32),
                terminated=np.ones(ROWS, bool),
                problem_ids=np.repeat(np.arange(ROWS // GROUP), GROUP).astype(np.int32),
            ),
            completions=[""] * ROWS,
            rewards=np.zeros(ROWS, np.float32),
            valid=self.mask.any(axis=1),
            reasons=[""] * ROWS,
            kinds=["wrong"] * ROWS,
            sample_seconds=1.0,
            verify_seconds=0.0,
            weights=self.weights,
        )


def moved(params, amount, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: np.float32(x + amount * random.normal(size=x.shape)), jax.device_get(params)
    )


def as64(tree):
    return jax.tree.map(np.float64, tree)


@pytest.fixture(scope="module")
def step():
    random, shape = np.random.default_rng(0), (ROWS, WIDTH)
    place = np.arange(WIDTH)[None]
    inside = (place >= PROMPTS[:, None]) & (place < TOTALS[:, None])
    mask = inside & (np.arange(ROWS) != NO_VERDICT)[:, None]
    tokens = random.integers(3, tiny.TINY.vocab_size, shape)
    tokens = np.where(place < TOTALS[:, None], tokens, 0).astype(np.int32)
    first = jax.device_get(tiny.random_params(tiny.TINY))
    policies = {"old": first, "new": moved(first, 0.006, 1), "ref": moved(first, 0.05, 2)}
    found = {name: scored(as64(p), tokens, PROMPTS) for name, p in policies.items()}
    noise, zeros = random.normal(size=(4, *shape)).astype(np.float32), np.zeros(ROWS, np.float32)
    return Step(
        tokens=tokens,
        mask=mask,
        advantages=random.normal(size=ROWS).astype(np.float32),
        weights=random.uniform(0.5, 2, ROWS).astype(np.float32),
        sampler=np.where(inside, found["old"][0] + 0.3 * noise[0], 0).astype(np.float32),
        policies=policies,
        logp={name: logp for name, (logp, _) in found.items()},
        lse=found["new"][1],
        states=in_float64(states64)(as64(policies["new"]), tokens),
        credit=TokenCredit(
            advantages=noise[1], returns=noise[2], values=noise[3], start_values=zeros
        ),
    )


# --------------------------------------------------------------------------- slopes derived by hand
def token_weights(mask, aggregation):
    """Of an update's rows [n T]: what a token's term counts."""
    lengths, live = mask.sum(axis=1, keepdims=True), mask.any(axis=1).sum()
    return {
        "token_mean": mask / mask.sum(),
        "sequence_mean": mask / (live * np.maximum(lengths, 1)),
        "constant_length": mask / (live * MAX_NEW),
    }[aggregation]


def slopes_of_ratio(ratio, a, low, high, dual=np.inf):
    """d/dlogp of max(-a ratio, -a clip(ratio)), at most -dual a where a < 0. No ratio may be so
    close to a bound that float32 sees it on the other side."""
    edges = np.abs(ratio[..., None] - [1 - low, 1 + high, dual])
    assert edges.min() > 1e-5
    free = np.where(a > 0, ratio < 1 + high, (ratio > 1 - low) & (ratio < dual))
    return np.where(free, -a * ratio, 0.0)


def token_slopes(loss, rows, step, old):
    """d loss / d logp of one update by a token objective, its KL term and the sampler's weights."""
    mask = step.mask[rows]
    logp = step.logp["new"][rows]
    a, log_ratio = np.float64(step.credit.advantages[rows]), mask * (logp - old[rows])
    if loss.objective == "gspo":
        lengths = np.maximum(mask.sum(axis=1, keepdims=True), 1)
        log_ratio = np.tile(log_ratio.sum(axis=1, keepdims=True) / lengths, WIDTH)
        a = np.tile(np.float64(step.advantages[rows, None]), WIDTH)
    ratio = np.exp(log_ratio)
    if loss.objective == "gpg":
        slopes = -a
    elif loss.objective == "cispo":
        slopes = -np.clip(ratio, 1 - loss.clip_low, 1 + loss.clip_high) * a
    else:
        slopes = slopes_of_ratio(ratio, a, loss.clip_low, loss.clip_high, loss.dual_clip or np.inf)
    gap = np.where(mask, old[rows] - np.float64(step.sampler[rows]), 0)
    if loss.sampler_correction == "sequence_tis":
        gap = np.broadcast_to(gap.sum(axis=1, keepdims=True), gap.shape)
    rho = np.exp(gap)
    if loss.sampler_correction in ("tis", "sequence_tis"):
        slopes = slopes * np.minimum(rho, loss.sampler_cap)
    if loss.sampler_correction == "icepop":
        slopes = slopes * np.where((rho > loss.sampler_floor) & (rho < loss.sampler_cap), rho, 0)
    x = logp - step.logp["ref"][rows]
    bounded = np.where(np.exp(-x) - 1 + x < 10, 1 - np.exp(-x), 0)
    kl = {"k1": 1.0, "k2": x, "k3": bounded, "k3+": x}[loss.kl]
    weights = token_weights(mask, loss.aggregation) * np.float64(step.weights[rows, None])
    return weights * (slopes + loss.kl_coef * kl)


def regression_slopes(loss, rows, step):
    """d loss / d logp [n T] and d loss / d lse [n] of the mean of e^2 over the live rows."""
    mask, a = step.mask[rows], np.float64(step.advantages[rows])
    live = mask.any(axis=1)
    anchor = step.logp["old" if loss.objective == "rebel" else "ref"][rows]
    x = np.sum(mask * (step.logp["new"][rows] - anchor), axis=1)
    e, of_x, of_lse = {
        "a_star_po": (loss.beta * x - a, loss.beta, 0.0),
        "rebel": (x - a / loss.beta, 1.0, 0.0),
        "tbrm": (x + step.lse[rows] - a / loss.beta, 1.0, 1.0),
    }[loss.objective]
    if loss.objective == "rebel":
        for prompt in np.arange(len(e)).reshape(-1, GROUP):
            kept = prompt[live[prompt]]
            e[kept] -= e[kept].mean()
    e = 2 * np.where(live, e, 0) * np.float64(step.weights[rows]) / live.sum()
    return mask * (of_x * e)[:, None], of_lse * e


def expected_gradient(loss, rows, step, *, on_policy=False):
    """The slopes, and from them the gradient of the parameters, of the rows of one update."""
    old = step.logp["new" if on_policy else "old"]
    slopes, of_lse = np.zeros(step.mask.shape), np.zeros(ROWS)
    if loss.objective in REGRESSIONS:
        slopes[rows], of_lse[rows] = regression_slopes(loss, rows, step)
    else:
        slopes[rows] = token_slopes(loss, rows, step, old)
    params = as64(step.policies["new"])
    return pulled_back(params, step.tokens, PROMPTS, (slopes, of_lse))


# ------------------------------------------------------------------------------ the library's side
def config_of(loss, rows):
    return Config(
        run_dir="",
        loss=loss,
        sampling=SamplingSection(max_new_tokens=MAX_NEW, group_size=GROUP, temperature=TEMPERATURE),
        train=TrainSection(
            prompts_per_step=ROWS // GROUP,
            minibatch_rollouts=rows,
            microbatch_rollouts=MICROBATCH,
        ),
    )


SCORE = make_score(
    tiny.TINY,
    loss=LossSection(logprob_chunk=CHUNK),
    temperature=TEMPERATURE,
    microbatch=MICROBATCH,
)


def batches_of(step, loss, *, update_rows):
    """The mesh and the microbatches of every update, of two widths. With two updates they hold the
    old policy's log-probabilities."""
    zeros = jnp.zeros(ROWS)
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        updates = make_batches(
            step.graded(),
            Estimate(
                advantages=jnp.asarray(step.advantages), values=zeros, baselines=zeros, info={}
            ),
            config=config_of(loss, update_rows),
            score=SCORE,
            params=step.policies["old"],
            reference=step.policies["ref"] if loss.needs_reference else None,
            credit=None if loss.objective in OF_SEQUENCES else step.credit,
            mesh=mesh,
        )
    for micros in updates:
        assert {micro.tokens.shape for micro in micros} == {(2, WIDTH), (4, 64)}
    return mesh, updates


def new_state(step, optimizer, mesh, *, critic=None):
    params = jax.tree.map(jnp.array, step.policies["new"])  # an update donates them
    return make_state(params, optimizer, (), model_config=tiny.TINY, mesh=mesh, critic=critic)


def gradients_of(step, losses, *, update_rows):
    """For each of ``losses``, which differ in their aggregation alone: the gradients of the step's
    updates, as an optimizer receives them, all at the new policy's parameters."""
    keep = optax.trace(decay=0.0)  # its state is the newest gradient
    update = make_update(
        tiny.TINY,
        keep,
        loss=losses[0],
        temperature=TEMPERATURE,
        microbatch=MICROBATCH,
        group_size=GROUP,
        rollouts=update_rows,
    )
    for loss in losses:
        mesh, updates = batches_of(step, loss, update_rows=update_rows)
        with jax.set_mesh(mesh):
            states = [update(new_state(step, keep, mesh), micros)[0] for micros in updates]
        yield loss, [jax.device_get(state.opt_state.trace) for state in states]


def assert_close(found, expected, tolerance=TOLERANCE):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        largest = np.abs(y).max()
        assert largest > 1e-6 and x.dtype == np.float32 and y.dtype == np.float64
        worst = np.abs(x - y).max() / largest
        assert worst < tolerance, f"{jax.tree_util.keystr(path)} is off by {worst:.1e}"


CASES = {
    "ppo_clip_tis_k3+": {
        **{"clip_low": 0.1, "clip_high": 0.15, "dual_clip": 1.25, "kl_coef": 0.3},
        **{"sampler_correction": "tis", "sampler_cap": 1.2},
    },
    "gspo_k1": {"clip_low": 0.01, "clip_high": 0.02, "kl": "k1", "kl_coef": 0.2},
    "cispo_k2": {"clip_low": 0.1, "clip_high": 0.15, "kl": "k2", "kl_coef": 0.5},
    "gpg_icepop_k3": {
        **{"sampler_correction": "icepop", "sampler_floor": 0.7, "sampler_cap": 1.4},
        **{"kl": "k3", "kl_coef": 0.4},
    },
    "a_star_po": {"beta": 0.05},
    "rebel": {"beta": 0.5},
    "tbrm": {"beta": 0.5},
}
"""The options of every objective, whose name comes first."""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_updates_of_a_step_have_the_gradients_of_their_formula(step, case):
    """Off-policy, with the plan's weights, a row without a verdict, and one advantage a token for
    objectives that allow it, by each aggregation that the objective allows."""
    objective = next(name for name in OBJECTIVES if case.startswith(name))
    loss = LossSection(objective=objective, logprob_chunk=CHUNK, **CASES[case])
    allowed = ("sequence_mean",) if objective in OF_SEQUENCES else AGGREGATIONS
    losses = [dataclasses.replace(loss, aggregation=name) for name in allowed]
    tolerance = OF_RESIDUALS if objective in REGRESSIONS else TOLERANCE
    for each, found in gradients_of(step, losses, update_rows=UPDATE):
        assert len(found) == ROWS // UPDATE
        for number, gradient in enumerate(found):
            rows = np.arange(number * UPDATE, (number + 1) * UPDATE)
            assert_close(gradient, expected_gradient(each, rows, step), tolerance)


@pytest.mark.slow
def test_the_one_update_of_a_step_has_the_gradient_of_its_formula(step):
    """Strictly on-policy: the ratio is 1, and the sampler's weights are those of this policy."""
    loss = LossSection(sampler_correction="sequence_tis", sampler_cap=3.0, logprob_chunk=CHUNK)
    ((_, (gradient,)),) = gradients_of(step, [loss], update_rows=ROWS)
    expected = expected_gradient(loss, np.arange(ROWS), step, on_policy=True)
    assert_close(gradient, expected)


@pytest.mark.slow
def test_a_critics_update_has_the_gradient_of_its_formula(step):
    """Of the whole step: sum of w / 2 max((V - R)^2, (V' - R)^2), V' clipped around the old value.
    Adam's first moment after one update is a tenth of the gradient."""
    head = {"weight": np.float32(np.random.default_rng(4).normal(size=32)), "bias": np.float32(0.3)}
    states = step.states[:, :-1]
    directions = np.zeros((ROWS, WIDTH, 32))
    directions[:, 1:] = states / np.linalg.norm(states, axis=-1, keepdims=True)
    v = directions @ np.float64(head["weight"]) + np.float64(head["bias"])
    old, returns = np.float64(step.credit.values), np.float64(step.credit.returns)
    near = old + np.clip(v - old, -0.5, 0.5)
    open_branch = (v == near) | ((v - returns) ** 2 > (near - returns) ** 2)
    weights = token_weights(step.mask, "token_mean") * np.float64(step.weights[:, None])
    slopes = weights * np.where(open_branch | (np.abs(v - old) < 0.5), v - returns, 0.0)
    expected = {"weight": np.einsum("nt,ntd->d", slopes, directions), "bias": slopes.sum()}

    section = CriticSection(clip=0.5)
    mesh, (micros,) = batches_of(step, LossSection(), update_rows=ROWS)
    with jax.set_mesh(mesh):
        head = jax.tree.map(jnp.asarray, head)
        critic = CriticState(head=head, opt_state=make_optimizer(section).init(head))
        state = new_state(step, optax.identity(), mesh, critic=critic)
        state, _ = make_critic_update(tiny.TINY, section)(state, micros)
    moment = jax.device_get(optax.tree.get(state.critic.opt_state, "mu"))
    assert_close(jax.tree.map(lambda x: x / np.float32(1 - 0.9), moment), expected)
