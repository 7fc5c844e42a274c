"""Rows of parquet files, folders and data sets on the hub, read by the package ``datasets``."""

import glob
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from basis_jax.data.tables import CSV, JSON, LARGEST_TEXT, PARQUET, Rows, file_kind, read_table
from basis_jax.files import home, read_json

MEDIA = ("Image", "Audio", "Video", "Pdf")
"""Types of columns that are not read, because decoding them needs further packages."""
SAVED = ("dataset_info.json", "dataset_dict.json")  # written by save_to_disk


def hub_rows(path: str, *, split: str, option: str) -> Rows:
    """Rows of a parquet file, a folder, or a data set on the hub. ``name:subset`` asks for a
    subset, as in openai/gsm8k:main. Floats of less than 64 bits have the digits that were written
    (0.1), class labels their names.

    Raises ValueError, with the cause and what to do, if it cannot be read for any reason."""
    try:
        yield from enumerate(found_rows(path, split), start=1)
    except Exception as error:  # builders of every format, and the network, raise what they like
        field = "data.split" if option == "--data.path" else "split"
        raise ValueError(
            f"the data set {path!r} ({field} {split!r}) could not be read ({causes(error)}); give "
            f"a local .json, .jsonl, .csv or .parquet file or a data set folder with {option}"
        ) from error


def found_rows(path: str, split: str) -> Iterator[dict[str, Any]]:
    """The rows, wherever they are."""
    import datasets  # imported here: it takes a second, and tasks and files do not need it

    name, _, subset = path.partition(":")
    if (local := home(path)).exists():
        subset = ""
    else:
        local = home(name)
    if local.is_file() and file_kind(local) is PARQUET:
        check_parquet(local)
        itself = glob.escape(str(local))
        return rows_of(datasets.load_dataset("parquet", data_files=itself, split="train"))
    if any((local / made).is_file() for made in SAVED):
        return rows_of(read_saved(local, split))
    if local.is_dir():
        files = folder_files(local, subset)
        wanted = {split: files[split]} if split in files else files
        if wanted and all(file_kind(f) in (JSON, CSV) for part in wanted.values() for f in part):
            return split_rows(wanted, split)
        return rows_of(datasets.load_dataset(str(local), subset or None, split=split))
    return rows_of(datasets.load_dataset(name, subset or None, split=split))


