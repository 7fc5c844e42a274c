"""A reward of your own: how close a number is to the right one.

    basis-jax train --config quickstart --run-dir runs/own_reward \
        --data.verifier examples/own_reward.py:reward --data.rewards overlong 0.1
"""


def reward(completions, answers, **columns):
    """1 for the right number, less for a number further off, 0 if the completion is no number."""
    return [closeness(text, answer) for text, answer in zip(completions, answers, strict=True)]


def closeness(text, answer):
    if not text.strip().isdigit():
        return 0.0
    return 1 / (1 + abs(int(text) - int(answer)))
