"""The parts of the fault drill that need separate processes: calls, kills, pairs, workers."""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from basis_jax.training.loop import train
from studies import fault_calls
from studies.fault_runs import (
    STEPS,
    Case,
    Drill,
    config_of,
    keep_programs,
    result,
    start_process,
    take_steps,
    wait_for,
)


def calls(drill: Drill, options: argparse.Namespace) -> Iterator[Case]:
    """Every state of the run folder in the last two steps: sampling, update, evaluation, records
    and checkpoints."""
    if shutil.which("strace") is None:
        print("calls: left out, because strace is not installed", flush=True)
        return
    run_dir, pause = drill.work / "traced", drill.work / "pause"
    for path in (run_dir, pause):
        shutil.rmtree(path, ignore_errors=True)
    pause.mkdir()
    process = child(run_dir, pause)
    if not wait_for(pause / "ready", process):
        raise SystemExit(f"error: the traced run ended early: {process.communicate()[0]}")
    recorder = fault_calls.Recorder(run_dir, drill.work / "store")
    stops = fault_calls.record_calls(process, recorder, pause / "go")
    said = f"calls: {stops} stops after calls, {len(recorder.states)} different states of the files"
    print(said, flush=True)
    for number, state in enumerate(recorder.states[:: options.every], 1):
        recorder.put_back(state, drill.work / "case")
        yield drill.resume(f"state {number}", drill.work / "case")


def child(run_dir: Path, pause: Path) -> subprocess.Popen:
    """A process that takes all steps, and waits for the file ``pause/go`` before the last two."""
    command = [sys.executable, "-m", "studies.fault_drill", "child", "--run-dir", run_dir]
    return subprocess.Popen(
        list(map(str, [*command, "--pause", pause])),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def be_child(options: argparse.Namespace) -> None:
    keep_programs(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))

    def pause(step: int, *_: object) -> None:
        if step == STEPS - 2:
            (options.pause / "ready").touch()
            wait_for(options.pause / "go")

    train(config_of(options.run_dir), callbacks=[pause])


def kills(drill: Drill, options: argparse.Namespace) -> Iterator[Case]:
    """The run as a process that is killed at a random moment after it has opened its run folder,
    and started again, until the run is finished; then the next run begins."""
    rng, done, run = random.Random(options.seed), 0, 0
    while done < options.kills:
        run, killed = run + 1, list[str]()
        run_dir = drill.work / f"killed-{run}"
        while True:
            process = start_process(run_dir)
            opened = time.time()
            while process.poll() is None and last_write(run_dir) < opened:
                time.sleep(0.01)
            number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            if done < options.kills:
                time.sleep(rng.uniform(0, options.seconds))
                if process.poll() is None:
                    process.send_signal(number)
            output = process.communicate()[0]
            phase = phase_of(run_dir)
            if process.returncode == 0:
                break
            done += 1
            if process.returncode not in (-9, -15, 128 + signal.SIGTERM):
                yield f"{number.name} in {phase}", "wrong", output[-500:]
                return
            killed.append(f"{number.name} in {phase}")
        case = drill.compared("", run_dir, [])
        for what in killed:
            yield what, case[1], case[2]
        shutil.rmtree(run_dir)


