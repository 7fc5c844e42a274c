"""Answers that need algebra: agreement with people, and what a hostile answer cannot do."""

import collections
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from basis_jax.verify import confinement, criteria, make_verifier, pool

ROOT = Path(__file__).parent.parent
PAIRS = [
    json.loads(line)
    for line in (ROOT / "tests" / "data" / "answer_pairs.jsonl").read_text("utf-8").splitlines()
]
EXPLAINED = {
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"): "a matrix is not a tuple",
    (r"\frac{1}{3}", "0.3333..."): "where the dots lead is not guessed",
    ("(-1,5)", r"x>-1 \text{ and } x<5"): "'and' separates a list, it does not intersect",
}


def boxed(answer):
    return rf"Therefore the answer is $\boxed{{{answer}}}$."


@pytest.fixture(scope="module")
def verifier():
    with make_verifier("math", workers=2, seconds=10.0) as made:
        yield made


@pytest.mark.slow
def test_grading_agrees_with_people_but_where_explained(verifier):
    """At least 95 % of a labelled list, and each disagreement is known and has its reason."""
    verdicts = verifier.grade([boxed(p["answer"]) for p in PAIRS], [p["gold"] for p in PAIRS])
    differing = {
        (p["gold"], p["answer"])
        for p, verdict in zip(PAIRS, verdicts, strict=True)
        if verdict.reward != p["equal"] or not verdict.valid
    }
    assert len(PAIRS) >= 300 and len(differing) <= 0.05 * len(PAIRS)
    assert differing == EXPLAINED.keys()


COMPLETIONS = [
    json.loads(line)
    for line in (ROOT / "tests" / "data" / "answer_completions.jsonl")
    .read_text("utf-8")
    .splitlines()
]


def test_whole_completions_are_graded_as_people_do(verifier):
    """Where the answer stands, and how much of what follows it is answer."""
    verdicts = verifier.grade(
        [c["completion"] for c in COMPLETIONS], [c["gold"] for c in COMPLETIONS]
    )
    assert all(verdict.valid for verdict in verdicts)
    found = zip(COMPLETIONS, verdicts, strict=True)
    assert [c for c, verdict in found if verdict.reward != c["right"]] == []


def test_the_list_covers_the_conventions_both_ways():
    kinds = collections.Counter((p["kind"], p["equal"]) for p in PAIRS)
    named = "fraction surd interval set matrix units percent degrees thousands text".split()
    assert all(kinds[kind, equal] >= 5 for kind in named for equal in (True, False))
    assert len({(p["gold"], p["answer"]) for p in PAIRS}) == len(PAIRS)


def test_a_set_s_tolerance_holds_for_expressions_too_and_all_its_answers_are_wanted(verifier):
    minerva = criteria.criterion(r"\frac{1}{3}", criteria.MINERVA)
    olympiad = criteria.criterion([r"\sqrt{2}", "1,000"], criteria.olympiad_tolerance("0.01"))
    for gold, answer, reward in (
        (minerva, "0.333332", 1),
        (minerva, "0.3333", 0),
        (minerva, r"0.333332\cdot\sqrt{1}", 1),
        (olympiad, r"1000, 1.41", 1),
        (olympiad, r"1000, 1.40", 0),
        (olympiad, "1.414", 0),
        (olympiad, r"\frac{2}{\sqrt{2}} \text{ and } 1000", 1),
    ):
        (verdict,) = verifier.grade([boxed(answer)], [gold])
        assert (verdict.valid, verdict.reward) == (True, reward), answer


def test_strict_mode_takes_no_answer_in_a_sentence():
    for name, reward in (("math", 1.0), ("math_strict", 0.0)):
        with make_verifier(name) as verifier:
            (verdict,) = verifier.grade(["The answer is 5."], ["5"])
            assert verdict.valid and verdict.reward == reward
            assert verifier.grade([r"\boxed{5}"], ["5"])[0].reward == 1


