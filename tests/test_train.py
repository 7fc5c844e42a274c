"""The update: the same gradient whatever the microbatches and devices, exact denominators."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from basis_jax import estimators
from basis_jax.config import Config, LossSection, OptimSection, SamplingSection, TrainSection
from basis_jax.model import decoder
from basis_jax.model.logprobs import token_logprobs
from basis_jax.model.sharding import make_mesh, named_tree
from basis_jax.opening.checks import check
from basis_jax.sampling.rollouts import Graded, counted_tokens
from basis_jax.training.microbatches import cut_rows, make_batches
from basis_jax.training.objective import make_score
from basis_jax.training.update import (
    make_estimate,
    make_optimizer,
    make_state,
    make_update,
    merge_updates,
    reward_metrics,
)
from basis_jax.types import Rollouts, TokenCredit
from basis_jax.verify.verdicts import KINDS, verdict_of

CONFIG = Config(
    run_dir="unused",
    sampling=SamplingSection(max_new_tokens=6),
    train=TrainSection(
        steps=10,
        prompts_per_step=8,
        minibatch_rollouts=8,
        microbatch_rollouts=8,
        sample_rollouts=8,
    ),
)


def graded(rows=8, seed=0):
    """Rollouts of uneven length, one of them without a verdict."""
    rng = np.random.default_rng(seed)
    prompt_lengths = rng.integers(1, 6, rows).astype(np.int32)
    lengths = rng.integers(1, 7, rows).astype(np.int32)
    tokens = np.zeros((rows, 11), np.int32)
    logprobs = np.zeros((rows, 11), np.float32)
    for i, (p, n) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        tokens[i, : p + n] = rng.integers(3, tiny.TINY.vocab_size, p + n)
        logprobs[i, p : p + n] = -rng.random(n)
    rollouts = Rollouts(
        tokens=tokens,
        prompt_lengths=prompt_lengths,
        completion_lengths=lengths,
        sampler_logprobs=logprobs,
        score_norms=rng.random(rows).astype(np.float32),
        terminated=rng.random(rows) < 0.7,
        problem_ids=np.arange(rows, dtype=np.int32),
    )
    valid = np.arange(rows) != 3
    return Graded(
        rollouts=rollouts,
        completions=[""] * rows,
        rewards=np.where(valid, rng.random(rows) < 0.5, 0).astype(np.float32),
        valid=valid,
        reasons=[""] * rows,
        kinds=np.where(valid, "wrong", "failure").tolist(),
        sample_seconds=1.0,
        verify_seconds=0.0,
    )


def one_update(*, sizes=(1, 1, 1), microbatch=8, config=CONFIG, data=None, learn=False):
    """Gradient of one step by an optimizer that just returns it (params - gradient), or the
    parameters after real updates."""
    data = graded() if data is None else data
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2], devices=devices)
    optimizer = make_optimizer(config.optim, updates=10) if learn else optax.sgd(1.0)
    with jax.set_mesh(mesh):
        params = jax.device_put(tiny.params(), named_tree(mesh, decoder.param_axes(tiny.TINY)))
        params = jax.tree.map(jnp.copy, params)  # the update donates them
        state = make_state(params, optimizer, (), model_config=tiny.TINY, mesh=mesh)
        each = microbatch // (sizes[0] * sizes[1])  # of the devices that the batch is split over
        train = dataclasses.replace(config.train, microbatch_rollouts=each)
        config = dataclasses.replace(config, train=train)
        options = {"loss": config.loss, "temperature": 1.0, "microbatch": microbatch}
        _, estimate = make_estimate(estimators.make("reinforce"))((), data)
        estimate = dataclasses.replace(
            estimate, advantages=estimate.advantages - 0.4 * data.valid.astype(np.float32)
        )
        score = make_score(tiny.TINY, **options)
        sizes = {
            "group_size": config.sampling.group_size,
            "rollouts": config.train.minibatch_rollouts,
        }
        update = make_update(tiny.TINY, optimizer, **options, **sizes)
        outcomes = []
        reference = jax.tree.map(lambda x: x * 0.5, params) if config.loss.needs_reference else None
        for microbatches in make_batches(
            data,
            estimate,
            config=config,
            score=score,
            params=state.params,
            reference=reference,
            mesh=mesh,
        ):
            state, outcome = update(state, microbatches)
            outcomes.append(outcome)
    return jax.device_get(state.params), merge_updates(outcomes)


def assert_same(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)


@pytest.fixture(scope="module")
def whole():
    return one_update()


@pytest.mark.slow
def test_the_gradient_is_that_of_the_weighted_sum(whole):
    """Against a direct loop over live tokens with the DAPO denominator."""
    data = graded()
    r = data.rollouts
    advantages = (data.rewards - 0.4) * data.valid
    tokens = int(r.completion_lengths[data.valid].sum())

    def loss(params):
        logprobs, _ = token_logprobs(params, tiny.TINY, jnp.asarray(r.tokens))
        total = 0.0
        for i in np.flatnonzero(data.valid):
            start, stop = r.prompt_lengths[i], r.prompt_lengths[i] + r.completion_lengths[i]
            total -= float(advantages[i]) * jnp.sum(logprobs[i, start:stop])
        return total / tokens

    gradient = jax.jit(jax.grad(loss))(tiny.params())
    expected = jax.tree.map(jnp.subtract, tiny.params(), gradient)
    assert_same(whole[0], expected)
    assert optax.tree.norm(gradient) > 0.1


def check_same(found, whole):
    assert_same(found[0], whole[0])
    assert found[1].keys() == whole[1].keys()
    for name, value in found[1].items():
        assert value == pytest.approx(whole[1][name], abs=1e-5), name


@pytest.mark.slow
def test_positions_that_no_row_reached_change_nothing(whole):
    data = graded()
    wide = {
        name: np.pad(getattr(data.rollouts, name), ((0, 0), (0, 289)))
        for name in ("tokens", "sampler_logprobs")
    }
    rollouts = dataclasses.replace(data.rollouts, **wide)
    check_same(one_update(data=dataclasses.replace(data, rollouts=rollouts)), whole)


def long_tailed(rows=16, max_width=256):
    """Rollouts of 2 to 255 tokens, most of them short, in no order; one has no verdict."""
    rng = np.random.default_rng(5)
    lengths = np.array([255, 200, 129, 97, 90, *rng.integers(2, 60, rows - 5)], np.int32)
    lengths = rng.permutation(lengths)
    prompts = np.maximum(1, lengths // 3)
    inside = np.arange(max_width)[None] < lengths[:, None]
    data = graded(rows)
    rollouts = Rollouts(
        tokens=np.where(inside, rng.integers(3, 32, inside.shape), 0).astype(np.int32),
        prompt_lengths=prompts,
        completion_lengths=lengths - prompts,
        sampler_logprobs=np.where(inside, -rng.random(inside.shape), 0).astype(np.float32),
        score_norms=np.ones(rows, np.float32),
        terminated=np.ones(rows, bool),
        problem_ids=np.arange(rows, dtype=np.int32),
    )
    return dataclasses.replace(data, rollouts=rollouts)


BUCKETS = dataclasses.replace(
    CONFIG,
    loss=LossSection(kl_coef=0.5, kl="k2", aggregation="sequence_mean", logprob_chunk=16),
    sampling=SamplingSection(max_new_tokens=256),
    train=dataclasses.replace(CONFIG.train, prompts_per_step=16, minibatch_rollouts=16),
)


@pytest.fixture(scope="module")
def one_width():
    """All rows of the long-tailed data in one pass."""
    return one_update(config=BUCKETS, data=long_tailed(), microbatch=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("microbatch", "sizes"), [(4, (1, 1, 1)), (8, (1, 1, 1)), (4, (2, 1, 1)), (4, (1, 4, 1))]
)
def test_rows_sorted_into_passes_of_several_widths_have_the_gradient_of_one_pass(
    one_width, microbatch, sizes
):
    """1, 2 and more microbatches on 1, 2 and 4 devices, with scores of a reference in the loss."""
    found = one_update(config=BUCKETS, data=long_tailed(), microbatch=microbatch, sizes=sizes)
    check_same(found, one_width)
    assert found[1]["policy/kl_ref"] > 1e-3


def test_rows_are_cut_by_length_and_the_tokens_of_a_pass_are_bounded():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5, 1.2, 512).astype(int), 4000)
    lengths[rng.random(512) < 0.1] = 0
    max_width, rows = 4000, 8
    cuts = cut_rows(lengths, rows=rows, max_width=max_width)
    index = np.concatenate([index for index, _ in cuts])
    assert len(set(index)) == len(index) and set(index) >= set(np.flatnonzero(lengths))
    assert (np.diff(lengths[index]) <= 0).all()
    for index, width in cuts:
        longest, count = lengths[index].max(), len(index)
        assert longest <= width <= max_width and count * width <= rows * max_width
        assert width == 64 or width == max_width or longest > width * 4 / 5
        assert width == max_width or width in np.outer([64, 80, 96, 112], 2 ** np.arange(8))
        assert count % rows == 0 and (count // rows).bit_count() == 1
        assert count == rows or 2 * lengths[index[count // 2]] > width
    positions = sum(len(index) * width for index, width in cuts)
    assert positions < 1.5 * lengths.sum() < 0.25 * 512 * max_width
    assert len({(len(index), width) for index, width in cuts}) <= 16


def test_microbatches_without_a_verdict_are_left_out_unless_there_is_nothing_else():
    lengths = np.zeros(16, int)
    assert [len(index) for index, _ in cut_rows(lengths, rows=4, max_width=64)] == [4]
    lengths[[3, 9]] = 5, 60
    (index, width), *others = cut_rows(lengths, rows=4, max_width=256)
    assert {3, 9} <= set(index.tolist()) and len(index) == 4 and width == 64 and not others


@pytest.mark.slow
@pytest.mark.parametrize("microbatch", [2, 4])
def test_microbatches_do_not_change_the_gradient(whole, microbatch):
    check_same(one_update(microbatch=microbatch), whole)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 2), (2, 2, 1)])
def test_devices_do_not_change_the_gradient(whole, sizes):
    check_same(one_update(sizes=sizes, microbatch=4), whole)


@pytest.mark.slow
def test_the_kl_term_is_the_same_over_microbatches_and_devices():
    """GSPO with k2 towards other weights."""
    loss = LossSection(objective="gspo", aggregation="sequence_mean", kl="k2", kl_coef=2.0)
    config = dataclasses.replace(CONFIG, loss=loss)
    whole = one_update(config=config)
    assert whole[1]["policy/kl_ref"] > 1e-3
    for change in ({"microbatch": 2}, {"sizes": (2, 2, 1), "microbatch": 4}):
        params, metrics = one_update(config=config, **change)
        assert_same(params, whole[0], tolerance=3e-5)  # gradients are about ten times as large
        assert metrics["policy/kl_ref"] == pytest.approx(whole[1]["policy/kl_ref"])
    without = one_update(config=dataclasses.replace(CONFIG, loss=LossSection()))
    assert "policy/kl_ref" not in without[1]


@pytest.mark.slow
def test_rows_without_a_verdict_do_not_reach_the_gradient(whole):
    data = graded()
    data.rollouts.tokens[3] = 5
    data.rollouts.sampler_logprobs[3] = np.nan
    params, metrics = one_update(data=data)
    assert_same(params, whole[0], tolerance=0)
    assert np.isfinite(metrics["sampler/logprob_gap_max"])


def test_the_log_prob_gap_is_that_of_the_sampler_and_the_trainer(whole):
    data = graded()
    r = data.rollouts
    scored, _ = tiny.token_logprobs(tiny.params(), tiny.TINY, jnp.asarray(r.tokens))
    gaps = [
        abs(float(scored[i, t]) - r.sampler_logprobs[i, t])
        for i in np.flatnonzero(data.valid)
        for t in range(r.prompt_lengths[i], r.prompt_lengths[i] + r.completion_lengths[i])
    ]
    assert whole[1]["sampler/logprob_gap_max"] == pytest.approx(max(gaps), rel=1e-4)
    assert whole[1]["sampler/logprob_gap_mean"] == pytest.approx(np.mean(gaps), rel=1e-4)


@pytest.mark.slow
def test_weights_for_the_sampler_and_their_metrics(whole):
    """The gradient of one update is that of the terms times min(p / sampler's, cap) by hand."""
    loss = LossSection(sampler_correction="tis", sampler_cap=1.3)
    data, cap = graded(), 1.3
    r = data.rollouts
    r.sampler_logprobs[:] -= 3.0  # around the trainer's
    tokens, mask = jnp.asarray(r.tokens), np.zeros(r.tokens.shape, bool)
    for i in np.flatnonzero(data.valid):
        mask[i, r.prompt_lengths[i] : r.prompt_lengths[i] + r.completion_lengths[i]] = True
    scored, _ = tiny.token_logprobs(tiny.params(), tiny.TINY, tokens)
    weights = np.minimum(np.exp(np.asarray(scored) - r.sampler_logprobs), cap)[mask]
    params, metrics = one_update(config=dataclasses.replace(CONFIG, loss=loss), data=data)
    assert metrics["sampler/weight_mean"] == pytest.approx(weights.mean(), rel=1e-4)
    assert metrics["sampler/weight_limited"] == pytest.approx(np.mean(weights == cap), rel=1e-4)
    assert 0 < metrics["sampler/weight_limited"] < 1
    advantages = (data.rewards - 0.4) * data.valid
    per_token = np.zeros(mask.shape, np.float32)
    per_token[mask] = weights
    per_token = jnp.asarray(per_token * advantages[:, None] / mask.sum(), jnp.float32)
    gradient = jax.jit(
        jax.grad(lambda p: -jnp.sum(per_token * token_logprobs(p, tiny.TINY, tokens)[0]))
    )(tiny.params())
    assert_same(params, jax.tree.map(jnp.subtract, tiny.params(), gradient))
    assert "sampler/weight_mean" not in whole[1]


@pytest.mark.slow
def test_a_second_update_is_off_policy_and_scored_before_the_first():
    """With two minibatches the ratio of the second is not 1, and its old log-probs are those of
    the parameters before the step: at lr 0 nothing is clipped and the policy has not moved."""
    train = dataclasses.replace(CONFIG.train, minibatch_rollouts=4, microbatch_rollouts=4)
    still = dataclasses.replace(CONFIG, train=train, optim=OptimSection(lr=0.0))
    moving = dataclasses.replace(still, optim=OptimSection(lr=0.1))
    _, metrics = one_update(config=still, microbatch=4, learn=True)
    assert metrics["policy/kl_old"] == pytest.approx(0, abs=1e-6)
    assert metrics["policy/clip_fraction"] == 0
    _, metrics = one_update(config=moving, microbatch=4, learn=True)
    assert abs(metrics["policy/kl_old"]) > 1e-3
    assert metrics["policy/clip_fraction"] > 0


def test_advantages_push_probabilities_the_right_way():
    params, _ = one_update(
        learn=True, config=dataclasses.replace(CONFIG, optim=OptimSection(lr=1e-3))
    )
    data = graded()
    tokens = jnp.asarray(data.rollouts.tokens)
    before, _ = tiny.token_logprobs(tiny.params(), tiny.TINY, tokens)
    after, _ = tiny.token_logprobs(params, tiny.TINY, tokens)
    r = data.rollouts
    weighted = sum(
        (data.rewards[i] - 0.4) * float(jnp.sum((after - before)[i, p : p + n]))
        for i, (p, n) in enumerate(zip(r.prompt_lengths, r.completion_lengths, strict=True))
        if data.valid[i]
    )
    assert weighted > 0


@pytest.mark.parametrize("name", ["policy/grad_norm", "policy/update_norm"])
def test_a_spoilt_update_stops_the_run(name):
    norms = {"policy/grad_norm": jnp.float32(1), "policy/update_norm": jnp.float32(1)}
    merge_updates([norms])
    with pytest.raises(
        ValueError,
        match="not finite, and none of it is saved; likely causes.*ids beyond.*NaN.*optim.lr",
    ):
        merge_updates([norms, norms | {name: jnp.float32(np.inf)}])


def test_value_error_is_the_mean_squared_advantage_over_valid_rows():
    data = graded()
    _, estimate = make_estimate(estimators.make("batch_mean"))((), data)
    metrics = reward_metrics(data, estimate)
    errors = (data.rewards - np.asarray(estimate.values))[data.valid] ** 2
    assert metrics["estimate/value_error"] == pytest.approx(errors.mean())
    assert metrics["reward/invalid"] == pytest.approx(1 / 8)


def test_with_credit_by_token_the_advantages_in_the_metrics_are_those_of_the_tokens_that_count():
    data = graded()
    estimate = make_estimate(estimators.make("batch_mean"))((), data)[1]
    counted = np.asarray(counted_tokens(data))
    advantages = np.where(counted, 0.0, 9.0).astype(np.float32)
    rows, places = np.nonzero(counted)
    advantages[rows[::4], places[::4]] = -2.0
    credit = TokenCredit(advantages=advantages, start_values=np.zeros(8, np.float32))
    metrics = reward_metrics(data, estimate, credit)
    share = len(rows[::4]) / len(rows)
    assert metrics["estimate/advantage_abs"] == pytest.approx(2 * share)
    assert metrics["estimate/zero_share"] == pytest.approx(1 - share)


def test_a_time_out_is_wrong_and_not_invalid_and_every_kind_has_its_share():
    """One rollout of eight failed to be graded, two took too long. Kinds that do not occur are 0,
    so that every line of metrics.jsonl has the same keys."""
    data, late = graded(), [verdict_of("timeout", "the comparison took too long")] * 2
    data.kinds[5:7] = [verdict.kind for verdict in late]
    data.rewards[5:7] = [verdict.reward for verdict in late]
    data.valid[5:7] = [verdict.valid for verdict in late]
    _, estimate = make_estimate(estimators.make("batch_mean"))((), data)
    metrics = reward_metrics(data, estimate)
    assert metrics["reward/invalid"] == metrics["verify/failure"] == 1 / 8
    assert metrics["verify/timeout"] == 2 / 8
    counted = {key: value for key, value in metrics.items() if key.startswith("verify/")}
    assert set(counted) == {f"verify/{kind}" for kind in KINDS} - {"verify/right", "verify/wrong"}
    assert all(type(value) is float for value in metrics.values())
    assert sum(counted.values()) == 3 / 8


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"minibatch_rollouts": 3}, "rollouts per step = 8 is not a multiple of"),
        ({"prompts_per_step": 24, "minibatch_rollouts": 24, "microbatch_rollouts": 4}, "16;"),
        ({"minibatch_rollouts": 2, "microbatch_rollouts": 2}, "2 is not a multiple of the batch"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(change, sentence):
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **change))
    with pytest.raises(ValueError, match=sentence):
        check(config, tiny.TINY, make_mesh(data=4, devices=jax.devices()[:4]))