def rows_of(dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a ``datasets.Dataset``, without columns of media."""
    media = [name for name, kind in dataset.features.items() if type(kind).__name__ in MEDIA]
    dataset = dataset.remove_columns(media)
    changes = {name: as_written(kind) for name, kind in dataset.features.items()}
    for batch in dataset.iter(batch_size=1000):
        for name, change in changes.items():
            if change:
                batch[name] = [v if v is None else change(v) for v in batch[name]]
        for values in zip(*batch.values(), strict=True):  # 20 times faster than row by row
            yield dict(zip(batch, values, strict=True))


def split_rows(files: Mapping[str, Sequence[Path]], split: str) -> Iterator[dict[str, Any]]:
    """The rows of a split of JSON and CSV files, or of slices of splits, as in train[:100]+test."""
    import datasets

    if split in files:
        return text_rows(files[split])
    rows = {name: list(text_rows(part)) for name, part in files.items()}
    counts = {name: len(part) for name, part in rows.items()}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(counts)
    return itertools.chain(*(rows[part.splitname][part.from_ : part.to] for part in parts))


def text_rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The rows of JSON and CSV files, one after the other."""
    try:
        for file in files:
            for _, row in read_table(file)[1]:
                yield dict(row)
    except ValueError as error:
        raise ValueError(str(error)) from None  # the message already has the cause


def as_written(feature: Any) -> Callable[[Any], Any] | None:
    """The function that restores what was written from a feature's values other than null, or None
    if it is not needed."""
    kind = getattr(feature, "dtype", "")
    if type(feature).__name__ == "ClassLabel":
        return lambda number: feature.names[number] if number >= 0 else None
    if kind in ("float16", "float32") and type(feature).__name__ == "Value":
        narrow = np.dtype(kind).type
        return lambda number: float(str(narrow(number)))
    if isinstance(feature, dict):
        inside = {name: change for name, part in feature.items() if (change := as_written(part))}
        if inside:
            return lambda value: {n: written(v, inside.get(n)) for n, v in value.items()}
    if item := as_written(feature.feature) if hasattr(feature, "feature") else None:
        return lambda values: [written(value, item) for value in values]
    return None


def written(value: Any, change: Callable[[Any], Any] | None) -> Any:
    return value if value is None or change is None else change(value)


def read_saved(folder: Path, split: str) -> Any:
    """The data set that ``save_to_disk`` wrote. Raises ValueError for a missing split, for files
    outside of the folder, and for damaged files, in which a text may end beyond the file."""
    import datasets

    for state in (folder / "state.json", *sorted(folder.glob("*/state.json"))):
        files = read_json(state)["_data_files"] if state.exists() else ()
        for name in (str(file["filename"]) for file in files):
            if Path(name).name != name or not (state.parent / name).is_file():
                raise ValueError(f"{state} names {name!r}, which is no file beside it")
    saved = datasets.load_from_disk(str(folder))
    dataset = the_split(saved, split) if isinstance(saved, Mapping) else saved
    dataset.data.validate(full=True)
    return dataset


def folder_files(folder: Path, subset: str) -> dict[str, list[Path]]:
    """The files of every split, if our own readers can read them; {} if its README.md sets options
    of another reader. Raises ValueError for files outside of the folder, for a file that has no
    rows to read, and for parquet files that unpack to too much."""
    import datasets

    config = datasets.load_dataset_builder(str(folder), subset or None).config
    common = ("name", "version", "data_dir", "data_files", "description")
    usual = type(config)(**{name: getattr(config, name) for name in common})
    roots = {os.path.abspath(folder), os.path.realpath(folder)}  # the folder may be a link
    chosen: dict[str, list[Path]] = {}
    for name, found in (config.data_files or {}).items():
        for file in map(Path, found):
            if not any(Path(os.path.abspath(file)).is_relative_to(root) for root in roots):
                raise ValueError(f"its README.md names {file}, which is not in the folder")
            if file_kind(file) is None and file.suffix != ".txt":
                raise ValueError(f"{file} is of an unknown kind")
            if file_kind(file) is PARQUET:
                check_parquet(file)
            chosen.setdefault(str(name), []).append(file)
    return chosen if config == usual else {}


def check_parquet(path: Path) -> None:
    """Raise ValueError if a file states that it unpacks to more than ``LARGEST_TEXT`` bytes, with
    at least 8 bytes per row and per value. A few bytes can stand for 1e9 equal rows."""
    import pyarrow.parquet

    about = pyarrow.parquet.read_metadata(path)
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    size = sum(group.total_byte_size for group in groups)
    values = sum(group.column(j).num_values for group in groups for j in range(group.num_columns))
    if max(size, about.num_rows * 8, values * 8) > LARGEST_TEXT:
        raise ValueError(
            f"{path.name} unpacks to {about.num_rows:,} rows with {values:,} values, which is too "
            "large to read"
        )


def the_split(saved: Mapping[str, Any], split: str) -> Any:
    if split not in saved:
        raise ValueError(f"it has the splits {', '.join(saved)}")
    return saved[split]


def causes(error: BaseException) -> str:
    """The message of an error, and those of the errors that caused it, if they differ."""
    first = error
    while (behind := first.__cause__ or hidden_context(first)) is not None:
        first = behind
    said = dict.fromkeys(map(first_line, (error, first)))
    return ": ".join(said)


def hidden_context(error: BaseException) -> BaseException | None:
    return None if error.__suppress_context__ else error.__context__


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".:")
