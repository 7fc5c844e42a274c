"""The process that grades: a line of JSON in, a line of JSON out, until its input ends.

It is started with ``python -m basis_jax.verify.worker KIND SECONDS MEGABYTES`` and expects to be
killed from outside. Its input was written by a model, so it is confined once it has started up
(``confinement``). Each job may use SECONDS of CPU time, after which SIGPROF ends the process.

A verdict must not depend on earlier jobs. So caches are emptied and random numbers are seeded again
for each job, and the process ends after anything but a plain verdict, or when memory is used up.
"""

import functools
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from typing import BinaryIO

from basis_jax.verify.confinement import confine
from basis_jax.verify.pool import OWN, PLAIN

WARM_UP = (
    (r"\frac{x}{2}", "3x"),
    (r"\ln x^2+\sin x", r"2\ln x+\sin x"),
    (r"x\ne 2", r"[0,\sqrt{2}]"),
    ("x<3", "x>3"),
    (r"\int_0^1 x^2 dx", "1"),
)
"""Comparisons after which sympy has imported its late modules and filled what it fills late."""


GROWTH = 4  # a worker ends once a fourth of its memory is used between jobs

Judge = Callable[[str, str], list[str]]  # (gold, answer) -> [kind of verdict, why]
Kind = tuple[Judge, Callable[[], None], str]  # also: forget; the folder it may read, "" for none


def main() -> None:
    """Print ``["ready", ""]``, then for each job ``[gold, answer]`` a kind of verdict and why."""
    kind, seconds, megabytes = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which ends our input
    output = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # nothing else can write between the lines
    try:
        judge, forget, readable = own(kind) if kind.startswith(OWN) else KINDS[kind]()
    except (ImportError, ValueError) as error:
        print(json.dumps(["failure", str(error)]), file=output, flush=True)
        return
    memory = open("/proc/self/statm", "rb") if sys.platform == "linux" else None  # still allowed
    present = pages(memory)
    refusals = confine(megabytes, readable)
    print(json.dumps(["ready", ""]), file=output, flush=True)
    for line in sys.stdin:
        refusals.clear()
        forget()
        limit_cpu(seconds)
        reply = answer(judge, line, refusals)
        limit_cpu(0)
        print(json.dumps(reply), file=output, flush=True)
        grown = (pages(memory) - present) * resource.getpagesize()
        if reply[0] not in PLAIN or grown > megabytes * 2**20 / GROWTH:
            return


def answer(judge: Judge, line: str, refusals: list[str]) -> list[str]:
    """The reply to one job, whatever the judge raises: the answer may be hostile."""
    try:
        reply = judge(*json.loads(line))
    except MemoryError:
        return ["memory", "the comparison needs too much memory"]
    except Exception as error:
        return ["nonsense", f"{type(error).__name__} in the comparison"]
    if refusals and reply[0] in ("wrong", "scored"):  # some judges catch every exception
        return ["refused", f"the comparison needed {refusals[0]}, which is refused"]
    return reply


def pages(memory: BinaryIO | None) -> int:
    """Pages of address space, from a file opened before: a confined process cannot open files."""
    return int(os.pread(memory.fileno(), 100, 0).split()[0]) if memory else 0


def mathematics() -> Kind:
    """Equivalence of mathematical answers, by math-verify and sympy."""
    import logging

    from sympy.core.cache import clear_cache
    from sympy.core.random import seed

    from basis_jax.verify.compare import equivalent
    from basis_jax.verify.criteria import read_criterion
    from basis_jax.verify.symbolic import Unreadable, same_scalars

    logging.disable()
    for pair in WARM_UP:
        same_scalars(*pair)

    def judge(gold, answer):
        gold, tolerance = read_criterion(gold)
        scalars = functools.partial(same_scalars, tolerance=tolerance)
        try:
            right = equivalent(gold, answer, scalars, tolerance=tolerance)
        except Unreadable as error:
            return ["gold", str(error)]
        return ["right", "equal"] if right else ["wrong", "differs"]

    def forget():
        clear_cache()
        random.seed(0)
        seed(0)

    return judge, forget, ""


def gym() -> Kind:
    """The scorers of reasoning-gym, which may read its word lists. The right answer is the task,
    its options and the problem, as JSON. An answer that a scorer cannot read is wrong."""
    import reasoning_gym

    @functools.lru_cache(maxsize=8)
    def scorer(task, options):
        return reasoning_gym.create_dataset(task, **json.loads(options)).score_answer

    def judge(gold, answer):
        given = json.loads(gold)
        score_answer = scorer(given["task"], json.dumps(given["options"]))
        try:
            score = score_answer(answer, given["entry"])
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            return ["wrong", f"{type(error).__name__} in the scorer"]
        return ["right" if score >= 1 else "wrong", f"scored {score:g}"]

    def forget():
        random.seed(0)

    return (
        judge,
        forget,
        os.path.realpath(os.path.join(os.path.dirname(reasoning_gym.__file__), "data")),
    )


def own(kind: str) -> Kind:
    """A user's own reward function."""
    from basis_jax.verify.own import judge_in_worker

    return judge_in_worker(kind.removeprefix(OWN)), lambda: random.seed(0), ""


KINDS = {"math": mathematics, "gym": gym}


def limit_cpu(seconds: float) -> None:
    """End this process by a signal after ``seconds`` more of CPU time; 0 lifts the limit. CPU time,
    because with clock time a verdict would depend on what else the machine is doing."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main()
