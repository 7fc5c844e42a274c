"""The plan ``branch``: steps, values from fresh completions, and their sampling from prefixes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_plans import SETTING, graded, make, opened, whole_step
from test_sampling import completions, run, run_on
from whole_runs import documented_metrics, repeatable, small

from basis_jax import command_line, estimators
from basis_jax.config import Config, EstimatorSection, LossSection, SamplingSection
from basis_jax.losses import REGRESSIONS
from basis_jax.model.sharding import make_mesh
from basis_jax.opening.plan import memory_needs
from basis_jax.opening.rollout_plan import open_plan
from basis_jax.plans import Belief, Plan, Requests, Setting
from basis_jax.plans.branch import steps_of
from basis_jax.runs.compiles import count_compiles
from basis_jax.sampling.rollouts import Graded, continued
from basis_jax.training.loop import make_step
from basis_jax.training.planned import as_rows, next_round
from basis_jax.training.session import open_session
from basis_jax.training.start import first_state
from basis_jax.training.update import make_estimate, make_signals
from basis_jax.training.watch import has_signal
from basis_jax.types import Prompts, Rollouts, TokenCredit

NEWLINE = 4
WITH_TEXT = dataclasses.replace(
    SETTING, prompts=2, group_size=2, decode=lambda ids: "\n" if ids == [NEWLINE] else "x"
)


def of_tokens(rows, problems, rewards, valid=None):
    """Completions of these tokens after two prompt tokens, in rows of 9."""
    size = len(rows)
    tokens = np.zeros((size, 9), np.int32)
    for row, found in zip(tokens, rows, strict=True):
        row[2 : 2 + len(found)] = found
    lengths = np.array([len(row) for row in rows], np.int32)
    return Graded(
        rollouts=Rollouts(
            tokens=tokens,
            prompt_lengths=np.full(size, 2, np.int32),
            completion_lengths=lengths,
            sampler_logprobs=np.zeros((size, 9), np.float32),
            score_norms=np.zeros(size, np.float32),
            terminated=np.ones(size, bool),
            problem_ids=np.array(problems, np.int32),
        ),
        completions=[""] * size,
        rewards=np.asarray(rewards, np.float32),
        valid=np.ones(size, bool) if valid is None else valid,
        reasons=[""] * size,
        kinds=["right"] * size,
        sample_seconds=1.0,
        verify_seconds=1.0,
    )


# ------------------------------------------------------------------------------------------ steps
def test_a_step_begins_after_a_separator_and_several_separators_end_one_step():
    rows = [[5, 6, 4, 7], [4, 5, 4, 4, 6], [5, 4], [5, 4, 6, 4, 7]]
    found = steps_of(
        of_tokens(rows, [3, 3, 9, 9], [0] * 4, np.arange(4) != 3), np.array([NEWLINE]), 25
    )
    assert found.steps[:, 2:].tolist() == [
        [0, 0, 0, 1, 0, 0, 0],
        [0, 1, 1, 1, 2, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0] * 7,
    ]
    assert not found.steps[:, :2].any()
    assert found.states == [
        [(3, ()), (3, (5, 6, 4))],
        [(3, ()), (3, (4,)), (3, (4, 5, 4, 4))],
        [(9, ())],
        [],  # could not be graded
    ]


def test_steps_after_the_first_ones_count_as_one_and_every_token_may_be_a_step():
    rows = of_tokens([[5, 4, 6, 4, 7], [4]], [3, 9], [0, 0])
    limited = steps_of(rows, np.array([NEWLINE]), 1)
    assert limited.steps[0, 2:].tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert limited.states == [[(3, ())], [(9, ())]]
    each = steps_of(rows, None, 25)
    assert each.steps[0, 2:].tolist() == [0, 1, 2, 3, 4, 0, 0]
    assert each.states[0] == [(3, (5, 4, 6, 4, 7)[:k]) for k in range(5)]


# --------------------------------------------------------------------------------- requests, credit
ROWS = [[5, 6, 4, 7, 7, 4, 7], [5, 6, 4, 8], [9], [9]]


def grade(asked, verdicts=lambda problem, prefix: [1, 0, 0], valid=None, rewards=(1, 0, 1, 0)):
    """The rollouts are ``ROWS``; ``verdicts``: the rewards of the completions of a state."""
    if asked.prefixes is None:
        return of_tokens(ROWS, asked.problems, rewards, valid)
    keys = zip(asked.problems.tolist(), map(tuple, asked.prefixes), strict=True)
    found = [reward for p, prefix in dict.fromkeys(keys) for reward in verdicts(p, prefix)]
    rows = [[*prefix, 1] for prefix in asked.prefixes]
    told = of_tokens(rows, asked.problems, np.nan_to_num(found), ~np.isnan(np.float32(found)))
    return told


def step(verdicts=lambda problem, prefix: [1, 0, 0], most=25, **more):
    def of_round(asked):
        return grade(asked, verdicts, **more)

    return whole_step("branch", setting=WITH_TEXT, grade=of_round, rollouts=3, most=most)


def test_each_state_is_asked_for_once_with_random_numbers_of_its_own():
    """The rollouts of a problem share what they begin with. All completions of a problem have
    different numbers, none of them that of a rollout."""
    (first, second), rows = step()
    a, b = first.problems[::2].tolist()
    wanted = [(a, ()), (a, (5, 6, 4)), (a, (5, 6, 4, 7, 7, 4)), (b, ())]
    asked = [*zip(second.problems.tolist(), map(tuple, second.prefixes), strict=True)]
    assert asked == [state for state in wanted for _ in range(3)]
    for problem, count in ((a, 9), (b, 3)):
        assert second.samples[second.problems == problem].tolist() == [*range(2, 2 + count)]
    assert rows.tokens == sum(map(len, ROWS)) + second.problems.size  # one new token each
    assert rows.plan_metrics["plan/rollouts"] == 4 + 12
    assert rows.plan_metrics["plan/branch_reward"] == pytest.approx(1 / 3)
    assert rows.rewards.tolist() == [1, 0, 1, 0] and rows.present.all()


def test_worked_vector():
    """Values .333333, .666667, .888889 of a rollout of three steps with a reward of 1."""
    found = {(): [1, 0, 0], (5, 6, 4): [1, 1, 0], (5, 6, 4, 7, 7, 4): [1, 1, 2 / 3]}
    _, rows = step(lambda problem, prefix: found[prefix])
    gains = np.float32([1 / 3, 1 / 3, 1 / 3, 2 / 9, 2 / 9, 2 / 9, 1 / 9])
    np.testing.assert_allclose(rows.credit.advantages[0], [0, 0, *gains], atol=1e-6)
    loss = np.float32([1 / 3, 1 / 3, 1 / 3, -2 / 3, 0, 0, 0])  # the second rollout, reward 0
    np.testing.assert_allclose(rows.credit.advantages[1], [0, 0, *loss], atol=1e-6)
    np.testing.assert_allclose(rows.credit.start_values, 1 / 3, atol=1e-6)
    _, told = make_estimate(estimators.make("vineppo"))((), rows, rows.credit)
    np.testing.assert_allclose(told.advantages, [2 / 3, -1 / 3, 2 / 3, -1 / 3], atol=1e-6)


def test_nothing_is_compiled_in_a_second_step():
    step()
    with count_compiles() as compiled:
        step()
    assert compiled.take()["compile/programs"] == 0


def test_equal_rewards_teach_where_fresh_completions_differ():
    """32 rollouts, all wrong, and completions of which some are right."""
    setting = dataclasses.replace(WITH_TEXT, prompts=16)

    def rows(verdicts):
        def of_round(asked):
            if asked.prefixes is None:
                return of_tokens([[5, 4, 6]] * 32, asked.problems, [0] * 32)
            return grade(asked, verdicts)

        return whole_step("branch", setting=setting, grade=of_round, rollouts=3)[1]

    assert has_signal(rows(lambda problem, prefix: [1, 0, 0] if prefix else [0] * 3))
    assert not has_signal(rows(lambda problem, prefix: [0] * 3))


def test_a_rollouts_own_reward_reaches_its_last_step_only():
    """All other advantages, and its value, are the same bit for bit."""
    _, expected = step()
    for row in range(4):
        changed = np.float32([1, 0, 1, 0])
        changed[row] = 9
        _, found = step(rewards=changed)
        differs = found.credit.advantages != expected.credit.advantages
        last = ROWS[row][2:].count(NEWLINE)
        steps = steps_of(of_tokens(ROWS, [0] * 4, changed), np.array([NEWLINE]), 25).steps
        inside = np.arange(9)[None] < 2 + np.array([len(r) for r in ROWS])[:, None]
        inside[:, :2] = False
        assert np.array_equal(differs[row], (steps[row] == last) & inside[row])
        assert not np.delete(differs, row, axis=0).any()
        np.testing.assert_array_equal(found.credit.start_values, expected.credit.start_values)


def test_what_could_not_be_graded_has_no_advantage():
    """A state none of whose completions could be graded: its step has advantage 0, and the step
    before takes the value of the next. An invalid rollout has none at all."""
    nan = float("nan")
    found = {(): [1, 0, nan], (5, 6, 4): [nan] * 3, (5, 6, 4, 7, 7, 4): [1, 1, 0]}
    _, rows = step(lambda problem, prefix: found[prefix], valid=np.array([1, 1, 1, 0], bool))
    third = 2 / 3
    expected = [third - 0.5] * 3 + [0] * 3 + [1 - third]
    np.testing.assert_allclose(rows.credit.advantages[0, 2:], expected, atol=1e-6)
    assert not rows.credit.advantages[3].any()
    assert rows.plan_metrics["plan/branch_invalid"] == pytest.approx(5 / 12)
    none, nothing = step(lambda problem, prefix: [nan] * 3)
    assert not nothing.credit.advantages.any() and np.isfinite(nothing.credit.start_values).all()
    rounds, ungraded = step(valid=np.zeros(4, bool))
    assert len(rounds) == 1 and not ungraded.credit.advantages.any()


def test_the_steps_that_are_not_estimated_get_nothing():
    found = {(): [1, 0, 0], (5, 6, 4): [1, 1, 0]}
    _, rows = step(lambda problem, prefix: found[prefix], most=2)
    np.testing.assert_allclose(
        rows.credit.advantages[0, 2:], [1 / 3] * 3 + [1 / 3] * 3 + [0], atol=1e-6
    )


# ------------------------------------------------------------------------------------ the sampler
@pytest.mark.slow
@pytest.mark.parametrize("new", [9, 40])
def test_a_completion_continued_with_its_own_random_numbers_is_the_same(new):
    """From every place, batch by batch and in refilled slots, on one device and on four: the draw
    of a token is a function of its place in the completion. Neither limit nor EOS moves."""
    limit = SamplingSection(max_new_tokens=new)
    prompts = tiny.prompts(rows=8)
    whole = jax.tree.map(np.asarray, run(prompts, sampling=limit))
    lengths = whole.completion_lengths
    assert (lengths == new).any() and lengths.min() < new
    cut = np.random.default_rng(0).integers(0, lengths)
    cut = np.where(lengths == new, new - 1, cut)
    assert cut.max() == new - 1 and cut.min() == 0
    prefixes = [row[:n] for row, n in zip(completions(whole), cut, strict=True)]
    begun = continued(prompts, prefixes, new)
    mesh = make_mesh() if new == 9 else make_mesh(data=4)
    for found in (
        run(begun, sampling=limit),
        run_on(mesh, begun, sampling=limit, rows_at_once=4),
    ):
        assert completions(found) == completions(whole)
        for field in ("prompt_lengths", "completion_lengths", "terminated", "tokens"):
            np.testing.assert_array_equal(getattr(found, field), getattr(whole, field))
        place = np.arange(whole.tokens.shape[1])[None]
        sampled = place >= (whole.prompt_lengths + cut)[:, None]
        np.testing.assert_allclose(
            found.sampler_logprobs, np.where(sampled, whole.sampler_logprobs, 0), atol=1e-5
        )


def test_another_sample_number_gives_another_end():
    prompts = tiny.prompts(rows=8)
    begun = continued(prompts, [(3, 5)] * 8, 9)
    first, second = (completions(run(begun, sample_index=k)) for k in (2, 3))
    assert first != second and {row[:2] for row in first + second} == {(3, 5)}
    assert max(map(len, first)) == 9


def test_a_prefix_that_leaves_nothing_to_sample_is_refused():
    prompts = Prompts(
        tokens=np.zeros((1, 2), np.int32), lengths=np.array([2]), problem_ids=np.array([0])
    )
    with pytest.raises(ValueError, match="begin with 9 tokens and sampling.max_new_tokens is 9"):
        continued(prompts, [range(9)], 9)


# ---------------------------------------------------------------------------------- what is refused
def prefixed(problems=(1,), samples=(6,), prefixes=((),), **more):
    return Requests(np.array(problems), np.array(samples), prefixes=prefixes, **more)


def credit(rounds, found):
    return TokenCredit(advantages=np.zeros((1, 8)), start_values=np.zeros(1))


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (lambda: prefixed((2,)), "completions from a prefix of a problem without rollouts"),
        (lambda: prefixed((20,)), "problem 20; give 0 to 19"),
        (lambda: prefixed(samples=(5,)), "sample 5 from a prefix, .* number them from 6 on"),
        (lambda: prefixed((1, 1), (6, 6), ((), (3,))), "same sample of a problem twice"),
        (lambda: prefixed(greedy=True), "neither greedy nor have weights"),
        (lambda: prefixed(weights=np.ones(1)), "neither greedy nor have weights"),
        (lambda: prefixed(prefixes=()), "got 1 problems and 0 prefixes"),
    ],
)
def test_completions_that_nobody_uses_are_refused(asked, sentence):
    first = Requests(np.array([1]), np.array([0]))
    plan = Plan(lambda step, belief: first, lambda *_: asked(), credit=credit, name="p.q:own")
    with pytest.raises(ValueError, match=sentence) as refused:
        next_round(plan, SETTING, 0, rounds=[first], graded=[graded(first)], belief=Belief())
    assert "\n" not in str(refused.value)
    without = dataclasses.replace(plan, more=lambda *_: prefixed(), credit=None)
    with pytest.raises(ValueError, match="give Plan a function credit"):
        next_round(without, SETTING, 0, rounds=[first], graded=[graded(first)], belief=Belief())


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (lambda: None, "credit returned a NoneType; return types.TokenCredit"),
        (lambda: (np.zeros((1, 7)), np.zeros(1)), r"advantages \[1, 7\]; give \[1, 8\]"),
        (lambda: (np.zeros((2, 8)), np.zeros(2)), r"advantages \[2, 8\]; give \[1, 8\]"),
        (lambda: (np.full((1, 8), np.nan), np.zeros(1)), "advantages that are not finite"),
        (lambda: (np.zeros((1, 8)), np.zeros(1), np.ones((1, 8))), "which are a critic's; leave"),
        (lambda: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_a_credit_without_a_number_for_every_token_is_refused(returned, sentence):
    first = Requests(np.array([1]), np.array([0]))

    def own(rounds, found):
        given = returned()
        if given is None:
            return None
        names = ("advantages", "start_values", "returns")
        return TokenCredit(**dict(zip(names, given, strict=False)))

    plan = Plan(lambda step, belief: first, credit=own, name="basis_jax.plans:own")
    with pytest.raises(ValueError, match=sentence) as refused:
        as_rows([first], [graded(first)], plan, SETTING, 4)
    assert "in step 5" in str(refused.value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"estimator": "vineppo"}, "vineppo needs a plan .* is uniform; set it to branch"),
        ({"plan": "branch"}, "value_filter does not use that; set estimator.name to vineppo"),
        ({"plan": "branch", "estimator": "gae"}, "gae does not use that"),
        ({"plan": "branch", "options": {"rollouts": 0}}, "got rollouts 0; give a whole"),
        ({"plan": "branch", "options": {"most": 0}}, "got most 0; give a whole"),
        (
            {"plan": "branch", "options": {"separator": "\\n"}},
            "a backslash and an n, .* give a line",
        ),
    ],
)
def test_a_plan_and_an_estimator_that_do_not_fit_are_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        opened(**given)
    opened("vineppo", "branch")


@pytest.mark.parametrize("objective", REGRESSIONS)
def test_a_regression_on_advantages_by_token_is_refused(objective):
    config = Config(
        run_dir="",
        sampling=SamplingSection(group_size=2, plan="branch"),
        estimator=EstimatorSection(name="vineppo"),
        loss=LossSection(objective=objective),
    )
    with pytest.raises(ValueError, match=f"{objective} takes one advantage per rollout"):
        open_plan(config, (9999,), estimators.make("vineppo"))


def test_absent_rows_get_no_credit():
    setting = Setting(seed=0, prompts=2, group_size=2, sizes=(9,))
    asked = Requests(np.array([5, 7]), np.array([1, 0]))

    def ones(rounds, found):
        return TokenCredit(advantages=np.ones((2, 8)), start_values=np.array([0.25, 0.5]))

    rows = as_rows([asked], [graded(asked)], Plan(lambda *_: asked, credit=ones), setting)
    assert rows.credit.advantages.sum(1).tolist() == [0, 8, 8, 0]
    assert rows.credit.start_values.tolist() == [0, 0.25, 0.5, 0]
    signals = make_signals(rows, aggregation="token_mean", score_norms="logits")
    assert signals.start_values is None  # ``make_estimate`` adds those of the credit
    assert make("branch").credit is not None


def test_prompts_that_go_on_with_a_completion_need_memory_for_it():
    """The prefill holds 8 + 40 tokens of each row instead of 8. As there are more of them than
    rollouts, they fill all 512 slots; nothing else changes."""

    def parts(plan, rows):
        config = Config(run_dir="", sampling=SamplingSection(plan=plan, max_new_tokens=40))
        widths = {"prompt_width": 8, "rows": rows, "training": True}
        return memory_needs(config, tiny.TINY, make_mesh(), **widths)[0].parts

    uniform, branched = parts("uniform", 512), parts("branch", 64)
    assert branched.pop("prefill") > 4 * uniform.pop("prefill") > 0
    assert branched == uniform


# ------------------------------------------------------------------------------------- whole steps
@pytest.mark.slow
def test_a_step_taken_again_from_its_state_is_the_same_step(tiny_folder, dapo_file, tmp_path):
    """Bit for bit, with every token a step. Every metric is documented."""
    changes = {"estimator.name": "vineppo", "estimator.table-samples": 0, "sampling.plan": "branch"}
    arguments = small(tiny_folder, dapo_file, tmp_path / "run", **changes)
    arguments += ["--sampling.max-new-tokens", "4"]
    arguments += ["--sampling.plan-options", "rollouts", "2", "separator", ""]
    config = command_line.parse("", argv=["--config", "quickstart", *arguments])[0]
    assert config.sampling.plan_options == {"rollouts": 2, "separator": ""}
    with open_session(config, lambda _: None, training=True) as session:
        with jax.set_mesh(session.setup.mesh):
            take, state = make_step(session), first_state(session, tmp_path, lambda _: None)
            kept = jax.tree.map(jnp.copy, state)
            state, metrics, found, _ = take(state, 0)
            again, metrics_again, found_again, _ = take(kept, 0)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    jax.tree.map(np.testing.assert_array_equal, found_again.credit, found.credit)
    assert repeatable([metrics_again]) == repeatable([metrics])
    assert metrics.keys() <= documented_metrics()
    assert metrics["plan/rounds"] == 2 and metrics["plan/absent"] == 0
    assert metrics["plan/rollouts"] > 2 * found.rewards.size
