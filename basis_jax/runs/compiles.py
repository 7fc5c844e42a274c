"""How many programs XLA compiled and the seconds that took: what a step that should have been quick
spent its time on."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax.monitoring

EVENT = "/jax/core/compile/backend_compile_duration"
"""JAX records it once a program, also where a persistent cache already has it."""


class Compiles:
    """Programs and seconds since the last ``take``, in this process."""

    def __init__(self):
        self._seconds: list[float] = []

    def take(self) -> dict[str, float]:
        """``compile/programs`` and ``compile/seconds``; the count begins anew."""
        taken, self._seconds = self._seconds, []
        return {"compile/programs": float(len(taken)), "compile/seconds": sum(taken, 0.0)}

    def add(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == EVENT:
            self._seconds.append(duration_secs)


@contextmanager
def count_compiles() -> Iterator[Compiles]:
    """Count what is compiled inside the block."""
    compiles = Compiles()
    jax.monitoring.register_event_duration_secs_listener(compiles.add)
    try:
        yield compiles
    finally:
        jax.monitoring.unregister_event_duration_listener(compiles.add)
