"""Problem sets from files, folders, the hub and tasks: rows into Problems."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from basis_jax.config import DataSection
from basis_jax.data import tasks
from basis_jax.data.answers import WANTED, read_answer
from basis_jax.data.benchmarks import BENCHMARKS, Source
from basis_jax.data.chats import read_prompt
from basis_jax.data.hub import hub_rows
from basis_jax.data.problem import Problem
from basis_jax.data.tables import CSV, JSON, READABLE, Rows, file_kind, read_table
from basis_jax.data.values import held_in, is_missing, listing
from basis_jax.files import check_regular, home, one_line
from basis_jax.verify import needs_answers
from basis_jax.verify.criteria import Tolerance, olympiad_tolerance
from basis_jax.verify.gym import check_scorer
from basis_jax.verify.verdicts import Verifier

SCORERS_TRIED = 3  # problems of reasoning-gym whose scorer is tried before a run
COLUMN_LAYOUTS = (
    ("problem", "answer"),  # MATH-500, DeepScaleR, AIME
    ("problem", "solution"),  # MATH: the answer is the last box
    ("question", "answer"),  # GSM8K: the answer follows ####
    ("prompt", "reward_model.ground_truth"),  # DAPO-Math-17K: the prompt is a chat
    ("question", "final_answer"),  # OlympiadBench: a list
    ("prompt", "answer"),
    ("messages", "answer"),
    ("conversations", "answer"),  # from and value
)
"""Columns that are looked for, in this order, if the config names none."""
ADVICE = "name the right one with --data.problem-field, --data.answer-field"


def load_training(section: DataSection, verifier: Verifier | None = None) -> list[Problem]:
    """The training problems, with the columns of their rows that the verifier reads (None: all).
    Raises ValueError as ``load``."""
    source = Source(
        path=section.path,
        split=section.split,
        problem_field=section.problem_field,
        answer_field=section.answer_field,
        wrapper=section.problem_wrapper,
        wanted=section.answers_wanted,
        option="--data.path",
    )
    return load(read_for(source, section, verifier), held_out=False)


def load_more(path: str, section: DataSection, verifier: Verifier | None = None) -> list[Problem]:
    """The problems of a further training set, of ``data.more_sets``. Raises ValueError as
    ``load``."""
    named = (section.problem_field, section.answer_field)
    source = Source(
        path=path,
        split=section.split,
        problem_field=section.problem_field,
        answer_field=section.answer_field,
        wanted=section.answers_wanted,
        otherwise=((named[0], ""), ("", named[1]), ("", "")),
        option="--data.more-sets",
    )
    return load(read_for(source, section, verifier), held_out=False)


def answers_needed(section: DataSection) -> bool:
    """Whether some verifier or reward of the section cannot grade a problem without an answer."""
    return any(needs_answers(name) for name in (section.verifier, *section.rewards))


def read_for(source: Source, section: DataSection, verifier: Verifier | None) -> Source:
    """The source, with the columns that the grading of its problems needs."""
    source = replace(source, needs_answers=answers_needed(section))
    if verifier is None:
        return source
    return replace(source, columns=verifier.columns, required=verifier.required_columns)


def load_held_out(
    name: str,
    folder: str = "",
    section: DataSection | None = None,
    verifier: Verifier | None = None,
) -> list[Problem]:
    """A benchmark by name, or a set by path. If ``folder`` has a readable file of the benchmark's
    name, such as ``<name>.jsonl``, that is used.

    A set by path has the columns that ``section`` names. If it lacks them, they are recognised, and
    so are those of a benchmark whose columns are not those on the hub. Raises ValueError as
    ``load``.
    """
    section = section or DataSection()
    named, unnamed = (section.problem_field, section.answer_field), ("", "")
    if folder and not Path(folder).is_dir():
        raise ValueError(f"eval.folder is {folder}, which is no folder; give another")
    if name not in BENCHMARKS:
        source = Source(
            name,
            problem_field=section.problem_field,
            answer_field=section.answer_field,
            wrapper=section.problem_wrapper,
            wanted=section.answers_wanted,
            otherwise=((named[0], ""), ("", named[1]), unnamed),
        )
    else:
        source = replace(BENCHMARKS[name], otherwise=(named, unnamed))
    source = read_for(source, section, verifier)
    if local := stand_in(name, folder):
        source = replace(source, path=str(local))
    return load(source, held_out=True)


def stand_in(name: str, folder: str) -> Path | None:
    """The file of a folder that stands in for a set: ``<name>.jsonl`` before others."""
    if not folder:
        return None
    usual = Path(folder) / f"{name}.jsonl"
    if usual.is_file():
        return usual
    files = (p for p in sorted(Path(folder).iterdir()) if p.is_file() and file_kind(p))
    return next((p for p in files if p.name.startswith(f"{name}.")), None)


def load(source: Source, *, held_out: bool) -> list[Problem]:
    """All problems of a source, repeated rows included. Equal rows are the same object, so DAPO's
    rows, each a hundred times, cost nothing. ``held_out``: which side of a task.

    A row without a problem or an answer is a Problem with an empty one. Raises ValueError, one
    sentence with file and row, if the source cannot be read, lacks a column, is empty, or has a row
    that cannot be understood.
    """
    if source.path.startswith("task:"):
        try:
            made = tasks.problems(source.path.removeprefix("task:"), held_out=held_out)
        except ValueError as error:
            raise ValueError(f"{error}; give another with {source.option}") from error
        if source.path.startswith("task:" + tasks.GYM):
            check_scorer(source.path, [problem.answer for problem in made[:SCORERS_TRIED]])
        check_required(source, ())
        return made
    if source.wanted not in WANTED:
        raise ValueError(
            f"data.answers_wanted is {source.wanted!r}; allowed are {', '.join(WANTED)}"
        )
    try:
        found = list(problems_of(source))
    except MemoryError as error:
        raise ValueError(
            f"{source.path} does not fit into memory; give a smaller file with {source.option}"
        ) from error
    except RecursionError as error:
        raise ValueError(
            f"{source.path} has a row whose columns are nested too deep; give another file with "
            f"{source.option}"
        ) from error
    except ValueError as error:
        raise ValueError(one_line(str(error))) from error
    if not found:
        raise ValueError(f"{source.path} holds no problems; give another with {source.option}")
    return found


def problems_of(source: Source) -> Iterator[Problem]:
    """Rows as Problems. Equal problems with the same columns are the same object. Raises ValueError
    as ``load``."""
    unit, rows = read_rows(source)
    columns = None
    seen: dict[Problem, Problem] = {}
    for number, row in rows:
        try:
            if columns is None:
                columns = choose_columns(row, source)
                check_required(source, row)
            problem = as_problem(row, columns, source)
        except ValueError as error:
            raise ValueError(f"{source.path}, {unit} {number}: {error}") from error
        known = seen.setdefault(problem, problem)
        yield known if known.columns == problem.columns else problem


def read_rows(source: Source) -> tuple[str, Rows]:
    """The word for a row in messages ("line" or "row"), and the rows with their numbers, from a
    file, a folder or the hub. A name that can only be local is never looked for on the hub."""
    if not source.path.strip():
        raise ValueError(f"{source.option} is empty; {READABLE}, a folder or a hub id")
    try:
        path = home(source.path)
        before_colon = home(source.path.partition(":")[0])
        kind = file_kind(path)
        check_regular(path)
        if path.is_file() and kind is None:
            raise ValueError(f"{path} is of an unknown kind; {READABLE}")
        if kind and not path.exists():
            raise ValueError(f"there is no file {path}; {READABLE}")
        if before_colon != path and before_colon.is_file():
            raise ValueError(f"{source.path} asks a file for a subset; leave out the colon")
        local_only = source.path.startswith((".", "/", "~")) or source.path.count("/") > 1
        if local_only and not path.exists() and not before_colon.exists():
            raise ValueError(f"there is no file or folder {source.path}; {READABLE}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}, with {source.option}") from error
    if path.is_file() and kind in (JSON, CSV):
        return read_table(path)
    return "row", hub_rows(source.path, split=source.split, option=source.option)


def choose_columns(row: Mapping[str, Any], source: Source) -> tuple[str, str]:
    """The columns with the problem and the answer: those that the source names, else those of the
    first layout that fits. Raises ValueError, listing the row's columns, if none fits."""
    named = (source.problem_field, source.answer_field)
    if all(named) and not source.otherwise:
        return named
    for choice in (named, *source.otherwise):
        for layout in COLUMN_LAYOUTS:
            columns = (choice[0] or layout[0], choice[1] or layout[1])
            if all(has_column(row, name) for name in columns):
                return columns
    if not source.needs_answers and not source.answer_field:
        for column in (source.problem_field, *(layout[0] for layout in COLUMN_LAYOUTS)):
            if column and has_column(row, column):
                return column, ""
    raise ValueError(
        f"the row has the columns {listing(row)}; name those with the problem and the answer by "
        "--data.problem-field and --data.answer-field"
    )


