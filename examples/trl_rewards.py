"""Two reward functions of TRL's documentation, for basis_jax: a boxed answer, and R1's form.

    basis-jax train --config qwen_math --data.verifier examples/trl_rewards.py:boxed \
        --data.rewards examples/trl_rewards.py:form 0.2
"""

import re


def boxed(completions, answers):
    found = [re.search(r"\\boxed\{(.*?)\}", text) for text in completions]
    return [float(bool(m) and m[1] == a) for m, a in zip(found, answers, strict=True)]


def form(completions):
    pattern = r"<think>.*?</think><answer>.*?</answer>"
    return [float(bool(re.fullmatch(pattern, text))) for text in completions]
