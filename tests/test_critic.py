"""The critic: a value head beside the policy, token by token, saved and resumed with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_lora import learnt, with_lora
from test_train import CONFIG, assert_same, graded
from whole_runs import documented_metrics, repeatable, small

from basis_jax import command_line, estimators
from basis_jax.config import Config, CriticSection, EstimatorSection
from basis_jax.losses import policy_loss, value_loss
from basis_jax.model import decoder
from basis_jax.model.sharding import make_mesh, named_tree
from basis_jax.runs.metrics import read_metrics
from basis_jax.training.critic import credited, first_critic, make_critic, token_values
from basis_jax.training.loop import train
from basis_jax.training.microbatches import make_batches
from basis_jax.training.update import make_estimate, make_state
from basis_jax.types import Batch


def test_value_loss_worked_vector():
    """Per token .64, .16, .16 with a clip of .5: half their mean; without a clip .64, .01, .16."""
    mask = np.array([[True, True, True, False]])

    def row(*numbers):
        return np.float32([[*numbers, np.nan]])

    batch = Batch(
        tokens=np.zeros((1, 4), np.int32),
        completion_mask=mask,
        loss_weights=np.where(mask, np.float32(1 / 3), 0).astype(np.float32),
        advantages=row(0, 0, 0),
        old_logprobs=None,
        sampler_logprobs=row(0, 0, 0),
        returns=row(1, 1, 0),
        old_values=row(0, 0.1, 0.5),
    )
    values = jnp.asarray(row(0.2, 0.9, 0.4))
    assert float(value_loss(values, batch, clip=0.5)) == pytest.approx(0.16)
    assert float(value_loss(values, batch, clip=0.0)) == pytest.approx(0.81 / 6)
    gradient = jax.grad(lambda v: value_loss(v, batch, clip=0.5))(values)
    np.testing.assert_allclose(gradient, [[-0.8 / 3, 0, 0.4 / 3, 0]], atol=1e-6)
    with pytest.raises(ValueError, match="no returns or old_values"):
        value_loss(values, dataclasses.replace(batch, returns=None), clip=0.5)


def test_the_policy_loss_takes_an_advantage_for_each_token():
    mask = np.array([[False, True, True]])
    batch = Batch(
        tokens=np.zeros((1, 3), np.int32),
        completion_mask=mask,
        loss_weights=np.float32([[0, 0.5, 0.5]]),
        advantages=np.float32([[9, 1, -2]]),
        old_logprobs=None,
        sampler_logprobs=np.zeros((1, 3), np.float32),
    )
    gradient = jax.grad(lambda x: policy_loss(x, batch, clip_low=0.2, clip_high=0.2)[0])(
        jnp.zeros((1, 3))
    )
    np.testing.assert_allclose(gradient, [[0, -0.5, 1]], atol=1e-6)


HEAD = {"weight": np.random.default_rng(4).normal(size=32).astype(np.float32), "bias": 0.25}
HEAD["bias"] = np.float32(HEAD["bias"])


def test_a_value_is_that_of_the_tokens_before_its_own():
    """w . h / |h| + b of the state before, in float64; other later tokens do not change it."""
    tokens, mask = tiny.tokens_of((3, 9)), np.ones((3, 9), bool)
    mask[1, :4] = False
    values = jax.jit(token_values, static_argnums=0)
    head = jax.tree.map(jnp.asarray, HEAD)
    found = values(tiny.TINY, tiny.params(), head, tokens, mask)
    hidden = np.float64(decoder.forward(tiny.params(), tiny.TINY, jnp.asarray(tokens))[0])
    hidden /= np.linalg.norm(hidden, axis=-1, keepdims=True)
    expected = np.where(mask[:, 1:], hidden[:, :-1] @ np.float64(HEAD["weight"]) + 0.25, 0)
    np.testing.assert_allclose(found[:, 1:], expected, atol=1e-5)
    changed = values(tiny.TINY, tiny.params(), head, np.where(np.arange(9) < 6, tokens, 5), mask)
    np.testing.assert_allclose(changed[:, :7], found[:, :7], atol=1e-6)


def test_credit_is_gae_whitened_over_the_whole_step_and_returns_are_not():
    rng, mask = np.random.default_rng(0), np.random.default_rng(1).random((5, 6)) < 0.7
    values, rewards = rng.normal(size=(5, 6)).astype(np.float32), np.float32([1, 0, 1, 1, 0])
    section = CriticSection(discount=0.9, trace_decay=0.8)
    found = credited(section, jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(mask))
    plain = np.zeros(mask.shape)
    for i in range(5):
        following, carried = 0.0, 0.0
        for n, t in enumerate(reversed(np.flatnonzero(mask[i]))):
            reward = float(rewards[i]) if n == 0 else 0.0
            carried = reward + 0.9 * following - float(values[i, t]) + 0.9 * 0.8 * carried
            plain[i, t], following = carried, float(values[i, t])
    np.testing.assert_allclose(found.returns, np.where(mask, plain + values, 0), atol=1e-5)
    live = plain[mask]
    whitened = (plain - live.mean()) / np.sqrt(live.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(found.advantages, np.where(mask, whitened, 0), atol=1e-5)
    assert found.start_values.tolist() == [values[i, np.argmax(mask[i])] for i in range(5)]
    section = dataclasses.replace(section, whiten=False)
    raw = credited(section, jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(mask))
    np.testing.assert_allclose(raw.advantages, np.where(mask, plain, 0), atol=1e-5)


def one_update(*, sizes=(1, 1, 1), microbatch=8, model_config=tiny.TINY):
    """The head after a step of Adam from ``HEAD``, its metrics, the credit, the batches."""
    data, devices = graded(), jax.devices()[: int(np.prod(sizes))]
    mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2], devices=devices)
    each = microbatch // (sizes[0] * sizes[1])
    config = dataclasses.replace(
        CONFIG,
        estimator=EstimatorSection(name="gae"),
        critic=CriticSection(lr=0.01, whiten=False),
        train=dataclasses.replace(CONFIG.train, microbatch_rollouts=each),
    )
    with jax.set_mesh(mesh):
        critic = make_critic(config, model_config, mesh)
        whole = jax.device_put(tiny.params(), named_tree(mesh, decoder.param_axes(tiny.TINY)))
        params, frozen = whole, None
        if model_config.lora is not None:
            params, frozen = learnt(model_config), whole
        state = make_state(
            params, optax.sgd(1.0), (), model_config=model_config, mesh=mesh, frozen=frozen
        )
        first = first_critic(config, model_config, mesh)
        head = jax.tree.map(lambda x, y: jnp.broadcast_to(x, y.shape) + y, HEAD, first.head)
        state = dataclasses.replace(state, critic=dataclasses.replace(first, head=head))
        credit = critic.credit(state, data)
        _, estimate = make_estimate(estimators.make("gae"))((), data, credit)
        (micros,) = make_batches(
            data,
            estimate,
            config=config,
            score=lambda *_: None,  # with one update nothing is scored
            params=None,
            credit=credit,
            mesh=mesh,
        )
        before = jax.device_get(state.params)
        state, told = critic.update(state, micros)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)
    return jax.device_get(state.critic), jax.device_get(told), credit, estimate


@pytest.fixture(scope="module")
def whole():
    return one_update()


def test_an_update_is_adam_on_the_error_of_every_token(whole):
    """Against float64: returns are the rewards, the gradient is that of half the mean square."""
    critic, told, credit, estimate = whole
    data = graded()
    r, rows, errors = data.rollouts, [], []
    hidden = np.float64(decoder.forward(tiny.params(), tiny.TINY, jnp.asarray(r.tokens))[0])
    for i in np.flatnonzero(data.valid):
        for t in range(r.prompt_lengths[i], r.prompt_lengths[i] + r.completion_lengths[i]):
            rows.append(hidden[i, t - 1] / np.linalg.norm(hidden[i, t - 1]))
            value = rows[-1] @ np.float64(HEAD["weight"]) + 0.25
            errors.append(value - data.rewards[i])
            assert credit.values[i, t] == pytest.approx(value, abs=1e-5)
            assert credit.advantages[i, t] == pytest.approx(-errors[-1], abs=1e-5)
    gradient = np.array(errors) @ np.array(rows) / len(errors)
    assert told["critic/value_loss"] == pytest.approx(np.mean(np.square(errors)) / 2, rel=1e-4)
    norm = np.sqrt(np.sum(gradient**2) + np.mean(errors) ** 2)
    assert told["critic/grad_norm"] == pytest.approx(norm, rel=1e-4)
    step = 0.01 * gradient / (np.abs(gradient) + 1e-8)  # Adam's first one
    np.testing.assert_allclose(critic.head["weight"], HEAD["weight"] - step, atol=1e-5)
    values = np.asarray(estimate.values)
    np.testing.assert_array_equal(values[3], 0)  # the row without a verdict
    np.testing.assert_allclose((estimate.advantages + values)[data.valid], data.rewards[data.valid])


@pytest.mark.slow
@pytest.mark.parametrize(("microbatch", "sizes"), [(2, (1, 1, 1)), (4, (2, 1, 2))])
def test_microbatches_and_devices_do_not_change_the_critic(whole, microbatch, sizes):
    found = one_update(microbatch=microbatch, sizes=sizes)
    assert_same(found[0].head, whole[0].head, tolerance=2e-5)
    assert found[1]["critic/value_loss"] == pytest.approx(whole[1]["critic/value_loss"], rel=1e-4)
    assert_same(found[2].advantages, whole[2].advantages)


@pytest.mark.slow
def test_adapters_have_a_critic_too(whole):
    """Of the states that the adapted model has, which differ from the base's."""
    found = one_update(model_config=with_lora(tiny.TINY))
    assert np.isfinite(found[1]["critic/value_loss"])
    assert np.abs(found[2].values - whole[2].values).max() > 1e-3


