"""Fault drill: break a run in every way we know, resume it, and compare it bit for bit.

    python -m studies.fault_drill                       # everything, with 100 random kills
    python -m studies.fault_drill calls --out drill.json
    python -m studies.fault_drill kills --kills 20

Parts: ``calls`` (the run folder as a kill after every write, fsync, rename and process start of a
step would leave it; needs strace), ``kills`` (random SIGKILL and SIGTERM), ``pairs`` (one of two
processes is killed), ``disk`` (full), ``readonly`` (a read-only mount), ``owner`` (another user's
folder), ``clock`` (jumps), ``workers`` (a verifier's processes are killed or stopped), ``lines``
(the last line is torn), ``files`` (each file of the newest checkpoint has a flipped bit, is cut, or
is removed).

A case is a broken run that is resumed to its end. It is ``same`` if metrics, samples, parameters,
moments and estimator state equal those of the unbroken run, bit for bit. It is ``said`` if a
warning also named something that was lost, and ``refused`` if the run ended with a one-sentence
error. Everything else is ``wrong``, and then this program exits with 1.
"""

import argparse
import collections
import ctypes
import functools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from studies.fault_processes import be_child, calls, kills, pairs, workers
from studies.fault_runs import STEPS, Case, Drill, start_process, take_steps


def disk(drill: Drill, options: argparse.Namespace) -> Iterator[Case]:
    """The disk is full: a file system in memory holds only a part of the run; later it grows."""
    place = drill.work / "small"
    place.mkdir(exist_ok=True)
    needed = sum(p.stat().st_size for p in (drill.work / "whole").rglob("*") if p.is_file())
    for percent in range(5, 100, options.percent):
        size = f"size={needed * percent // 100 // 1024 + 8}k"
        if os.system(f"mount -t tmpfs -o {size} none {place} 2>/dev/null"):
            print("disk: left out, because this user cannot mount a tmpfs", flush=True)
            return
        try:
            what = f"disk of {percent} % of the run"
            try:
                take_steps(place / "run")
                first = "the run ended in spite of it"
            except ValueError as error:
                first = str(error)
            except Exception as error:
                yield what, "wrong", f"{type(error).__name__}: {error}"
                continue
            os.system(f"mount -o remount,size=1g {place}")
            _, outcome, said = drill.resume(what, place / "run")
            yield what, outcome, f"{first} | {said}"
        finally:
            os.system(f"umount {place}")


def readonly(drill: Drill, options: argparse.Namespace) -> Iterator[Case]:
    """The run folder is not writable: mounted read-only, or without write permission if this user
    cannot mount. The run must end with a one-sentence error, and resume once it is writable."""
    run_dir = drill.folder()
    mounted = not os.system(f"mount --bind {run_dir} {run_dir} 2>/dev/null")
    if mounted:
        os.system(f"mount -o remount,ro,bind {run_dir}")
    else:
        change_modes(run_dir, 0o555, 0o444)
    try:
        take_steps(run_dir)
        first = "the run ended in spite of it"
    except ValueError as error:
        first = str(error)
    finally:
        if mounted:
            os.system(f"umount {run_dir}")
        else:
            change_modes(run_dir, 0o755, 0o644)
    _, outcome, said = drill.resume("", run_dir)
    outcome = "wrong" if first.startswith("the run ended") else outcome
    yield f"{'read-only mount' if mounted else 'no write permission'}", outcome, f"{first} | {said}"


def owner(drill: Drill, options: argparse.Namespace) -> Iterator[Case]:
    """The run folder belongs to another user: a one-sentence error, and none of its files changes.
    Root gives the folder away and starts a process without root's right to write everywhere."""
    if not hasattr(os, "geteuid") or os.geteuid():
        print("owner: left out, because only root can give a folder to another user", flush=True)
        return
    run_dir = drill.folder()
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    for path in (run_dir, *before):
        os.chown(path, 65534, 65534)
    with ThreadPoolExecutor(1) as thread:  # a thread has its own rights
        drop = functools.partial(ctypes.CDLL(None).prctl, DROP_FROM_BOUNDING_SET)
        if any(thread.submit(drop, right, 0, 0, 0).result() for right in FILE_RIGHTS):
            print("owner: left out, because root cannot give up its rights here", flush=True)
            return
        process = thread.submit(start_process, run_dir).result()
    said = (process.communicate()[0].strip().splitlines() or [""])[-1]
    untouched = before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    refused = process.returncode == 1 and said.startswith("error: ") and untouched
    _, outcome, more = drill.resume("", run_dir)
    yield "another user's folder", outcome if refused else "wrong", f"{said} | {more}"


FILE_RIGHTS = (1, 2, 3)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
DROP_FROM_BOUNDING_SET = 24  # PR_CAPBSET_DROP