BACKSLASH = "\\"
HOSTILE = {  # quick to refuse: each is wrong at once
    "a megabyte of digits": boxed("1" * 10**6),
    "a megabyte of prose": "x" * 10**6,
    "a megabyte of terms": boxed(r"\frac{1}{2}+" * 80_000 + "1"),
    "deep braces": boxed("{" * 5000 + "6" + "}" * 5000),
    "deep fractions": boxed(r"\frac{1}{" * 100 + "2" + "}" * 100),
    "null byte": boxed("5\x00"),
    "null byte first": boxed("\x005"),
    "arabic digit": boxed("\u0665"),
    "wide digit": boxed("\uff15"),
    "zero width space": boxed("5\u200b"),
    "lone surrogate": boxed("\ud800"),
    "instruction echoed": r"Put your final answer within \boxed{}.",
    "python": boxed("__import__('os').system('touch PWNED')"),
    "python in text": boxed(r"\text{__import__('os').system('touch PWNED')}"),
    "exec": boxed("exec(open('PWNED','w').write('1'))"),
    "attributes": boxed("x.__class__.__mro__"),
    "tex input": boxed(r"\input{/etc/passwd}"),
    "tex write": boxed(r"\write18{touch PWNED}"),
    "tex recursion": boxed(r"\def\x{\x\x}\x"),
    "a hundred guesses": boxed(",".join(map(str, range(100)))),
    "every sign": boxed(r"\pm" * 300 + "5"),
    "commas": boxed("," * 900),
    "backslashes": boxed(BACKSLASH * 501),
    "dollars": boxed("$" * 999),
    "wide power": boxed("(x+y+z+a+b+c)^{200}"),
    "not a number": boxed(r"\frac{0}{0}"),
    "infinity less infinity": boxed(r"\infty-\infty"),
    "division by zero": boxed(r"\frac{5}{0}"),
    "nothing": "",
}
ENDLESS = {  # would compute for ever, or fill the memory
    "tower of powers": r"9^{9^{9^{9}}}",
    "factorial of factorials": "((((9!)!)!)!)!",
    "long product": r"\prod_{k=1}^{10^9} k",
    "half of everything": r"\binom{10^{9}}{5\cdot 10^{8}}",
    "large sine": r"\sin(10^{10^{8}})",
}


