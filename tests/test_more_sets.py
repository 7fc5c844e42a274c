"""Several weighted training sets; held-out sets with their own samples and verifiers."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from basis_jax import command_line
from basis_jax.config import Config, DataSection, EvalSection, SamplingSection
from basis_jax.data import encoding, order, sources
from basis_jax.data.problem import Problem
from basis_jax.evaluation import evaluate as evaluation
from basis_jax.evaluation import report, scores
from basis_jax.model.sharding import make_mesh
from basis_jax.opening.checks import check_sets
from basis_jax.opening.ranges import check_ranges
from basis_jax.sampling.rollouts import RolloutSetup


class Tokenizer:
    bos_token_id = eos_token_id = None

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[1] * len(text) for text in texts]}


def encoded(*prompts):
    section = DataSection(prompt_format="text")
    problems = [Problem(prompt=prompt, answer="1") for prompt in prompts]
    return encoding.encode_prompts(problems, section, Tokenizer())


def test_a_step_has_prompts_of_each_set_in_proportion_and_epochs_of_each():
    sizes, weights = (12, 9, 4), (1.0, 0.5, 0.5)
    starts = np.cumsum([0, *sizes])
    visits = [
        order.step_problems(3, step, batch_size=8, sizes=sizes, weights=weights)
        for step in range(6)
    ]
    for rows in visits:
        assert len(set(rows.tolist())) == 8
        assert np.histogram(rows, starts)[0].tolist() == [4, 2, 2]
    first = np.concatenate(visits[:3])
    assert sorted(first[first < 12]) == list(range(12))  # an epoch of the first set
    again = order.step_problems(3, 5, batch_size=8, sizes=sizes, weights=weights)
    assert again.tolist() == visits[5].tolist()  # a function of seed and step
    of_set = [np.digitize(rows, starts[1:-1]).tolist() for rows in visits]
    assert all(numbers != sorted(numbers) for numbers in of_set)  # minibatches hold all sets


def test_one_set_keeps_the_order_that_runs_had():
    one = order.step_problems(3, 2, batch_size=4, sizes=(14,), weights=(1.0,))
    assert one.tolist() == order.batch_indices(3, 2, batch_size=4, size=14).tolist()


@pytest.mark.parametrize(
    "weights, total, counts",
    [((1.0, 1.0, 1.0), 8, [3, 3, 2]), ((1.0, 0.1), 11, [10, 1]), ((1.0, 3.0), 4, [1, 3])],
)
def test_largest_remainders_are_rounded_up(weights, total, counts):
    assert order.prompts_by_set(weights, total) == counts


def test_a_set_without_a_prompt_and_one_that_is_too_small_are_refused():
    with pytest.raises(ValueError, match="leaves a set no prompt of a step .weights 1, 0.01"):
        order.prompts_by_set((1.0, 0.01), 8)
    with pytest.raises(ValueError, match="is 4 but there are 2 training problems in set 2"):
        order.step_problems(0, 0, batch_size=8, sizes=(9, 2), weights=(1.0, 1.0))


def test_sets_are_joined_without_what_an_earlier_one_has():
    first, second = encoded("aa", "b"), encoded("b", "cccc", "dd")
    both = encoding.joined([first, second])
    assert both.sizes == (2, 2) and both.tokens.shape == (4, 4)
    assert [len(p.prompt) for p in both.problems] == both.lengths.tolist()
    assert {p.prompt for p in both.problems[2:]} == {"cccc", "dd"}
    assert both.counts["used"] == 4 and both.counts["duplicate"] == 1
    assert (both.tokens != 0).sum(axis=1).tolist() == both.lengths.tolist()
    with pytest.raises(ValueError, match="every problem of training set 2 is also in one before"):
        encoding.joined([second, encoded("b")])


def test_a_further_set_may_have_other_columns(tmp_path):
    path = tmp_path / "more.jsonl"
    path.write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    section = DataSection(problem_field="q", answer_field="a", problem_wrapper="Solve: {problem}")
    assert sources.load_more(str(path), section) == [Problem(prompt="1+1?", answer="2")]
    with pytest.raises(ValueError, match="there is no file .*none.jsonl.* --data.more-sets"):
        sources.load_more(str(tmp_path / "none.jsonl"), section)


def test_a_weight_of_a_set_is_positive():
    config = Config(run_dir="r", data=DataSection(more_sets={"a.jsonl": 0.0}))
    with pytest.raises(ValueError, match="weight of a.jsonl in data.more_sets is 0.0; give more"):
        check_ranges(config)


# ---------------------------------------------------------------------------------- held-out sets
def named(name, size):
    """A set whose first problem is its name."""
    problems = tuple(Problem(prompt=name if not i else str(i), answer="1") for i in range(size))
    rows = np.ones((size, 1), np.int32)
    return encoding.EncodedProblems(problems, rows, rows[:, 0], {})


def made_setup(**verifiers):
    return RolloutSetup(
        model_config=tiny.TINY,
        mesh=make_mesh(),
        tokenizer=None,
        eos_ids=(),
        verifier="usual",
        seed=0,
        rows_at_once=8,
        held_out_verifiers=verifiers,
    )


@pytest.fixture
def calls(monkeypatch):
    """What ``evaluate`` asks ``complete`` for; every reward is the set's temperature."""
    seen = []

    def complete(params, setup, problems, *, units, samples, sampling):
        seen.append(
            (problems.problems[0].prompt, setup.verifier, len(units), samples, sampling.temperature)
        )
        n = len(units)
        return SimpleNamespace(
            rewards=np.full(n, sampling.temperature), valid=np.ones(n, bool), kinds=["right"] * n
        )

    monkeypatch.setattr(evaluation, "complete", complete)
    return seen


