"""Worker processes with a hard time limit per job: one that exceeds it is killed and replaced.

There are no threads, signals, pickles, or forks of a process that runs JAX: the workers are
separate programs that exchange JSON lines over pipes. They start with the first job.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

START_SECONDS = 120
START_ATTEMPTS = 3
LOOK_EVERY_S = 0.5  # seconds between looks whether the run has been stopped
PATIENCE = 10  # wall-clock limit of a job, in units of its CPU time: other processes compute too
UNCLEAN = ("memory", "nonsense", "refused")
"""Kinds of replies that earlier jobs may have caused. A fresh process repeats the job, unless it
was the first job of its process."""
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR")
OWN = "own:"  # begins the kind of a user's own function; it may need the user's import path
PLAIN = ("right", "wrong", "gold", "scored")
"""Kinds of replies after which a process may take another job."""
Reply = tuple[str, str]  # the kind of verdict ("right", "wrong", "timeout", ...); the reason


class Stopped(Exception):
    """Grading was given up, because the run that asked for it ends."""


class Worker:
    """One process and the job it is busy with."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]):
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.input = cast(IO[bytes], self.process.stdin)  # pipes, so not None
        self.output = cast(IO[bytes], self.process.stdout)
        self.ready = False
        self.job: int | None = None
        self.jobs_before = 0
        self.deadline = time.monotonic() + START_SECONDS
        self.received = b""

    def send(self, job: int, pair: tuple[str, str], seconds: float) -> None:
        """Start on a job. A worker that has died is noticed when its output ends."""
        self.job = job
        self.deadline = time.monotonic() + PATIENCE * seconds
        try:
            self.input.write(json.dumps(pair).encode() + b"\n")
            self.input.flush()
        except BrokenPipeError:
            pass

    def receive(self) -> Reply | None:
        """The reply, once its line is complete; the cause of death if the process has ended; None
        otherwise."""
        found = os.read(self.output.fileno(), 65536)
        if not found:
            return self.cause_of_death()
        self.received += found
        if not self.received.endswith(b"\n"):
            return None
        line, self.received = self.received, b""
        status, reason = json.loads(line)
        return status, reason

    def cause_of_death(self) -> Reply:
        """Why the process ended, by its exit status: through the job, or killed from outside."""
        try:
            status = -self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "failure", "the grading process closed its output"
        if status == signal.SIGPROF:
            return "timeout", "the comparison took too long"
        if status in FROM_OUTSIDE:
            return "failure", f"the grading process died by {signal.Signals(status).name}"
        return "nonsense", f"the grading process died with status {-status}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.output.close()
        try:
            self.input.close()
        except BrokenPipeError:
            pass