@pytest.mark.parametrize("gold", ["5", r"x^2+\sqrt{2}"])
def test_hostile_answers_are_wrong_at_once(verifier, gold, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verifier.grade([boxed("x")], ["y+1"])  # the workers run
    slow = {}
    for name, completion in HOSTILE.items():
        started = time.perf_counter()
        (verdict,) = verifier.grade([completion], [gold])
        slow[name] = time.perf_counter() - started
        assert verdict.reward == 0 and verdict.valid, (name, verdict)
    # limits are CPU time of a worker; by the clock a busy machine may take some times as long
    assert max(slow.values()) < 20, slow
    assert not list(tmp_path.rglob("PWNED")) and not (ROOT / "PWNED").exists()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(verifier):
    return [worker.process.pid for worker in verifier.pool.workers]


def test_an_endless_answer_is_wrong_within_the_limit_and_its_process_is_gone():
    with make_verifier("math", workers=1, seconds=0.6) as verifier:
        assert pids(verifier) == []  # nothing starts before there is algebra to do
        assert verifier.grade([boxed("5")], ["5"])[0].reward == 1 and pids(verifier) == []
        assert verifier.grade([boxed("x+1")], ["1+x"])[0].reward == 1
        (first,) = pids(verifier)
        before = process_cpu_seconds(first) + children_cpu_seconds()
        (verdict,) = verifier.grade([boxed(ENDLESS["tower of powers"])], ["5"])
        assert children_cpu_seconds() - before < verifier.pool.seconds + 0.3
        assert verdict.valid and verdict.reward == 0 and verdict.kind == "timeout"
        assert not alive(first)
        (after,) = verifier.grade([boxed("2x")], ["x+x"])
        assert after.reward == 1 and after.valid
        (last,) = pids(verifier)
    assert not alive(last)


@pytest.mark.slow
def test_every_endless_answer_is_wrong_and_its_neighbours_are_graded():
    with make_verifier("math", workers=2, seconds=2.0) as verifier:
        completions = [c for text in ENDLESS.values() for c in (boxed(text), boxed("x+2x"))]
        verdicts = verifier.grade(completions, ["3x"] * len(completions))
        assert {v.kind for v in verdicts[::2]} <= {"timeout", "memory", "nonsense"}
        assert all(v.valid and v.reward == 0 for v in verdicts[::2])
        assert all(v.valid and v.reward == 1 for v in verdicts[1::2])


def test_workers_are_light_and_have_no_jax(verifier):
    verifier.grade([boxed("x")], ["y+2"])
    for pid in pids(verifier):
        assert "jaxlib" not in Path(f"/proc/{pid}/maps").read_text()
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        assert int(fields["VmRSS"].split()[0]) < 300_000


def test_a_worker_that_dies_is_one_error_and_is_replaced(verifier):
    """The busy one; one that dies idle costs nothing."""
    verifier.grade([boxed("x"), boxed("z")], ["y+3"] * 2)
    before = pids(verifier)
    killer = threading.Timer(0.5, lambda: [os.kill(pid, signal.SIGKILL) for pid in before])
    killer.start()
    (verdict,) = verifier.grade([boxed(ENDLESS["tower of powers"])], ["6"])
    killer.join()
    assert not verdict.valid and "died" in verdict.reason
    while any(map(alive, before)):
        time.sleep(0.01)
    assert verifier.grade([boxed("x+y")], ["y+x"])[0].reward == 1


def test_grading_works_from_any_thread_and_two_at_once(verifier):
    results = {}

    def grade(name):
        results[name] = verifier.grade([boxed(f"{name}(x+1)")] * 3, [f"{name}x+{name}"] * 3)

    threads = [threading.Thread(target=grade, args=(n,)) for n in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [v.reward for n in (3, 4) for v in results[n]] == [1.0] * 6


def test_a_right_answer_that_no_parser_reads_is_an_error(verifier):
    (verdict,) = verifier.grade([boxed("x+1")], [r"\frac{x}{"])
    assert not verdict.valid and "cannot be read" in verdict.reason


CONFINED = """
import sys, os
from basis_jax.verify.confinement import confine
refusals = confine(64)
for name, forbidden in {
    "eval": lambda: eval("1"), "compile": lambda: compile("1", "x", "eval"),
    "write": lambda: open("PWNED", "w"), "read": lambda: open("/etc/passwd"),
    "system": lambda: os.system("true"), "fork": os.fork, "remove": lambda: os.remove("PWNED"),
    "process": lambda: __import__("subprocess").run(["true"]),
    "memory": lambda: bytearray(10**9),
}.items():
    try:
        forbidden()
    except (PermissionError, MemoryError):
        continue
    sys.exit(name)
"""


def test_python_code_in_a_confined_process_is_refused_what_the_hook_lists(tmp_path):
    """Asked in the usual ways; what native code may do is the kernel's matter, below."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import subprocess\n{CONFINED}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())


BY_THE_KERNEL = """
import os, socket, sys, threading
from basis_jax.verify.confinement import forbid_syscalls
assert forbid_syscalls()
for name, forbidden in {
    "fork": os.fork, "exec": lambda: os.execv("/bin/true", ["true"]),
    "thread": lambda: threading.Thread(target=print).start(), "socket": socket.socket,
    "write": lambda: open("PWNED", "w"), "append": lambda: open(sys.argv[1], "a"),
    "remove": lambda: os.remove(sys.argv[1]), "folder": lambda: os.mkdir("PWNED"),
    "mode": lambda: os.chmod(sys.argv[1], 0), "signal": lambda: os.kill(os.getppid(), 0),
}.items():
    try:
        forbidden()
    except (PermissionError, RuntimeError):
        continue
    sys.exit(name)
print(open(sys.argv[1]).read())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in confinement.MACHINES,
    reason="seccomp is Linux's",
)
def test_the_kernel_refuses_processes_sockets_signals_and_writing(tmp_path):
    """Root's too, whom RLIMIT_NPROC does not bind, and without the audit hook. Reading is left."""
    there = tmp_path / "there"
    there.write_text("readable")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{BY_THE_KERNEL}"
    done = subprocess.run(
        [sys.executable, "-c", code, there], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "readable\n", "")
    assert list(tmp_path.iterdir()) == [there]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_has_the_limits_and_nothing_of_the_trainers_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a secret")
    with make_verifier("math", workers=1) as verifier:
        verifier.grade([boxed("x")], ["y+1"])
        (pid,) = pids(verifier)
        names = {
            entry.partition(b"=")[0].decode()
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if entry
        }
        assert "OMP_NUM_THREADS" in names and "HF_TOKEN" not in names
        assert names <= {"PYTHONPATH", "OMP_NUM_THREADS", "PYTHONHASHSEED", *pool.KEPT}
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"Max processes +0 +0", limits)
        if platform.machine() in confinement.MACHINES:
            assert re.search(r"Seccomp:\s+2", Path(f"/proc/{pid}/status").read_text())


@pytest.mark.slow
def test_a_verdict_does_not_depend_on_what_its_worker_did_before():
    """Nor on where its memory went: what is due to earlier jobs is repeated by a fresh process."""
    heavy = [
        boxed(ENDLESS["half of everything"]),
        boxed(r"(x+y+z)^{60}"),
        boxed(r"\frac{1}{2000!}"),
    ]
    pairs = [
        *((completion, "x^2+1") for completion in heavy),
        (boxed(r"\sin^2 x+\cos^2 x"), r"\frac{x}{x}"),
        (boxed(r"\int_0^1 x^3 dx"), r"\frac{\sqrt{4}}{8}"),
        (boxed(r"\sqrt[3]{2+\sqrt{5}}"), r"\frac{1+\sqrt5}{2}"),
    ]
    found = []
    for order in (pairs, pairs[::-1]):
        with make_verifier("math", workers=1, seconds=1.5) as verifier:
            verdicts = verifier.grade([c for c, _ in order], [gold for _, gold in order])
        found.append(dict(zip(order, verdicts, strict=True)))
    assert found[0] == found[1]
    assert all(verdict.valid for verdict in found[0].values())
    assert [found[0][pair].reward for pair in pairs[3:]] == [1, 1, 1]


