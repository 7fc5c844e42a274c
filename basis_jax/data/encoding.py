"""Problems as rows of tokens, in the order of their uids."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from basis_jax.config import DataSection
from basis_jax.data.overlap import contradictions
from basis_jax.data.problem import Problem
from basis_jax.data.sources import answers_needed
from basis_jax.data.template_trial import Chat
from basis_jax.data.templates import chat_texts, token_rows
from basis_jax.data.values import shown

FORMATS = ("chat", "text")


@dataclass(frozen=True)
class EncodedProblems:
    """M problems in the order of their uids, with their prompts as right-padded rows. Several sets
    follow one another, each in this order."""

    problems: tuple[Problem, ...]
    tokens: Int32[np.ndarray, "M P"]
    lengths: Int32[np.ndarray, " M"]
    counts: dict[str, int]  # read, duplicate, too long, not asked for, used
    set_sizes: tuple[int, ...] = ()  # of several sets, one after the other

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of problems of each set; there is one set unless ``joined`` made this."""
        return self.set_sizes or (len(self.problems),)

    def fingerprint(self) -> str:
        """sha256 (hex) of the problems, their answers, columns and tokens, in order."""
        digest = hashlib.sha256(self.tokens.tobytes() + self.lengths.tobytes())
        digest.update(",".join(str(p.uid) for p in self.problems).encode())
        for problem in self.problems:
            if problem.columns:  # only those that a reward function reads were kept
                digest.update(written(problem).encode())
        return digest.hexdigest()


def written(problem: Problem) -> str:
    """The columns of a problem as JSON. Raises ValueError if they are nested too deep."""
    try:
        return json.dumps(problem.columns, sort_keys=True, default=repr)
    except RecursionError as error:
        raise ValueError(
            f"a column of the problem {shown(str(problem.prompt))} is nested too deep; leave it out"
        ) from error


def as_texts(problems: Sequence[Problem], section: DataSection, tokenizer: Any) -> list[str]:
    """The prompts as the model reads them."""
    chats = [as_chat(problem, section) for problem in problems]
    if section.prompt_format != "text":
        return chat_texts(chats, section, tokenizer) if chats else []
    if section.chat_template_options or any(len(chat) > 1 for chat in chats):
        raise ValueError(
            "data.prompt_format 'text' has no place for data.system_prompt, "
            "data.chat_template_options or a chat of several messages; use 'chat', or "
            "data.problem_prefix for what stands before a problem"
        )
    return [chat[0]["content"] for chat in chats]


def as_chat(problem: Problem, section: DataSection) -> Chat:
    """The prompt's messages, with the system prompt, the prefix and the suffix."""
    messages = problem.prompt
    if isinstance(messages, str):
        messages = (("user", messages),)
    *before, (role, content) = messages
    content = section.problem_prefix + content + section.problem_suffix
    system = [("system", section.system_prompt)] if section.system_prompt else []
    return [{"role": r, "content": c} for r, c in (*system, *before, (role, content))]


def encode_and_report(
    name: str,
    problems: Sequence[Problem],
    section: DataSection,
    tokenizer: Any,
    *,
    size: int,
    report: Callable[[str], None],
) -> EncodedProblems:
    """``encode_prompts`` for a named set. Reports what was left out, and prompts that occur with
    different answers. Raises ValueError as ``encode_prompts`` does, with the name."""
    try:
        encoded = encode_prompts(problems, section, tokenizer, size=size)
    except ValueError as error:
        raise ValueError(f"{name} problems: {error}") from error
    report(f"{name} problems: {', '.join(f'{v} {k}' for k, v in encoded.counts.items() if v)}")
    first = {problem.uid: problem.columns for problem in encoded.problems}
    other_columns = sum(first.get(p.uid, p.columns) != p.columns for p in problems if p.columns)
    if other_columns:
        report(
            f"warning: {other_columns} rows of the {name} problems repeat a problem and its answer "
            "with other columns; the first of each is used"
        )
    different = contradictions(encoded.problems)
    if different:
        one, other = different[0]
        prompt = one.prompt if isinstance(one.prompt, str) else one.prompt[-1][1]
        report(
            f"warning: {len(different)} prompts of the {name} problems have different answers in "
            f"different rows, such as {shown(prompt)}: {shown(one.answer)} and "
            f"{shown(other.answer)}"
        )
    return encoded


def joined(sets: Sequence[EncodedProblems]) -> EncodedProblems:
    """Several sets as one, without problems that an earlier set has. Raises ValueError if nothing
    is left of a set."""
    seen: set[int] = set()
    kept: list[np.ndarray] = []
    for number, part in enumerate(sets):
        new = [p.uid not in seen for p in part.problems]
        if not any(new):
            raise ValueError(
                f"every problem of training set {number + 1} is also in one before it; leave it "
                "out of data.more_sets"
            )
        seen |= {p.uid for p in part.problems}
        kept.append(np.flatnonzero(new))
    width = max(part.tokens.shape[1] for part in sets)
    pairs = [*zip(sets, kept, strict=True)]
    tokens = [np.pad(s.tokens[rows], ((0, 0), (0, width - s.tokens.shape[1]))) for s, rows in pairs]
    counts = {key: sum(part.counts[key] for part in sets) for key in sets[0].counts}
    repeated = counts["used"] - sum(map(len, kept))
    return EncodedProblems(
        tuple(part.problems[i] for part, rows in pairs for i in rows),
        np.concatenate(tokens),
        np.concatenate([part.lengths[rows] for part, rows in pairs]),
        counts | {"duplicate": counts["duplicate"] + repeated, "used": counts["used"] - repeated},
        tuple(map(len, kept)),
    )


def encode_prompts(
    problems: Sequence[Problem], section: DataSection, tokenizer: Any, *, size: int = 0
) -> EncodedProblems:
    """Problems as token rows in the order of their uids. Left out and counted are repeated
    problems, those without a text, those without an answer (if the verifier or a reward needs one),
    and prompts that are too long.

    ``size`` > 0 keeps the first so many in that order, which is a random subset. Raises ValueError
    if nothing is left.
    """
    unique = {p.uid: p for p in dict.fromkeys(problems)}
    needed = answers_needed(section)
    complete = [
        unique[uid]
        for uid in sorted(unique)
        if unique[uid].prompt and (unique[uid].answer or not needed)
    ]
    texts = as_texts(complete, section, tokenizer)
    rows = token_rows(texts, section, tokenizer)
    fitting = [
        (p, row)
        for p, row in zip(complete, rows, strict=True)
        if 0 < len(row) <= section.max_prompt_tokens
    ]
    kept = fitting[: size or None]
    counts = {
        "read": len(problems),
        "duplicate": len(problems) - len(unique),
        "without text or answer": len(unique) - len(complete),
        "too long": len(complete) - len(fitting),
        "not asked for": len(fitting) - len(kept),
        "used": len(kept),
    }
    if not kept:
        raise ValueError(
            f"no problem is left ({', '.join(f'{v} {k}' for k, v in counts.items())}); "
            f"data.max_prompt_tokens is {section.max_prompt_tokens} and the shortest prompt has "
            f"{min(map(len, rows), default=0)} tokens"
        )
    lengths = np.array([len(row) for _, row in kept], np.int32)
    tokens = np.zeros((len(kept), lengths.max()), np.int32)
    for i, (_, row) in enumerate(kept):
        tokens[i, : len(row)] = row
    return EncodedProblems(tuple(p for p, _ in kept), tokens, lengths, counts)
