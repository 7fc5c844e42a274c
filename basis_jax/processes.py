"""Several processes of one run: the only module that knows that there may be more than one.

Every process runs the same program on the same values, and each sees only its own devices. So two
laws hold everywhere else. Which device programs run, and in which order, follows only from values
that all processes share. What one process alone finds out, a verdict or the content of a file,
reaches the others through ``exchange`` or ``by_first`` before anything depends on it. With one
process all functions are trivial and run nothing on a device.
"""

import atexit
import collections
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

T = TypeVar("T")
Report = Callable[[str], None]


def count() -> int:
    """Number of processes."""
    return jax.process_count()


def index() -> int:
    """The number of this process, from 0."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this is the process that writes files and talks to the user. No array operation may
    depend on it."""
    return jax.process_index() == 0


def spoken(report: Report) -> Report:
    """``report`` in the first process, nothing in the others."""
    return report if is_first() else lambda text: None


def _same(x: T) -> T:
    return x


def gathered(tree: PyTree) -> PyTree:
    """Start to copy the arrays that are split over processes to every device; the others, and all
    of them in a single process, stay as they are. Call it in every process."""
    leaves, structure = jax.tree.flatten(tree)
    split = [i for i, x in enumerate(leaves) if _is_split(x)]
    if split:
        everywhere = NamedSharding(leaves[split[0]].sharding.mesh, PartitionSpec())
        copies = jax.jit(_same, out_shardings=everywhere)([leaves[i] for i in split])
        for i, copy in zip(split, copies, strict=True):
            leaves[i] = copy
    return jax.tree.unflatten(structure, leaves)


def on_host(tree: PyTree) -> PyTree:
    """The arrays as NumPy arrays, whole in every process. Call it in every process."""
    return jax.device_get(gathered(tree))


def _is_split(x: Any) -> bool:
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)


def put_everywhere(mesh: Mesh, tree: PyTree) -> PyTree:
    """Host arrays, the same in all processes, as arrays that every device of the mesh holds."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, everywhere, lambda at: x[at])

    return jax.tree.map(put, tree)


def owned(rows: np.ndarray) -> np.ndarray:
    """Those of the rows that this process decides on; every row has one owner."""
    return rows[rows % count() == index()]


def exchange(work: Callable[[], T]) -> list[T]:
    """What ``work()`` gives in each process, in their order. An exception of it in one process is
    raised in all, in the others as a ValueError with its sentence."""
    if count() == 1:
        return [work()]
    result, failed = None, None
    try:
        result = work()
    except Exception as error:
        failed = error
    own = _packed(result, failed)
    sizes = multihost_utils.process_allgather(np.int32(own.size))
    parts = multihost_utils.process_allgather(_padded(own, int(sizes.max())))
    given = [pickle.loads(part[:size].tobytes()) for part, size in zip(parts, sizes, strict=True)]
    for _, sentence in given:
        if sentence is not None:
            if failed is not None and _sentence(failed) == sentence:
                raise failed
            raise ValueError(sentence)
    return [result for result, _ in given]


def by_first(work: Callable[[], T]) -> T:
    """What ``work()`` gives in the first process, which alone calls it, in all of them; a
    ValueError is raised in all. ``work`` reads or writes files, and touches no array that is split
    over processes."""
    if count() == 1:
        return work()
    result, failed = None, None
    if is_first():
        try:
            result = work()
        except ValueError as error:
            failed = error
    said = _packed(result, failed)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(said.size)))
    content = multihost_utils.broadcast_one_to_all(_padded(said, size))
    result, sentence = pickle.loads(content[:size].tobytes())
    if sentence is not None:
        raise failed or ValueError(sentence)
    return result


def _packed(result: Any, failed: Exception | None) -> np.ndarray:
    sentence = None if failed is None else _sentence(failed)
    return np.frombuffer(pickle.dumps((result, sentence)), np.uint8)


def _sentence(error: BaseException) -> str:
    """An error as the other processes tell it."""
    text = " ".join(str(error).split())
    ours = isinstance(error, (ValueError, OSError))
    return text if ours else f"{type(error).__name__}: {text}"


def _padded(content: np.ndarray, size: int) -> np.ndarray:
    """As many bytes as the power of two that ``size`` fits into, so that few programs occur."""
    whole = np.zeros(1 << max(10, (size - 1).bit_length()), np.uint8)
    whole[: min(size, content.size)] = content[:size]
    return whole


def barrier() -> None:
    """Wait until all processes are here."""
    largest(0)


def largest(number: int) -> int:
    """The largest of the numbers that the processes give."""
    if count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def check_same(what: Callable[[], Mapping[str, Any]]) -> None:
    """Raise the same ValueError in all processes where ``what()`` differs between them."""
    if count() == 1:
        return
    everyone = exchange(lambda: dict(what()))
    for process, other in enumerate(everyone[1:], 1):
        for name in sorted(everyone[0].keys() | other.keys()):
            here, there = everyone[0].get(name), other.get(name)
            if here != there:
                shown = [text if len(text := repr(x)) < 70 else text[:70] for x in (here, there)]
                raise ValueError(
                    f"{name} is {shown[0]} in process 0 and {shown[1]} in process {process}; "
                    "start all processes by the same command, from the same version and files"
                )


SILENCE_S = 30.0
"""A process that has said nothing for so long has ended, or will not be heard any more."""
SILENT = "a process ended without a word; its own output may say why"
BEAT_S = 2.0
"""Between two signs of life."""
NOT_OURS_S = 50
"""The same limit of JAX's own heartbeat, which ends a process with its C++ stack; it is the later
one, for what keeps Python's threads from running."""


