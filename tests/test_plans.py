"""Rollout plans: what they ask for, what a step makes of it, and what is refused."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whole_runs import (
    documented_metrics,
    final_arrays,
    lines,
    repeatable,
    run,
    run_killed,
    small,
)

from basis_jax import command_line, estimators, plans
from basis_jax.config import Config, DataSection, EstimatorSection, SamplingSection, TrainSection
from basis_jax.data.order import step_problems
from basis_jax.model.sharding import make_mesh
from basis_jax.opening.rollout_plan import open_plan
from basis_jax.plans import Belief, Plan, Requests, Setting
from basis_jax.plans.sequential import COST, saving
from basis_jax.plans.weighted import inclusion, systematic
from basis_jax.sampling.rollouts import Graded
from basis_jax.training.loop import make_step
from basis_jax.training.microbatches import make_batches
from basis_jax.training.planned import as_rows, next_round
from basis_jax.training.session import open_session
from basis_jax.training.start import first_state, identity_of
from basis_jax.training.update import make_estimate, make_signals, reward_metrics
from basis_jax.types import Rollouts

ANY = Plan(lambda step, belief: bad(), name="own")
SETTING = Setting(seed=3, prompts=4, group_size=6, sizes=(20,), decode=lambda tokens: "x")


def values(size=20, seed=0):
    return np.random.default_rng(seed).random(size).astype(np.float32)


def make(name, setting=SETTING, **options):
    return plans.make(name, setting, options)


def graded(asked, rewards=None, valid=None):
    """What came of the requests; completion k has k % 5 + 1 tokens."""
    size = asked.problems.size
    lengths = np.arange(size, dtype=np.int32) % 5 + 1
    rewards = np.arange(size) % 2 if rewards is None else rewards
    valid = np.ones(size, bool) if valid is None else valid
    rollouts = Rollouts(
        tokens=np.full((size, 8), 7, np.int32),
        prompt_lengths=np.full(size, 2, np.int32),
        completion_lengths=lengths,
        sampler_logprobs=np.full((size, 8), -0.5, np.float32),
        score_norms=lengths.astype(np.float32),
        terminated=lengths < 4,
        problem_ids=asked.problems,
    )
    return Graded(
        rollouts=rollouts,
        completions=[f"{p}.{s}" for p, s in zip(asked.problems, asked.samples, strict=True)],
        rewards=np.asarray(rewards, np.float32),
        valid=valid,
        reasons=[""] * size,
        kinds=["right" if reward else "wrong" for reward in rewards],
        sample_seconds=1.0,
        verify_seconds=1.0,
    )


def whole_step(name, number=0, belief=None, grade=graded, setting=SETTING, **options):
    """The rounds of a step and its rows."""
    plan = make(name, setting, **options)
    belief = belief or Belief(values(setting.problems))
    rounds, found = [], []
    while (
        asked := next_round(plan, setting, number, rounds=rounds, graded=found, belief=belief)
    ) is not None:
        found.append(grade(asked))
        rounds.append(asked)
    return rounds, as_rows(rounds, found, plan, setting)


# --------------------------------------------------------------------------------- what they ask
@pytest.mark.parametrize("name", plans.PLANS)
def test_a_plan_made_anew_asks_for_the_same(name):
    """What it asks for is a function of seed, step, values and rewards alone; other steps and seeds
    give other problems."""
    first, _ = whole_step(name, 9)
    plan = make(name)
    plan.ask(2, Belief(values(seed=5)))  # leaves nothing behind
    rounds = []

    def then():
        found = [graded(asked) for asked in rounds]
        return next_round(plan, SETTING, 9, rounds=rounds, graded=found, belief=Belief(values()))

    for asked in first:
        again = then()
        for field in ("problems", "samples", "weights"):
            np.testing.assert_array_equal(getattr(again, field), getattr(asked, field))
        rounds.append(again)
    assert then() is None
    other_seed = dataclasses.replace(SETTING, seed=4)
    others = whole_step(name, 30)[0], whole_step(name, 9, setting=other_seed)[0]
    assert all(o[0].problems.tolist() != first[0].problems.tolist() for o in others)


def test_uniform_visits_the_problems_in_the_order_of_the_data():
    asked = make("uniform").ask(7, Belief())
    expected = step_problems(3, 7, batch_size=4, sizes=(20,), weights=(1.0,))
    assert asked.problems.tolist() == np.repeat(expected, 6).tolist()
    assert asked.samples.tolist() == [*range(6)] * 4 and asked.weights is None


def test_sticky_keeps_its_problems_and_then_takes_the_next():
    steps = [make("sticky", hold=3).ask(step, Belief()).problems.tolist() for step in range(7)]
    uniform = [make("uniform").ask(step, Belief()).problems.tolist() for step in range(3)]
    assert steps == [*[uniform[0]] * 3, *[uniform[1]] * 3, uniform[2]]


def test_with_sticky_batches_kae_has_history_in_all_steps_but_the_first_of_a_batch():
    """Without them hardly any problem comes back within its window."""

    def known(name):
        setting = Setting(seed=0, prompts=8, group_size=1, sizes=(400,))
        kae = estimators.make("kae")
        update = make_estimate(kae)
        state, found = kae.init(np.zeros(400), np.zeros(400)), []
        for step in range(16):
            _, rows = whole_step(name, step, setting=setting)
            state, told = update(state, rows)
            found.append(1 - float(told.info["fallback_share"]))
        return found

    assert known("sticky") == [0, *[1] * 7] * 2
    assert known("uniform") == [0] * 16


# ------------------------------------------------------------------------------------- weighted
@pytest.mark.parametrize("count", [1, 7, 19, 20])
def test_chances_follow_the_weights_up_to_certainty(count):
    weights = np.array([0.05, 100.0, *np.linspace(0.1, 1, 18)])
    chances = inclusion(weights, count)
    assert chances.sum() == pytest.approx(count) and chances.max() <= 1
    free = chances < 1
    if free.any():
        ratios = chances[free] / weights[free]
        np.testing.assert_allclose(ratios, ratios[0])


def test_the_importance_weights_make_the_draw_unbiased():
    """The mean over 5,000 steps of sum_i weight_i x_i is the mean over the problems of every set,
    times its share of a step, within 6 standard errors in each of 40 numbers: by the normal
    approximation a false alarm has a probability of 1e-7. Each step has different problems."""
    setting = Setting(seed=1, prompts=6, group_size=1, sizes=(20, 20), set_weights=(1.0, 0.5))
    plan, belief = make("weighted", setting), Belief(values(40))
    sums, squares, steps = np.zeros(40), np.zeros(40), 5_000
    for step in range(steps):
        asked = plan.ask(step, belief)
        assert len({*asked.problems}) == 6
        sums[asked.problems] += asked.weights
        squares[asked.problems] += asked.weights.astype(np.float64) ** 2
    mean = sums / steps
    error = np.sqrt((squares / steps - mean**2) / steps)
    expected = np.repeat([4 / 20, 2 / 20], 20)
    assert np.all(np.abs(mean - expected) < 6 * error)
    assert np.ptp(squares) > 0  # the weights differ


def test_undecided_problems_are_drawn_more_often_and_spo_gives_no_weights():
    belief = Belief(np.array([0.5] * 10 + [0.99] * 10, np.float32))
    plan = make("weighted", importance=False, by="variance", floor=0.01)
    drawn = np.concatenate([plan.ask(step, belief).problems for step in range(500)])
    assert plan.ask(0, belief).weights is None
    assert np.mean(drawn < 10) > 0.8
    state = estimators.spo_init(np.arange(9), np.full(9, 8))
    rates = np.asarray(estimators.evidence_rates(state))
    np.testing.assert_allclose(np.sqrt(rates * (1 - rates)) + 0.05, estimators.spo_weights(state))


def test_certain_problems_are_always_drawn():
    random = np.random.default_rng(0)
    for _ in range(50):
        assert 3 in systematic(inclusion(np.where(np.arange(20) == 3, 50.0, 1.0), 4), random)


# ---------------------------------------------------------------------------------- greedy beside
def test_the_greedy_reward_of_its_problem_stands_beside_every_rollout():
    """NaN where it could not be graded. It is a function of the greedy round alone: the rewards of
    the rollouts do not move it."""

    def grade(asked, rewards=None):
        if not asked.greedy:
            return graded(asked, rewards)
        return graded(asked, [1, 0, 1, 1], np.array([True, True, True, False]))

    rounds, rows = whole_step("greedy_beside", grade=grade)
    assert [asked.greedy for asked in rounds] == [False, True]
    assert rounds[1].problems.tolist() == rounds[0].problems[::6].tolist()
    signals = make_signals(rows, aggregation="token_mean", score_norms="logits")
    expected = np.repeat(np.float32([1, 0, 1, np.nan]), 6)
    np.testing.assert_array_equal(signals.greedy_rewards, expected)
    _, told = make_estimate(estimators.make("remax"))((), rows)
    np.testing.assert_array_equal(told.baselines, np.nan_to_num(expected))
    for i in range(24):
        flipped = rows.rewards != (np.arange(24) == i)
        _, other = whole_step(
            "greedy_beside", grade=lambda a, f=flipped: grade(a, f.astype(np.float32))
        )
        np.testing.assert_array_equal(other.signals["greedy_rewards"], expected)
    assert rows.plan_metrics["plan/greedy_reward"] == pytest.approx(2 / 3)
    assert rows.plan_metrics["plan/greedy_invalid"] == 1 / 4
    assert rows.tokens == sum(graded(asked).tokens for asked in rounds)


# ------------------------------------------------------------------------------------- sequential
def test_a_useless_prior_costs_sixteen_rollouts_and_a_good_one_four():
    """Worked numbers of the rule: D = max(0, (mean - prior)^2 - 1/k) with rewards of -1 and 1."""
    one = np.ones(1)
    k = np.arange(4, 17)
    worth = [saving(one, 0 * one, np.array([n]))[0] > COST for n in k]
    assert worth == [n < 16 for n in k]
    d = 4 - 1 / 4
    assert saving(one, 0 * one, np.array([4]))[0] == pytest.approx(
        d / (4 * d + 1) - d / (5 * d + 1)
    )
    assert saving(one, 0.8 * one, np.array([4]))[0] == 0  # (0.4)^2 < 1/4


def test_only_problems_that_contradict_the_value_get_more_rollouts():
    """Samples are numbered on, up to group_size; invalid rollouts tell nothing, and a problem whose
    first rollouts all agree with its value stops."""
    belief = Belief(np.full(20, 0.01, np.float32))
    lucky = set(make("uniform").ask(0, belief).problems[::6][:2].tolist())
    unknown = max(lucky)

    def grade(asked):
        rewards = [float(p in lucky) for p in asked.problems]
        return graded(asked, rewards, asked.problems != unknown)

    rounds, rows = whole_step("sequential", belief=belief, grade=grade, first=2, add=3)
    (again,) = lucky - {unknown}
    assert [r.problems.size for r in rounds] == [8, 3, 1]
    assert {*rounds[1].problems, *rounds[2].problems} == {again}
    assert [*rounds[1].samples, *rounds[2].samples] == [2, 3, 4, 5]
    assert rows.present.sum() == 12 and rows.present.size == 24
    by_problem = {p: rows.weights[(rows.rollouts.problem_ids == p) & rows.present] for p in lucky}
    assert by_problem[again].sum() == pytest.approx(by_problem[unknown].sum())
    assert rows.weights[rows.present].mean() == pytest.approx(1)
    for row in np.flatnonzero(rows.present):
        name = f"{rows.rollouts.problem_ids[row]}.{row % 6}"
        assert rows.completions[row] == name


def test_the_weights_multiply_the_loss_and_not_its_denominators():
    """Row by row; absent rows have none."""
    _, rows = step_with_absent_rows()
    weights = np.where(rows.present, np.arange(24) + 1, 0).astype(np.float32)
    estimate = estimators.reinforce(rows.rewards, valid=rows.valid)
    config = Config(
        run_dir="",
        train=TrainSection(prompts_per_step=4, minibatch_rollouts=24, microbatch_rollouts=6),
        sampling=SamplingSection(group_size=6),
    )

    def of_rows(graded):
        fixed = {
            "config": config,
            "score": lambda *_: jnp.zeros(0),
            "params": None,
            "mesh": make_mesh(),
        }
        total = np.zeros(24)
        for micro in make_batches(graded, estimate, **fixed)[0]:
            total[np.asarray(micro.rows)] += np.asarray(micro.loss_weights).sum(1)
        return total

    plain = of_rows(rows)
    assert plain.sum() == pytest.approx(1) and np.count_nonzero(plain) == 6  # one is invalid
    weighted = of_rows(dataclasses.replace(rows, weights=weights))
    np.testing.assert_allclose(weighted, plain * weights, rtol=1e-6)


# ------------------------------------------------------------------------------------ absent rows
def step_with_absent_rows():
    """Three problems of four, with 4, 2 and 1 rollouts of six."""
    asked = Requests(np.array([5, 5, 5, 9, 9, 5, 2]), np.array([0, 1, 3, 0, 4, 5, 2]))
    found = graded(asked, [1, 0, 1, 1, 0, 0, 1], np.arange(7) != 5)
    return found, as_rows([asked], [found], ANY, SETTING)


def test_no_metric_counts_an_absent_row():
    without, rows = step_with_absent_rows()
    assert np.flatnonzero(rows.present).tolist() == [0, 1, 3, 5, 6, 10, 14]
    assert not rows.valid[~rows.present].any() and rows.kinds.count("absent") == 17
    found = reward_metrics(rows, make_estimate(estimators.make("reinforce"))((), rows)[1])
    expected = reward_metrics(without, make_estimate(estimators.make("reinforce"))((), without)[1])
    assert found.pop("plan/absent") == pytest.approx(17 / 24)
    assert found.pop("plan/rounds") == 1 and found.pop("plan/rollouts") == 7
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def named(name, group):
    options = {"group_size": group} if "group_size" in estimators.option_names(name) else {}
    return estimators.make(name, **options, **({"k": 2} if name == "pass_at_k" else {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*estimators.ESTIMATORS, "spo+least_variance"])
def test_absent_rows_do_not_change_the_result_of_any_estimator(name):
    """Six problems with three rollouts each: in groups of three, and in groups of six of which the
    last three rows are absent, with a seventh problem that has no rollout at all."""
    random = np.random.default_rng(0)
    asked = Requests(np.repeat(random.permutation(20)[:6], 3), np.tile(np.arange(3), 6))
    tight = graded(asked, random.integers(0, 2, 18))
    given = {
        "greedy_rewards": np.float32(asked.samples == 1),
        "start_values": random.random(18, np.float32),
    }
    tight = dataclasses.replace(tight, signals=given)
    wide = as_rows([asked], [tight], ANY, dataclasses.replace(SETTING, prompts=7))
    spread = {signal: np.zeros(42, np.float32) for signal in given}
    for signal, values in given.items():
        spread[signal][wide.present] = values
    wide = dataclasses.replace(wide, signals=spread)
    counts = random.integers(0, 9, 20), np.full(20, 8)

    def two_steps(rows, group):
        estimator = named(name, group)
        update, state = jax.jit(estimator.update), estimator.init(*counts)
        signals = make_signals(rows, aggregation="token_mean", score_norms="logits")
        for _ in range(2):
            state, told = update(state, signals)
        return told, state

    (expected, expected_state), (told, state) = two_steps(tight, 3), two_steps(wide, 6)
    for field in ("advantages", "values", "baselines"):
        found = np.asarray(getattr(told, field))
        np.testing.assert_allclose(
            found[wide.present], getattr(expected, field), atol=2e-5, err_msg=field
        )
        assert not found[~wide.present].any()
    for a, b in zip(
        jax.tree.leaves((state, told.info)),
        jax.tree.leaves((expected_state, expected.info)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-5)


# ---------------------------------------------------------------------------------- what is refused
def bad(problems=(1,), samples=(0,), **more):
    return Requests(np.array(problems), np.array(samples), **more)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (lambda: None, "it returned a NoneType; return plans.Requests"),
        (lambda: [3], "it returned a list"),
        (lambda: bad((), ()), "it asks for no rollout; ask for at least one"),
        (lambda: bad((20,)), "it asks for problem 20; give 0 to 19"),
        (lambda: bad((-1,)), "it asks for problem -1"),
        (lambda: bad((1,), (6,)), "it asks for sample 6; give 0 to 5"),
        (lambda: bad((1, 1), (2, 2)), "the same sample of a problem twice"),
        (lambda: bad(range(5), [0] * 5), "it asks for 5 problems; a step has room for train"),
        (lambda: bad(weights=np.array([np.nan])), "a weight that is negative or not finite"),
        (lambda: bad(weights=np.array([-1])), "a weight that is negative or not finite"),
        (lambda: bad(greedy=True), "declare them with Plan(greedy=True)"),
        (lambda: bad((1, 2), (0,)), "arrays of 2, 1 and 2 entries"),
        (lambda: bad((1.5,)), "problems float64[1]; give one whole number per rollout"),
        (lambda: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_a_step_without_room_for_what_is_asked_ends_with_a_sentence(asked, sentence):
    name = "basis_jax.plans:own"  # as by reference
    plan = Plan(lambda step, belief: asked(), name=name)
    with pytest.raises(ValueError) as refused:
        next_round(plan, SETTING, 4, rounds=[], graded=[], belief=Belief())
    said = str(refused.value)
    assert said.startswith(f"sampling.plan {name}") and "in step 5" in said and sentence in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("greedy", "before", "sentence"),
    [
        ((2,), [], "a greedy completion of a problem without rollouts"),
        ((1, 1), [], "two greedy completions of a problem"),
        ((1,), [(1,)], "two greedy completions of a problem"),
    ],
)
def test_greedy_completions_that_nobody_uses_are_refused(greedy, before, sentence):
    rounds = [bad(), *(bad(p, greedy=True) for p in before)]
    plan = Plan(ANY.ask, lambda *_: bad(greedy, [0] * len(greedy), greedy=True), greedy=True)
    with pytest.raises(ValueError, match=sentence):
        next_round(
            plan, SETTING, 0, rounds=rounds, graded=[graded(r) for r in rounds], belief=Belief()
        )


def opened(estimator="value_filter", plan="uniform", options=(), **data):
    config = Config(
        run_dir="",
        sampling=SamplingSection(group_size=6, plan=plan, plan_options=dict(options)),
        estimator=EstimatorSection(name=estimator),
        train=TrainSection(prompts_per_step=4),
        data=DataSection(**data),
    )
    return open_plan(config, (20,), named(estimator, 6))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"plan": "weigted"},
            "'weigted', which is no plan; did you mean weighted",
        ),
        ({"plan": "no/such.py:plan"}, "there is no file"),
        ({"plan": "basis_jax.plans:PLANS"}, "is of type dict; name a function"),
        (
            {"plan": "sticky", "options": {"held": 2}},
            "no option 'held'; did you mean hold",
        ),
        ({"plan": "sticky", "options": {"hold": 0}}, "got hold 0; give a whole number, 1 or more"),
        ({"plan": "weighted", "options": {"floor": 0.0}}, "got floor 0.0; give a number above 0"),
        ({"plan": "weighted", "options": {"by": "sd"}}, "got by 'sd'; allowed are deviation"),
        (
            {"plan": "sequential", "options": {"first": 6}},
            "got first 6; give .* 1 to 5",
        ),
        (
            {"estimator": "remax"},
            "remax needs greedy completions .* is uniform",
        ),
        (
            {"plan": "greedy_beside"},
            "and value_filter does not use them",
        ),
        (
            {"plan": "weighted", "estimator": "grpo"},
            "needs the estimator's values .* grpo has",
        ),
        (
            {"plan": "sequential", "normalise_rewards": True, "rewards": {"format": 1.0}},
            "data.normalise_rewards puts all rewards of a step on one scale",
        ),
    ],
)
def test_a_plan_that_does_not_fit_the_run_is_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        opened(**given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "estimator",
    ["basis", "dbb", "spo", "spo_pp", "v05", "v05_filter", "value_filter", "spo+least_variance"],
)
def test_the_values_of_a_problem_are_rates_that_its_rewards_move(estimator):
    """The prediction is that of the state: with a table of half right each is near 1/2, and for
    estimators that learn, a problem whose rollouts were all right rises."""
    assert opened(estimator, "weighted").needs_values
    made = named(estimator, 6)
    state = made.init(np.full(20, 4), np.full(20, 8))
    before = np.asarray(made.predict(state))
    np.testing.assert_allclose(before, 0.5, atol=0.02)
    _, rows = whole_step("uniform", grade=lambda asked: graded(asked, asked.problems % 2))
    state, _ = made.update(
        state, make_signals(rows, aggregation="token_mean", score_norms="logits")
    )
    after = np.asarray(made.predict(state))
    assert after.shape == (20,)
    right = {p for p in rows.rollouts.problem_ids.tolist() if p % 2}
    for problem in right if estimator not in ("a_star_po", "basis", "v05") else ():
        assert after[problem] > before[problem]


# ------------------------------------------------------------------------------------ own plans
EXAMPLE = Path(__file__).parent.parent / "examples" / "own_plan.py"


def test_the_examples_plan_mixes_the_hardest_problems_into_the_order():
    plan = make(f"{EXAMPLE}:hard_again", share=0.5)
    belief = Belief(values())
    asked = plan.ask(2, belief)
    in_order = make("uniform").ask(2, belief).problems[::6]
    chosen = asked.problems[::6]
    assert len({*chosen}) == 4 and {*chosen[2:]} == {*in_order[2:]}
    left = np.delete(belief.values, chosen)
    assert belief.values[chosen[:2]].max() <= left.min()


def test_an_own_plan_that_raises_is_named_with_its_line(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from basis_jax import plans\n\n\ndef broken(setting):\n    def ask(step, belief):\n"
        "        return belief.values[0]\n\n    return plans.Plan(ask)\n\n\n"
        "def no_plan(setting):\n    return 3\n"
    )
    plan = make(f"{path}:broken")
    with pytest.raises(ValueError, match=r"raised TypeError in line 6 in step 1: .*; correct it$"):
        next_round(plan, SETTING, 0, rounds=[], graded=[], belief=Belief())
    with pytest.raises(ValueError, match="no_plan returned a int; return a plans.Plan"):
        make(f"{path}:no_plan")
    before = plans.source_fingerprint(f"{path}:broken")
    path.write_text(path.read_text() + "\n")
    assert plans.source_fingerprint(f"{path}:broken") != before
    assert plans.source_fingerprint("weighted") is None


# ------------------------------------------------------------------------------------ whole steps
RUNS = {"greedy_beside": "remax", "sequential": "v05_filter", "weighted": "spo"}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_step_taken_again_from_its_state_is_the_same_step(name, tiny_folder, dapo_file, tmp_path):
    """Bit for bit: rollouts, metrics and the next state; so a run resumed from a checkpoint, which
    holds that state, goes on as if it had not stopped. Every metric is documented."""
    changes = {"estimator.name": RUNS[name], "estimator.table-samples": 0, "sampling.plan": name}
    changes |= {"sampling.max-new-tokens": 4}
    arguments = small(tiny_folder, dapo_file, tmp_path / "run", **changes)
    if name == "sequential":
        arguments += ["--sampling.group-size", "4", "--train.prompts-per-step", "4"]
        arguments += ["--sampling.plan-options", "first", "2", "add", "1"]
    config = command_line.parse("", argv=["--config", "quickstart", *arguments])[0]
    with open_session(config, lambda _: None, training=True) as session:
        assert "sampling.plan" not in identity_of(session)
        with jax.set_mesh(session.setup.mesh):
            step, state = make_step(session), first_state(session, tmp_path, lambda _: None)
            rounds = []
            for number in range(2):
                kept = jax.tree.map(jnp.copy, state)
                state, metrics, graded, _ = step(state, number)
                again, metrics_again, graded_again, _ = step(kept, number)
                same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
                same((again, graded_again.rollouts), (state, graded.rollouts))
                assert graded_again.completions == graded.completions
                assert repeatable([metrics_again]) == repeatable([metrics])
                assert metrics.keys() <= documented_metrics()
                rounds.append(metrics["plan/rounds"])
    assert max(rounds) == {"greedy_beside": 2, "sequential": 3, "weighted": 1}[name]


def test_the_file_of_an_own_plan_is_part_of_the_run(tiny_folder, dapo_file, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(EXAMPLE.read_text())
    changes = {"estimator.name": "spo", "estimator.table-samples": 0}
    changes |= {"sampling.plan": f"{path}:hard_again"}
    arguments = small(tiny_folder, dapo_file, tmp_path / "run", **changes)
    config = command_line.parse("", argv=["--config", "quickstart", *arguments])[0]
    hashes = []
    for _ in range(2):
        with open_session(config, lambda _: None) as session:
            hashes.append(identity_of(session)["sampling.plan"])
        path.write_text(path.read_text() + "\n")
    assert hashes[0] != hashes[1]


@pytest.mark.nightly
def test_a_run_with_rounds_is_killed_and_goes_on_bit_for_bit(tiny_folder, dapo_file, tmp_path):
    """scripts/train.py with the plan ``sequential``, killed at a random moment."""
    changes = {"estimator.name": "v05_filter", "estimator.table-samples": 0, "train.steps": 3}
    changes |= {"sampling.plan": "sequential", "sampling.group-size": 4, "checkpoint.every": 1}
    changes |= {"train.prompts-per-step": 4, "sampling.max-new-tokens": 4}
    done = []
    for name in ("whole", "killed"):
        arguments = small(tiny_folder, dapo_file, tmp_path / name, **changes)
        arguments += ["--sampling.plan-options", "first", "2", "add", "1"]
        if name == "killed":
            written = tmp_path / name / "metrics.jsonl"
            run_killed("train.py", "quickstart.py", *arguments, written=written, line_count=2)
        done.append(run("train.py", "quickstart.py", *arguments))
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    assert repeatable(lines(whole / "metrics.jsonl")) == repeatable(lines(killed / "metrics.jsonl"))
    assert lines(whole / "samples.jsonl") == lines(killed / "samples.jsonl")
    assert max(row.get("plan/rounds", 0) for row in lines(whole / "metrics.jsonl")) == 3
    (step, found), (_, wanted) = final_arrays(killed), final_arrays(whole)
    assert step == 3
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)