def change_modes(folder: Path, of_folders: int, of_files: int) -> None:
    for path in [*folder.rglob("*"), folder]:
        path.chmod(of_folders if path.is_dir() else of_files)


def clock(drill: Drill, options: argparse.Namespace) -> Iterator[Case]:
    """Python's wall clock jumps by up to six hours, forward or back, again and again. Orbax gives
    up a checkpoint if the clock jumps while it is written; then the run is started again."""
    now, rng, offset = time.time, random.Random(options.seed), [0.0]

    def jumping() -> float:
        if rng.random() < 0.02:
            offset[0] = rng.uniform(-1, 1) * 6 * 3600
        return now() + offset[0]

    run_dir, said = drill.work / "clock", []
    shutil.rmtree(run_dir, ignore_errors=True)
    for trial in range(5):
        try:
            with (
                mock.patch.object(time, "time", jumping),
                mock.patch.object(time, "time_ns", lambda: int(jumping() * 1e9)),
            ):
                take_steps(run_dir)
        except ValueError as error:
            said.append(str(error))
            continue
        what, outcome, more = drill.resume(f"clock set {trial + 1}", run_dir)
        yield what, "said" if said and outcome == "same" else outcome, "; ".join([*said, more])
        return
    _, outcome, _ = drill.resume("", run_dir)
    yield "clock set in each of five starts", "said" if outcome == "same" else outcome, said[-1]


def lines(drill: Drill, options: argparse.Namespace) -> Iterator[Case]:
    """The last line of metrics.jsonl or samples.jsonl is torn, lacks its metrics or is not text."""
    pieces = ('{"step": 4, "rew', '{"step": 4}', "\0" * 100)
    cases = [(name, piece) for name in ("metrics.jsonl", "samples.jsonl") for piece in pieces]
    for name, piece in cases[:: options.every]:
        run_dir = drill.folder()
        with (run_dir / name).open("a") as file:
            file.write(piece)
        yield drill.resume(f"{name} ends with {piece[:16]!r}", run_dir)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def files(drill: Drill, options: argparse.Namespace) -> Iterator[Case]:
    """Each file of the newest checkpoint has one bit flipped, is cut in half, or is removed."""
    newest = Path("checkpoints") / str(STEPS - 1)
    base = drill.work / "broken"
    names = sorted(p.relative_to(base) for p in (base / newest).rglob("*") if p.is_file())
    harms: tuple[Callable[[Path], None], ...] = (flip, cut, Path.unlink)
    cases = [(name, harm) for name in names for harm in harms]
    for name, harm in cases[:: options.every]:
        run_dir = drill.folder()
        harm(run_dir / name)
        what = f"{name.relative_to(newest)}: {harm.__name__}"
        case = drill.resume(what, run_dir)
        yield case if case[1] != "same" else (what, "wrong", "used without a word")


PARTS: dict[str, Callable[[Drill, argparse.Namespace], Iterator[Case]]] = {
    f.__name__: f
    for f in (files, lines, clock, readonly, owner, disk, workers, calls, kills, pairs)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="the parts to run; all without a name")
    parser.add_argument("--out", type=Path, help="write every case to this JSON file")
    parser.add_argument("--work", type=Path, help="keep files here (default: a temporary folder)")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=10, help="kills of one of two processes")
    parser.add_argument("--seconds", type=float, default=8.0, help="latest moment of a kill")
    parser.add_argument("--every", type=int, default=1, help="take every n-th call or file only")
    parser.add_argument("--percent", type=int, default=10, help="step between sizes of the disk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--talk", action="store_true", help="print every case")
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pause", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.parts == ["child"]:
        be_child(options)
        return
    if unknown := set(options.parts) - set(PARTS):
        raise SystemExit(f"error: no part {min(unknown)}; parts are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(not run(options.work or Path(folder), options))


def run(work: Path, options: argparse.Namespace) -> bool:
    """Run the parts and print a table; returns True if nothing went wrong."""
    work.mkdir(parents=True, exist_ok=True)
    drill, found = Drill(work), {}
    for part in options.parts or PARTS:
        started, cases = time.monotonic(), []
        for case in PARTS[part](drill, options):
            cases.append(case)
            if case[1] in ("wrong", "refused") or options.talk:
                print(f"{part}: {' | '.join(case)}", flush=True)
        counts = collections.Counter(outcome for _, outcome, _ in cases)
        shown = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
        seconds = time.monotonic() - started
        print(f"{part}: {len(cases)} cases, {shown or 'none'} ({seconds:.0f} s)", flush=True)
        found[part] = cases
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    return not any(case[1] in ("wrong", "refused") for cases in found.values() for case in cases)


if __name__ == "__main__":
    main()
