"""A user's own reward functions, given by reference (``references``).

    def reward(prompts, completions, answers, **columns) -> list[float | None]

The function is plain or async. It is called by keyword with those of these arguments that its
signature names: ``prompts`` (texts, or chats as lists of messages), ``completions`` (texts),
``answers`` (texts, None if a row of the data has none), ``tokens`` (the number in each completion),
``terminated`` (False: cut at the length limit), and any column of the data set. Each is a list with
one item per completion. A reward of None means that the completion cannot be graded: the rollout is
invalid and left out.
"""

import asyncio
import inspect
import json
import math
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from basis_jax import references
from basis_jax.verify.pool import OWN, Pool, Stopped
from basis_jax.verify.verdicts import RIGHT_ABOVE, Submission, Verdict, Verifier, verdict_of

WHAT = "reward function"
GIVEN = ("prompts", "completions", "answers")
ASKED = ("tokens", "terminated")
"""Arguments of every call, and those of a function that asks for them by name."""
KNOWN = (*GIVEN, *ASKED)
SHAPE = "def NAME(prompts, completions, answers, **columns)"
SECONDS, WORKER_SECONDS = 600.0, 10.0
"""Default limits of a call: in this process, and of CPU time in a worker process."""
LOOK_EVERY_S = 0.5  # seconds between looks whether the run has been stopped
SHOWN = 60  # characters of a text in an error
TRIED = 8
"""If none of the first so many completions gets a reward, the function itself is at fault."""
SEARCH_SECONDS = 10.0  # to find the row of a batch on which a function fails

Rewards = list[float | None]
Await = Callable[[Awaitable], Any]


