"""The output of a run on the terminal."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from io import TextIOBase
from pathlib import Path
from statistics import median_low
from typing import Any, TextIO

from basis_jax.config import Config
from basis_jax.files import is_step

FIELDS = (
    ("reward {:.3f}", "reward/mean"),
    ("accuracy {:.1%}", "reward/accuracy"),
    ("held-out {:.1%}", "eval/accuracy"),
    ("value error {:.3f}", "estimate/value_error"),
    ("length {:.1f} tokens", "completion/length_mean"),
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
            parts.append(f"about {duration(left)} left")
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
        compiling = metrics.get("compile/seconds", 0.0)
        parts += f"; {compiling:.1f} of it to compile" if compiling >= 1 else ""
        yield f"{sum(seconds.values()):.1f} s ({parts})"


def duration(seconds: float) -> str:
    """A time in its largest units: 7 s, 2 min 5 s, 3 h 20 min, 4 d 1 h."""
    left = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        number, left = divmod(left, size)
        if number or parts or unit == "s":
            parts.append(f"{number} {unit}")
    return " ".join(part for part in parts[:2] if not part.startswith("0 ")) or "0 s"


class Pace:
    """The time left of work whose units take the same time each."""

    def __init__(self, done: int, total: int):
        self._first, self._total, self._began = done, total, time.monotonic()

    def left(self, done: int) -> str:
        """ ", about 20 s left", or "" if nothing is left."""
        if not self._first < done < self._total:
            return ""
        seconds = time.monotonic() - self._began
        left = seconds / (done - self._first) * (self._total - done)
        return f", about {duration(left)} left"


def announcement(config: Config) -> str:
    """What a run is about to do, in one line."""
    train, group_size = config.train, config.sampling.group_size
    names = [p.name for p in Path(config.run_dir, "checkpoints").glob("[0-9]*")]
    saved = [int(name) for name in names if is_step(name)]
    if not saved:
        state = "new"
    elif max(saved) < train.steps:
        state = f"resumed at step {max(saved)}"
    else:
        state = "all steps are done"
    sets = ", ".join([config.data.path, *config.data.more_sets])
    return (
        f"training {config.model.path} on {sets}: {train.steps} steps of "
        f"{train.prompts_per_step} prompts with {group_size} "
        f"{'completion' if group_size == 1 else 'completions'} each; run folder {config.run_dir} "
        f"({state})"
    )


def _live(stream: Stream) -> Any:
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:  # plain lines are enough
        return None
    console = Console(file=stream)  # type: ignore[arg-type]  # rich only writes to it
    return Live(console=console, auto_refresh=False)
