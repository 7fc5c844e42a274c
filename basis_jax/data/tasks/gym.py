"""Tasks of reasoning-gym (the extra [tasks]): ``task:gym/NAME`` or ``task:gym/NAME?key=value``.

``task:gym/chain_sum?size=2000&min_terms=2`` generates 2,000 problems; everything after the question
mark is an option of the generator, ``seed`` (0 by default) included. Repeated questions are one
problem. About a fifth is held out, by a hash of the question. The verifier ``gym`` grades them; the
answer of such a problem is everything that its scorer needs, as JSON.
"""

import json
from typing import Any
from urllib.parse import parse_qsl

from basis_jax.data.problem import Problem, content_hash

SIZE = 1000


def problems(spec: str, *, held_out: bool) -> list[Problem]:
    """One side of a task's problems. Raises ValueError if reasoning-gym is missing or does not know
    the task or its options."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(
            f"task:gym/{spec} needs reasoning-gym; pip install it, or basis-jax with the extra "
            "[tasks]"
        ) from error
    name, _, query = spec.partition("?")
    if name not in reasoning_gym.factory.DATASETS:
        raise ValueError(
            f"reasoning-gym has no task {name!r}; it has "
            f"{', '.join(sorted(reasoning_gym.factory.DATASETS))}"
        )
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        options = {"size": SIZE, "seed": 0} | {k: value(v) for k, v in pairs}
        entries = list(reasoning_gym.create_dataset(name, **options))
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"task:gym/{spec}: reasoning-gym refuses its options ({error})") from error
    return [
        Problem(prompt=question, answer=written(name, options, entry), kind=name)
        for question, entry in {e["question"]: e for e in reversed(entries)}.items()
        if (content_hash(question) % 5 == 0) == held_out
    ]


def written(name: str, options: dict[str, Any], entry: dict[str, Any]) -> str:
    """What the scorer needs, as JSON, without the problem's position in the data set."""
    metadata = {k: v for k, v in entry["metadata"].items() if k != "source_index"}
    made = {k: v for k, v in options.items() if k not in ("size", "seed")}
    found = {"task": name, "options": made, "entry": entry | {"metadata": metadata}}
    return json.dumps(found, default=str, sort_keys=True)


def value(text: str) -> Any:
    """A number, a list, true or false as in JSON; anything else is text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # also of a number with too many digits
        return text