class RewardFunction:
    """A loaded function, and what its signature asks for.

    Raises ValueError, one sentence, for a function that cannot be loaded or called.
    """

    def __init__(self, reference: str):
        self.reference = reference
        self.function = references.load(reference, WHAT, inspect.isroutine)
        if not callable(self.function):
            raise ValueError(
                f"{reference} is of the type {type(self.function).__name__} and cannot be called; "
                f"write {SHAPE}"
            )
        if inspect.isclass(self.function):
            raise ValueError(
                f"{reference} is a class; give a function, or an object of the class, which its "
                "module makes"
            )
        parameters = _parameters(reference, self.function)
        kinds = inspect.Parameter
        self.takes_all = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
        self.named = tuple(p.name for p in parameters if p.kind is not kinds.VAR_KEYWORD)
        self.required = tuple(
            p.name for p in parameters if p.name in self.named and p.default is kinds.empty
        )

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The columns that the function reads; None: all."""
        return None if self.takes_all else tuple(n for n in self.named if n not in KNOWN)

    @property
    def required_columns(self) -> tuple[str, ...]:
        return tuple(name for name in self.required if name not in KNOWN)

    def __call__(self, rows: Sequence[Submission], wait_for: Await) -> Rewards:
        """The rewards of a batch. Raises ValueError, one sentence, if the function raises or
        returns anything but rewards."""
        arguments = self.arguments(rows)
        try:
            found = self.function(**arguments)
            if inspect.isawaitable(found):
                found = wait_for(found)
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(self._raised(error, rows)) from error
        return self._checked(found, rows)

    def arguments(self, rows: Sequence[Submission]) -> dict[str, list]:
        """The arguments of a call. A row without a column that other rows have gets None. Raises
        ValueError if the function asks for a column that is not there."""
        given: dict[str, list] = {
            "prompts": [_messages(row.prompt) for row in rows],
            "completions": [row.completion for row in rows],
            "answers": [row.answer or None for row in rows],
            "tokens": [row.tokens for row in rows],
            "terminated": [row.terminated for row in rows],
        }
        columns = dict.fromkeys(name for row in rows for name in row.columns)
        wanted = {*self.named, *GIVEN, *columns} if self.takes_all else {*self.named}
        for name in columns:
            if name in wanted and name not in given:
                given[name] = [row.columns.get(name) for row in rows]
        for name in self.required:
            if name not in given:
                raise ValueError(
                    f"{self.reference} asks for {name!r}, which is no column of the data; rename "
                    "the parameter or give it a default"
                )
        return {name: values for name, values in given.items() if name in wanted}

    def _raised(self, error: Exception, rows: Sequence[Submission]) -> str:
        code = getattr(self.function, "__code__", None)
        line = references.line_of(error, code.co_filename) if code else ""
        said = " ".join(str(error).split())
        return (
            f"{self.reference} raised {type(error).__name__}{line}: {said}, for {_about(rows)}; "
            "correct it, or return None for what cannot be graded"
        )

    def _checked(self, found: Any, rows: Sequence[Submission]) -> Rewards:
        values = found.tolist() if hasattr(found, "tolist") else found
        if not isinstance(values, list | tuple):
            raise ValueError(
                f"{self.reference} returned {_described(found)}; return a list with one float or "
                f"None for each of the {len(rows)} completions"
            )
        if len(values) != len(rows):
            raise ValueError(
                f"{self.reference} returned {len(values)} values for {len(rows)} completions; "
                "return one float or None for each"
            )
        return [self._one(value, row) for value, row in zip(values, rows, strict=True)]

    def _one(self, value: Any, row: Submission) -> float | None:
        value = value.item() if hasattr(value, "item") else value
        if value is None:
            return None
        if not isinstance(value, Real):
            raise ValueError(
                f"{self.reference} returned {_described(value)} for {_about([row])}; return a "
                "float or None"
            )
        if not math.isfinite(value):
            raise ValueError(
                f"{self.reference} returned {float(value)} for {_about([row])}; return a finite "
                "number, or None for what cannot be graded"
            )
        return float(value)


class OwnReward(Verifier):
    """The rewards of a user's own function.

    With ``workers`` 0 it is called in this process, with all completions of a step at once, and may
    take ``seconds`` (0: ``SECONDS``). Otherwise it is called with one completion at a time in so
    many confined processes (``confinement``: no files, no network, no new process). There it may
    compute for ``seconds`` (0: ``WORKER_SECONDS``) per completion. A completion on which it takes
    longer, needs too much memory or dies has reward 0, as with the verifiers of this package.
    """

    def __init__(
        self, reference: str, *, workers: int = 0, seconds: float = 0.0, memory_mb: int = 512
    ):
        self.name, self.function = reference, RewardFunction(reference)
        self.columns, self.whole_batches = self.function.columns, not workers
        self.required_columns = self.function.required_columns
        self.seconds = seconds or (WORKER_SECONDS if workers else SECONDS)
        self.stopped = threading.Event()
        self.absolute = references.absolute(reference, WHAT)
        self.pool = workers and Pool(
            kind=f"{OWN}{self.absolute}",
            package="what its module imports",
            workers=workers,
            seconds=self.seconds,
            memory_mb=memory_mb,
        )
        self.answered, self.silent = False, 0

    def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        pairs = zip(completions, answers, strict=True)
        return self.judge([Submission(completion, answer) for completion, answer in pairs])

    def judge(self, rows: Sequence[Submission]) -> list[Verdict]:
        """Raises ValueError if the function raises, does not return rewards, or does not return."""
        if not rows:
            return []
        if self.pool:
            first = 0 if self.answered else TRIED  # a function that hangs gets only these
            return self._in_workers(rows[:first]) + self._in_workers(rows[first:])
        return [scored(value) for value in self._in_time(rows)]

    def _in_time(self, rows: Sequence[Submission]) -> Rewards:
        """The function's rewards. It runs in a thread, which is abandoned if it does not return."""
        outcome: list[Any] = []

        def call() -> None:
            try:
                outcome.append(self._called(rows))
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        deadline = time.monotonic() + self.seconds
        while not outcome:
            thread.join(min(LOOK_EVERY_S, max(0.0, deadline - time.monotonic())))
            if outcome:
                break
            if self.stopped.is_set():
                raise Stopped
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"{self.name} has not returned after {self.seconds:g} s, for {_about(rows)}; "
                    "make it faster, raise data.reward_seconds, or set data.reward_workers, whose "
                    "processes can be ended"
                )
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def _called(self, rows: Sequence[Submission]) -> Rewards:
        """The function's rewards. If it fails on a batch, the error names the first row on which it
        fails alone."""
        try:
            return self.function(rows, _run)
        except ValueError:
            stop = time.monotonic() + SEARCH_SECONDS
            for row in rows if len(rows) > 1 else ():
                if time.monotonic() < stop:
                    self.function([row], _run)
            raise

    def _in_workers(self, rows: Sequence[Submission]) -> list[Verdict]:
        if not rows or not self.pool:
            return []
        replies = self.pool.run([(self._written(row), row.completion) for row in rows])
        for kind, reason in replies:
            if kind == "broken":
                raise ValueError(reason.replace(self.absolute, self.name, 1))
        self.answered = self.answered or any(kind == "scored" for kind, _ in replies)
        self.silent += len(replies)
        if not self.answered and self.silent >= TRIED:
            raise ValueError(
                f"{self.name} gave no reward in a worker process ({replies[0][1]}), for "
                f"{_about(rows)}; correct it, raise data.reward_seconds (now {self.seconds:g}), or "
                "leave data.reward_workers at 0"
            )
        return [
            scored(json.loads(reason)) if kind == "scored" else verdict_of(kind, reason)
            for kind, reason in replies
        ]

    def _written(self, row: Submission) -> str:
        fields = {name: vars(row)[name] for name in ("answer", "prompt", "tokens", "terminated")}
        try:
            return json.dumps(fields | {"columns": dict(row.columns)})
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"a column for {self.name} cannot be sent to a worker process ({error}); name only "
                "the columns that it needs in its signature, or leave data.reward_workers at 0"
            ) from error

    def stop(self) -> None:
        self.stopped.set()
        if self.pool:
            self.pool.stop()

    def close(self) -> None:
        if self.pool:
            self.pool.close()


