"""Worked steps: the tasks, their split and grading, and the embedded model that works on them."""

import random
import re
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from basis_jax.data import tasks
from basis_jax.data.encoding import encode_prompts
from basis_jax.data.tasks import steps
from basis_jax.verify import make_verifier
from basis_jax.weights import huggingface
from configs import steps as steps_config
from studies import make_steps_model
from studies.make_steps_model import EQUALS, OPENERS

DATA = steps_config.config().data


@pytest.fixture(scope="module")
def tokenizer():
    return huggingface.load_tokenizer(huggingface.resolve_folder("embedded:steps"))


def dial(prompt):
    """The answer, from the prompt's words alone."""
    words = prompt.rstrip(".").split()
    numbers = "zero one two three four five six seven eight nine".split()
    times = int(words[6]) if "times" in words else 1
    moves = zip(words[3::2], words[4::2], strict=False) if times == 1 else [words[3:5]]
    turned = sum({"add": 1, "take": -1}[v] * numbers.index(a) for v, a in moves)
    return (int(words[2]) + times * turned) % 40


@pytest.mark.parametrize("regime", tasks.REGIMES)
def test_answers_follow_from_the_words_and_are_never_the_start(regime):
    """So a guess of the start is always wrong."""
    for problem in tasks.problems(f"steps/{regime}", held_out=True):
        assert int(problem.answer) == dial(problem.prompt) != int(problem.prompt.split()[2])


def test_what_one_regime_holds_out_no_regime_trains_on():
    """Disjoint by start and steps, whatever the manner; 600 and 320 problems a regime."""

    def contents(regime, held_out):
        found = {(q.start, q.steps) for q in steps.questions(regime, held_out=held_out)}
        assert len(found) == (320 if held_out else 600)
        return found

    training, held_out = (
        set().union(*(contents(regime, side) for regime in tasks.REGIMES)) for side in (False, True)
    )
    assert not training & held_out


def test_problems_are_the_same_in_every_process():
    """The reference table of one run fits the next."""
    program = (
        "from basis_jax.data import tasks; "
        "print(sum(p.uid for r in tasks.REGIMES for p in tasks.problems(f'steps/{r}', "
        "held_out=False)))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    made = [tasks.problems(f"steps/{regime}", held_out=False) for regime in tasks.REGIMES]
    assert printed.stdout.strip() == str(sum(p.uid for problems in made for p in problems))


def test_the_regimes_of_the_module_are_those_that_tasks_names():
    assert tuple(steps.REGIMES) == tasks.REGIMES
    with pytest.raises(ValueError, match="unknown task 'steps'; allowed are .*steps/free"):
        tasks.problems("steps", held_out=True)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("So 37 plus five is 2\nThen 2 minus three makes 39\nAnswer: 39", True),
        ("So 37 plus five is 1\nThen 1 plus three makes 4\nAnswer: 39", True),
        ("So 37 plus five is 2\nThen 2 minus three makes 39\nAnswer: 38", False),
        ("So 37 plus five is 2\nThen 2 minus three makes 39\n", False),
        ("Now 39 plus five is 39\n", False),
        ("Answer: 37", False),
        ("39", False),
    ],
)
def test_only_the_last_line_is_graded(completion, right):
    """Wrong working with a right last line is right; numbers inside lines never count."""
    with make_verifier(DATA.verifier, mode=DATA.answer_mode) as verifier:
        assert verifier.grade([completion], ["39"])[0].reward == float(right)


@pytest.mark.parametrize("regime", tasks.REGIMES)
def test_prompts_and_completions_are_their_tokens(tokenizer, regime):
    """No unknown word; prompts fit the config, completions its limit, and ``long`` has 200."""
    generator = random.Random(0)
    questions = steps.questions(regime, held_out=True)
    lengths = []
    for question in questions:
        work = make_steps_model.work(generator, question, textbook=False)
        for text in (question.text, work):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
        lengths.append(len(ids) + 1)
    problems = tasks.problems(f"steps/{regime}", held_out=True)
    assert encode_prompts(problems, DATA, tokenizer).counts["used"] == len(problems)
    if regime == "long":
        assert np.median(lengths) >= 200 and max(lengths) <= 300
    else:
        assert max(lengths) <= steps_config.config().sampling.max_new_tokens


def test_pupils_use_all_wordings_of_a_line():
    """24 of them, equally often: chi-squared of 2,400 lines below 56 (false alarm 1e-4)."""
    generator = random.Random(0)
    question = steps.Question("free", 3, (("add", 2), ("take", 5), ("add", 9)))
    texts = [make_steps_model.work(generator, question, textbook=False) for _ in range(800)]
    lines = [line for text in texts for line in text.splitlines()[:-1]]
    found = [re.fullmatch(r"(\w+) .* (\w+) \d+", line).groups() for line in lines]
    counts = np.array([found.count((o, e)) for o in OPENERS for e in EQUALS])
    assert counts.sum() == 2400 and np.sum((counts - 100) ** 2) / 100 < 56


def test_a_wrong_line_is_carried_on_and_a_textbook_has_none():
    """Each line begins where the line before ended, and the answer is the last line's number."""
    generator = random.Random(0)
    for textbook in (True, False):
        wrong = 0
        for question in steps.questions("hard", held_out=True):
            *lines, last = make_steps_model.work(
                generator, question, textbook=textbook
            ).splitlines()
            ends = [question.start, *(int(line.split()[-1]) for line in lines)]
            assert [int(line.split()[1]) for line in lines] == ends[:-1]
            assert last == f"Answer: {ends[-1]}"
            wrong += ends[-1] != question.answer
        assert (wrong == 0) == textbook


@pytest.fixture(scope="module")
def model():
    folder = huggingface.resolve_folder("embedded:steps")
    model_config = huggingface.read_model_config(folder)
    return huggingface.load_params(folder, model_config), model_config


def test_it_is_a_small_qwen3_decoder(model):
    """Below 1 M parameters; the folder is below 2 MB."""
    params, model_config = model
    assert (model_config.architecture, model_config.tied) == ("qwen3", True)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) < 1e6
    folder = huggingface.resolve_folder("embedded:steps")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2e6


def probabilities(model, questions):
    """P(right completion | prompt) of every question, worked as a textbook prints it: exactly."""
    generator = random.Random(0)
    rows = [(q.text, make_steps_model.work(generator, q, textbook=True)) for q in questions]
    width = make_steps_model.width_of(max(len(q.steps) for q in questions))
    tokens = make_steps_model.encode(make_steps_model.make_tokenizer(), rows, width)
    return np.asarray(make_steps_model.completion_probability(*model, *tokens), np.float64)


def test_pass_rates_of_one_wording_are_spread_as_those_of_pupils(model):
    """One string is right, so its probability is the value: mean .4 to .6, sd at least .25."""
    questions = steps.questions("single", held_out=True)
    passed = probabilities(model, questions)
    designed = [make_steps_model.design(q) for q in questions]
    assert 0.4 <= passed.mean() <= 0.6 and passed.std() >= 0.25
    assert np.corrcoef(passed, designed)[0, 1] > 0.9


def test_a_free_prompt_has_many_right_completions(model):
    """None is likelier than .05, and each line's wording takes at least half a nat."""
    free = steps.questions("free", held_out=True)
    single = [replace(question, manner="single") for question in free]
    worded, fixed = probabilities(model, free), probabilities(model, single)
    lines = [len(question.steps) for question in free]
    assert worded.max() < 0.05
    assert np.mean((np.log(fixed) - np.log(worded)) / lines) >= 0.5
