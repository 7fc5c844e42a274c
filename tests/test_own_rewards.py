"""Reward functions of the user's own: what they are given, what they may return, and every way in
which they fail, said in one sentence. Several rewards together."""

import json
import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import tiny

from basis_jax import estimators
from basis_jax.config import Config, DataSection, EstimatorSection, EvalSection, SamplingSection
from basis_jax.data import encoding, sources
from basis_jax.data.problem import Problem
from basis_jax.model.sharding import make_mesh
from basis_jax.opening import rollout_setup
from basis_jax.opening.checks import check_rewards, check_sets
from basis_jax.opening.ranges import check_ranges
from basis_jax.sampling.rollouts import BackgroundGrader, Graded, RolloutSetup, parts_of
from basis_jax.training import reference_table
from basis_jax.training.session import check_normalised, make_estimator
from basis_jax.training.update import reward_metrics
from basis_jax.training.watch import Watch
from basis_jax.types import Rollouts
from basis_jax.verify import make_verifier, rewards
from basis_jax.verify.pool import Stopped
from basis_jax.verify.verdicts import Submission, Verdict

ROWS = [
    Submission(
        completion=text,
        answer=answer,
        prompt=f"p{i}",
        columns={"level": i, "topic": "sums"},
        tokens=i + 1,
        terminated=i != 1,
    )
    for i, (text, answer) in enumerate([("4", "4"), ("5", "6"), ("long answer", "")])
]


class Tokenizer:
    bos_token_id = eos_token_id = None

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[1, len(text)] for text in texts]}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes my_file.py in the current directory; returns the reward verifier of its ``reward``."""
    monkeypatch.chdir(tmp_path)

    def write(text, **options):
        (tmp_path / "my_file.py").write_text(text)
        return make_verifier("my_file.py:reward", **options)

    return write


def values(verdicts):
    return [(v.reward, v.valid, v.kind) for v in verdicts]


# ------------------------------------------------------------------------------------ what it gets
SPY = """
seen = {}
def reward(prompts, completions, answers, **columns):
    seen.update(prompts=prompts, completions=completions, answers=answers, columns=columns)
    return [len(c) / 4 if a else None for c, a in zip(completions, answers)]