@contextmanager
def joined(
    processes: str, coordinator: str, process_id: str, *, silence_s: float = SILENCE_S
) -> Iterator[None]:
    """Run the block as one of several processes; as it is where ``processes`` is empty or "1".

    "auto" asks the cluster (TPU VMs, Slurm, Open MPI, Kubernetes); with a number, ``coordinator``
    is HOST:PORT of the first process and ``process_id`` the number of this one. An exception that
    leaves the block ends all processes with its sentence, and so does the death of one, which is
    noticed when it has been silent for ``silence_s``. Raises ValueError for options that do not fit
    together, where the others cannot be found, and where the processes have different devices.
    """
    options = _start_options(processes, coordinator, process_id)
    if options is None:
        yield
        return
    jax.config.update("jax_enable_preemption_service", False)  # signals are ``runs.stopping``'s
    try:
        jax.distributed.initialize(**options, heartbeat_timeout_seconds=NOT_OURS_S)
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the processes did not find each other ({reason}); check --processes, --coordinator "
            "and --process-id, and that every process was started"
        ) from error
    watch = _Watch(silence_s)
    try:
        _check_devices()
        yield
    except SystemExit:
        watch.leave()
        raise
    except BaseException as error:
        watch.fail(error)
        raise
    watch.leave()


def _start_options(processes: str, coordinator: str, process_id: str) -> dict[str, Any] | None:
    """What ``jax.distributed.initialize`` is given; None for one process."""
    if processes in ("", "1") and not coordinator and process_id in ("", "0"):
        return None
    if processes == "auto":
        named = {"coordinator_address": coordinator} if coordinator else {}
        return named | ({"process_id": int(process_id)} if process_id.isdecimal() else {})
    numbers = processes.isdecimal() and process_id.isdecimal()
    host, _, port = coordinator.rpartition(":")
    if not (numbers and int(process_id) < int(processes) and host and port.isdecimal()):
        raise ValueError(
            f"--processes is {processes or '(missing)'}, --process-id {process_id or '(missing)'} "
            f"and --coordinator {coordinator or '(missing)'}; give --processes auto on a cluster "
            "that JAX knows, or the number of processes, this one's number from 0 and HOST:PORT of "
            "process 0"
        )
    return {
        "coordinator_address": coordinator,
        "num_processes": int(processes),
        "process_id": int(process_id),
        "cluster_detection_method": "deactivate",
    }


def _check_devices() -> None:
    owned_by = collections.Counter((d.process_index, d.device_kind) for d in jax.devices())
    numbers, kinds = sorted({*owned_by.values()}), sorted({kind for _, kind in owned_by})
    if len(numbers) > 1 or len(kinds) > 1:
        raise ValueError(
            f"the processes have {' or '.join(map(str, numbers))} devices of the kinds "
            f"{', '.join(kinds)}; give each the same number of one kind"
        )


class _Watch:
    """A thread that tells the others that this process lives, and ends it where one of them has
    failed: a device program that waits for a process that is gone may never come back."""

    def __init__(self, silence_s: float) -> None:
        from jax._src import distributed  # the only way to its key-value store

        self._store: Any = distributed.global_state.client
        self._silence_s = silence_s
        self._ended = threading.Event()
        self._heard: dict[str, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """The orderly end, when all processes have come here."""
        self._store.wait_at_barrier("leave", 24 * 3600 * 1000)
        self._ended.set()
        self._thread.join()
        jax.distributed.shutdown()

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process ends. An error of a device program, unless it is about
        memory, may only mean that another process has ended: then that one's sentence is waited
        for, and ends this one."""
        causes = (error, error.__cause__)
        of_program = any(isinstance(cause, jax.errors.JaxRuntimeError) for cause in causes)
        if of_program and "RESOURCE_EXHAUSTED" not in str(error):
            time.sleep(self._silence_s + 5 * BEAT_S)
        self._ended.set()
        self._tell(_sentence(error), index())
        if is_first():
            self._let_others_read()
        # JAX's own way out waits for all processes
        atexit.register(_exit, 130 if isinstance(error, KeyboardInterrupt) else 1)

    def _tell(self, sentence: str, process: int) -> None:
        """Leave a sentence for all processes, unless there is one."""
        with suppress(jax.errors.JaxRuntimeError):  # there is one, or the first process is gone
            self._store.key_value_set("failed", f"{sentence} (process {process})")

    def _let_others_read(self) -> None:
        """The store ends with the first process."""
        time.sleep(2 * BEAT_S)

    def _run(self) -> None:
        beat = 0
        while not self._ended.is_set():
            beat += 1
            try:
                self._store.key_value_set(f"alive/{index()}", str(beat), allow_overwrite=True)
                if is_first():
                    self._look_for_silence()
                failed = self._store.blocking_key_value_get("failed", int(1000 * BEAT_S))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                failed = f"{SILENT} (process 0)"
            if not self._ended.is_set():
                print(f"error: {failed}", file=sys.stderr, flush=True)
                if is_first():
                    self._let_others_read()
                _exit(1)

    def _look_for_silence(self) -> None:
        """Tell of a process that has given no sign of life for too long."""
        now = time.monotonic()
        for key, beat in self._store.key_value_dir_get("alive"):
            if self._heard.get(key, ("", now))[0] != beat:
                self._heard[key] = (beat, now)
            elif now - self._heard[key][1] > self._silence_s:
                self._tell(SILENT, int(key.rpartition("/")[2]))


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
