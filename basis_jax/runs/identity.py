"""A run folder holds one run: its lock, and config.json with the run's config and origin."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from basis_jax.config import Config
from basis_jax.files import check_links, is_step, lock, one_line, read_json, replace_file
from basis_jax.runs.provenance import provenance
from basis_jax.saved_config import renamed

MAY_DIFFER = (
    "run_dir",  # the folder may be moved
    "data.answers_wanted",  # its effect is part of the problems' hash
    "data.reward_workers",
    "data.reward_seconds",
    "model.remat",
    "model.attention",
    "model.decode_layers",
    "loss.logprob_chunk",
    "train.log_samples",
    "train.loggers",
    "train.microbatch_rollouts",
    "train.sample_rollouts",
    "train.patience",
    "train.abort_on",
    "watch.",
    "eval.every",
    "mesh.",
    "checkpoint.",
)
"""Fields that a resumed run may change. A name that ends with a dot is a whole section.

They change where, when or how often a run computes and writes, but its results only by rounding.
``train.steps`` is one of them if ``optim.schedule`` is ``constant``; the decaying schedules depend
on it."""


@contextmanager
def lock_run(run_dir: str | Path) -> Iterator[Path]:
    """Make the folder and lock it for this process until the block ends.

    Raises ValueError if another process has locked it, if it cannot be made, or if a link in it
    leads outside.
    """
    if not str(run_dir).strip():
        raise ValueError("run_dir is empty; give a folder with --run-dir")
    run_dir = Path(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", "") or error
        raise ValueError(
            one_line(f"run folder {run_dir} cannot be made ({reason}); give another --run-dir")
        ) from None
    check_links(run_dir)
    for name in ("config.json", "metrics.jsonl", "samples.jsonl"):
        if (run_dir / name).is_dir():
            raise ValueError(f"{run_dir / name} is a folder; remove it, or give another --run-dir")
    try:
        opened = (run_dir / ".lock").open("w")
    except OSError as error:
        raise ValueError(
            f"run folder {run_dir} cannot be written to ({error.strerror}); fix that, or give "
            "another --run-dir"
        ) from None
    with opened as file:
        lock(file, f"the run folder {run_dir}", "--run-dir")
        yield run_dir


def open_run(
    config: Config,
    *,
    devices: Sequence[str],
    identity: Mapping[str, str] | None = None,
    fork_from: str = "",
) -> None:
    """Write ``config.json`` into ``config.run_dir``, or check that it holds a run of ``config``.

    The file is ``{"config": ..., "identity": ..., "starts": [...]}``. ``identity`` holds hashes of
    what the config refers to by name, such as the model and the problems. A start has the commit,
    uncommitted changes, versions and devices. It is added if it differs from the one before.
    ``fork_from`` is the checkpoint that a new run begins with; the file then names it, too.

    Raises ValueError naming the fields that differ, except those in ``MAY_DIFFER``. A run without a
    checkpoint starts from the beginning, so all its fields may differ.
    """
    run_dir = Path(config.run_dir)
    path = run_dir / "config.json"
    fields = asdict(config)
    starts, forked = [], fork_from
    if path.exists():
        before = read_config(path)
        done = [int(p.name) for p in (run_dir / "checkpoints").glob("[0-9]*") if is_step(p.name)]
        if done:
            _check_same(
                run_dir,
                described(before["config"], before.get("identity", {})),
                described(fields, identity or {}),
            )
            _check_steps(config, max(done))
            starts, forked = before["starts"], before.get("forked_from", "")
            if fork_from and fork_from != forked:
                raise ValueError(
                    f"run folder {run_dir} holds a run {_origin(forked)}, and --fork-from is "
                    f"{fork_from}; give another --run-dir for a new run"
                )
    start = {**provenance(), "devices": list(devices)}
    if start not in starts[-1:]:
        starts.append(start)
    record = {"config": fields, "identity": dict(identity or {}), "starts": starts}
    if forked:
        record["forked_from"] = forked
    replace_file(path, json.dumps(record, indent=2) + "\n")


def _origin(forked: str) -> str:
    return f"that was forked from {forked}" if forked else "that is no fork"


def start_facts(config: Config) -> dict[str, Any]:
    """What must be the same in all processes of a run before they begin."""
    about = provenance()
    return {**dict(_leaves(asdict(config))), **about.pop("versions"), **about}


def _check_steps(config: Config, done: int) -> None:
    if config.train.steps < done:
        raise ValueError(
            f"run folder {config.run_dir} has done {done} steps and train.steps is "
            f"{config.train.steps}; give {done} or more, or another --run-dir"
        )


def read_config(path: Path) -> dict[str, Any]:
    """The content of a run's config.json. Raises ValueError if it is something else."""
    try:
        record = read_json(path)
        sections = [n for n, part in asdict(Config(run_dir="")).items() if isinstance(part, dict)]
        parts = [record["config"].get(name, {}) for name in sections] + [record.get("identity", {})]
        whole = all(isinstance(part, dict) for part in parts) and isinstance(record["starts"], list)
    except (ValueError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is not a run's config.json; give another --run-dir")
    return record


def _check_same(run_dir: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [said for name, said in differences(before, now) if not _may_differ(name, now)]
    if differing:
        raise ValueError(
            f"run folder {run_dir} holds a run of another configuration: "
            f"{one_line('; '.join(differing))}; take the values that are there, or give another "
            "--run-dir"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(dotted name, what differs in words) of the fields and hashes of two runs."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return [
        (name, _difference(name, old, new))
        for name in sorted(old.keys() | new.keys())
        if not (name in old and name in new and old[name] == new[name])
        and not (name.startswith(OWN_SET) and name not in old)  # of an older version
    ]


def described(config: Mapping[str, Any], identity: Mapping[str, str]) -> dict[str, Any]:
    """A run as ``differences`` compares it. The config may be of an older version."""
    fields = json.loads(json.dumps(_with_defaults(config)))  # tuples as lists
    return {**fields, "contents of": dict(identity)}


def _with_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config of an older version. Fields that it did not have yet get their defaults."""
    defaults, fields = json.loads(json.dumps(asdict(Config(run_dir="")))), renamed(fields)
    merged = {**defaults, **fields}
    for name, section in defaults.items():
        if isinstance(section, dict) and name in fields:
            merged[name] = {**section, **fields[name]}
    return merged


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


CONTENTS = {
    "contents of.data.path": "the training problems of data.path have changed since the run began",
    "contents of.model.path": "the model in model.path has changed since the run began",
    "contents of.estimator.name": "the estimator's file has changed since the run began",
    "contents of.sampling.plan": "the file of the rollout plan has changed since the run began",
    "contents of.data.verifier": "the file of the reward function in data.verifier has changed "
    "since the run began",
}


OWN_REWARD = "contents of.data.rewards "
OWN_VERIFIER = "contents of.eval.set_verifiers "
OWN_SET = "contents of.eval.sets "


def _difference(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if name in CONTENTS:
        return CONTENTS[name]
    if name.startswith(OWN_REWARD):
        reward = name.removeprefix(OWN_REWARD)
        return f"the file of the reward function {reward} has changed since the run began"
    if name.startswith(OWN_VERIFIER):
        held_out = name.removeprefix(OWN_VERIFIER)
        return f"the file of the verifier of {held_out} has changed since the run began"
    if name.startswith(OWN_SET):
        held_out = name.removeprefix(OWN_SET)
        return f"the held-out problems of {held_out} have changed since the run began"
    return f"{name} is {_shown(old, name)} there and {_shown(new, name)} here"


def _shown(leaves: Mapping[str, Any], name: str) -> str:
    return json.dumps(leaves[name]) if name in leaves else "absent"


def _may_differ(name: str, config: Mapping[str, Any]) -> bool:
    if name == "train.steps":
        return config["optim"]["schedule"] == "constant"
    return any(name == field or field[-1] == "." and name.startswith(field) for field in MAY_DIFFER)
