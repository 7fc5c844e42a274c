"""The process that grades: a line of JSON in, a line of JSON out, until its input ends.

It is started with ``python -m basis_jax.verify.worker KIND SECONDS MEGABYTES`` and expects to be
killed from outside. What it reads was written by a model, so after start-up nothing in it can
compile text, start a process, open a socket or a file, or take memory or time without end.
"""

import functools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable

REFUSED = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "urllib.", "pty.")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
HARMLESS = ("os.listdir", "os.scandir")
MODULES = (".py", ".pyc", ".so")
WARM_UP = (
    (r"\frac{x}{2}", "3x"),
    (r"\ln x^2+\sin x", r"2\ln x+\sin x"),
    (r"x\ne 2", r"[0,\sqrt{2}]"),
    ("x<3", "x>3"),
    (r"\int_0^1 x^2 dx", "1"),
)
"""What makes sympy load and make what it loads and makes late."""


Judge = Callable[[str, str], list[str]]  # (gold, answer) -> [right, wrong or error; why]
Kind = tuple[Judge, str]  # and the folder whose files it may read: "" for none


def main() -> None:
    """Say ``["ready", ""]``, then to each job ``[gold, answer]`` right, wrong or error, and why."""
    kind, seconds, megabytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, who ends our input
    output = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # nothing else can write between the lines
    try:
        judge, readable = KINDS[kind]()
    except ImportError as error:
        print(json.dumps(["error", str(error)]), file=output, flush=True)
        return
    refusals = confine(megabytes, readable)
    print(json.dumps(["ready", ""]), file=output, flush=True)
    for line in sys.stdin:
        limit_cpu(seconds)
        refusals.clear()
        try:
            reply = judge(*json.loads(line))
        except Exception as error:  # whatever it raises on hostile input is one row's matter
            reply = ["error", f"{type(error).__name__} in the comparison"]
        if refusals and reply[0] == "wrong":  # math-verify and some scorers catch every exception
            reply = ["error", f"the comparison needed {refusals[0]}, which is refused"]
        print(json.dumps(reply), file=output, flush=True)


def mathematics() -> Kind:
    """Equivalence of mathematical answers, by math-verify and sympy."""
    import logging

    from basis_jax.verify.compare import equivalent
    from basis_jax.verify.symbolic import Unreadable, same_scalars

    logging.disable()
    for pair in WARM_UP:
        same_scalars(*pair)

    def judge(gold, answer):
        try:
            right = equivalent(gold, answer, same_scalars)
        except Unreadable as error:
            return ["error", str(error)]
        return ["right", "equal"] if right else ["wrong", "differs"]

    return judge, ""


def gym() -> Kind:
    """The scorers of reasoning-gym, which read its word lists; the right answer is the task, its
    options and the problem, as JSON. What a scorer cannot read is wrong."""
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

    return judge, os.path.realpath(os.path.join(os.path.dirname(reasoning_gym.__file__), "data"))


KINDS = {"math": mathematics, "gym": gym}


def confine(megabytes: int, readable: str = "") -> list[str]:
    """No more memory than ``megabytes`` beyond the present, no files but those in the folder
    ``readable`` to read, nothing compiled or run. What has been refused since is noted in the list
    returned."""
    if sys.platform == "linux":  # elsewhere address space is not counted so
        with open("/proc/self/statm") as file:
            present = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (present + megabytes * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    refusals: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        if not is_allowed(event, arguments, readable):
            refusals.append(event)
            raise PermissionError(f"a grading process does no {event}")

    sys.addaudithook(hook)
    return refusals


def is_allowed(event: str, arguments: tuple, readable: str) -> bool:
    """Audit events (PEP 578): sympy may import its modules late, and write itself functions that
    multiply monomials, whose text holds nothing of the answer; no more."""
    if event == "open":
        path, mode, flags = arguments
        known = isinstance(path, str) and path.endswith(MODULES)
        if readable and isinstance(path, str | os.PathLike):
            known = known or os.path.realpath(path).startswith(readable + os.sep)
        return known and mode in ("r", "rb", None) and not flags & WRITING
    if event == "compile":
        source, name = arguments
        head = source[:13] if isinstance(source, str | bytes) else None
        return str(name).endswith(".py") or head in ("def monomial_", b"def monomial_")
    return not event.startswith(REFUSED) or event in HARMLESS


def limit_cpu(seconds: int) -> None:
    """Die by signal ``seconds`` of computing from now, should nobody be left to kill us."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds + 2, hard))


if __name__ == "__main__":
    main()
