"""The records of a run of several processes: the first process writes, all can read."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from basis_jax import processes
from basis_jax.runs.metrics import Records


class SharedRecords:
    """``Records`` whose files are in the first process; a context manager. Its methods are called
    in all processes, and raise in all of them if a file cannot be written."""

    def __init__(self, run_dir: Path, total_steps: int, resume_step: int, **options: Any):
        self._opened = ExitStack()

        def open_files() -> None:
            records = Records(run_dir, total_steps, resume_step, **options)
            self._records = self._opened.enter_context(records)

        processes.by_first(open_files)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        processes.by_first(lambda: self._records.log(step, metrics))

    def lines(self) -> list[dict[str, Any]]:
        return processes.by_first(lambda: self._records.lines())

    def complete(self, metrics: Mapping[str, float]) -> None:
        processes.by_first(lambda: self._records.complete(metrics))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        processes.by_first(lambda: self._records.samples(step, rows))

    def message(self, text: str) -> None:
        processes.by_first(lambda: self._records.message(text))

    def __enter__(self) -> "SharedRecords":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
