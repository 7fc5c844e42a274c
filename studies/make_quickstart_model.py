"""Make the embedded model: a small Qwen3 decoder taught arithmetic by careless pupils.

Command:   python -m studies.make_quickstart_model --out FOLDER
Hardware:  2 CPU cores; 20 minutes measured beside several other jobs (about 10 CPU minutes)
Expected:  1,095,168 parameters; exact pass rates at temperature 1, answer and EOS teacher-forced:
           training problems mean .457 sd .291, held-out mean .478 sd .277 (deciles .04 .11 .21 .35
           .47 .58 .67 .72 .78 .84); the usual slip has .263, all else the remaining .26

The corpus is a textbook without errors, followed by what a class of pupils wrote. A pupil who makes
a slip forgets to carry or to borrow (ten off), loses a sign, or miscounts by one. The probability
depends on the question (``care``: large digits are hard). So the model knows the right answer and
the usual slip of most questions, and writes the right one with a probability between 0 and 1 that
differs from question to question. Training stops early, so it does not know every answer. As in any
pretraining corpus, all questions may occur; held-out questions are held out from reinforcement
learning only.

Seeds are fixed: another run gives the same file up to the machine's rounding.
"""

import argparse
import math
import random
import re
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree
from tokenizers import Tokenizer

from basis_jax.data.tasks import number_words
from basis_jax.data.tasks.number_words import Question
from basis_jax.model import decoder
from basis_jax.weights import huggingface
from studies.pretraining import (
    SPECIAL,
    completion_probability,
    encode,
    fit,
    word_tokenizer,
    write_tokenizer,
)

PIECE = r"[a-z]+\n|\n| ?[A-Za-z]+-?| ?\d|."
"""A piece is a role with its newline, a newline, a word with the space before and the hyphen after
it, a digit with the space before it, or any other character. Joined, the pieces are the text."""
SHARES = {"plus": 0.28, "minus": 0.28, "times": 0.1, "chain": 0.17, "count": 0.17}  # of the corpus
WIDTH = 19  # tokens of the longest question with its answer and EOS
TEXTBOOK_STEPS, STEPS, ROWS, RATE = 1300, 2000, 64, 3e-3


def vocabulary() -> list[str]:
    """Special tokens, characters, digits and words with and without a space before them."""
    wordings = " ".join(number_words.WORDINGS.values())
    words = {*re.findall("[A-Za-z]+", wordings), *number_words.ONES}
    words |= {*number_words.TENS, *(f"{word}-" for word in number_words.TENS)}
    stems = [*"0123456789", *sorted(words)]
    roles = ("system\n", "user\n", "assistant\n")
    return [*SPECIAL, "\n", *" ?.-", *roles, *stems, *(f" {stem}" for stem in stems)]


def care(question: Question) -> float:
    """P(a pupil's answer is right): a logistic function of the size of the digits."""
    kind, operands = question.kind, question.operands
    if kind == "count":
        ease = 1.6 * (2.2 - question.answer) + 0.8 * (5 - len(operands))
    else:
        digits = [int(d) for n in operands for d in f"{n:02d}"]
        bearable = {"plus": 3.2, "minus": 2.9, "times": 2.5, "chain": 2.3}[kind]
        ease = 2.4 * (bearable - sum(digits) / len(digits))
    return 1 / (1 + math.exp(-ease))


def slip(question: Question) -> int:
    """The wrong answer that a careless pupil writes."""
    answer = question.answer
    if question.kind == "count":
        return answer - 1 if answer else 1
    if question.kind == "minus" and answer < 0:
        return -answer
    if question.kind in ("plus", "times") and answer >= 10:
        return answer - 10
    return answer + 10


def rows_of(pairs: list[tuple[Question, int]]) -> list[tuple[str, str]]:
    """Prompts and completions of questions with answers."""
    return [(question.text, str(answer)) for question, answer in pairs]


def write_lines(generator: random.Random, *, textbook: bool) -> list[tuple[Question, int]]:
    """Questions with the answers of a textbook, or with those that pupils wrote."""
    lines = []
    for kind in generator.choices(list(SHARES), list(SHARES.values()), k=ROWS):
        question = number_words.draw(generator, kind)
        right = textbook or generator.random() < care(question)
        lines.append((question, question.answer if right else slip(question)))
    return lines


def report(
    params: PyTree, model_config: decoder.ModelConfig, tokenizer: Tokenizer, *, held_out: bool
) -> None:
    """Print the distribution of pass rates, and the probability of the usual slip."""
    questions = number_words.questions(held_out=held_out)
    passed, slipped = (
        np.asarray(
            completion_probability(params, model_config, *encode(tokenizer, rows_of(pairs), WIDTH))
        )
        for pairs in ([(q, q.answer) for q in questions], [(q, slip(q)) for q in questions])
    )
    kinds = np.array([q.kind for q in questions])
    deciles = " ".join(f"{x:.2f}" for x in np.quantile(passed, np.linspace(0.05, 0.95, 10)))
    by_kind = ", ".join(f"{k} {passed[kinds == k].mean():.2f}" for k in SHARES)
    print(
        f"  {'held-out' if held_out else 'training'} {len(questions)}: mean {passed.mean():.3f} "
        f"sd {passed.std():.3f} deciles {deciles} | slip {slipped.mean():.3f} | {by_kind}",
        flush=True,
    )


def train(model_config: decoder.ModelConfig, tokenizer: Tokenizer) -> PyTree:
    """Train on the textbook, then on what the pupils wrote."""

    def batches():
        generator = random.Random(0)
        for step in range(1, STEPS + 1):
            lines = write_lines(generator, textbook=step <= TEXTBOOK_STEPS)
            yield encode(tokenizer, rows_of(lines), WIDTH)

    return fit(
        model_config,
        batches(),
        steps=STEPS,
        rate=RATE,
        reported=lambda step: step % 100 == 0,
        report=lambda params: report(params, model_config, tokenizer, held_out=True),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    folder = parser.parse_args().out
    tokenizer = word_tokenizer(vocabulary(), PIECE)
    model_config = decoder.ModelConfig(
        architecture="qwen3",
        vocab_size=tokenizer.get_vocab_size(),
        embed=192,
        layers=3,
        heads=6,
        kv_heads=2,
        head_dim=32,
        mlp=448,
        max_positions=128,
        tied=True,
        qk_norm=True,
    )
    params = train(model_config, tokenizer)
    huggingface.save_params(params, model_config, folder, dtype="bfloat16", overwrite=True)
    write_tokenizer(tokenizer, folder)
    params = huggingface.load_params(folder, huggingface.read_model_config(folder))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{folder}: {size:,} parameters, as stored:")
    for held_out in (False, True):
        report(params, model_config, tokenizer, held_out=held_out)


if __name__ == "__main__":
    main()
