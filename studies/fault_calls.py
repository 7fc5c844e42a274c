"""The run folder after every system call that changes files, for the fault drill.

A kill leaves the files as they are at that moment. So one run is enough to see what a kill after
each of its calls would leave: strace stops the whole process, C++ threads included, after each
call, and the folder is recorded if it has changed. Calls of two threads at the same moment are
recorded together, in one of their possible orders.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

CALLS = (
    "write,pwrite64,writev,pwritev,?pwritev2,fsync,fdatasync,ftruncate,?truncate,?rename,renameat,"
    "?renameat2,?mkdir,mkdirat,?unlink,unlinkat,?rmdir,?link,linkat,?symlink,symlinkat,execve"
)
Files = dict[str, str]  # the digest of every file by its path in the folder; "" for a folder


class Recorder:
    """The different states of a folder. A file's content is stored once."""

    def __init__(self, folder: Path, store: Path):
        self.folder, self.store = folder, store
        self.states: list[Files] = []
        self._digests: dict[tuple, str] = {}
        store.mkdir(parents=True, exist_ok=True)

    def record(self) -> None:
        """Add the folder's state if it differs from the last one."""
        state: Files = {}
        for path in sorted(self.folder.rglob("*")):
            about = path.stat()
            known = (str(path), about.st_ino, about.st_size, about.st_mtime_ns)
            if path.is_dir():
                state[str(path.relative_to(self.folder))] = ""
            elif known in self._digests:
                state[str(path.relative_to(self.folder))] = self._digests[known]
            else:
                content = path.read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                self._digests[known] = state[str(path.relative_to(self.folder))] = digest
                (self.store / digest).write_bytes(content)
        if state != (self.states[-1] if self.states else None):
            self.states.append(state)

    def put_back(self, state: Files, folder: Path) -> None:
        """Make ``folder`` equal to the recorded state."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, digest in state.items():  # sorted, so a folder comes before its files
            if digest:
                shutil.copyfile(self.store / digest, folder / name)
            else:
                (folder / name).mkdir()


def family(pid: int) -> list[int]:
    """The process and all processes that it started."""
    found = [pid]
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
                found += family(int(child))
    return found


def states_of(pid: int) -> list[str]:
    """The state of each thread, as letters of /proc: R running, S sleeping, t or T stopped."""
    return [
        Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0]
        for thread in os.listdir(f"/proc/{pid}/task")
    ]


def is_stopped(pid: int, tracer: int) -> bool:
    """Whether the process is stopped. strace itself stops a thread for some microseconds at each
    call, so the process counts as stopped only if strace waits too, three times in a row."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for _ in range(3):
            if states_of(tracer) != ["S"] or set(states_of(pid)) - {"t", "T"}:
                return False
            time.sleep(0.0005)
        return True
    return False


def attach(pid: int) -> subprocess.Popen:
    """Begin to stop the process after each of ``CALLS``."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(pid), "-o", "/dev/null", "-e", f"trace={CALLS}"]
        + ["-e", f"inject={CALLS}:signal=STOP"],
        stderr=subprocess.DEVNULL,
    )
    while any(
        "TracerPid:\t0\n" in Path(f"/proc/{pid}/task/{thread}/status").read_text()
        for thread in os.listdir(f"/proc/{pid}/task")
    ):
        if tracer.poll() is not None:
            raise SystemExit("error: strace cannot attach to a process; may this user trace?")
        time.sleep(0.01)
    return tracer


def record_calls(process: subprocess.Popen, recorder: Recorder, go: Path) -> int:
    """Record the folder after every call until the process, which waits for the file ``go``, ends.
    Returns the number of stops."""
    tracer, stops = attach(process.pid), 0
    go.touch()
    while process.poll() is None:
        for pid in family(process.pid):
            if is_stopped(pid, tracer.pid):
                stops += 1
                recorder.record()
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
    tracer.wait()
    recorder.record()
    return stops