@pytest.mark.parametrize(
    ("section", "change", "sentence"),
    [
        (
            "model",
            {"attention": "cudnn", "compute_dtype": "bfloat16"},
            "NVIDIA GPUs, .* this is cpu with",
        ),
        ("model", {"attention": "flash"}, "model.attention is 'flash'; allowed are auto, plain"),
        ("model", {"attention": "splash"}, "model.attention splash needs TPUs and this is cpu"),
        (
            "data",
            {"verifier": "math", "answer_mode": "box"},
            "data.answer_mode is 'box'; allowed are lenient, strict, boxed, hashes, answer_line",
        ),
        ("data", {"answer_mode": "boxed"}, "for data.verifier 'exact'; only 'math' takes one"),
        (
            "data",
            {"verifier": "math_strict", "answer_mode": "lenient"},
            "for data.verifier 'math_strict'; only 'math' takes one, leave it empty",
        ),
        ("sampling", {"dtype": "int4"}, "sampling.dtype is 'int4'; allowed are float32, bfloat16"),
    ],
)
def test_words_that_nothing_knows_are_refused(section, change, sentence):
    part = dataclasses.replace(getattr(CONFIG, section), **change)
    with pytest.raises(ValueError, match=sentence):
        check(dataclasses.replace(CONFIG, **{section: part}), tiny.TINY, make_mesh())


def test_heads_that_do_not_divide_over_the_mesh_are_refused():
    mesh = make_mesh(tensor=4, devices=jax.devices()[:4])
    with pytest.raises(ValueError, match="key heads = 2 does not divide over 4 devices"):
        check(CONFIG, tiny.TINY, mesh)


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 0}, {"fsdp": 8}, {"data": -1, "fsdp": -1}])
def test_a_mesh_that_does_not_fill_the_devices_is_refused(sizes):
    with pytest.raises(ValueError, match="the 4 devices present"):
        make_mesh(devices=jax.devices()[:4], **sizes)


def test_schedules_warm_up_and_decay():
    section = OptimSection(lr=1.0, schedule="linear", warmup_steps=2, max_grad_norm=0.0, eps=0.0)
    optimizer = make_optimizer(section, updates=6)
    params = jnp.float32(0.0)
    state, moves = optimizer.init(params), []
    for _ in range(6):
        with jax.numpy_dtype_promotion("standard"):
            change, state = optimizer.update(jnp.float32(1.0), state, params)
        moves.append(-float(change))
    np.testing.assert_allclose(moves, [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25], atol=1e-5)