def scored(reward: float | None) -> Verdict:
    """The verdict for a reward. It counts as right above ``RIGHT_ABOVE``."""
    if reward is None:
        return verdict_of("ungraded", "the reward function gave None")
    kind = "right" if reward > RIGHT_ABOVE else "wrong"
    return Verdict(reward, True, f"reward {reward:g}", kind)


def judge_in_worker(reference: str) -> Callable[[str, str], list[str]]:
    """Make the function (row as JSON, completion) -> ["scored", reward as JSON], or ["broken", a
    sentence]. The process is confined afterwards, so everything that opens files is done here."""
    function, loop = RewardFunction(reference), asyncio.new_event_loop()

    def judge(row: str, completion: str) -> list[str]:
        fields = json.loads(row)
        if isinstance(fields["prompt"], list):
            fields["prompt"] = tuple(map(tuple, fields["prompt"]))
        try:
            found = function([Submission(completion, **fields)], loop.run_until_complete)
        except ValueError as error:
            return ["broken", str(error)]
        return ["scored", json.dumps(found[0])]

    return judge


def _parameters(reference: str, function: Callable) -> list[inspect.Parameter]:
    """The parameters that can be given by keyword. Raises ValueError for others without a
    default."""
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{reference} has no signature that can be read; write {SHAPE}") from error
    kept = []
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ValueError(
                f"{reference} takes {parameter.name!r} by position only; write {SHAPE}"
            )
        if parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            kept.append(parameter)
    return kept


def _run(awaitable: Awaitable) -> Any:
    async def result() -> Any:
        return await awaitable

    return asyncio.run(result())


def _messages(prompt: str | tuple) -> str | list[dict[str, str]]:
    if isinstance(prompt, str):
        return prompt
    return [{"role": role, "content": content} for role, content in prompt]


def _about(rows: Sequence[Submission]) -> str:
    """Describe the row that an error is about; for several rows, their number."""
    if len(rows) > 1:
        return f"a batch of {len(rows)} completions"
    prompt = rows[0].prompt if isinstance(rows[0].prompt, str) else rows[0].prompt[-1][1]
    return f"the completion {_short(rows[0].completion)} of the prompt {_short(prompt)}"


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else "..." + text[-SHOWN:])


def _described(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {_short(value)}"
    if isinstance(value, Mapping):
        return "a dictionary"
    return f"{value!r:.60} of the type {type(value).__name__}"
