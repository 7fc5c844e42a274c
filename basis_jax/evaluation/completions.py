"""``completions.jsonl``: every completion of a stand-alone evaluation, and results from it.

It has one line per rollout: sets in the config's order, problems by uid, and a problem's samples
adjacent. All results are computed from these lines only, so anybody can compute them again.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from basis_jax import processes
from basis_jax.config import DataSection
from basis_jax.data.encoding import EncodedProblems
from basis_jax.evaluation import scores
from basis_jax.evaluation.evaluate import Evaluation, complete, sha256
from basis_jax.files import (
    append_json_lines,
    json_object,
    lock,
    read_json,
    replace_file,
    whole_lines,
)
from basis_jax.runs.terminal import Pace
from basis_jax.sampling.rollouts import ROWS_PER_SLOT, Graded
from basis_jax.verify import extraction_mode, is_own
from basis_jax.verify.compare import simplify, unwrapped, without_name
from basis_jax.verify.extract import extract_answer
from basis_jax.verify.gym import submitted_answer
from basis_jax.verify.mathematics import why_not_comparable
from basis_jax.verify.notation import canonical, number

PROGRESS_EVERY_S = 10.0
FIELDS = {
    "sets": "eval.sets",
    "samples": "eval.samples",
    "temperature": "eval.temperature",
    "verifier": "data.verifier",
    **{key: f"sampling.{key}" for key in ("top_p", "top_k", "max_new_tokens")},
}
"""For each entry of a protocol, the config field that sets it."""
RULES = {
    "invalid": "a completion that could not be graded counts as wrong in every metric",
    "avg@k": "mean over problems of the mean reward of a problem's k completions",
    "pass@k": "mean over problems of 1 - binom(n - c, k) / binom(n, k), c of n completions right",
    "maj@k": "reward of the answer (field vote) that most of a problem's completions give; those "
    "without an answer do not vote; ties: the mean over the tied answers; 0 if nobody votes",
    "interval": f"95 % percentile bootstrap over problems, {scores.RESAMPLES} draws, seed 0; a "
    "problem's completions stay together",
    "average": "every set weighs the same; only of metrics that all sets have",
    "accuracy": "avg@k of a set, k being its own number of completions",
}


def write_completions(
    params: PyTree,
    evaluation: Evaluation,
    out: Path,
    protocol: Mapping[str, Any],
    report: Callable[[str], None] = print,
) -> Path:
    """Write every completion that ``out/completions.jsonl`` lacks, and return its path.

    A killed evaluation continues after its last complete line. Batches have the same boundaries
    again, so the file is the same bit for bit. Call under ``jax.set_mesh``. Raises ValueError if
    the folder belongs to another protocol, or if another process writes there.
    """
    path = out / "completions.jsonl"
    file: Any = None  # open in the first process
    with ExitStack() as held:

        def begin() -> int:
            nonlocal file
            out.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(path.open("a+b"))
            lock(file, str(out), "--out")
            settle_protocol(out, protocol)
            ends = [end for _, end in whole_lines(file)]
            file.truncate(ends[-1] if ends else 0)
            return len(ends)

        done, rollouts_before = processes.by_first(begin), 0
        for name, problems in evaluation.sets.items():
            left = done - rollouts_before
            for start, rows in chunks(params, evaluation, name, done=left, report=report):
                missing = rows[max(0, left - start) :]
                processes.by_first(functools.partial(append_json_lines, file, missing))
            rollouts_before += len(problems.problems) * evaluation.config.eval.samples_of(name)
    return path


def chunks(
    params: PyTree,
    evaluation: Evaluation,
    name: str,
    *,
    done: int,
    report: Callable[[str], None],
) -> Iterator[tuple[int, list[dict]]]:
    """(number of the first rollout, rows) of each batch of a set, without batches that are done.

    The first ``done`` rollouts of the set are done. Batches have the same shape: the last one is
    filled up with copies of its first rollout, unless the verifier grades whole batches, which must
    not see copies.
    """
    setup = evaluation.setup.for_set(name)
    problems, samples = evaluation.sets[name], evaluation.config.eval.samples_of(name)
    total = len(problems.problems) * samples
    size = min(ROWS_PER_SLOT * evaluation.setup.rows_at_once, total)
    reported, pace = time.monotonic(), Pace(done, total)
    for start in range(0, total, size):
        count = min(size, total - start)
        if start + count <= done:
            continue
        units = start + np.arange(size)
        units = np.where(units < total, units, start)
        if setup.verifier.whole_batches:
            units = units[:count]
        graded = complete(
            params,
            setup,
            problems,
            units=units,
            samples=samples,
            sampling=evaluation.sampling(name),
        )
        numbers = (units[:count] % samples).tolist()
        data = evaluation.config.held_out_data(name)
        yield start, as_rows(graded, problems, name, numbers=numbers, data=data)
        if time.monotonic() - reported > PROGRESS_EVERY_S or start + count == total:
            left = pace.left(start + count)
            report(f"{name}: {start + count} of {total} completions{left}")
            reported = time.monotonic()


def as_rows(
    graded: Graded,
    problems: EncodedProblems,
    name: str,
    *,
    numbers: Sequence[int],
    data: DataSection,
) -> list[dict[str, Any]]:
    """The rows to write for the first rollouts, whose sample numbers are ``numbers``. ``tokens`` is
    the number of tokens in the completion, including the EOS."""
    rows = []
    for i, sample in enumerate(numbers):
        problem = problems.problems[graded.rollouts.problem_ids[i]]
        answer = extracted(graded.completions[i], data.verifier, data.answer_mode)
        rows.append(
            {
                "set": name,
                "uid": problem.uid,
                "sample": sample,
                "problem": problem.prompt,
                "answer": problem.answer,
                "completion": graded.completions[i],
                "reward": float(graded.rewards[i]),
                "valid": bool(graded.valid[i]),
                "reason": graded.reasons[i],
                "kind": graded.kinds[i],
                "extracted": answer,
                "vote": vote(answer, data.verifier),
                "tokens": int(graded.rollouts.completion_lengths[i]),
                "terminated": bool(graded.rollouts.terminated[i]),
            }
        )
    return rows


def extracted(completion: str, verifier: str, answer_mode: str = "") -> str | None:
    """The answer that the verifier finds in a completion (see ``extraction_mode``), or None. For a
    user's own reward function it is the whole text."""
    if verifier == "exact" or is_own(verifier):
        return completion.strip() or None
    if verifier == "gym":
        return submitted_answer(completion) or None
    return extract_answer(completion, extraction_mode(verifier, answer_mode))


