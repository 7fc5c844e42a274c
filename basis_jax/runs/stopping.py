"""SIGINT (Ctrl-C) and SIGTERM end a run between two steps, with everything saved.

Work that changes nothing yet (sampling, grading, evaluating) is dropped at once; work that has
begun to change the state is finished first. A step whose evaluation is dropped is kept, and is
evaluated when the run goes on. A second signal ends the process at once. Of several processes any
may be given the signal: they agree on it where a block that can be dropped begins and ends.
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
    has stopped; ``exit_code`` is then the one that shells give to the signal."""

    exit_code = 1


class Stopper:
    """While it is entered, the two signals ask the run to stop; a context manager. In a thread
    other than the main one, where signals cannot be handled, it does nothing. ``agree`` gives the
    largest of the numbers that several processes give (``processes.largest``)."""

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
        """A block that may be left at any moment. Raises StopRequested at once if the run has been
        asked to stop, and from inside the block as soon as it is; with several processes, at its
        end in all of them."""
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
        """Whether any process has been asked to stop; then all have been. Call it in all."""
        if self._agree is not None:
            number = self._agree(self.requested or 0)
            self.requested = signal.Signals(number) if number else None
        return self.requested is not None

    def stopped_after(self, step: int | None) -> StopRequested:
        """What ``train`` raises when the newest checkpoint is of step ``step``; None: there is
        none."""
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
        self._restore()  # a second signal is not kept waiting
        if self._droppable:
            raise StopRequested

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
