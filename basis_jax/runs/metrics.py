"""The records of a run's steps: metrics.jsonl, samples.jsonl, loggers, the terminal.

``metrics.jsonl`` has one line per step, ``{"step": 3, "reward/mean": 0.41, ...}``, in increasing
order. Resuming cuts both .jsonl files back to the checkpoint's step. So a run that was killed and
resumed has every step exactly once, as long as a step is logged before its checkpoint is saved. All
its values are the same bit for bit, except those under ``time/``, ``throughput/`` and ``compile/``.
Values that are not finite are written as null. ``loggers`` show the same numbers; after a kill they
may lack the last second.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from io import BufferedWriter
from pathlib import Path
from typing import Any

from basis_jax.files import (
    append_json_lines,
    check_regular,
    json_object,
    one_line,
    replace_file,
    whole_lines,
)
from basis_jax.runs.log import log_line
from basis_jax.runs.loggers import open_loggers, what
from basis_jax.runs.terminal import Stream, Terminal

LARGEST = 2**63
"""Whole numbers in the files are smaller."""


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``. A last line that is still being written is left out.

    Raises ValueError if there is no such run, a line is damaged, two lines are of one step, or a
    metric is no number.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not os.path.isfile(path):
        raise ValueError(f"no metrics.jsonl in {run_dir}; give the folder of a run")
    rows = [row for row, _ in _rows(path)]
    for before, row in zip(rows, rows[1:], strict=False):
        if before["step"] == row["step"]:
            raise ValueError(f"{path} has two lines of step {row['step']}; remove one")
    for row in rows:
        for name, value in row.items():
            whole = type(value) is int and abs(value) < LARGEST
            if not (value is None or whole or type(value) is float):
                raise ValueError(
                    f"{path} has {one_line(f'{value!r:.60} as {name}')} of step {row['step']}; "
                    "give a number or null"
                )
    return rows


class Records:
    """The records of a run whose folder this process has locked (``lock_run``); a context manager.

    ``resume_step`` is the step of the restored checkpoint, or -1 if there is none. Lines of later
    steps are cut off. ``last_step`` is the last step that has a line, or -1 before the first.
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: int,
        resume_step: int = -1,
        *,
        stream: Stream | None = None,
        loggers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ):
        run_dir = self._run_dir = Path(run_dir)
        kept = [] if resume_step >= 0 else set_aside(run_dir)
        with ExitStack() as opened:  # closes the files if a later line raises
            self._metrics, self.last_step = _open_lines(run_dir / "metrics.jsonl", resume_step)
            opened.enter_context(self._metrics)
            self._samples, _ = _open_lines(run_dir / "samples.jsonl", resume_step)
            opened.enter_context(self._samples)
            stream = sys.stdout if stream is None else stream
            self._terminal = opened.enter_context(Terminal(total_steps, resume_step, stream))
            self._loggers = open_loggers(
                loggers, run_dir, config or {}, next_step=resume_step + 1, report=self.message
            )
            self._failed: set[str] = set()
            opened.callback(self._close_loggers)
            self._opened = opened.pop_all()
        if kept:
            self.message(
                "warning: there is no checkpoint to go on from, so the run starts anew; the "
                f"records of the earlier start are kept as {', '.join(kept)}"
            )
        if self.last_step != resume_step:
            self.message(
                f"metrics.jsonl ends at step {self.last_step}, the checkpoint is of step "
                f"{resume_step}: the lines between are lost"
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the step to all records. Raises ValueError unless steps increase."""
        if step <= self.last_step:
            raise ValueError(
                f"step {step} is logged after step {self.last_step}; log each step once, in order"
            )
        values = {key: float(value) for key, value in metrics.items()}
        append_json_lines(self._metrics, [_finite({"step": step, **values})])
        self.last_step = step
        self._show(step, values, values)

    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(self._run_dir)

    def complete(self, metrics: Mapping[str, float]) -> None:
        """Add ``metrics`` to the line of the last step. The file is replaced in one step."""
        if not metrics:
            return
        *before, line = self.lines()
        new = {key: float(value) for key, value in metrics.items()}
        line |= new
        content = "".join(json.dumps(_finite(row)) + "\n" for row in [*before, line])
        replace_file(self._run_dir / "metrics.jsonl", content)
        self._metrics, _ = _open_lines(self._run_dir / "metrics.jsonl", self.last_step)
        self._opened.enter_context(self._metrics)
        shown = {k: v for k, v in line.items() if v is not None and k != "step"}
        self._show(self.last_step, new, shown)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append completions to ``samples.jsonl``, one line each. Call it before ``log``."""
        append_json_lines(self._samples, (_finite({"step": step, **row}) for row in rows))

    def _show(self, step: int, new: Mapping[str, float], all_of: Mapping[str, float]) -> None:
        for name in self._loggers.keys() - self._failed:
            try:
                self._loggers[name].log(step, new)
            except Exception as error:  # of a network or a user's own code
                self._failed.add(name)
                self.message(
                    f"warning: the logger {name} failed at step {step} ({what(error)}) and is "
                    "left out; metrics.jsonl holds everything"
                )
        log_line(self._run_dir, self._terminal.step(step, all_of))

    def message(self, text: str) -> None:
        """Show one line to the user."""
        self._terminal.message(text)
        log_line(self._run_dir, text)

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_loggers(self) -> None:
        for name, logger in self._loggers.items():
            try:
                logger.close()
            except Exception as error:
                self.message(f"warning: the logger {name} failed at the end ({what(error)})")


def set_aside(run_dir: Path) -> list[str]:
    """Rename the files of an earlier start, so that they are kept; returns the new names."""
    kept = []
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = run_dir / name
        if path.is_file() and path.stat().st_size:
            number = 1
            while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
                number += 1
            path.rename(aside)
            kept.append(aside.name)
    return kept


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """(row, position of its end) for every line. An incomplete last line, left by a kill or a full
    disk, is skipped. A damaged line before others raises ValueError, as does a step below the one
    before it: a run is cut back at the first step that is too late."""
    check_regular(path)
    last = -1
    with path.open("rb") as file:
        lines = list(whole_lines(file))
    for number, (line, end) in enumerate(lines, 1):
        row = json_object(line)
        step = row["step"] if row and "step" in row else None
        if row and type(step) is int and last <= step < LARGEST:
            last = step
            yield row, end
        elif type(step) is int and step < last:
            raise ValueError(
                f"line {number} of {path} is of step {step}, after one of step {last}; put the "
                "lines in order"
            )
        elif number < len(lines):
            raise ValueError(f'line {number} of {path} is no JSON object with "step"; fix it')


def _open_lines(path: Path, resume_step: int) -> tuple[BufferedWriter, int]:
    """Open the file for appending, with only the lines of steps <= resume_step; returns it and the
    last of these steps. Steps increase down the file, so one atomic truncation is enough."""
    path.touch()
    end, last = 0, -1
    for row, row_end in _rows(path):
        if row["step"] > resume_step:
            break
        end, last = row_end, row["step"]
    file = path.open("ab")
    file.truncate(end)
    return file, last


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with None (null) for numbers that are not finite, because JSON has no NaN."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