def test_what_earlier_jobs_may_have_caused_is_repeated_by_a_fresh_process(monkeypatch, tmp_path):
    """Here a worker runs out of memory at its second job, whatever that is."""
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        "print(json.dumps(['ready', '']), flush=True)\n"
        "for i, line in enumerate(sys.stdin):\n"
        "    print(json.dumps(['memory', ''] if i else ['right', '']), flush=True)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with make_verifier("math", workers=1) as verifier:
        verdicts = verifier.grade([boxed(f"x+{i}") for i in range(4)], ["y"] * 4)
    assert [v.kind for v in verdicts] == ["right"] * 4


def test_answers_are_failures_where_no_process_starts_any_more(monkeypatch):
    """Before the first has started it is an error of the installation, and raised."""
    with make_verifier("math", workers=1) as verifier:
        assert verifier.grade([boxed("x+1")], ["1+x"])[0].reward == 1
        verifier.close()
        monkeypatch.setattr(sys, "executable", "/bin/false")
        verdicts = verifier.grade([boxed("x+2"), boxed("3")], ["2+x", "3"])
        assert [(v.valid, v.kind) for v in verdicts] == [(False, "failure"), (True, "right")]
        monkeypatch.undo()
        assert verifier.grade([boxed("x+2")], ["2+x"])[0].reward == 1


def test_workers_end_with_a_trainer_that_was_killed():
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from basis_jax.verify import confinement, criteria, make_verifier, pool
verifier = make_verifier("math", workers=1)
verifier.grade([r"\\boxed{{x}}"], ["y+1"])
print(verifier.pool.workers[0].process.pid, flush=True)
input()
"""
    trainer = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with trainer:
        pid = int(trainer.stdout.readline())
        assert alive(pid)
        trainer.kill()
    until = time.monotonic() + 10
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pid)


def test_a_file_called_sympy_in_the_working_folder_is_not_sympy(tmp_path, monkeypatch):
    (tmp_path / "sympy.py").write_text("raise SystemExit('not sympy')")
    monkeypatch.chdir(tmp_path)
    with make_verifier("math", workers=1) as verifier:
        assert verifier.grade([boxed("x+1")], ["1+x"])[0].reward == 1


@pytest.mark.slow
def test_an_endless_job_ends_by_itself_where_nobody_is_left_to_kill_it():
    command = [sys.executable, "-m", "basis_jax.verify.worker", "math", "1", "512"]
    worker = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with worker:
        assert json.loads(worker.stdout.readline()) == ["ready", ""]
        worker.stdin.write(json.dumps(["5", ENDLESS["tower of powers"]]).encode() + b"\n")
        worker.stdin.flush()
        try:
            assert worker.wait(timeout=60) == -signal.SIGPROF
        finally:
            worker.kill()


def test_no_process_to_grade_with_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        make_verifier("math", workers=1) as verifier,
        pytest.raises(ValueError, match="no process to grade .* needs math-verify"),
    ):
        verifier.grade([boxed("x")], ["y+1"])


def process_cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children_cpu_seconds():
    """Of child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cpu_seconds(verifier):
    """Of this process and the workers: the clock would measure whatever else runs here."""
    return time.process_time() + sum(map(process_cpu_seconds, pids(verifier)))


@pytest.mark.slow
def test_ordinary_answers_are_graded_at_300_a_second_on_two_cores():
    """Of 1,500 long completions 4 in 5 hold a number; the rest are surds, polynomials and pairs."""
    prose = "Let us compute this step by step. " * 60
    completions, golds = [], []
    for i in range(1500):
        n, shift = 17 * i + 3, i % 3 == 0
        gold, answer = {
            0: (rf"{n}\sqrt{{{i + 2}}}", rf"{n + shift} \sqrt{{{i + 2}}}"),
            1: (f"{n}x^2+{i}x", f"{i}x+{n + shift}x^2"),
            2: (f"({n},{i})", f"({n},{i + shift})"),
            3: (rf"\frac{{{n}}}{{7}}", f"{n + shift}/7"),
        }.get(i % 15, (str(n), f"{n + shift}"))
        completions.append(prose + boxed(answer))
        golds.append(gold)
    with make_verifier("math", workers=2) as verifier:
        verifier.grade([boxed("x")], ["y+1"])
        started = cpu_seconds(verifier)
        verdicts = verifier.grade(completions, golds)
        used = cpu_seconds(verifier) - started
    assert [v.reward for v in verdicts] == [float(i % 3 != 0) for i in range(1500)]
    assert len(verdicts) / (used / 2) >= 300
