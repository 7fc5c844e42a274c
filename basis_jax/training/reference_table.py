"""The offline reference table: how often the reference policy solves each training problem.

A table is one .npz file. It holds the successes and trials of each problem, the reward of every
rollout, the problem's identity (content hash and prompt hash), and the table's origin (model
fingerprint, sampling settings, verifier). A rollout that could not be graded does not count as a
trial, and is reported (``ungraded_warning``). A table is used only if its origin fits the run.
Making it costs M x n rollouts, once; 1 M problems take 32 MB plus 4 MB per rollout of a problem.
Tables of older versions, which have no rewards, are read too. A table may also hold the reference
policy's ``prompt_features``, with or without rollouts: M prefills, 4 MB per feature for 1 M
problems.
"""

import functools
import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import PyTree

from basis_jax import processes
from basis_jax.config import DataSection, SamplingSection
from basis_jax.data.encoding import EncodedProblems
from basis_jax.files import check_regular, one_line, replace_file
from basis_jax.runs.terminal import Pace
from basis_jax.sampling.rollouts import ROWS_PER_SLOT, RolloutSetup, roll_out
from basis_jax.training.prompt_features import prompt_features
from basis_jax.verify import source_fingerprint

SAVE_EVERY_S = 10.0
LARGEST = 1 << 34
"""Bytes of a table: 4,000 rollouts of each of a million problems."""
FIELDS = {
    "verifier": "data.verifier",
    "features": "estimator.features",
    **{k: f"sampling.{k}" for k in ("temperature", "top_p", "top_k", "max_new_tokens")},
    "eos_ids": "eos_ids (sampling.stop_tokens and the model's)",
}
"""For each entry of a table's origin, the config fields that set it."""


@dataclass(frozen=True)
class ReferenceTable:
    """Counts of M problems. ``position`` of the planned M x samples rollouts are done."""

    successes: np.ndarray  # [M] sum of the rewards, clipped into [0, 1]: int32, or float32
    trials: np.ndarray  # [M] int32: graded rollouts; those that failed to verify do not count
    uids: np.ndarray  # [M] int64
    prompt_hashes: np.ndarray  # [M] uint64
    features: np.ndarray  # [M, e] float32; e may be 0
    made_by: dict
    position: int
    rewards: np.ndarray | None = None  # [M, samples] float32, NaN: not (yet) graded; None: unknown

    @property
    def fractional(self) -> bool:
        """Whether a reward is neither 0 nor 1, so that the counts are not enough."""
        return self.rewards is not None and not _binary(self.rewards)


def table_origin(
    setup: RolloutSetup, *, model_fingerprint: str, sampling: SamplingSection, data: DataSection
) -> dict:
    """What two tables must have in common to be comparable. The dtype of decoding is not part of
    it."""
    return {
        "model": model_fingerprint,
        "verifier": described_rewards(data),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_new_tokens": sampling.max_new_tokens,
        "eos_ids": list(setup.eos_ids),
    }


def described_rewards(data: DataSection) -> str:
    """What grades training rollouts: names, weights, and the hashes of a user's own files."""
    words = [f"{data.verifier} {data.answer_mode}".strip()]
    if data.verifier_weight != 1:
        words.append(f"x {data.verifier_weight:g}")
    words += [f"+ {name} x {weight:g}" for name, weight in data.rewards.items()]
    if "format" in data.rewards:
        words.append(f"(format {data.format_pattern})")
    if "overlong" in data.rewards:
        words.append(f"(overlong {data.overlong_limit} {data.overlong_buffer})")
    hashes = [source_fingerprint(name) for name in (data.verifier, *data.rewards)]
    return " ".join([*words, *(f"sha256 {found}" for found in hashes if found)])


def prompt_hashes(problems: EncodedProblems) -> np.ndarray:
    """64-bit hash of each tokenised prompt. It shows a changed template or few-shot prompt."""
    rows = zip(problems.tokens, problems.lengths, strict=True)
    digests = [
        hashlib.sha256(np.ascontiguousarray(t[:n], np.int32).tobytes()).digest() for t, n in rows
    ]
    return np.array([int.from_bytes(d[:8], "little") for d in digests], np.uint64)


