"""Worker processes with a hard time limit for each job; one that overstays is killed and replaced.

No thread, no signal, no pickle, and no fork of a process that runs JAX: the workers are programs of
their own, talking JSON lines over pipes. They start when the first job comes.
"""

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

START_SECONDS = 120
START_ATTEMPTS = 3
Reply = tuple[str, str]  # "right", "wrong" or "error"; the reason


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
        self.ready = False
        self.job: int | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self.received = b""

    def send(self, job: int, pair: tuple[str, str], seconds: float) -> None:
        """Start on a job. A worker that has died is noticed when its output ends."""
        self.job = job
        self.deadline = time.monotonic() + seconds
        try:
            self.process.stdin.write(json.dumps(pair).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass

    def receive(self) -> Reply | None:
        """A whole line, once it is there. Raises EOFError where the process has ended."""
        found = os.read(self.process.stdout.fileno(), 65536)
        if not found:
            raise EOFError
        self.received += found
        if not self.received.endswith(b"\n"):
            return None
        line, self.received = self.received, b""
        status, reason = json.loads(line)
        return status, reason

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass


class Pool:
    """``run`` pairs of right answer and answer through up to ``workers`` processes.

    ``kind`` is what grades them (``worker.KINDS``), ``package`` where that comes from. ``seconds``
    is wall-clock time for one pair, ``memory_mb`` what a worker may use beyond its own code. One
    call at a time; a second thread waits.
    """

    def __init__(self, *, kind: str, package: str, workers: int, seconds: float, memory_mb: int):
        self.kind, self.package = kind, package
        self.size, self.seconds, self.memory_mb = workers, seconds, memory_mb
        self.workers: list[Worker] = []
        self.failed_starts = 0
        self.lock = threading.Lock()

    def run(self, pairs: Sequence[tuple[str, str]]) -> list[Reply]:
        """The reply to each pair. Raises RuntimeError where no worker can start."""
        with self.lock:
            replies: dict[int, Reply] = {}
            waiting = deque(range(len(pairs)))
            try:
                while len(replies) < len(pairs):
                    self._feed(waiting, pairs)
                    for worker, spoke in self._heard():
                        self._take(worker, spoke, replies)
            finally:  # after an interrupt: nobody is left to hear those that are busy
                for worker in [w for w in self.workers if w.job is not None]:
                    self._drop(worker)
            return [replies[i] for i in range(len(pairs))]

    def _feed(self, waiting: deque[int], pairs: Sequence[tuple[str, str]]) -> None:
        """As many workers as there is work for, and a job for each that is free and lives."""
        idle = [w for w in self.workers if w.ready and w.job is None]
        for worker in [w for w in idle if w.process.poll() is not None]:
            self._drop(worker)
        free = sum(worker.job is None for worker in self.workers)
        for _ in range(min(self.size - len(self.workers), len(waiting) - free)):
            self.workers.append(self._start())
        for worker in self.workers:
            if waiting and worker.ready and worker.job is None:
                job = waiting.popleft()
                worker.send(job, pairs[job], self.seconds)

    def _start(self) -> Worker:
        root = str(Path(__file__).parent.parent.parent)
        seconds, memory = str(int(self.seconds) + 1), str(self.memory_mb)
        # -P: a sympy.py in the working folder is not sympy
        command = [sys.executable, "-P", "-m", "basis_jax.verify.worker"]
        command += [self.kind, seconds, memory]
        return Worker(command, os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"})

    def _heard(self) -> list[tuple[Worker, bool]]:
        """Waits for the first workers to speak or end (True), or to overstay in silence (False)."""
        active = [w for w in self.workers if w.job is not None or not w.ready]
        with selectors.DefaultSelector() as selector:
            for worker in active:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            rest = min(w.deadline for w in active) - time.monotonic()
            spoke = [key.data for key, _ in selector.select(max(rest, 0))]
        now = time.monotonic()
        silent = [w for w in active if w not in spoke and w.deadline <= now]
        return [(w, True) for w in spoke] + [(w, False) for w in silent]

    def _take(self, worker: Worker, spoke: bool, replies: dict[int, Reply]) -> None:
        """Note what a worker said, or why it will say nothing."""
        try:
            reply = worker.receive() if spoke else ("error", f"took more than {self.seconds:g} s")
            lost = not spoke
        except EOFError:
            reply, lost = ("error", "the grading process died, as by too much memory"), True
        if reply is None:
            return
        if worker.ready:
            replies[worker.job] = reply
        else:
            lost = lost or reply[0] != "ready"
            self.failed_starts = self.failed_starts + 1 if lost else 0
        if lost:
            self._drop(worker)
        worker.ready, worker.job = True, None
        if self.failed_starts >= START_ATTEMPTS:
            raise RuntimeError(
                f"no process to grade answers could start ({reply[1]}); the verifier "
                f"{self.kind!r} needs {self.package}"
            )

    def _drop(self, worker: Worker) -> None:
        worker.end()
        self.workers.remove(worker)

    def close(self) -> None:
        """End the processes. The pool can be used again; they would start anew."""
        with self.lock:
            while self.workers:
                self._drop(self.workers[-1])
