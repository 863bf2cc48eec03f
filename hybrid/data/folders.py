"""A folder as a source: what `save_to_disk` wrote, or data files of one format, in one set or by splits."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from hybrid.core import InputError, first_line
from hybrid.data.columnar import dataset_rows
from hybrid.data.config import Format
from hybrid.data.files import DATA_SUFFIXES, Part, Row, file_rows, format_of

__all__ = ["HELD_OUT", "SPLITS", "folder_parts", "folder_splits"]

# The names of a held-out split, the first that is there being meant.
HELD_OUT = ("validation", "valid", "val", "eval", "dev", "test")
SPLITS = ("train", *HELD_OUT)
# What `datasets` writes beside the data: a dict of splits, one data set.
SPLITS_FILE, STATE_FILE = "dataset_dict.json", "state.json"


def folder_parts(folder: Path, format: Format) -> list[Part]:
    """Its files, or its saved rows. Raises InputError for one with splits, and where it is not clear what is meant."""
    if splits := folder_splits(folder):
        some = next(iter(splits))
        raise InputError(
            f"the folder {str(folder)!r} holds the splits {', '.join(map(repr, splits))}; choose one, as "
            f"{f'{folder}:{some}'!r}"
        )
    if os.path.isfile(folder / STATE_FILE):
        return [Part(str(folder), list(_saved_rows(folder)))]
    files = _data_files(folder)
    if inner := [file.name for file in sorted(folder.iterdir()) if file.is_dir() and not file.name.startswith(".")]:
        raise InputError(
            f"the folder {str(folder)!r} holds folders too ({inner[0]!r}); name the files, or a pattern ('**' for all)"
        )
    formats = {format_of(file): file.name for file in files}
    if not files:
        raise InputError(f"the folder {str(folder)!r} holds no data files ({' '.join(DATA_SUFFIXES)}); name one")
    if len(formats) > 1:
        listed = ", ".join(map(repr, formats.values()))
        raise InputError(
            f"the folder {str(folder)!r} holds files of several formats ({listed}); name the files, or a pattern"
        )
    return [Part(str(file), file_rows(file, format)) for file in files]


def folder_splits(folder: Path) -> dict[str, Path] | dict[str, list[Path]] | None:
    """The files of each split, or the folder of each; None where the folder has no splits."""
    if os.path.isfile(folder / SPLITS_FILE):
        try:
            names = json.loads((folder / SPLITS_FILE).read_text())["splits"]
            return {name: folder / name for name in names}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"{folder / SPLITS_FILE} names no splits: {first_line(error)}") from error
    if os.path.isfile(folder / STATE_FILE):
        return None
    files = _data_files(folder)
    splits: dict[str, list[Path]] = {}
    for file in files:
        # train.jsonl, test.csv.gz, train-00000-of-00002.parquet
        if (name := file.name.partition(".")[0].partition("-")[0]) in SPLITS:
            splits.setdefault(name, []).append(file)
    if not splits or set(splits) == {"train"}:
        return None
    others = [file.name for file in files if not any(file in part for part in splits.values())]
    if others:
        raise InputError(
            f"the folder {str(folder)!r} holds files of the splits {', '.join(map(repr, splits))} and others "
            f"({others[0]!r}); name the files"
        )
    return splits


def _data_files(folder: Path) -> list[Path]:
    try:
        return sorted(
            file
            for file in folder.iterdir()
            if file.is_file() and format_of(file) and not file.name.startswith((".", "README", "LICENSE"))
        )
    except OSError as error:
        raise InputError(f"the folder {str(folder)!r} cannot be read: {error.strerror}") from error


def _saved_rows(folder: Path) -> Iterable[Row]:
    from datasets import load_from_disk

    try:
        return list(dataset_rows(load_from_disk(str(folder))))
    except Exception as error:
        raise InputError(f"the saved data set {str(folder)!r} does not load: {first_line(error)}") from error
