"""What a run shows on the terminal."""

import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from io import TextIOBase
from statistics import median_low
from typing import Any, TextIO

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

Stream = TextIO | TextIOBase
"""``sys.stdout`` is declared as the first; a ``StringIO`` passes run-time checks as the second."""


class Terminal:
    """A progress bar on a terminal (with rich), one plain line a step anywhere else."""

    def __init__(self, total: int, done: int, stream: Stream):
        self._total, self._stream = total, stream
        self._seconds: deque[float] = deque(maxlen=20)  # of the last steps
        self._then = time.monotonic()
        self._live = _live(stream) if stream.isatty() else None
        if self._live is not None:
            self._live.start()
            self._show(max(0, done), "")

    def step(self, step: int, metrics: Mapping[str, float]) -> str:
        """Show a step, and return what is shown."""
        now = time.monotonic()
        if step > 0:  # line 0 is the evaluation before the first step
            self._seconds.append(now - self._then)
        self._then = now
        parts = [f"step {step}/{self._total}"]
        parts += [
            f"{label} {form.format(metrics[key])}" for label, key, form in FIELDS if key in metrics
        ]
        parts += [
            f"{key.split('/')[1]} {value:.1%}"
            for key, value in metrics.items()
            if key.count("/") == 2 and key.startswith("eval/") and key.endswith("/accuracy")
        ]
        if self._seconds and step < self._total:
            # the low median forgets the step that compiled as soon as there is another
            eta = median_low(self._seconds) * (self._total - step)
            parts.append(f"ETA {timedelta(seconds=round(eta))}")
        line = "  ".join(parts)
        self._show(step, line)
        return line

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

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()


def _live(stream: Stream) -> Any:
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:  # plain lines do as well
        return None
    console = Console(file=stream)  # type: ignore[arg-type]  # rich only writes to it
    return Live(console=console, auto_refresh=False)