reward.seen = seen
"""


def test_it_is_called_once_with_lists_and_every_column_and_none_is_invalid(own):
    verifier = own(SPY)
    verdicts = verifier.judge(ROWS)
    seen = verifier.function.function.seen
    assert seen["prompts"] == ["p0", "p1", "p2"] and seen["answers"] == ["4", "6", None]
    assert seen["columns"] == {"level": [0, 1, 2], "topic": ["sums"] * 3}
    assert values(verdicts) == [
        (0.25, True, "wrong"),
        (0.25, True, "wrong"),
        (0.0, False, "ungraded"),
    ]
    assert verifier.columns is None and verifier.whole_batches


@pytest.mark.parametrize("workers", [0, 1])
def test_it_is_given_no_more_than_its_signature_names(own, workers):
    """Async too; columns that it does not name are not read from the data."""
    with own(
        "async def reward(completions, level, tokens, terminated, missing=None):\n"
        "    assert missing is None\n"
        "    return [l + t + 10 * d for l, t, d in zip(level, tokens, terminated)]\n",
        workers=workers,
    ) as verifier:
        assert set(verifier.columns) == {"level", "missing"}
        assert verifier.required_columns == ("level",)
        assert [v.reward for v in verifier.judge(ROWS)] == [11, 3, 15]


def test_a_chat_is_a_list_of_messages(own):
    verifier = own("def reward(prompts):\n    return [len(p[0]['content']) for p in prompts]\n")
    assert verifier.judge([Submission("", "", prompt=(("user", "abc"),))])[0].reward == 3


def test_arrays_booleans_and_numpy_numbers_are_rewards(own):
    verifier = own(
        "import numpy as np\n"
        "def reward(completions):\n    return np.array([True, False, True])[: len(completions)]\n"
    )
    assert [v.reward for v in verifier.judge(ROWS)] == [1, 0, 1]
    verifier = own(
        "import numpy as np\n"
        "def reward(completions):\n    return [np.float32(0.5)] * len(completions)\n"
    )
    assert verifier.judge(ROWS)[2].reward == 0.5


def test_nothing_is_graded_without_a_call(own):
    assert own("def reward(completions):\n    raise ValueError\n").judge([]) == []


# --------------------------------------------------------------------------------- what goes wrong
BROKEN = {
    "raises": (
        "    return [1 / (len(c) - 1) for c in completions]",
        r"my_file.py:reward raised ZeroDivisionError in line 2: .* for the completion '4' of the "
        r"prompt 'p0'; correct it, or return None",
    ),
    "count": ("    return [1.0]", "returned 1 values for 3 completions; return one float or None"),
    "one number": ("    return 1.0", "returned 1.0 of the type float; return a list with one"),
    "nothing": ("    pass", "returned None of the type NoneType; return a list with one float"),
    "a text": ("    return 'good'", "returned the text 'good'; return a list"),
    "a dictionary": ("    return {}", "returned a dictionary; return a list"),
    "nan": (
        "    return [float('nan') if c == '5' else 0 for c in completions]",
        "returned nan for the completion '5' of the prompt 'p1'; return a finite number, or None",
    ),
    "infinity": ("    return [1e999] * len(completions)", "returned inf for the completion '4'"),
    "texts": (
        "    return ['yes'] * len(completions)",
        "returned the text 'yes' for the completion '4' .*; return a float or None",
    ),
    "complex": ("    return [1j] * len(completions)", "returned 1j of the type complex for the"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_it_returns_or_raises_ends_the_run_with_a_sentence(own, name, workers):
    body, message = BROKEN[name]
    if workers:
        if name == "count":
            pytest.skip("one completion at a time")
        message = message.replace("for 3 completions", "for 1 completions")
    with own(f"def reward(completions):\n{body}\n", workers=workers) as verifier:
        with pytest.raises(ValueError, match=message) as caught:
            verifier.judge(ROWS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("reward = 3", "is of the type int and cannot be called; write def NAME"),
        ("class reward: pass", "is a class; give a function"),
        ("def other(): pass", r"has no reward function 'reward' \(allowed: other\)"),
        ("def rewards(): pass", r"no reward function 'reward'; did you mean rewards\?"),
        ("def reward(completions, /): pass", "takes 'completions' by position only"),
        ("1 / 0", "raised ZeroDivisionError in line 1 on import"),
        ("import no_such_module_here", "on import: .*install that module"),
    ],
)
def test_what_cannot_be_called_is_refused_when_it_is_loaded(own, text, message):
    with pytest.raises(ValueError, match=message):
        own(text)


@pytest.mark.parametrize(
    "reference, message",
    [
        ("none.py:reward", "there is no file .*none.py; give an existing one"),
        ("no.such.module:reward", "there is no module no.such.module on the import path"),
        ("my_file.py:", "got the reward function 'my_file.py:'; write FILE.py:NAME"),
        ("tests", "data.verifier is 'tests'; allowed are exact, .*FILE.py:NAME"),
    ],
)
def test_what_does_not_exist_is_named(reference, message):
    with pytest.raises(ValueError, match=message):
        make_verifier(reference)


def test_one_that_never_returns_ends_the_run_after_its_limit(own):
    verifier = own("import time\ndef reward(completions):\n    time.sleep(60)\n", seconds=0.2)
    with pytest.raises(
        ValueError, match="has not returned after 0.2 s, for a batch of 3 .*workers"
    ):
        verifier.judge(ROWS)


def test_one_that_never_returns_is_left_when_the_run_stops(own):
    verifier = own("import time\ndef reward(completions):\n    time.sleep(60)\n")
    threading.Timer(0.2, verifier.stop).start()
    begun = time.monotonic()
    with pytest.raises(Stopped):
        verifier.judge(ROWS)
    assert time.monotonic() - begun < 30


# -------------------------------------------------------------------------------------- in workers
def test_in_a_worker_only_the_completion_that_takes_too_long_is_wrong(own):
    """As with the verifiers of the package: reward 0, valid, counted as a timeout."""
    text = "def reward(completions):\n    while completions[0] == '5': pass\n    return [0.75]\n"
    with own(text, workers=1, seconds=0.5) as verifier:
        assert not verifier.whole_batches
        assert values(verifier.judge(ROWS)) == [
            (0.75, True, "right"),
            (0.0, True, "timeout"),
            (0.75, True, "right"),
        ]


def test_in_a_worker_one_that_hangs_on_everything_is_named(own):
    text = "def reward(completions):\n    while True: pass\n"
    with own(text, workers=2, seconds=0.2) as verifier:
        assert [v.reward for v in verifier.judge(ROWS)] == [0.0] * 3  # it may be theirs
        with pytest.raises(ValueError, match="reward gave no reward in a worker process .*correct"):
            verifier.judge(ROWS * 100)


def test_a_worker_is_confined_and_says_so(own, tmp_path):
    """A file that is read while grading, even where the function catches the refusal."""
    text = (
        "def reward(completions):\n"
        "    try:\n        open('/etc/hostname').read()\n    except OSError:\n        pass\n"
        "    return [1.0]\n"
    )
    with own(text, workers=1) as verifier:
        assert [v.kind for v in verifier.judge(ROWS)] == ["refused"] * 3
        with pytest.raises(ValueError, match="gave no reward in a worker process .*needed open"):
            verifier.judge(ROWS * 3)


def test_a_column_that_a_worker_cannot_get_is_named(own):
    with own("def reward(when):\n    return [0.0]\n", workers=1) as verifier:
        row = Submission("4", "4", columns={"when": {1, 2}})
        with pytest.raises(ValueError, match="a column for my_file.py:reward cannot be sent"):
            verifier.judge([row])


# ---------------------------------------------------------------------------------------- the data
def written(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_columns_travel_with_a_problem_but_are_no_part_of_it(own, tmp_path):
    rows = [{"problem": "2+2?", "answer": "4", "level": 1, "topic": {"a": [1]}}]
    section = DataSection(path=written(tmp_path, rows))
    (problem,) = sources.load_training(section)
    assert problem.columns == {"answer": "4", "level": 1, "topic": {"a": [1]}}
    bare = sources.Problem(prompt="2+2?", answer="4")
    assert problem == bare and problem.uid == bare.uid and hash(problem) == hash(bare)
    (problem,) = sources.load_training(section, own("def reward(level): pass"))
    assert problem.columns == {"level": 1}
    (problem,) = sources.load_training(section, own("def reward(problem): pass"))
    assert problem.columns == {"problem": "2+2?"}
    (problem,) = sources.load_training(section, make_verifier("exact"))
    assert problem.columns == {}  # a million rows need no memory for what nobody reads


def test_a_column_that_is_not_there_is_named_before_anything_is_sampled(own, tmp_path):
    section = DataSection(path=written(tmp_path, [{"problem": "2+2?", "answer": "4", "level": 1}]))
    with pytest.raises(ValueError, match="line 1: the reward function asks for 'depth'.*level"):
        sources.load_training(section, own("def reward(depth): pass"))
    with pytest.raises(ValueError, match="'depth', and the columns of task:arithmetic are none"):
        sources.load_training(DataSection(path="task:arithmetic"), own("def reward(depth): pass"))


def test_answers_may_be_missing_where_the_verifier_needs_none(own, tmp_path):
    """No column of answers, an empty one, or one that holds something else."""
    mine = own("def reward(completions): pass")
    for row in ({}, {"answer": ""}, {"answer": {"tests": [1]}}, {"answer": None}):
        path = written(tmp_path, [{"problem": "2+2?", **row}])
        section = DataSection(path=path, verifier="my_file.py:reward", prompt_format="text")
        problems = sources.load_training(section, mine)
        assert problems == [sources.Problem(prompt="2+2?", answer="")]
        assert encoding.encode_prompts(problems, section, Tokenizer()).counts["used"] == 1
        with pytest.raises(ValueError):
            needing = replace(section, rewards={"math": 1.0})
            encoding.encode_prompts(sources.load_training(needing, mine), needing, Tokenizer())


def test_a_named_column_of_answers_is_read_even_where_none_is_needed(own, tmp_path):
    path = written(tmp_path, [{"problem": "2+2?", "target": {"tests": [1]}}])
    section = DataSection(path=path, verifier="my_file.py:reward", answer_field="target")
    with pytest.raises(ValueError, match="name one of its parts"):
        sources.load_training(section, own("def reward(completions): pass"))


def test_the_fingerprint_of_problems_holds_the_columns_that_are_read(tmp_path, own):
    mine = own("def reward(level): pass")
    found = set()
    for rows in ([{"level": 1}], [{"level": 2}], [{"level": 2, "other": 3}], [{}]):
        path = written(tmp_path, [{"problem": "2+2?", "answer": "4", **rows[0]}])
        section = DataSection(path=path, prompt_format="text")
        verifier = mine if "level" in rows[0] else make_verifier("exact")
        problems = sources.load_training(section, verifier)
        found.add(encoding.encode_prompts(problems, section, Tokenizer()).fingerprint())
    assert len(found) == 3  # of a column that nobody reads it holds nothing


def test_rows_that_differ_in_columns_alone_are_one_problem_and_are_reported(own, tmp_path):
    rows = [{"problem": "2+2?", "answer": "4", "level": level} for level in (1, 2, 1)]
    section = DataSection(path=written(tmp_path, rows), prompt_format="text")
    problems = sources.load_training(section, own("def reward(level): pass"))
    said = []
    encoded = encoding.encode_and_report(
        "training", problems, section, Tokenizer(), size=0, report=said.append
    )
    assert [p.columns for p in encoded.problems] == [{"level": 1}]
    assert any("1 rows of the training problems repeat a problem" in line for line in said)


# --------------------------------------------------------------------------------- several rewards
class Fixed(rewards.Verifier):
    def __init__(self, values, name="fixed"):
        self.values, self.name = values, name

    def judge(self, rows):
        return [
            Verdict(0.0, False, "no idea", "failure")
            if v is None
            else Verdict(v, True, "so", "right")
            for v in self.values
        ]


def test_dapos_overlong_punishment_has_its_floor():
    """Lengths 50 to 110 of a limit of 100 with a buffer of 20."""
    found = [rewards.overlong(n, limit=100, buffer=20) for n in (50, 80, 85, 90, 100, 110)]
    assert found == [0, 0, -0.25, -0.5, -1, -1]
    verifier = rewards.OverlongReward(100)  # the buffer is a fifth, as 4,096 of 20,480
    assert verifier.judge([Submission("", "", tokens=90)])[0].reward == -0.5
    with pytest.raises(ValueError, match="data.overlong_buffer is 101 tokens and the limit is 100"):
        rewards.OverlongReward(100, 101)


def test_the_format_reward_wants_the_whole_form():
    verifier = rewards.FormatReward()
    texts = {
        "<think>a\nb</think>\n<answer>4</answer>": 1,
        "<think>a</think><answer>4</answer> and": 0,
        "so <think>a</think><answer>4</answer>": 0,
        "<answer>4</answer>": 0,
    }
    assert [v.reward for v in verifier.judge([Submission(t, "") for t in texts])] == [
        *texts.values()
    ]
    with pytest.raises(ValueError, match="data.format_pattern is '\\(', which is no regular"):
        rewards.FormatReward("(")


def test_a_pattern_that_backtracks_forever_costs_a_reward_and_not_the_run(monkeypatch):
    monkeypatch.setattr(rewards, "MATCH_SECONDS", 0.1)
    verdicts = rewards.FormatReward("(a|aa)+b").judge(
        [Submission(a, "") for a in ("a" * 90, "aab")]
    )
    assert [(v.reward, v.valid, v.kind) for v in verdicts] == [
        (0, True, "timeout"),
        (1, True, "right"),
    ]


def test_weighted_rewards_are_added_and_each_is_kept():
    both = rewards.SeveralRewards(
        {"math": Fixed([1.0, 0.0, 1.0]), "short": Fixed([-0.5, 0.25, None])}, [2.0, 4.0]
    )
    verdicts = both.judge(ROWS)
    assert values(verdicts) == [(0.0, True, "right"), (1.0, True, "right"), (0.0, False, "failure")]
    assert verdicts[0].parts == (1.0, -0.5) and verdicts[2].reason == "short: no idea"
    assert verdicts[1].reason == "so (math 0, short 0.25)"


def test_normalised_rewards_have_deviations_of_their_weights():
    """r_i = sum_k w_k r_ki / s_k over valid rows; what is the same for all adds nothing."""
    random = np.random.default_rng(0)
    columns = [random.normal(size=50).tolist(), (100 * random.normal(size=50)).tolist(), [3.0] * 50]
    columns[0][7] = None
    several = rewards.SeveralRewards(
        {name: Fixed(column) for name, column in zip("abc", columns, strict=True)},
        [2.0, 1.0, 5.0],
        normalised=True,
    )
    verdicts = several.settle(several.judge(ROWS))
    kept = np.arange(50) != 7
    a, b = (np.array(column, float)[kept] for column in columns[:2])
    expected = 2 * a / a.std() + b / b.std()
    np.testing.assert_allclose(np.array([v.reward for v in verdicts])[kept], expected, rtol=1e-12)
    assert not verdicts[7].valid
    none = rewards.SeveralRewards({"a": Fixed([None, None])}, [1.0], normalised=True)
    assert [v.valid for v in none.settle(none.judge(ROWS[:2]))] == [False, False]


@pytest.mark.parametrize("size", [1e200, 1e-200, 1.7e308])
def test_normalised_rewards_may_have_any_size(size):
    """Their squares, or even their sum, need not fit in a float."""
    column = [size, -size, 0.5 * size, 0.0]
    several = rewards.SeveralRewards({"a": Fixed(column)}, [2.0], normalised=True)
    verdicts = several.settle(several.judge([*ROWS, ROWS[0]]))
    expected = 2 * np.array([1, -1, 0.5, 0]) / np.std([1, -1, 0.5, 0])
    np.testing.assert_allclose([v.reward for v in verdicts], expected, rtol=1e-12)


def test_a_sum_of_rewards_too_large_for_a_float_is_not_a_number():
    """``Graded`` counts it as a failure of the verifier."""
    column = [1.7e308, 1.7e308, 0.0]
    several = rewards.SeveralRewards({"a": Fixed(column), "b": Fixed(column)}, [1.0, 1.0])
    assert [math.isfinite(v.reward) for v in several.judge(ROWS)] == [False, False, True]


def test_the_leak_of_the_own_reward_into_the_scale_is_as_small_as_the_docstring_says():
    random = np.random.default_rng(1).normal(size=400)
    z = (random - random.mean()) / random.std()
    for i in (int(z.argmax()), int(abs(z).argmin())):
        without = np.delete(random, i).std() / random.std()
        second_order = ((1 + z[i] ** 2) / 400) ** 2
        assert math.isclose(without, 1 + (1 - z[i] ** 2) / 800, abs_tol=second_order)


class Letters:
    """A tokenizer whose tokens are code points."""

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(map(chr, row)) for row in rows]


def rollouts_of(completions):
    """Rollouts after prompts of two tokens; the second is cut."""
    rows, width = len(completions), 2 + max(map(len, completions))
    tokens = np.zeros((rows, width), np.int32)
    for row, text in enumerate(completions):
        tokens[row, 2 : 2 + len(text)] = [ord(c) for c in text]
    return Rollouts(
        tokens=tokens,
        prompt_lengths=np.full(rows, 2, np.int32),
        completion_lengths=np.array([*map(len, completions)], np.int32),
        sampler_logprobs=np.zeros((rows, width), np.float32),
        score_norms=np.zeros(rows, np.float32),
        terminated=np.arange(rows) != 1,
        problem_ids=np.arange(rows, dtype=np.int32),
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_is_one_call_in_this_process_and_every_part_at_once_in_workers(
    own, monkeypatch, workers
):
    """Rows end in parts, the last ones first."""
    verifier = own(
        "def reward(completions, level, tokens, terminated):\n"
        "    rows = zip(completions, level, tokens, terminated)\n"
        "    return [float(c) + 10 * l + 100 * n + 1000 * t for c, l, n, t in rows]\n",
        workers=workers,
    )
    sizes, judge = [], verifier.judge
    monkeypatch.setattr(verifier, "judge", lambda rows: sizes.append(len(rows)) or judge(rows))
    problems = [Problem(prompt="p", answer="", columns={"level": i}) for i in range(4)]
    setup = RolloutSetup(
        model_config=tiny.TINY,
        mesh=make_mesh(),
        tokenizer=Letters(),
        eos_ids=(),
        verifier=verifier,
        seed=0,
        rows_at_once=4,
    )
    rollouts = rollouts_of(["1", "22", "3", "4"])
    with verifier, BackgroundGrader(setup, problems) as grader:
        for part in ([3, 2], [1], [0]):
            grader.submit(rollouts, np.array(part))
        graded = grader.wait()
    assert sizes == ([2, 1, 1] if workers else [4])
    assert [v.reward for _, v in graded] == [1101, 232, 1123, 1134]


def test_single_rewards_become_metrics_and_accuracy_is_the_verifiers():
    """Sum .5 on average, but half of the completions are right; invalid rows are left out."""
    several = rewards.SeveralRewards(
        {"math": Fixed([1.0, 0.0, None]), "overlong": Fixed([-1.0, 0.0, 0.0])}, [1.0, 0.5]
    )
    verdicts = several.judge(ROWS)
    graded = Graded(
        rollouts=rollouts_of(["1", "22", "3"]),
        completions=["1", "22", "3"],
        rewards=np.float32([v.reward for v in verdicts]),
        valid=np.array([v.valid for v in verdicts]),
        reasons=[v.reason for v in verdicts],
        kinds=[v.kind for v in verdicts],
        sample_seconds=1.0,
        verify_seconds=0.0,
        parts=parts_of(verdicts, several.part_names),
    )
    metrics = reward_metrics(graded, estimators.reinforce(graded.rewards, valid=graded.valid))
    assert (metrics["rewards/math"], metrics["rewards/overlong"]) == (0.5, -0.5)
    assert metrics["reward/mean"] == 0.25 and metrics["reward/accuracy"] == 0.5
    assert metrics["verify/failure"] == pytest.approx(1 / 3)


def config(**changes):
    data = DataSection(**{"verifier": "exact", **changes})
    return Config(run_dir="r", data=data, eval=EvalSection(sets=("task:arithmetic",)))


def test_training_adds_rewards_and_held_out_sets_have_the_verifier_alone(own):
    own("def reward(completions, level): return [0.0] * len(completions)")
    with rollout_setup.open_verifiers(
        config(rewards={"overlong": 1.0, "my_file.py:reward": 0.5}, verifier_weight=2.0)
    ) as verifiers:
        assert verifiers.training.part_names == ("exact", "overlong", "reward")
        assert verifiers.training.required_columns == ("level",)
        assert verifiers.training.whole_batches
        assert verifiers.held_out["task:arithmetic"] is verifiers.training.rewards[0]
        assert verifiers.training.rewards[1].limit == SamplingSection().max_new_tokens
    assert rollout_setup.short_names(["a.py:f", "b.py:f", "m"]) == ["a.py:f", "b.py:f", "m"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rewards": {"exact": 1.0}}, "'exact', which is data.verifier; give its weight as"),
        ({"rewards": {"fromat": 1.0}}, "data.rewards names 'fromat'; allowed are format, overlong"),
        ({"normalise_rewards": True}, "is for several rewards and data.rewards is empty"),
    ],
)
def test_rewards_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_rewards(config(**changes).data)


def test_a_weight_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="the weight of format in data.rewards is nan"):
        check_ranges(config(rewards={"format": math.nan}))


@pytest.mark.parametrize("name, remembers", [("reinforce_pp", False), ("spo", True), ("ema", True)])
def test_normalised_rewards_are_refused_where_an_estimator_remembers(name, remembers):
    made = config(rewards={"format": 1.0}, normalise_rewards=True)
    made = Config(run_dir="r", data=made.data, estimator=EstimatorSection(name=name))
    estimator = make_estimator(made.estimator, 1)
    if not remembers:
        check_normalised(made, estimator)
        return
    with pytest.raises(ValueError, match=f"{name} remembers rewards of earlier steps"):
        check_normalised(made, estimator)


def test_rewards_that_the_estimator_would_clip_are_warned_about_once():
    """Those with a range, which is 0 to 1 where none is given."""
    rewards = np.float32([-1, 0.5])
    for name, options, warned in (
        ("spo", {}, True),
        ("spo", {"low": -1.0, "high": 1.0}, False),
        ("grpo", {}, False),
    ):
        watch = Watch(Config(run_dir="r", estimator=EstimatorSection(name=name, options=options)))
        first, second = ([*watch._range_warning(rewards)] for _ in range(2))
        assert len(first) == warned and not second
        if warned:
            assert first[0].startswith("warning: rewards of this step go from -1 to 0.5 and spo ta")


def test_a_reference_table_is_of_one_version_of_a_reward(own):
    own("def reward(completions): return [0.0]")
    section = DataSection(verifier="my_file.py:reward", rewards={"overlong": 0.5})
    before = reference_table.described_rewards(section)
    own("def reward(completions): return [1.0]")
    assert before != reference_table.described_rewards(section)
    assert before.startswith("my_file.py:reward + overlong x 0.5 (overlong 0 0) sha256 ")
    assert reference_table.described_rewards(DataSection()) == "exact"


def test_a_verifier_for_a_set_that_is_not_evaluated_is_refused():
    section = EvalSection(sets=("AIME24",), set_verifiers={"AIME-25": "math"})
    with pytest.raises(ValueError, match="eval.set_verifiers names 'AIME-25', which is neither"):
        check_sets(Config(run_dir="r", eval=section))
