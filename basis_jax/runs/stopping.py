"""SIGINT (Ctrl-C) and SIGTERM end a run between two steps, with everything saved.

Work that does not change the state (sampling, grading, evaluating) is dropped at once. Work that
changes it is finished first. A step whose evaluation is dropped is saved, and is evaluated when the
run is resumed. A second signal ends the process at once. With several processes, any of them may
get the signal; they agree on it at the beginning and end of blocks that may be dropped.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(Exception):
    """Raised inside ``Stopper.droppable`` when the run is asked to stop, and by ``train`` when it
    has stopped. In the latter case ``exit_code`` is the shells' exit code for the signal."""

    exit_code = 1


class Stopper:
    """A context manager in which the two signals ask the run to stop.

    It does nothing outside the main thread, because signals cannot be handled there. With several
    processes, ``agree`` returns the largest of their numbers (``processes.largest``).
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self.requested: signal.Signals | None = None
        self._droppable = False
        self._agree = agree
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stopper":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextmanager
    def droppable(self) -> Iterator[None]:
        """Mark a block that may be left at any moment.

        Raises StopRequested at its beginning if the run has been asked to stop. If the run is asked
        during the block, it is raised at once; with several processes, in all of them at its end.
        """
        if self.agreed():
            raise StopRequested
        self._droppable = self._agree is None
        try:
            yield
        finally:
            self._droppable = False
        if self._agree is not None and self.agreed():
            raise StopRequested

    def agreed(self) -> bool:
        """Whether any process has been asked to stop. Call it in all processes."""
        if self._agree is not None:
            number = self._agree(self.requested or 0)
            self.requested = signal.Signals(number) if number else None
        return self.requested is not None

    def stopped_after(self, step: int | None) -> StopRequested:
        """The exception that ``train`` raises. ``step`` is the newest checkpoint's step, or None if
        there is no checkpoint."""
        name = self.requested.name if self.requested else "a request"
        if step is None:
            sentence = "before a step was saved; the same command starts the run again"
        else:
            sentence = f"with everything up to step {step} saved; the same command goes on there"
        stopped = StopRequested(f"stopped by {name} {sentence}")
        stopped.exit_code = 128 + (self.requested or 0)
        return stopped

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        self._restore()  # so that a second signal ends the process
        if self._droppable:
            raise StopRequested

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
