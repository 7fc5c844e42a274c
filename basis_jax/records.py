"""What a run writes down: config.json, metrics.jsonl, samples.jsonl, TensorBoard, the terminal.

``metrics.jsonl`` has one line a step, ``{"step": 3, "reward/mean": 0.41, ...}``, in rising order.
Resuming cuts both .jsonl files back to the checkpoint's step, so a run that was killed at any
moment and started again has every step once, as long as a step is logged before its checkpoint is
saved. All keys then repeat bit for bit except wall times and what was compiled: those under
``time/``, ``throughput/`` and ``compile/``. Values that are not finite are written as null.
TensorBoard is a view of the same numbers; a kill may cost it the last second.
"""

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from io import BufferedWriter, TextIOBase
from pathlib import Path
from statistics import median_low
from typing import Any

from basis_jax.config import Config

MAY_DIFFER = (
    "run_dir",  # the folder was moved
    "model.remat",
    "loss.logprob_chunk",
    "train.log_samples",
    "train.microbatch_rollouts",
    "train.sample_rollouts",
    "eval.every",
    "mesh.",
    "checkpoint.",
)
"""Fields (with a dot at the end: sections) that change where, when or how often a run computes and
writes, not what it computes beyond rounding. ``train.steps`` joins them when ``optim.schedule`` is
``constant``: the decaying schedules end at the last step."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")

FIELDS = (
    ("reward", "reward/mean", "{:.3f}"),
    ("accuracy", "reward/accuracy", "{:.1%}"),
    ("held-out", "eval/accuracy", "{:.1%}"),
    ("value error", "estimate/value_error", "{:.3f}"),
    ("length", "completion/length_mean", "{:.1f}"),
    ("tokens/s", "throughput/sample_tokens_per_s", "{:.0f}"),
    ("sample", "time/sample_s", "{:.2f}s"),
    ("verify", "time/verify_s", "{:.2f}s"),
    ("update", "time/update_s", "{:.2f}s"),
)
"""What the terminal shows of a step: label, metric key, format."""


@contextmanager
def lock_run(run_dir: str | Path) -> Iterator[Path]:
    """Make the folder and hold it for this process until the block ends.

    Raises ValueError where another process holds it, or it cannot be made.
    """
    run_dir = Path(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"run folder {run_dir} cannot be made ({error.strerror}); give another --run-dir"
        ) from None
    with _lock(run_dir):
        yield run_dir


def open_run(
    config: Config, *, devices: Sequence[str], identity: Mapping[str, str] | None = None
) -> None:
    """Write ``config.json`` into ``config.run_dir``, or check that it holds a run of ``config``.

    It is ``{"config": ..., "identity": ..., "starts": [...]}``. ``identity``: hashes of what the
    config only names, the problems and the model. A start is commit, uncommitted changes, versions
    and devices, and is added where it differs from the one before. Raises ValueError naming the
    fields that differ, except those of ``MAY_DIFFER``; a run without a checkpoint, which starts
    anew, may differ in all.
    """
    run_dir = Path(config.run_dir)
    path = run_dir / "config.json"
    fields = json.loads(json.dumps(asdict(config)))
    starts = []
    if path.exists():
        before = _read_config(path)
        if any((run_dir / "checkpoints").glob("[0-9]*")):
            _check_same(
                run_dir,
                {**before["config"], "contents of": before.get("identity", {})},
                {**fields, "contents of": dict(identity or {})},
            )
            starts = before["starts"]
    start = {**provenance(), "devices": list(devices)}
    if start not in starts[-1:]:
        starts.append(start)
    written = path.with_suffix(".json.new")
    record = {"config": fields, "identity": dict(identity or {}), "starts": starts}
    written.write_text(json.dumps(record, indent=2) + "\n")
    written.replace(path)


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a last line that is still being written is left out.

    Raises ValueError where there is no such run or a line is damaged.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"no metrics.jsonl in {run_dir}; give the folder of a run")
    return [row for row, _ in _rows(path)]


class Records:
    """The records of a run whose folder this process holds (``lock_run``); a context manager.

    ``resume_step`` is the step of the restored checkpoint, -1 without one; lines of later steps
    are cut off. ``last_step`` is the last step that has a line, -1 before the first.
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: int,
        resume_step: int = -1,
        *,
        stream: TextIOBase | None = None,
    ):
        run_dir = Path(run_dir)
        with ExitStack() as opened:  # closes what is open when a later line raises
            self._metrics, self.last_step = _open_lines(run_dir / "metrics.jsonl", resume_step)
            opened.enter_context(self._metrics)
            self._samples, _ = _open_lines(run_dir / "samples.jsonl", resume_step)
            opened.enter_context(self._samples)
            stream = sys.stdout if stream is None else stream
            self._terminal = opened.enter_context(_Terminal(total_steps, resume_step, stream))
            self._events = self._tensorboard(run_dir / "tensorboard", resume_step + 1)
            if self._events is not None:
                opened.enter_context(self._events)
            self._opened = opened.pop_all()
        if self.last_step != resume_step:
            self.message(
                f"metrics.jsonl ends at step {self.last_step}, the checkpoint is of step "
                f"{resume_step}: the lines between are lost"
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the step's line everywhere. Raises ValueError unless steps rise."""
        if step <= self.last_step:
            raise ValueError(
                f"step {step} is logged after step {self.last_step}; log each step once, in order"
            )
        values = {key: float(value) for key, value in metrics.items()}
        _append(self._metrics, [{"step": step, **values}])
        self.last_step = step
        if self._events is not None:
            for key, value in values.items():
                self._events.add_scalar(key, value, step)
        self._terminal.step(step, values)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append completions to ``samples.jsonl``, one line each, before the step is logged."""
        _append(self._samples, [{"step": step, **row} for row in rows])

    def message(self, text: str) -> None:
        """One line for whoever watches the run."""
        self._terminal.message(text)

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _tensorboard(self, folder: Path, next_step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            self.message("tensorboardX is not installed: no TensorBoard events, only metrics.jsonl")
            return None
        return SummaryWriter(str(folder), purge_step=next_step, flush_secs=1)


class _Terminal:
    """A progress bar on a terminal (with rich), one plain line a step anywhere else."""

    def __init__(self, total: int, done: int, stream: TextIOBase):
        self._total, self._stream = total, stream
        self._seconds: deque[float] = deque(maxlen=20)  # of the last steps
        self._then = time.monotonic()
        self._live = _live(stream) if stream.isatty() else None
        if self._live is not None:
            self._live.start()
            self._show(max(0, done), "")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        if step > 0:  # line 0 is the evaluation before the first step
            self._seconds.append(now - self._then)
        self._then = now
        parts = [f"step {step}/{self._total}"]
        parts += [
            f"{label} {form.format(metrics[key])}" for label, key, form in FIELDS if key in metrics
        ]
        if self._seconds and step < self._total:
            # the low median forgets the step that compiled as soon as there is another
            eta = median_low(self._seconds) * (self._total - step)
            parts.append(f"ETA {timedelta(seconds=round(eta))}")
        self._show(step, "  ".join(parts))

    def _show(self, step: int, line: str) -> None:
        if self._live is None:
            print(line, file=self._stream, flush=True)
            return
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        rows = Table.grid()
        rows.add_row(ProgressBar(total=max(1, self._total), completed=step))
        rows.add_row(Text(line))
        self._live.update(rows, refresh=True)

    def message(self, text: str) -> None:
        if self._live is None:
            print(text, file=self._stream, flush=True)
        else:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "_Terminal":
        return self

    def __exit__(self, *_) -> None:
        if self._live is not None:
            self._live.stop()


def _live(stream: TextIOBase):
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:  # plain lines do as well
        return None
    return Live(console=Console(file=stream), auto_refresh=False)


def _lock(run_dir: Path) -> TextIOBase:
    """Hold the folder for this process. POSIX record locks die with the process, and worker
    processes forked from it do not keep them alive."""
    file = (run_dir / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"another process is writing to the run folder {run_dir}; wait for it, stop it, or "
            "give another --run-dir"
        ) from None
    return file


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """(row, bytes up to its end) for every line; a torn last line (a kill, a full disk) is left
    out, a bad line before others raises ValueError."""
    lines = path.read_bytes().splitlines(keepends=True)
    end = 0
    for number, line in enumerate(lines, 1):
        end += len(line)
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if isinstance(row, dict) and "step" in row:
            yield row, end
        elif number < len(lines):
            raise ValueError(f'line {number} of {path} is no JSON object with "step"; mend it')


def _open_lines(path: Path, resume_step: int) -> tuple[BufferedWriter, int]:
    """The file, ready for appending, with only the lines of steps <= resume_step, and the last of
    these steps. Steps rise down the file, so one atomic truncation is enough."""
    path.touch()
    end, last = 0, -1
    for row, row_end in _rows(path):
        if row["step"] > resume_step:
            break
        end, last = row_end, row["step"]
    file = path.open("ab")
    file.truncate(end)
    return file, last


def _append(file: BufferedWriter, rows: Sequence[Mapping[str, Any]]) -> None:
    file.write(b"".join(json.dumps(_finite(row)).encode() + b"\n" for row in rows))
    file.flush()
    os.fsync(file.fileno())


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: null stands for what is not finite."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def _read_config(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except ValueError:
        record = None
    if not isinstance(record, dict) or not {"config", "starts"} <= record.keys():
        raise ValueError(f"{path} is not a run's config.json; give another --run-dir")
    return record


def _check_same(run_dir: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new = dict(_leaves(before)), dict(_leaves(now))
    differing = [
        f"{name} is {_shown(old, name)} there and {_shown(new, name)} here"
        for name in sorted(old.keys() | new.keys())
        if not (name in old and name in new and old[name] == new[name])
        and not _may_differ(name, new)
    ]
    if differing:
        raise ValueError(
            f"run folder {run_dir} holds a run of another configuration: {'; '.join(differing)}; "
            "take the values that are there, or give another --run-dir"
        )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shown(leaves: Mapping[str, Any], name: str) -> str:
    return json.dumps(leaves[name]) if name in leaves else "absent"


def _may_differ(name: str, config: Mapping[str, Any]) -> bool:
    if name == "train.steps":
        return config.get("optim.schedule") == "constant"
    return any(name == field or field[-1] == "." and name.startswith(field) for field in MAY_DIFFER)


def provenance(*more: str) -> dict[str, Any]:
    """What every written result carries: commit, uncommitted changes, versions (of ``more``
    packages too; None where one is not installed)."""
    return {**_commit(), "versions": _versions(("basis-jax", *PACKAGES, *more))}


def _commit() -> dict[str, Any]:
    """Commit of this source tree and whether it has changes; None where git cannot say."""
    root = Path(__file__).resolve().parent.parent
    unknown = {"commit": None, "uncommitted_changes": None}
    if not (root / ".git").exists():  # installed: an enclosing repository is not ours
        return unknown
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return unknown
    return {"commit": commit, "uncommitted_changes": bool(status)}


def _versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
