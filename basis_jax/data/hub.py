"""Rows of parquet files, folders and data sets on the hub, by the package ``datasets``."""

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from basis_jax.data.tables import CSV, JSON, LARGEST_TEXT, PARQUET, Rows, file_kind, read_table

MEDIA = ("Image", "Audio", "Video", "Pdf")
"""Features of columns that are not read: decoding them needs packages of its own."""
SAVED = ("dataset_info.json", "dataset_dict.json")  # by save_to_disk


def hub_rows(path: str, *, split: str, option: str) -> Rows:
    """Rows of a parquet file, a folder, or a data set on the hub; ``name:subset`` asks for a
    subset, as in openai/gsm8k:main. Narrow floats have the digits that were written (0.1).

    Raises one ValueError for whatever keeps it from being read, with the cause and what to do."""
    dataset = read_dataset(path, split=split, option=option)
    media = [name for name, kind in dataset.features.items() if type(kind).__name__ in MEDIA]
    narrow = {
        name: np.dtype(kind.dtype).type
        for name, kind in dataset.features.items()
        if getattr(kind, "dtype", "") in ("float16", "float32")
    }
    number = 0
    for batch in dataset.remove_columns(media).iter(batch_size=1000):
        for name, kind in narrow.items():
            batch[name] = [v if v is None else float(str(kind(v))) for v in batch[name]]
        for values in zip(*batch.values(), strict=True):  # 20 times faster than row by row
            number += 1
            yield number, dict(zip(batch, values, strict=True))


def read_dataset(path: str, *, split: str, option: str) -> Any:
    """A ``datasets.Dataset``. Raises ValueError as ``hub_rows``."""
    import datasets  # here: it takes a second, and tasks and files do not need it

    local = Path(path).expanduser()
    name, _, subset = path.partition(":")
    try:
        if local.is_file() and file_kind(local) is PARQUET:
            check_parquet(local)
            files = glob.escape(str(local))
            return datasets.load_dataset("parquet", data_files=files, split="train")
        if any((local / made).is_file() for made in SAVED):
            saved = datasets.load_from_disk(str(local))
            return the_split(saved, split) if isinstance(saved, Mapping) else saved
        if local.is_dir():
            return datasets.load_dataset(str(local), split=split)
        return datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # builders of every format, and the network, raise what they like
        field = "data.split" if option == "--data.path" else "split"
        raise ValueError(
            f"the data set {path!r} ({field} {split!r}) could not be read "
            f"({broken_file(local) or causes(error)}); give a local .json, .jsonl, .csv or "
            f".parquet file or a data set folder with {option}"
        ) from error


def check_parquet(path: Path) -> None:
    """Raise ValueError if a file says that it unpacks to more than ``LARGEST_TEXT``, or has so many
    rows; a few bytes can stand for a thousand million equal rows."""
    import pyarrow.parquet

    about = pyarrow.parquet.read_metadata(path)
    size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    if max(size, about.num_rows * 8) > LARGEST_TEXT:
        raise ValueError(f"it unpacks to {about.num_rows:,} rows, which is too large to read")


def the_split(saved: Mapping[str, Any], split: str) -> Any:
    if split not in saved:
        raise ValueError(f"it has the splits {', '.join(saved)}")
    return saved[split]


def causes(error: BaseException) -> str:
    """What an error says, and what the error behind it says, where that is something else."""
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


def broken_file(folder: Path) -> str:
    """What our own readers say of the first file in a folder that they cannot read, its line
    included; "" where there is none."""
    if not folder.is_dir():
        return ""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and file_kind(path) in (JSON, CSV) and path.name not in SAVED:
            try:
                for _ in read_table(path)[1]:
                    pass
            except ValueError as error:
                return str(error)
    return ""