def test_each_set_is_completed_by_its_own_protocol_and_greedy_ones_once(calls):
    sets = {name: named(name, size) for name, size in (("a", 3), ("b", 5))}
    section = EvalSection(
        samples=2, set_samples={"a": 4}, set_temperatures={"b": 0.0}, temperature=0.5
    )
    metrics = evaluation.evaluate(
        None, made_setup(b="own"), sets, section=section, sampling=SamplingSection()
    )
    assert calls == [
        ("a", "usual", 12, 4, 0.5),
        ("b", "own", 5, 1, 0.0),
        ("a", "usual", 3, 1, 0.0),
    ]
    assert metrics["eval/accuracy"] == 0.25 and metrics["eval/greedy_accuracy"] == 0.0
    assert metrics["eval/a/accuracy"] == 0.5 and metrics["eval/b/greedy_accuracy"] == 0.0


def test_the_flagship_is_evaluated_as_in_the_paper(calls):
    """avg@32 on four sets, one greedy completion on three."""
    config = command_line.load_config("qwen_math")
    check_sets(config)
    sets = {name: named(name, 1) for name in config.eval.sets}
    evaluation.evaluate(None, made_setup(), sets, section=config.eval, sampling=config.sampling)
    protocol = {name: (samples, temperature) for name, _, _, samples, temperature in calls[:7]}
    assert protocol == {
        **dict.fromkeys(("AIME24", "AIME25", "AMC23", "HMMT25"), (32, 1.0)),
        **dict.fromkeys(("MATH-500", "Minerva", "OlympiadBench"), (1, 0.0)),
    }


def test_values_by_name_stand_in_place_of_the_configs():
    def parse(*arguments):
        return command_line.parse("", argv=["--config", "qwen_math", *arguments])[0].eval

    assert parse("--eval.set-samples", "AIME24", "4").set_samples == {"AIME24": 4}
    assert parse("--eval.set-samples").set_samples == {}
    assert parse("--eval.size", "3").set_samples["HMMT25"] == 32
    with pytest.raises(ValueError, match="write --eval.set-samples aime24 VALUE"):
        parse("--eval.set-samples.aime24", "4")


def test_what_is_said_of_a_set_is_part_of_its_protocol_and_of_no_other():
    section = EvalSection(
        sets=("a", "b"),
        set_samples={"a": 4},
        set_temperatures={"a": 0.5},
        set_verifiers={"a": "math"},
    )
    config = Config(run_dir="r", eval=section)
    own = evaluation.set_protocol(config, "a")
    assert (own["samples"], own["temperature"], own["verifier"]["name"]) == (4, 0.5, "math")
    assert evaluation.set_protocol(config, "b") == {}


def test_a_sets_verifier_reads_and_grades_its_problems():
    data = DataSection(verifier="math", answer_mode="boxed", rewards={"format": 1.0})
    section = EvalSection(sets=("a", "b"), set_verifiers={"a": "exact"})
    config = Config(run_dir="r", data=data, eval=section)
    a, b = config.held_out_data("a"), config.held_out_data("b")
    assert (a.verifier, a.answer_mode, a.rewards) == ("exact", "", {})
    assert (b.verifier, b.answer_mode, b.rewards) == ("math", "boxed", {})
    with pytest.raises(ValueError, match="need the verifier 'gym'"):
        check_sets(
            dataclasses.replace(
                config, eval=EvalSection(sets=("task:gym/x",), set_verifiers={"task:gym/x": "math"})
            )
        )


@pytest.mark.parametrize("value, message", [(0, "give 1 or more"), (1.5, "give a whole number")])
def test_samples_of_a_set_are_a_whole_number(value, message):
    config = Config(run_dir="r", eval=EvalSection(set_samples={"AIME24": 1}))
    config.eval.set_samples["AIME24"] = value
    with pytest.raises(ValueError, match=f"eval.samples of AIME24 is {value}; {message}"):
        check_ranges(config)


def test_sets_with_other_numbers_of_completions_share_an_accuracy():
    def of(values):
        rewards = np.array(values, float)
        return scores.all_scores(
            rewards, np.ones(rewards.shape, bool), np.zeros(rewards.shape, int)
        )

    both = {"a": of([[1, 0], [1, 1]]), "b": of([[0], [1]])}
    sets, average = scores.summary(both)
    assert average["accuracy"]["value"] == (0.75 + 0.5) / 2
    assert "avg@2" not in average and "pass@1" in average
    found = {
        "sets": {
            name: {"problems": 2, "invalid": 0, "truncated": 0.0, "metrics": metrics}
            for name, metrics in sets.items()
        },
        "average": average,
    }
    header, a, b, mean = report.table(found)
    assert header.split() == (
        "set problems invalid cut short accuracy avg@2 pass@1 pass@2 maj@2 avg@1 maj@1".split()
    )
    assert "62.5%" in mean and "75.0%" in a and "75.0%" not in b