def save(table: ReferenceTable, path: Path) -> None:
    """Write the table; the file is replaced in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    fields = {**vars(table), "made_by": json.dumps(table.made_by, sort_keys=True)}
    np.savez(content, **{name: x for name, x in fields.items() if x is not None})
    replace_file(path, content.getbuffer())


def load(path: Path) -> ReferenceTable:
    """Read a table. Raises ValueError if the file is missing or is not a table."""
    try:
        check_regular(path)
        if not zipfile.is_zipfile(path) and path.exists():
            raise ValueError("it is no .npz file")
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            if sum(part.file_size for part in file.zip.infolist()) > LARGEST:
                raise ValueError(f"it unpacks to more than {LARGEST:,} bytes")
            fields = {name: file[name] for name in file.files}
        fields["made_by"] = json.loads(str(fields["made_by"]))
        table = ReferenceTable(**{**fields, "position": int(fields["position"])})
        _check(table)
        return table
    except FileNotFoundError:
        raise ValueError(
            f"no reference table at {path}; make it with scripts/reference_stats.py or leave "
            "estimator.table empty"
        ) from None
    except Exception as error:  # of zip, of NumPy's headers and types, of JSON; out of memory
        raise ValueError(
            one_line(
                f"{path} is not a reference table ({error or type(error).__name__}); make it again "
                "with scripts/reference_stats.py"
            )
        ) from error


def _check(table: ReferenceTable) -> None:
    """Raise ValueError unless the parts have the shapes, types and values of ``ReferenceTable``."""
    size, samples = table.uids.size, table.made_by["samples"]
    if type(samples) is not int or not 0 <= table.position <= samples * size:
        raise ValueError(f"it has {table.position} rollouts of {size} problems x {samples!r}")
    axes = {"successes": 1, "trials": 1, "uids": 1, "prompt_hashes": 1, "features": 2, "rewards": 2}
    kinds = {"successes": "if", "trials": "i", "uids": "i", "prompt_hashes": "u"}
    for name, count in axes.items():
        part = getattr(table, name)
        if name == "rewards" and part is None:
            continue
        if part.ndim != count or len(part) != size or part.dtype.kind not in kinds.get(name, "f"):
            raise ValueError(f"{name} is {part.dtype}{list(part.shape)} for {size} problems")
    if table.rewards is not None and table.rewards.shape[1] != samples:
        raise ValueError(f"it has {table.rewards.shape[1]} rewards of a problem, not {samples}")
    if len({*zip(table.uids.tolist(), table.prompt_hashes.tolist(), strict=True)}) != size:
        raise ValueError("it has a problem twice")
    counted = (table.successes >= 0) & (table.successes <= table.trials)  # NaN is neither
    if not (np.all(counted) and np.all(table.trials <= samples)):
        raise ValueError(f"its successes are not 0 to trials, or its trials not 0 to {samples}")
    infinite = table.rewards is not None and np.isinf(table.rewards).any()  # NaN: not graded
    if infinite or not np.isfinite(table.features).all():
        raise ValueError("its features or rewards are not finite")


def rows_for(
    table: ReferenceTable, problems: EncodedProblems, origin: dict, path: Path
) -> ReferenceTable:
    """The rows of ``table`` for ``problems``, in their order. The table may hold more problems.

    Raises ValueError if the table has another origin, is unfinished or lacks a problem.
    """
    differing = [key for key in origin if table.made_by.get(key) != origin[key]]
    if differing:
        says = one_line(
            "; ".join(
                f"{FIELDS.get(k, k)} {table.made_by.get(k)!r}, run {origin[k]!r}" for k in differing
            )
        )
        raise ValueError(
            f"the table of estimator.table, {path}, does not fit this run ({says}); make one for "
            "this run with scripts/reference_stats.py"
        )
    total = int(table.made_by["samples"]) * len(table.uids)
    if table.position < total:
        raise ValueError(
            f"the table of estimator.table, {path}, is unfinished ({table.position} of {total} "
            "rollouts); run scripts/reference_stats.py again to finish it"
        )
    hashes = prompt_hashes(problems)
    rows = {
        (int(u), int(h)): i
        for i, (u, h) in enumerate(zip(table.uids, table.prompt_hashes, strict=True))
    }
    keys = [(p.uid, int(h)) for p, h in zip(problems.problems, hashes, strict=True)]
    missing = sum(key not in rows for key in keys)
    if missing:
        raise ValueError(
            f"the table of estimator.table, {path}, lacks {missing} of the run's {len(keys)} "
            "problems (or has them with other prompts); make one for this run with "
            "scripts/reference_stats.py"
        )
    index = np.array([rows[key] for key in keys])
    return replace(
        table,
        successes=table.successes[index],
        trials=table.trials[index],
        uids=table.uids[index],
        prompt_hashes=table.prompt_hashes[index],
        features=table.features[index],
        rewards=None if table.rewards is None else table.rewards[index],
    )


def build(
    params: PyTree,
    setup: RolloutSetup,
    problems: EncodedProblems,
    *,
    samples: int,
    features: int = 0,
    sampling: SamplingSection,
    origin: dict,
    path: Path,
    report: Callable[[str], None] = lambda text: None,
) -> ReferenceTable:
    """Make the table at ``path``, or finish the one begun there. Features are made first.

    Rollout u of the plan is sample u // M of problem u mod M. The file is saved every 10 s with the
    number of rollouts done, so a killed run continues from its last save and counts nothing twice.
    """
    size = len(problems.problems)
    origin = {**origin, "samples": samples, "features": features, "seed": setup.seed}
    table = ReferenceTable(
        successes=np.zeros(size, np.int32),
        trials=np.zeros(size, np.int32),
        uids=np.array([p.uid for p in problems.problems], np.int64),
        prompt_hashes=prompt_hashes(problems),
        features=np.zeros((size, 0), np.float32),
        made_by=origin,
        position=0,
        rewards=np.full((size, samples), np.nan, np.float32),
    )
    empty = table
    table = processes.by_first(lambda: resumed(load(path), empty, path) if path.exists() else empty)
    if table.features.shape[1] < features:
        made_features = prompt_features(
            params, setup.model_config, problems, mesh=setup.mesh, size=features
        )
        table = replace(table, features=made_features)
        with_features = table
        processes.by_first(lambda: save(with_features, path))
        report(f"reference table: {features} features of {size} problems")
    saved, pace = time.monotonic(), Pace(table.position, size * samples)

    def keep(table: ReferenceTable) -> None:
        nonlocal saved
        if table.position == size * samples or time.monotonic() - saved > SAVE_EVERY_S:
            save(table, path)
            saved = time.monotonic()
            left = pace.left(table.position)
            report(f"reference table: {table.position} of {size * samples} rollouts{left}")

    while table.position < size * samples:
        units = np.arange(
            table.position, min(table.position + ROWS_PER_SLOT * setup.rows_at_once, size * samples)
        )
        table = with_rollouts(params, setup, problems, table, sampling=sampling, units=units)
        processes.by_first(functools.partial(keep, table))
    return table


def ungraded_warning(table: ReferenceTable) -> str:
    """A warning if some rollouts of a finished table could not be graded, else ""."""
    rollouts = int(table.made_by["samples"]) * len(table.uids)
    ungraded = rollouts - int(table.trials.sum())
    if not ungraded:
        return ""
    without = int(np.sum(table.trials == 0))
    return (
        f"warning: {ungraded} of {rollouts} reference rollouts could not be graded and are left "
        f"out of the pass rates, so that {without} of {len(table.uids)} problems have none; look "
        "at the right answers and at data.verifier"
    )


def resumed(begun: ReferenceTable, empty: ReferenceTable, path: Path) -> ReferenceTable:
    """The table begun on disk. Raises ValueError if its plan is another one."""
    same = (
        begun.made_by == empty.made_by
        and np.array_equal(begun.uids, empty.uids)
        and np.array_equal(begun.prompt_hashes, empty.prompt_hashes)
    )
    if not same:
        raise ValueError(
            f"{path} holds a reference table of another model, sampling setting or problem set; "
            "give another path or remove the file"
        )
    return begun


def with_rollouts(
    params: PyTree,
    setup: RolloutSetup,
    problems: EncodedProblems,
    table: ReferenceTable,
    *,
    sampling: SamplingSection,
    units: np.ndarray,
) -> ReferenceTable:
    """The table after the rollouts ``units`` of the plan."""
    size = len(problems.problems)
    ids = (units % size).astype(np.int32)
    graded = roll_out(
        params,
        setup,
        problems,
        ids=ids,
        samples=(units // size).astype(np.int32),
        sampling=sampling,
        stream="reference",
        step=0,
    )
    graded_rewards = np.asarray(graded.rewards, np.float32)
    valid = graded.valid & np.isfinite(graded_rewards)
    position, trials = int(units[-1]) + 1, table.trials.copy()
    np.add.at(trials, ids, valid.astype(np.int32))
    new = np.where(valid, graded_rewards, np.nan)
    if table.rewards is not None:
        rewards = table.rewards.copy()
        rewards[ids, units // size] = new
        successes = _successes(rewards)
        return replace(
            table, successes=successes, trials=trials, position=position, rewards=rewards
        )
    if not _binary(new):
        raise ValueError(
            "a rollout has a reward other than 0 and 1, which the table begun by an older version "
            "cannot keep; remove that table and make it again"
        )
    successes = table.successes.copy()
    np.add.at(successes, ids, (new == 1).astype(np.int32))
    return replace(table, successes=successes, trials=trials, position=position)


def _binary(rewards: np.ndarray) -> bool:
    return bool(np.all(np.isnan(rewards) | (rewards == 0) | (rewards == 1)))


def _successes(rewards: np.ndarray) -> np.ndarray:
    """Sum of every problem's rewards, each clipped into [0, 1]."""
    total = np.clip(np.nan_to_num(rewards.astype(np.float64)), 0, 1).sum(axis=1)
    return np.asarray(total, np.int32 if np.all(total == np.floor(total)) else np.float32)
