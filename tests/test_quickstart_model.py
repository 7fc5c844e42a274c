"""The embedded model is what the quickstart and its documents say it is."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from basis_jax.config import DataSection
from basis_jax.data.encoding import encode_prompts
from basis_jax.data.tasks import number_words
from basis_jax.model.logprobs import token_logprobs
from basis_jax.weights import huggingface

FOLDER = huggingface.resolve_folder("embedded:quickstart")


@pytest.fixture(scope="module")
def tokenizer():
    return huggingface.load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def params():
    return huggingface.load_params(FOLDER, huggingface.read_model_config(FOLDER))


def test_it_is_a_small_qwen3_decoder(params):
    """Qwen3, tied, grouped queries; 1 to 4 M parameters; the folder is below 5 MB."""
    model_config = huggingface.read_model_config(FOLDER)
    assert (model_config.architecture, model_config.tied, model_config.qk_norm) == (
        "qwen3",
        True,
        True,
    )
    assert model_config.kv_heads < model_config.heads
    assert 1e6 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 4e6
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 5e6


def exact_pass_rates(params, tokenizer, *, held_out):
    """P(answer, EOS | prompt) of every problem, by one teacher-forced forward pass."""
    problems = number_words.problems(held_out=held_out)
    prompts = encode_prompts(problems, DataSection(), tokenizer)
    rows = [
        [*tokens[:length], *tokenizer.encode(p.answer, add_special_tokens=False)]
        for p, tokens, length in zip(
            prompts.problems, prompts.tokens.tolist(), prompts.lengths, strict=True
        )
    ]
    rows = [[*row, tokenizer.eos_token_id] for row in rows]
    width = max(map(len, rows))
    tokens = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    at = np.arange(width)[None]
    ends = np.array([len(row) for row in rows])[:, None]
    answered = (at >= prompts.lengths[:, None]) & (at < ends)
    score = jax.jit(token_logprobs, static_argnums=1)
    logprobs, _ = score(params, huggingface.read_model_config(FOLDER), jnp.asarray(tokens))
    return np.exp(np.where(answered, np.asarray(logprobs), 0.0).sum(axis=1)), prompts.problems


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [False, True])
def test_pass_rates_are_spread(params, tokenizer, held_out):
    """Mean in .3-.6 and sd >= .25: there is something to learn, and values differ by prompt."""
    rates, _ = exact_pass_rates(params, tokenizer, held_out=held_out)
    assert 0.3 <= rates.mean() <= 0.6
    assert rates.std() >= 0.25


def test_pass_rates_differ_inside_kinds(params, tokenizer):
    """The spread is not one between kinds alone: within each the sd is at least .1."""
    rates, problems = exact_pass_rates(params, tokenizer, held_out=True)
    kinds = np.array([p.kind for p in problems])
    assert min(rates[kinds == kind].std() for kind in set(kinds)) >= 0.1


def test_chat_template_asks_for_an_answer(tokenizer):
    """ChatML; the prompt ends where the assistant's answer begins."""
    chat = [{"role": "user", "content": "What is forty-two plus seven?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\nWhat is forty-two plus seven?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert huggingface.eos_ids(FOLDER, tokenizer) == (
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )
    assert tokenizer.pad_token_id not in huggingface.eos_ids(FOLDER, tokenizer)


def test_tokens_are_the_text(tokenizer):
    """Problems and answers survive encoding and decoding; nothing in them is unknown."""
    for held_out in (False, True):
        for problem in number_words.problems(held_out=held_out):
            for text in (problem.prompt, problem.answer):
                ids = tokenizer.encode(text, add_special_tokens=False)
                assert tokenizer.unk_token_id not in ids, text
                assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_answers_of_questions_are_right():
    """The answer of every arithmetic question follows from its words."""
    numbers = {number_words.in_words(n): n for n in range(100)}
    assert numbers["forty-two"] == 42 and numbers["seventeen"] == 17 and len(numbers) == 100
    orders = {"Add": "{1} plus {0}", "Take": "{1} minus {0}", "Multiply": "{0} times {1}"}
    signs = {"plus": "+", "minus": "-", "times": "*"}
    for problem in number_words.problems(held_out=True):
        words = problem.prompt.rstrip("?.").split()
        if problem.kind == "count":
            assert int(problem.answer) == words[-1].count(words[3])
            continue
        if words[0] in orders:
            words = orders[words[0]].format(words[1], words[3]).split()
        else:
            words = words[2:]
        expression = "".join(str(numbers.get(w, signs.get(w))) for w in words)
        assert eval(expression) == int(problem.answer), problem


def test_held_out_questions_are_not_trained_on():
    """Disjoint by kind and operands, in whatever order and wording they come."""

    def contents(held_out):
        return {
            (q.kind, tuple(sorted(q.operands)) if q.kind in ("plus", "times") else q.operands)
            for q in number_words.questions(held_out=held_out)
        }

    training, held_out = contents(False), contents(True)
    assert len(training) > 500 and len(held_out) > 300
    assert not training & held_out


def test_problems_are_the_same_every_time():
    """The reference table of one run fits the next."""
    first, second = (number_words.problems(held_out=False) for _ in range(2))
    assert first == second
    assert json.dumps(first[0].prompt) and len({p.uid for p in first}) == len(first)