def test_a_run_without_gae_has_no_critic():
    config: Config = dataclasses.replace(CONFIG, estimator=EstimatorSection(name="reinforce"))
    mesh = make_mesh(devices=jax.devices()[:1])
    critic = make_critic(config, tiny.TINY, mesh)
    assert first_critic(config, tiny.TINY, mesh) is None
    assert critic.credit(None, graded()) is None and not critic.alone(0)
    assert critic.update("state", []) == ("state", {})


@pytest.mark.slow
def test_the_policy_waits_for_the_critic_and_a_resumed_run_is_the_same(
    tiny_folder, dapo_file, tmp_path
):
    """With an own reward and a rollout plan, three steps at once and two and then a third have the
    same metrics, policy and critic, bit for bit. In the first step, of warm-up, the critic alone
    changes."""
    own = tmp_path / "own.py"
    own.write_text(
        "def reward(prompts, completions, answers): return [len(c) % 2 for c in completions]"
    )
    made = []
    for name, stops in (("once", [3]), ("twice", [2, 3])):
        seen = {}

        def remember(step, state, metrics, seen=seen):
            seen[step] = jax.device_get((state.params, state.critic))

        for steps in stops:
            changes = {"train.steps": steps, "estimator.name": "gae", "critic.warmup-steps": 1}
            changes |= {"estimator.table-samples": 0, "checkpoint.every": 1}
            changes |= {"optim.schedule": "constant", "data.verifier": f"{own}:reward"}
            changes |= {"sampling.plan": "sticky"}
            arguments = small(tiny_folder, dapo_file, tmp_path / name, **changes)
            config, _ = command_line.parse("", argv=["--config", "quickstart", *arguments])
            train(config, callbacks=[remember], report=lambda _: None)
        made.append((seen, repeatable(read_metrics(tmp_path / name))))
    (once, metrics), (twice, others) = made
    jax.tree.map(np.testing.assert_array_equal, once[3], twice[3])
    assert [m for m in metrics if m["step"] in (1, 3)] == [m for m in others if m["step"] in (1, 3)]
    assert "policy/grad_norm" not in metrics[1] and metrics[1]["estimate/no_signal"] == 0
    assert metrics[1]["critic/grad_norm"] > 0 and metrics[2]["policy/grad_norm"] > 0
    keys = {key for line in metrics for key in line}
    assert keys - documented_metrics() == {"step"}
    start = [jax.tree.leaves(once[step]) for step in (1, 2)]
    assert any((a != b).any() for a, b in zip(*start, strict=True))
