"""Count compiled programs and their compile time, which explain slow steps, and keep the programs
in a folder for the next start."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.monitoring

from basis_jax.files import home

SWITCH = "BASIS_JAX_KEEP_COMPILED"
KEPT = "~/.cache/basis_jax/compiled"

EVENT = "/jax/core/compile/backend_compile_duration"
"""JAX records this event once per program, also if a persistent cache already has the program."""


class Compiles:
    """Programs and seconds of compiling in this process since the last ``take``."""

    def __init__(self):
        self._seconds: list[float] = []

    def take(self) -> dict[str, float]:
        """``compile/programs`` and ``compile/seconds``; resets both."""
        taken, self._seconds = self._seconds, []
        return {"compile/programs": float(len(taken)), "compile/seconds": sum(taken, 0.0)}

    def add(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == EVENT:
            self._seconds.append(duration_secs)


@contextmanager
def count_compiles() -> Iterator[Compiles]:
    """Count programs that are compiled inside the block."""
    compiles = Compiles()
    jax.monitoring.register_event_duration_secs_listener(compiles.add)
    try:
        yield compiles
    finally:
        jax.monitoring.unregister_event_duration_listener(compiles.add)


def keep_compiled(report: Callable[[str], None] = print) -> None:
    """Keep programs that took a second or more to compile, so that the next start reads them.

    They are kept in JAX_COMPILATION_CACHE_DIR, or in ``KEPT`` if that is not set.
    ``BASIS_JAX_KEEP_COMPILED=no`` keeps none.
    """
    if os.environ.get(SWITCH, "").lower() in ("no", "off", "0", "false"):
        return
    folder = home(os.environ.get("JAX_COMPILATION_CACHE_DIR") or KEPT)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        report(
            f"warning: compiled programs are not kept: {folder} cannot be made ({error.strerror})"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    report(f"compiled programs are kept in {folder} ({SWITCH}=no keeps none)")
