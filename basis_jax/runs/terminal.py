"""The output of a run on the terminal."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import timedelta
from io import TextIOBase
from statistics import median_low
from typing import Any, TextIO

FIELDS = (
    ("reward {:.3f}", "reward/mean"),
    ("accuracy {:.1%}", "reward/accuracy"),
    ("held-out {:.1%}", "eval/accuracy"),
    ("value error {:.3f}", "estimate/value_error"),
    ("length {:.1f}", "completion/length_mean"),
    ("{:.0f} tokens/s", "throughput/sample_tokens_per_s"),
)
"""Text and metric key of what the terminal shows of a step, before its times."""

TIMES = (
    ("sample", "time/sample_s"),
    ("verify", "time/verify_s"),
    ("update", "time/update_s"),
    ("evaluate", "time/eval_s"),
)
"""Label and metric key of the parts of a step's time."""

Stream = TextIO | TextIOBase
"""``sys.stdout`` is declared as the first; a ``StringIO`` passes run-time checks as the second."""


class Terminal:
    """Prints one line per step, and on a terminal a progress bar (if rich is installed)."""

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
            compiling = metrics.get("compile/seconds", 0.0)  # later steps do not need it
            self._seconds.append(max(0.0, now - self._then - compiling))
        self._then = now
        parts = [f"step {step:>{len(str(self._total))}}/{self._total}", *shown(metrics)]
        if self._seconds and step < self._total:
            left = median_low(self._seconds) * (self._total - step)
            parts.append(f"about {timedelta(seconds=round(left))} left")
        line = "  ".join(parts)
        self._show(step, line)
        return line

    def _show(self, step: int, line: str) -> None:
        if line:
            self.message(line)
        if self._live is not None:
            from rich.progress_bar import ProgressBar

            bar = ProgressBar(total=max(1, self._total), completed=step)
            self._live.update(bar, refresh=True)

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


def shown(metrics: Mapping[str, float]) -> Iterator[str]:
    """The parts of a step's line. Accuracy is left out if it equals the mean reward, as with
    rewards of 0 and 1."""
    same = metrics.get("reward/accuracy") == metrics.get("reward/mean")
    for form, key in FIELDS:
        if key in metrics and not (same and key == "reward/accuracy"):
            yield form.format(metrics[key])
    for key, value in metrics.items():
        if key.count("/") == 2 and key.startswith("eval/") and key.endswith("/accuracy"):
            yield f"{key.split('/')[1]} {value:.1%}"
    seconds = {label: metrics[key] for label, key in TIMES if metrics.get(key, 0) >= 0.05}
    if seconds:
        parts = ", ".join(f"{label} {value:.1f}" for label, value in seconds.items())
        yield f"{sum(seconds.values()):.1f} s ({parts})"


def _live(stream: Stream) -> Any:
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:  # plain lines are enough
        return None
    console = Console(file=stream)  # type: ignore[arg-type]  # rich only writes to it
    return Live(console=console, auto_refresh=False)
