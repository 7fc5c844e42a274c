"""Loggers for metrics: TensorBoard, trackio, wandb, mlflow, and a user's own loggers.

Only ``metrics.jsonl`` is exact after a kill. A logger is a class, or any function of a ``Run``,
that makes an object with ``log(step, metrics)`` and ``close()``. If the object has a ``remote_id``,
a resumed run gets it again. A logger that fails during the run is reported and not used any more;
the run goes on.
"""

import hashlib
import importlib.util
import json
import os
import posixpath
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from basis_jax import references
from basis_jax.files import read_json, replace_file

PROJECT = "basis_jax"
MLFLOW_LONGEST = 250  # characters of a metric's name
REMEMBERED = "loggers.json"  # in the run folder: the remote run of each logger


@dataclass(frozen=True)
class Run:
    """What a logger knows about its run when it is opened."""

    folder: Path
    config: Mapping[str, Any]
    next_step: int
    """The first step that will be logged; 0 in a new run. Steps after the newest checkpoint may
    have been logged before a kill. They are logged again: only wall times differ then."""
    remote_id: str = ""
    """The logger's ``remote_id`` from the run's earlier start; empty in a new run."""


@runtime_checkable
class Logger(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a step's metrics, or additional metrics of the newest step."""

    def close(self) -> None:
        """Finish pending writes."""


class TensorBoard:
    """Events in the folder ``tensorboard``. Steps that are logged again replace the old ones.

    They are written at once. tensorboardX's own thread ends on a full disk and on a clock that is
    set back, and then its full queue would stop the run.
    """

    def __init__(self, run: Run):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        folder = run.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        replaces = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(step=run.next_step, session_log=replaces))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.time()
        for name, value in metrics.items():
            summary = self._scalar(name, value)
            self._events.write_event(self._event(wall_time=now, step=step, summary=summary))
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class Wandb:
    """Weights & Biases. wandb itself reads WANDB_PROJECT, WANDB_MODE and so on. The step is logged
    as a metric, because wandb drops values for a step before its own counter."""

    def __init__(self, run: Run):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.folder.name,
            config=dict(run.config),
            dir=str(run.folder),
            id=run.remote_id or None,
            resume="allow" if run.remote_id else None,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.remote_id = self._run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """trackio, a local dashboard. A resumed run is found by its name."""

    def __init__(self, run: Run):
        import trackio

        self.remote_id = run.remote_id or f"{run.folder.name}-{uuid.uuid4().hex[:8]}"
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=self.remote_id,
            config=dict(run.config),
            resume="allow",
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow. MLFLOW_TRACKING_URI sets the server or folder."""

    def __init__(self, run: Run):
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if run.remote_id:
            self.remote_id = run.remote_id
            self._client.update_run(self.remote_id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        made = self._client.create_run(experiment, run_name=run.folder.name)
        self.remote_id = made.info.run_id
        self._client.log_dict(self.remote_id, dict(run.config), "config.json")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(mlflow_name(name), x, now, step) for name, x in metrics.items()]
        self._client.log_batch(self.remote_id, metrics=values)

    def close(self) -> None:
        self._client.set_terminated(self.remote_id)


def mlflow_name(name: str) -> str:
    """The metric's name if MLflow allows it, otherwise one that it allows.

    MLflow allows letters, digits, spaces and ``_-.:/``, relative paths without empty parts, and 250
    characters. A changed name ends in a hash of the original, so that different names stay
    different.
    """
    allowed = posixpath.normpath(re.sub(r"[^\w.:/ -]", "_", name)).lstrip("./")
    if allowed == name and len(name) <= MLFLOW_LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{allowed[: MLFLOW_LONGEST - 9]}-{digest}"


BUILT_IN: dict[str, tuple[Callable[[Run], Any], str]] = {
    "tensorboard": (TensorBoard, "tensorboardX"),
    "wandb": (Wandb, "wandb"),
    "trackio": (Trackio, "trackio"),
    "mlflow": (MLflow, "mlflow"),
}
"""By name: the logger's class and the package that it needs."""


def check_loggers(names: Sequence[str]) -> None:
    """Raise ValueError for an unknown name, a package that is not installed, and a reference that
    cannot be loaded. TensorBoard may be missing; ``Records`` reports this."""
    for name in names:
        if ":" in name:
            _own(name)
        elif name not in BUILT_IN:
            raise ValueError(
                f"train.loggers names {name!r}; allowed are {', '.join(BUILT_IN)}, "
                f"{references.FORMS}"
            )
        elif name != "tensorboard" and importlib.util.find_spec(BUILT_IN[name][1]) is None:
            raise ValueError(
                f"train.loggers names {name}, which is not installed; install it "
                f"(pip install 'basis-jax[{name}]') or leave it out"
            )


def open_loggers(
    names: Sequence[str],
    folder: Path,
    config: Mapping[str, Any],
    *,
    next_step: int,
    report: Callable[[str], None],
) -> dict[str, Logger]:
    """Open the loggers; returns them by name. A resumed run (``next_step`` > 0) continues its
    remote runs. Raises ValueError if a logger cannot be opened.
    """
    path = folder / REMEMBERED
    known = read_json(path) if next_step > 0 and path.exists() else {}
    opened: dict[str, Logger] = {}
    for name in names:
        if name == "tensorboard" and importlib.util.find_spec("tensorboardX") is None:
            report("tensorboardX is not installed: no TensorBoard events, only metrics.jsonl")
            continue
        run = Run(folder, config, next_step, known.get(name, ""))
        make = _own(name) if ":" in name else BUILT_IN[name][0]
        try:
            logger = make(run)
        except Exception as error:  # of a network, a login or a user's own code
            raise ValueError(
                f"the logger {name} of train.loggers could not be opened ({what(error)}); fix it "
                "or leave it out"
            ) from error
        _check_logger(name, logger)
        opened[name] = logger
    ids = {
        name: logger.remote_id for name, logger in opened.items() if hasattr(logger, "remote_id")
    }
    if ids:
        replace_file(path, json.dumps(known | ids, indent=2) + "\n")
    return opened


def _check_logger(name: str, logger: Any) -> None:
    for method in ("log", "close"):
        if not callable(getattr(logger, method, None)):
            raise ValueError(
                f"the logger {name} of train.loggers made a {type(logger).__name__} without "
                f"{method}(); give it log(step, metrics) and close()"
            )


def _own(reference: str) -> Callable[[Run], Any]:
    found = references.load(reference, "logger")
    if not callable(found):
        raise ValueError(
            f"train.loggers: {reference} is of the type {type(found).__name__}; give a class or a "
            "function that takes a basis_jax.runs.loggers.Run"
        )
    return found


def what(error: Exception) -> str:
    """The error's message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
