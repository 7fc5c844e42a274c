"""Data of your own: a file of problems without answers, whose columns say what a reward needs.

    python examples/own_data.py problems.jsonl
    basis-jax train --config quickstart --run-dir runs/own_data --estimator.name reinforce_pp \
        --data.path problems.jsonl --data.verifier examples/own_data.py:reward \
        --eval.set-verifiers task:number_words exact --train.prompts-per-step 128 \
        --train.minibatch-rollouts 128 --train.microbatch-rollouts 128
"""

import json
import random
import sys

WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def write(path, *, rows=600, seed=0):
    """Write one JSON object per line: the problem, and the columns that the reward reads."""
    draw = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(rows):
            a, b = draw.randrange(13), draw.randrange(13)
            problem = f"What is {WORDS[a]} plus {WORDS[b]}?"
            row = {"problem": problem, "least": a + b - 1, "most": a + b + 1}
            file.write(json.dumps(row) + "\n")


def reward(completions, least, most):
    """The columns ``least`` and ``most``, row by row beside the completions."""
    rows = zip(completions, least, most, strict=True)
    return [float(text.strip().isdigit() and low <= int(text) <= high) for text, low, high in rows]


if __name__ == "__main__":
    write(sys.argv[1])
