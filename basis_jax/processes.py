"""Several processes of one run. Only this module knows that there may be more than one.

Every process runs the same program on the same values, and sees only its own devices. So the other
modules follow two rules. First, which device programs run, and in which order, depends only on
values that are the same in all processes. Second, what only one process knows, such as a verdict or
the content of a file, is sent to the others by ``exchange`` or ``by_first`` before anything depends
on it. With one process all functions are trivial and run nothing on a device.
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
    """Whether this is the process that writes files and prints messages. No array operation may
    depend on it."""
    return jax.process_index() == 0


def spoken(report: Report) -> Report:
    """``report`` in the first process; in the others a function that does nothing."""
    return report if is_first() else lambda text: None


def _same(x: T) -> T:
    return x


def gathered(tree: PyTree) -> PyTree:
    """Start to copy arrays that are split over processes to every device. Other arrays stay as they
    are; with a single process these are all. Call it in every process."""
    leaves, structure = jax.tree.flatten(tree)
    split = [i for i, x in enumerate(leaves) if _is_split(x)]
    if split:
        everywhere = NamedSharding(leaves[split[0]].sharding.mesh, PartitionSpec())
        copies = jax.jit(_same, out_shardings=everywhere)([leaves[i] for i in split])
        for i, copy in zip(split, copies, strict=True):
            leaves[i] = copy
    return jax.tree.unflatten(structure, leaves)


def on_host(tree: PyTree) -> PyTree:
    """The arrays as NumPy arrays, complete in every process. Call it in every process."""
    return jax.device_get(gathered(tree))


def _is_split(x: Any) -> bool:
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)


def put_everywhere(mesh: Mesh, tree: PyTree) -> PyTree:
    """Host arrays, the same in all processes, as arrays replicated on every device of the mesh."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, everywhere, lambda at: x[at])

    return jax.tree.map(put, tree)


def owned(rows: np.ndarray) -> np.ndarray:
    """The rows that this process owns. Every row has exactly one owner."""
    return rows[rows % count() == index()]


def exchange(work: Callable[[], T]) -> list[T]:
    """The results of ``work()`` in all processes, in their order. If it raises in one process, the
    others raise a ValueError with the same message."""
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
    """Call ``work()`` in the first process only, and return its result in all processes.

    A ValueError of it is raised in all of them. ``work`` may read or write files, but must not use
    arrays that are split over processes.
    """
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
    """The message of an error for the other processes."""
    text = " ".join(str(error).split())
    ours = isinstance(error, (ValueError, OSError))
    return text if ours else f"{type(error).__name__}: {text}"


def _padded(content: np.ndarray, size: int) -> np.ndarray:
    """The content padded to a power of two of at least ``size`` bytes, so that programs are few."""
    whole = np.zeros(1 << max(10, (size - 1).bit_length()), np.uint8)
    whole[: min(size, content.size)] = content[:size]
    return whole


def barrier() -> None:
    """Wait until all processes have called this."""
    largest(0)


def largest(number: int) -> int:
    """The largest ``number`` of all processes."""
    if count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def check_same(what: Callable[[], Mapping[str, Any]]) -> None:
    """Raise the same ValueError in all processes if ``what()`` differs between them."""
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
"""A process without a sign of life for so many seconds counts as ended."""
SILENT = "a process ended without a word; its own output may say why"
BEAT_S = 2.0
"""Seconds between two signs of life of a process."""
NOT_OURS_S = 50
"""Seconds until JAX's own heartbeat ends a process, with a C++ stack trace. It is longer than ours,
and is needed only if Python's threads cannot run."""


@contextmanager
def joined(
    processes: str, coordinator: str, process_id: str, *, silence_s: float = SILENCE_S
) -> Iterator[None]:
    """Run the block as one of several processes; alone if ``processes`` is empty or "1".

    "auto" asks the cluster (TPU VMs, Slurm, Open MPI, Kubernetes). With a number, ``coordinator``
    is HOST:PORT of the first process and ``process_id`` the number of this one. An exception that
    leaves the block ends all processes with its message. They also end if one process has given no
    sign of life for ``silence_s`` seconds. Raises ValueError for options that do not fit together,
    if the other processes are not found, and if processes have different devices.
    """
    options = _start_options(processes, coordinator, process_id)
    if options is None:
        yield
        return
    jax.config.update("jax_enable_preemption_service", False)  # ``runs.stopping`` handles signals
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
    """Arguments of ``jax.distributed.initialize``, or None for one process."""
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
    """A thread that gives signs of life, and ends this process if another one has failed.

    It is needed because a device program that waits for an ended process may never return.
    """

    def __init__(self, silence_s: float) -> None:
        from jax._src import distributed  # the only way to its key-value store

        self._store: Any = distributed.global_state.client
        self._silence_s = silence_s
        self._ended = threading.Event()
        self._heard: dict[str, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Wait until all processes have called this, then end the thread."""
        self._store.wait_at_barrier("leave", 24 * 3600 * 1000)
        self._ended.set()
        self._thread.join()
        jax.distributed.shutdown()

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process ends.

        An error of a device program may only mean that another process has ended, unless the error
        is about memory. So this process first waits for the message of that process, which ends it.
        """
        causes = (error, error.__cause__)
        of_program = any(isinstance(cause, jax.errors.JaxRuntimeError) for cause in causes)
        if of_program and "RESOURCE_EXHAUSTED" not in str(error):
            time.sleep(self._silence_s + 5 * BEAT_S)
        self._ended.set()
        self._tell(_sentence(error), index())
        if is_first():
            self._let_others_read()
        # JAX's own handler at exit would wait for all processes.
        atexit.register(_exit, 130 if isinstance(error, KeyboardInterrupt) else 1)

    def _tell(self, sentence: str, process: int) -> None:
        """Store a message for all processes, unless there is one already."""
        with suppress(jax.errors.JaxRuntimeError):  # there is one, or the first process ended
            self._store.key_value_set("failed", f"{sentence} (process {process})")

    def _let_others_read(self) -> None:
        """Give the others time to read the message, because the store ends with this process."""
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
        """Report a process that has given no sign of life for too long."""
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