def check_required(source: Source, names: Collection[str]) -> None:
    """Raise ValueError for a missing column that a reward function asks for."""
    for name in source.required:
        if name not in names:
            raise ValueError(
                f"the reward function asks for {name!r}, and the columns of {source.path} are "
                f"{listing(names) or 'none'}; rename the parameter or give it a default"
            )


def has_column(row: Mapping[str, Any], name: str) -> bool:
    return name in row or name.split(".")[0] in row


def value_at(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, whose name may contain dots, or the value at a dotted name inside
    objects; None if one of the objects is null. Raises ValueError, listing the columns, if there is
    no such column."""
    if name in row:
        return row[name]
    outer, _, inner = name.partition(".")
    inside = row.get(outer)
    if isinstance(inside, dict) and inner in inside:  # as nearly always
        return inside[inner]
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        outer = ".".join(parts[:i])
        if outer not in row:
            continue
        inside = row[outer]
        if isinstance(inside, str) and inside[:1] == "{":  # as CSV files hold objects
            inside = held_in(inside)
        if is_missing(inside):
            return None
        if isinstance(inside, Mapping):
            try:
                return value_at(inside, ".".join(parts[i:]))
            except ValueError:
                break
    raise ValueError(f"the row has no column {name!r} but {listing(row)}; {ADVICE}")


def as_problem(row: Mapping[str, Any], columns: tuple[str, str], source: Source) -> Problem:
    """A row as a Problem. Its prompt or answer is empty if the row has none.

    The answer in a worked solution is what follows the last ``####``, else the content of the last
    box; a ``solution`` with neither has no answer. Several answers are all wanted if
    ``source.wanted`` says so, or the row itself: ``answers_wanted``, or OlympiadBench's
    ``is_multiple_answer``. The tolerance of numbers is the source's, or that of OlympiadBench's
    ``error``. The columns are those that the source names, or all except the problem's. Raises
    ValueError for values that are not a problem or an answer.
    """
    return Problem(
        prompt=read_prompt(value_at(row, columns[0]), source.wrapper),
        answer=answer_in(row, columns[1], source),
        kind=kind_of(row["kind"]) if "kind" in row else "",
        columns={
            name: value
            for name, value in row.items()
            if (name != columns[0] if source.columns is None else name in source.columns)
        },
    )


def answer_in(row: Mapping[str, Any], column: str, source: Source) -> str:
    """The answer of a row. If none is needed and the source names no column for it, a value that
    cannot be read gives no answer; it is still one of the columns."""
    try:
        answer = value_at(row, column) if column else ""
        one_text = isinstance(answer, str) and answer[:1] not in ("[", "{")
        return read_answer(
            answer,
            worked=column.endswith("solution"),
            wanted=source.wanted if one_text else wanted_in(row, source.wanted),
            tolerance=tolerance_in(row, column, source.tolerance),
        )
    except ValueError:
        if source.needs_answers or source.answer_field:
            raise
        return ""


def kind_of(value: Any) -> str:
    """A row's kind, as a text; empty for lists and objects."""
    is_kind = not is_missing(value) and not isinstance(value, list | Mapping)
    return str(value).encode("utf-8", "replace").decode() if is_kind else ""


def tolerance_in(row: Mapping[str, Any], answer_column: str, usual: Tolerance) -> Tolerance:
    """How far from the right number an answer to this row may be."""
    if answer_column != "final_answer" or "error" not in row:
        return usual
    return olympiad_tolerance(None if is_missing(row["error"]) else row["error"])


def wanted_in(row: Mapping[str, Any], usual: str) -> str:
    """Whether any or all of a row's answers are wanted."""
    if "is_multiple_answer" in row and str(row["is_multiple_answer"]).lower() == "true":
        return "all"
    wanted = row.get("answers_wanted")
    if is_missing(wanted):
        return usual
    if wanted not in WANTED:
        raise ValueError(f"answers_wanted is {wanted!r}; allowed are {', '.join(WANTED)}")
    return wanted