class Pool:
    """``run`` grades pairs (right answer, answer) in up to ``workers`` processes.

    ``kind`` is what grades them (``worker.KINDS``), ``package`` the package that it needs.
    ``seconds`` is the CPU time for one pair, ``memory_mb`` the memory that a worker may use beyond
    its own code. There is one call at a time; a second thread waits.
    """

    def __init__(self, *, kind: str, package: str, workers: int, seconds: float, memory_mb: int):
        self.kind, self.package = kind, package
        self.size, self.seconds, self.memory_mb = workers, seconds, memory_mb
        self.workers: list[Worker] = []
        self.failed_starts, self.has_started, self.trouble = 0, False, ""
        self.lock, self.stopped = threading.Lock(), threading.Event()

    def run(self, pairs: Sequence[tuple[str, str]]) -> list[Reply]:
        """The reply to each pair. Raises ValueError if no worker has ever started. If some have but
        no more start, the pairs that are left are failures. Raises Stopped after ``stop``."""
        with self.lock:
            replies: dict[int, Reply] = {}
            waiting = deque(range(len(pairs)))
            try:
                while len(replies) < len(pairs):
                    if self.stopped.is_set():
                        raise Stopped
                    self._feed(waiting, pairs)
                    for worker, spoke in self._heard():
                        self._take(worker, spoke, replies, waiting=waiting)
                    if self.failed_starts >= START_ATTEMPTS:
                        self._give_up(waiting, replies)
            finally:  # after an interrupt nobody reads the replies of busy workers
                for worker in [w for w in self.workers if w.job is not None]:
                    self._drop(worker)
            return [replies[i] for i in range(len(pairs))]

    def _feed(self, waiting: deque[int], pairs: Sequence[tuple[str, str]]) -> None:
        """Start as many workers as there is work for, and give a job to each that is free."""
        idle = [w for w in self.workers if w.ready and w.job is None]
        for worker in [w for w in idle if w.process.poll() is not None]:
            self._drop(worker)
        free = sum(worker.job is None for worker in self.workers)
        for _ in range(min(self.size - len(self.workers), len(waiting) - free)):
            try:
                self.workers.append(self._start())
            except OSError as error:  # no memory or no process left
                self._note_start(error.strerror or str(error))
        for worker in self.workers:
            if waiting and worker.ready and worker.job is None:
                job = waiting.popleft()
                worker.send(job, pairs[job], self.seconds)

    def _start(self) -> Worker:
        """Start a process. Of this one's environment it gets only where libraries are. The seed of
        hashes is fixed, because the order of sets can change what sympy does."""
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        folders = [str(Path(__file__).parent.parent.parent)]
        if self.kind.startswith(OWN) and "PYTHONPATH" in os.environ:
            folders.append(os.environ["PYTHONPATH"])
        environment |= {"PYTHONPATH": os.pathsep.join(folders)}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        # -P: a sympy.py in the working folder is not sympy
        command = [sys.executable, "-P", "-m", "basis_jax.verify.worker"]
        command += [self.kind, str(self.seconds), str(self.memory_mb)]
        return Worker(command, environment)

    def _heard(self) -> list[tuple[Worker, bool]]:
        """Wait for the first workers to answer or end (True), or to exceed their time without an
        answer (False)."""
        active = [w for w in self.workers if w.job is not None or not w.ready]
        if not active:
            return []
        with selectors.DefaultSelector() as selector:
            for worker in active:
                selector.register(worker.output, selectors.EVENT_READ, worker)
            rest = min(w.deadline for w in active) - time.monotonic()
            spoke = [key.data for key, _ in selector.select(min(max(rest, 0), LOOK_EVERY_S))]
        now = time.monotonic()
        silent = [w for w in active if w not in spoke and w.deadline <= now]
        return [(w, True) for w in spoke] + [(w, False) for w in silent]

    def _take(
        self, worker: Worker, spoke: bool, replies: dict[int, Reply], *, waiting: deque[int]
    ) -> None:
        """Store a worker's reply, or why there will be none."""
        stalled = "failure", f"the grading process stalled for {PATIENCE * self.seconds:g} s"
        reply = worker.receive() if spoke else stalled
        if reply is None:
            return
        if not worker.ready:
            worker.ready = reply[0] == "ready"
            self._note_start("" if worker.ready else reply[1])
            if not worker.ready:
                self._drop(worker)
            return
        job, worker.job = worker.job, None
        assert job is not None  # a worker that is ready is heard only while it is busy
        if reply[0] in UNCLEAN and worker.jobs_before:
            waiting.appendleft(job)
        else:
            replies[job] = reply
        worker.jobs_before += 1
        if reply[0] not in PLAIN:
            self._drop(worker)

    def _note_start(self, trouble: str) -> None:
        self.failed_starts = self.failed_starts + 1 if trouble else 0
        self.has_started = self.has_started or not trouble
        self.trouble = trouble or self.trouble

    def _give_up(self, waiting: deque[int], replies: dict[int, Reply]) -> None:
        """No process starts. Raise ValueError if none ever has, because then the installation is
        wrong; otherwise every waiting pair is a failure."""
        self.failed_starts = 0
        if not self.has_started:
            raise ValueError(
                f"no process to grade answers could start ({self.trouble}); the verifier "
                f"{self.kind!r} needs {self.package}"
            )
        while waiting and not any(worker.ready for worker in self.workers):
            replies[waiting.popleft()] = ("failure", f"no grading process starts: {self.trouble}")

    def _drop(self, worker: Worker) -> None:
        worker.end()
        self.workers.remove(worker)

    def stop(self) -> None:
        """End a call of ``run`` in another thread, and all later ones, within a second."""
        self.stopped.set()

    def close(self) -> None:
        """End the processes. The pool can be used again and then starts new ones."""
        with self.lock:
            while self.workers:
                self._drop(self.workers[-1])