def vote(answer: str | None, verifier: str) -> str | None:
    """The text by which answers are compared in a majority vote: equal texts agree.

    With ``exact``, ``gym`` and own functions it is the answer itself. In mathematics it is the
    answer in canonical notation, without the name of a variable, and with plain numbers as exact
    fractions: 0.5, 1/2 and x = \\frac12 agree. It uses neither algebra nor the right answer.
    """
    if answer is None or verifier in ("exact", "gym") or is_own(verifier):
        return answer
    if why_not_comparable(answer):
        return answer
    text = without_name(simplify(canonical(answer)))
    value = number(text)
    return (unwrapped(text) if value is None else str(value)) or answer


def settle_protocol(out: Path, protocol: Mapping[str, Any]) -> None:
    """Write ``out/protocol.json``, or check that it equals ``protocol``."""
    path, protocol = out / "protocol.json", json.loads(json.dumps(protocol))
    if not path.exists() and not (out / "completions.jsonl").stat().st_size:
        replace_file(path, json.dumps(protocol, indent=2) + "\n")
    stored = read_json(path)
    differing = [
        f"{FIELDS.get(key, key)} is {shortened(stored.get(key))} there and "
        f"{shortened(protocol.get(key))} here"
        for key in sorted(stored.keys() | protocol.keys())
        if stored.get(key) != protocol.get(key)
    ]
    if differing:
        raise ValueError(
            f"{out} holds an evaluation of another protocol: {'; '.join(differing)}; take the "
            "values that are there, or give another --out"
        )


def shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 70 else f"{text[:40]}... (sha256 {sha256(value)[:8]})"


def results(path: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Every metric with its interval, by set and as the average over sets.

    The metrics are computed from the lines of ``path`` only. For each set there are also the
    numbers of problems left out and of completions not graded or cut at the length limit.
    ``failed`` has the sets without a result and the reason: the set could not be loaded, or none of
    its completions could be graded.

    Raises ValueError if the lines do not fit the evaluation, or if every set has failed.
    """
    rows = read_lines(path)
    described, scores_by_set, failed = {}, {}, dict(evaluation.failed)
    for name, problems in evaluation.sets.items():
        samples = evaluation.config.eval.samples_of(name)
        columns = read_set(rows, name, problems, samples, path)
        try:
            scores.check_graded(columns["valid"], name)
        except ValueError as error:
            failed[name] = str(error)
            if len(failed) == len(evaluation.sets) + len(evaluation.failed):
                raise
            continue
        scores_by_set[name] = scores.all_scores(
            *(columns[key] for key in ("reward", "valid", "vote"))
        )
        described[name] = {
            "problems": len(problems.problems),
            "read": problems.counts,
            "completions": columns["valid"].size,
            "invalid": int((~columns["valid"]).sum()),
            "truncated": float((~columns["terminated"]).mean()),
            "without_answer": float((columns["vote"] < 0).mean()),
            "tokens_mean": float(columns["tokens"].mean()),
        }
    if next(rows, None) is not None:
        raise ValueError(f"{path} has more lines than the evaluation; remove the folder")
    sets, average = scores.summary(scores_by_set)
    for name, metrics in sets.items():
        described[name]["metrics"] = metrics
    return {"sets": described, "average": average, "failed": failed, "rules": RULES}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rollouts in the file, in order. Raises ValueError for a line that is not a rollout."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row = json_object(line)
            if row is None:
                raise ValueError(f"line {number} of {path} is no JSON object; remove the folder")
            if not is_rollout(row):
                raise ValueError(
                    f"line {number} of {path} is no rollout: reward and tokens are numbers, valid "
                    "and terminated booleans, vote a text or null; remove the folder"
                )
            yield row


def is_rollout(row: Mapping[str, Any]) -> bool:
    """Whether what the results are computed from has the types that ``as_rows`` writes."""
    reward, tokens, vote = (row.get(key, row) for key in ("reward", "tokens", "vote"))
    if not all(isinstance(row.get(key), bool) for key in ("valid", "terminated")):
        return False
    if type(tokens) is not int or not 0 <= tokens < 2**31 or type(reward) not in (int, float):
        return False
    finite = abs(reward) <= sys.float_info.max  # NaN is not
    return (finite or not row["valid"]) and isinstance(vote, str | None)


def read_set(
    rows: Iterator[dict[str, Any]], name: str, problems: EncodedProblems, samples: int, path: Path
) -> dict[str, np.ndarray]:
    """Columns [M, samples] of the next set's rollouts. Votes are numbered within their problem; -1
    means no vote."""
    kinds = {"reward": float, "valid": bool, "terminated": bool, "tokens": int, "vote": int}
    shape = (len(problems.problems), samples)
    columns: dict[str, np.ndarray] = {key: np.zeros(shape, kind) for key, kind in kinds.items()}
    for i, problem in enumerate(problems.problems):
        answers: dict[str, int] = {}
        for j in range(samples):
            row = next(rows, {})
            if (row.get("set"), row.get("uid"), row.get("sample")) != (name, problem.uid, j):
                raise ValueError(
                    f"{path} does not hold sample {j} of problem {problem.uid} of {name} in its "
                    "place; remove the folder and evaluate again"
                )
            for key in columns.keys() - {"vote"}:
                columns[key][i, j] = row[key]
            text = row["vote"]
            columns["vote"][i, j] = -1 if text is None else answers.setdefault(text, len(answers))
    return columns
