"""Problem sets from files, folders, the hub and tasks: rows into Problems."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from basis_jax.config import DataSection
from basis_jax.data import tasks
from basis_jax.data.problem import Problem
from basis_jax.verify.extract import after_hashes, last_boxed
from basis_jax.verify.gym import check_scorer

SCORERS_TRIED = 3  # problems of reasoning-gym whose scorer is tried before a run
COLUMN_LAYOUTS = (
    ("problem", "answer"),  # MATH-500, DeepScaleR, AIME
    ("problem", "solution"),  # MATH: the answer is the last box
    ("question", "answer"),  # GSM8K: the answer follows ####
    ("prompt", "reward_model.ground_truth"),  # DAPO-Math-17K: the prompt is a chat
)
"""Columns looked for, in this order, where the config names none."""


@dataclass(frozen=True)
class Source:
    """Where a data set lies. Empty column names are recognised (``COLUMN_LAYOUTS``)."""

    path: str
    split: str = "test"
    problem_field: str = ""
    answer_field: str = ""
    wrapper: str = ""
    option: str = "--eval.sets"  # what a user changes when it cannot be read


BENCHMARKS = {
    "MATH-500": Source("HuggingFaceH4/MATH-500"),
    "AIME24": Source("HuggingFaceH4/aime_2024", "train"),
    "AIME25": Source("math-ai/aime25"),
    "AMC23": Source("math-ai/amc23"),
    "HMMT25": Source("MathArena/hmmt_feb_2025", "train"),
    "Minerva": Source("math-ai/minervamath"),
    "OlympiadBench": Source("math-ai/olympiadbench", "test", "question", "final_answer"),
    "GSM8K": Source("openai/gsm8k:main"),
}


def load_training(section: DataSection) -> list[Problem]:
    """The training problems. Raises ValueError as ``load``."""
    source = Source(
        path=section.path,
        split=section.split,
        problem_field=section.problem_field,
        answer_field=section.answer_field,
        wrapper=section.problem_wrapper,
        option="--data.path",
    )
    return load(source, held_out=False)


def load_held_out(name: str, folder: str = "") -> list[Problem]:
    """A benchmark by name (from ``folder/<name>.jsonl`` where there is one), or a set by path."""
    source = BENCHMARKS.get(name, Source(name))
    local = Path(folder) / f"{name}.jsonl"
    if folder and local.is_file():
        source = replace(source, path=str(local))
    return load(source, held_out=True)


def load(source: Source, *, held_out: bool) -> list[Problem]:
    """The problems as they stand at their source: repeated rows too (the same object again, so
    DAPO's hundredfold rows cost nothing). ``held_out`` is the side of a task.

    Raises ValueError where the source cannot be read, lacks a column or holds nothing.
    """
    if source.path.startswith("task:"):
        made = tasks.problems(source.path.removeprefix("task:"), held_out=held_out)
        if source.path.startswith("task:" + tasks.GYM):
            check_scorer(source.path, [problem.answer for problem in made[:SCORERS_TRIED]])
        return made
    columns = (source.problem_field, source.answer_field)
    seen: dict[Problem, Problem] = {}
    found = []
    for row in read_rows(source):
        columns = columns if all(columns) else fill_in(columns, row, source.path)
        problem = as_problem(row, columns, source.wrapper, source.path)
        found.append(seen.setdefault(problem, problem))
    if not found:
        raise ValueError(f"{source.path} holds no problems; give another with {source.option}")
    return found


def read_rows(source: Source) -> Iterator[Mapping[str, Any]]:
    """Rows of a .json, .jsonl or .parquet file, of a data set folder, or of a hub data set."""
    local = Path(source.path)
    if local.suffix in (".json", ".jsonl"):
        yield from read_json_rows(local, source.option)
        return
    dataset = read_dataset(source.path, split=source.split, option=source.option)
    for batch in dataset.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):  # 20 times faster than row by row
            yield dict(zip(batch, values, strict=True))


def read_json_rows(path: Path, option: str) -> Iterator[Mapping[str, Any]]:
    """Objects of a JSON array, or one a line. Raises ValueError naming the line that is not one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} ({error}); give another with {option}") from error
    try:
        if text.lstrip().startswith("["):
            rows: Iterator[tuple[int, Any]] = enumerate(json.loads(text), start=1)
        else:  # not splitlines(): JSON strings may hold other line separators as they are
            lines = enumerate(text.split("\n"), start=1)
            rows = ((number, json.loads(line)) for number, line in lines if line.strip())
        for number, row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"{path}: row {number} is no object with named columns")
            yield row
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is neither a JSON array nor one JSON object a line ({error})"
        ) from error


def read_dataset(path: str, *, split: str, option: str) -> Any:
    """A ``datasets.Dataset``. ``name:subset`` asks the hub for a subset, as in openai/gsm8k:main.

    Raises one ValueError for whatever keeps it from being read, with what to do.
    """
    import datasets  # here: it takes a second, and tasks and JSON files do not need it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    local = Path(path)
    name, _, subset = path.partition(":")
    try:
        if local.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=path, split="train")
        if any((local / made).is_file() for made in ("dataset_info.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(path)
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        if local.is_dir():
            return datasets.load_dataset(path, split=split)
        return datasets.load_dataset(name, subset or None, split=split)
    except (
        OSError,
        ValueError,
        KeyError,
        HfHubHTTPError,
        HFValidationError,
        datasets.exceptions.DatasetsError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"the data set {path!r} (split {split!r}) could not be read ({reason}); give a local "
            f".json, .jsonl or .parquet file or a data set folder with {option}"
        ) from error


def fill_in(columns: tuple[str, str], row: Mapping[str, Any], path: str) -> tuple[str, str]:
    """Column names where the config leaves them empty: those of the first layout that fits."""
    for problem, answer in COLUMN_LAYOUTS:
        named = (columns[0] or problem, columns[1] or answer)
        if all(name.split(".")[0] in row for name in named):
            return named
    raise ValueError(
        f"{path} has the columns {', '.join(row)}; name those with the problem and the answer by "
        "--data.problem-field and --data.answer-field"
    )


def value_at(row: Mapping[str, Any], name: str, path: str) -> Any:
    """The value at a dotted name. Raises ValueError naming the columns that there are."""
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(
                f"{path} has no column {name!r} but {', '.join(row)}; name the right one with "
                "--data.problem-field, --data.answer-field"
            )
        value = value[part]
    return value


def as_problem(
    row: Mapping[str, Any], columns: tuple[str, str], wrapper: str, path: str
) -> Problem:
    """A row as a Problem, its answer empty where the row has none.

    A chat of one user message is that message. A worked answer is what follows its last ``####``,
    else what its last box holds; a ``solution`` with neither is no answer.
    """
    prompt, answer = (value_at(row, name, path) for name in columns)
    if isinstance(prompt, list):
        prompt = tuple((message["role"], message["content"]) for message in prompt)
        if len(prompt) == 1 and prompt[0][0] == "user":
            prompt = prompt[0][1]
    if isinstance(prompt, str):
        prefix, _, suffix = wrapper.partition("{problem}")
        prompt = prompt.strip().removeprefix(prefix).removesuffix(suffix).strip()
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    answer = "" if answer is None else answer if isinstance(answer, str) else json.dumps(answer)
    worked = after_hashes(answer) or last_boxed(answer)
    if worked is None and columns[1].endswith("solution"):
        worked = ""
    return Problem(
        prompt=prompt or "",
        answer=answer.strip() if worked is None else worked,
        kind=str(row.get("kind", "")),
    )
