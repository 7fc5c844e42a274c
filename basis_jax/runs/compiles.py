"""Programs that XLA compiled: how many and the seconds that took, which explain a slow step; and
the folder that keeps them for the next start."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.monitoring

SWITCH = "BASIS_JAX_KEEP_COMPILED"
KEPT = "~/.cache/basis_jax/compiled"

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


def keep_compiled(report: Callable[[str], None] = print) -> None:
    """Keep programs that took a second or more to compile, in JAX_COMPILATION_CACHE_DIR or else
    ``KEPT``, so that the next start reads them. ``BASIS_JAX_KEEP_COMPILED=no`` keeps none."""
    if os.environ.get(SWITCH, "").lower() in ("no", "off", "0", "false"):
        return
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or KEPT).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        report(
            f"warning: compiled programs are not kept: {folder} cannot be made ({error.strerror})"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    report(f"compiled programs are kept in {folder} ({SWITCH}=no keeps none)")