def pairs(drill: Drill, options: argparse.Namespace) -> Iterator[Case]:
    """Two processes share a run. One of them is killed at a random moment, and the other one must
    end by itself. The result is compared with an unbroken run of two processes."""
    rng, done, run = random.Random(options.seed), 0, 0
    for process in start_pair(drill.work / "pair"):
        output = process.communicate()[0]
        if process.returncode:
            raise SystemExit(f"error: the unbroken run of two processes failed: {output[-500:]}")
    wanted = result(drill.work / "pair")
    while done < options.pairs:
        run, killed = run + 1, list[str]()
        run_dir = drill.work / f"pair-{run}"
        while True:
            pair, opened = start_pair(run_dir), time.time()
            victim: int | None = None
            while all(p.poll() is None for p in pair) and last_write(run_dir) < opened:
                time.sleep(0.01)
            if done < options.pairs:
                time.sleep(rng.uniform(0, options.seconds))
                victim = rng.randrange(2)
                pair[victim].kill()
            limit = 1200 if victim is None else 120
            try:
                ends = [(p.communicate(timeout=limit)[0], p.returncode) for p in pair]
            except subprocess.TimeoutExpired:
                for process in pair:
                    process.kill()
                what = f"two processes, after {len(killed)} kills"
                yield what, "wrong", f"they had not ended after {limit} s"
                return
            if not any(code for _, code in ends):
                break
            if victim is None or ends[victim][1] != -signal.SIGKILL:  # failed by themselves
                said = " | ".join(output[-250:] for output, _ in ends)
                yield f"two processes, after {len(killed)} kills", "wrong", said
                return
            killed.append(f"process {victim} of 2 killed in {phase_of(run_dir)}")
            done += 1
        case = drill.compared("", run_dir, [], wanted)
        for what in killed:
            yield what, case[1], case[2]
        shutil.rmtree(run_dir)


def start_pair(run_dir: Path) -> list[subprocess.Popen]:
    """The run as two processes that find each other on this machine."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        where = f"localhost:{found.getsockname()[1]}"
    return [
        start_process(run_dir, "--processes=2", f"--coordinator={where}", f"--process-id={number}")
        for number in range(2)
    ]


def last_write(run_dir: Path) -> float:
    """When the run folder was last opened by a run."""
    path = run_dir / "config.json"
    return path.stat().st_mtime if path.exists() else 0.0


def phase_of(run_dir: Path) -> str:
    """What the run was doing when it was killed, as far as its folder shows."""
    if not (run_dir / "reference.npz").exists():
        return "table"
    rows = (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    if any("tmp" in path.name for path in (run_dir / "checkpoints").glob("*")):
        return "checkpoint"
    return "first evaluation" if rows == 0 else f"step {rows}"


OWN_REWARD = """
import time

def same(completions, answers):
    time.sleep(0.05)
    return [float(text.strip() == answer) for text, answer in zip(completions, answers)]
"""


def workers(drill: Drill, options: argparse.Namespace) -> Iterator[Case]:
    """The processes that grade answers are killed, or stopped without end, while they work."""
    own = drill.work / "own.py"
    own.write_text(OWN_REWARD)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        run_dir = drill.work / f"workers-{number.name}"
        graded: dict[str, Any] = {"data.verifier": f"{own}:same", "data.reward-workers": 2}
        graded |= {"data.reward-seconds": 1}
        with hunted(number, 2.0) as hit:
            try:
                said = take_steps(run_dir, **graded)
            except ValueError as error:
                yield f"grading processes, {number.name}", "refused", str(error)
                continue
        rows = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
        failed = sum(row.get("verify/failure", 0) for row in rows)
        what = f"grading processes, {len(hit)} x {number.name}"
        told_of = failed or any("could not be graded" in line for line in said)
        fine = rows[-1]["step"] == STEPS and told_of and hit
        told = f"verify/failure adds up to {failed:g}; {'; '.join(said)}"
        yield what, "said" if fine else "wrong", told


@contextmanager
def hunted(number: signal.Signals, every: float) -> Iterator[list[int]]:
    """Send a signal to each grading process some seconds after its start; yields the processes that
    were hit."""
    over, hit = threading.Event(), list[int]()

    def hunt() -> None:
        seen: dict[int, float] = {}
        while not over.wait(0.1):
            for pid in fault_calls.family(os.getpid())[1:]:
                command = Path(f"/proc/{pid}/cmdline")
                if command.exists() and b"verify.worker" in command.read_bytes():
                    seen.setdefault(pid, time.monotonic())
            now = time.monotonic()
            ready = [pid for pid, since in seen.items() if now - since > every]  # has started
            for pid in set(ready) - set(hit):
                os.kill(pid, number)
                hit.append(pid)
                if number == signal.SIGSTOP:
                    return

    thread = threading.Thread(target=hunt)
    thread.start()
    try:
        yield hit
    finally:
        over.set()
        thread.join()
