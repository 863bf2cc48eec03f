"""Rows from wherever the user keeps them: files, folders, Hugging Face data sets, frames, objects in memory."""

import difflib
import glob
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from hybrid.core import InputError, first_line, unknown_name
from hybrid.data.columnar import dataset_rows, frame_rows, plain, table_rows
from hybrid.data.config import Format
from hybrid.data.files import Part, Row, checked_row, file_rows
from hybrid.data.folders import SPLITS, folder_parts, folder_splits

__all__ = ["Row", "read_parts", "read_rows", "splits_of"]

# What has no length may have no end: two million rows are some 2 GB as Python's objects.
MAX_ROWS = 2_000_000


def read_rows(source: Any, *, format: Format = "auto") -> list[Row]:
    """The rows of a source, in its order.

    source: a file, a pattern ("data/*.jsonl", in the order of the names), a folder (one that `save_to_disk` wrote,
        or of data files of one format), a Hugging Face dataset ("name" or "name:split", split "train" by default), a
        list of these; a datasets.Dataset, a pandas or Polars frame, a pyarrow Table, a torch Dataset, a mapping of
        columns, an iterable of mappings.
    format: of the files. json: a list of objects, or an object with one list in it; jsonl: an object a line;
        csv: a header and rows (tab-separated and without quoting in a .tsv); text: a row {"text": line} a line;
        parquet; arrow: also Feather. Text may be compressed (.gz, .bz2, .xz). hf: no file, whatever there is.
    Blank lines are skipped and a byte order mark is accepted.
    Raises InputError: not found, not readable as its format (with the line), several splits, a row that is no
    mapping, no rows.
    """
    return [row for part in read_parts(source, format=format) for row in part.rows]


def read_parts(source: Any, *, format: Format = "auto", name: str = "data") -> list[Part]:
    """`read_rows`, each file apart.   name: what an object in memory is called in messages."""
    if _is_name(source):
        parts = _named(os.fspath(source), format)
        name = os.fspath(source)
    elif isinstance(source, (list, tuple)) and source and all(map(_is_name, source)):
        parts = [part for one in source for part in read_parts(one, format=format)]
    else:
        parts = [Part(name, list(_in_memory(source, name)))]
    if not any(part.rows for part in parts):
        raise InputError(f"{_called(name)} holds no rows")
    return parts


def splits_of(source: Any, *, format: Format = "auto") -> dict[str, Any] | None:
    """The splits of a DatasetDict or another mapping of data sets, of a folder with a saved one, or of a folder whose
    files are named after splits; each is itself a source. None where the source is one set of rows."""
    if isinstance(source, Mapping):
        return {str(name): rows for name, rows in source.items()} if _maps_splits(source) else None
    if format != "hf" and _is_name(source) and os.path.isdir(folder := _path(os.fspath(source))):
        return folder_splits(folder)
    return None


def _is_name(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike))


def _is_a(source: Any, library: str, name: str) -> bool:
    """Whether it is of the library's class, without importing what the user has not."""
    kind = getattr(sys.modules.get(library), name, None)
    return kind is not None and isinstance(source, kind)


def _called(name: str) -> str:
    return "the data" if name == "data" else name


# In memory


def _in_memory(source: Any, name: str) -> Iterable[Row]:
    if isinstance(source, Mapping):
        return _columns(source)
    if _is_a(source, "torch.utils.data", "DataLoader"):
        raise InputError("the data is a DataLoader, which gives batches; give its dataset")
    if _is_a(source, "pandas", "DataFrame"):
        return frame_rows(source, name)
    if _is_a(source, "datasets", "Dataset"):
        return _given(dataset_rows(source), name, None)
    if hasattr(source, "__arrow_c_stream__"):
        return table_rows(source, name)
    if not isinstance(source, (bytes, bytearray)):
        if isinstance(source, Iterable):
            return _given(source, name, None if hasattr(source, "__len__") else MAX_ROWS)
        if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
            return _given((source[i] for i in range(len(source))), name, None)
    raise InputError(
        f"{_called(name)} must be a file, a folder, a Hugging Face dataset's name, a datasets.Dataset, a frame or a "
        f"list of dicts, got {type(source).__name__}"
    )


def _given(source: Iterable[Any], name: str, limit: int | None) -> Iterator[Row]:
    """The rows of the user's own iterable, whose errors are told as what they are.   limit: None where it must end."""
    number = 0
    # iter() is the user's code too: here it is called by next().
    values = chain.from_iterable([source])
    while limit is None or number <= limit:
        try:
            value = next(values)
        except StopIteration:
            return
        except Exception as error:
            raise InputError(
                f"{_called(name)} raised {type(error).__name__} after {number} rows: {first_line(error)}"
            ) from error
        number += 1
        yield checked_row(value, f"{name}, row {number}")
    raise InputError(
        f"{_called(name)} has no length, and gives more than {limit:,} rows: has it an end? Take a part of it, with "
        "itertools.islice(rows, n) or a dataset's take(n)"
    )


def _maps_splits(mapping: Mapping[Any, Any]) -> bool:
    """Whether the values are data sets, and not the columns of one, or the cells of a row."""
    named = bool(mapping) and all(str(name) in SPLITS for name in mapping)
    return named or (bool(mapping) and all(map(_is_set, mapping.values())))


def _is_set(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and isinstance(value[0], Mapping)
    is_column = isinstance(value, (str, bytes, os.PathLike, Mapping)) or hasattr(value, "tolist")
    return not is_column and hasattr(value, "__getitem__" if hasattr(value, "__len__") else "__iter__")


def _columns(mapping: Mapping[Any, Any]) -> Iterable[Row]:
    names = ", ".join(map(repr, mapping))
    if _maps_splits(mapping):
        raise InputError(f"the data is a mapping of the splits {names}; choose one of them")
    columns = {name: column.tolist() if hasattr(column, "tolist") else column for name, column in mapping.items()}
    if not all(isinstance(column, (list, tuple)) for column in columns.values()):
        raise InputError(f"the data is one row, of {names}; give a list of rows")
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{name!r} {len(column)}" for name, column in columns.items())
        raise InputError(f"the columns of the data are not of one length: {lengths}")
    rows = zip(*columns.values(), strict=True)
    return [checked_row(dict(zip(columns, map(plain, row), strict=True)), "the data") for row in rows]


# By name


def _path(name: str) -> Path:
    # Not Path's own, which raises for a user that there is not.
    return Path(os.path.expanduser(name))


def _named(source: str, format: Format) -> list[Part]:
    if not source.strip() or "\0" in source:
        raise InputError(f"the data's name is {source!r}, which no file has")
    if "://" in source:
        raise InputError(f"{_shortened(source)} is an address: download the file, or name a Hugging Face dataset")
    path = _path(source)
    if format == "hf":
        return [Part(source, _hub_rows(source))]
    if os.path.isfile(path):
        return [Part(source, file_rows(path, format))]
    if os.path.isdir(path):
        return folder_parts(path, format)
    if os.path.exists(path):
        raise InputError(f"{source!r} is no regular file; save what it gives to one")
    folder, colon, split = source.rpartition(":")
    if colon and os.path.isdir(_path(folder)):
        splits = splits_of(folder)
        if splits is None:
            raise InputError(f"the folder {folder!r} has no splits; name it without {':' + split!r}")
        if split not in splits:
            raise unknown_name(f"split of the folder {folder!r}:", split, splits)
        return read_parts(splits[split], format=format)
    if any(mark in source for mark in "*?["):
        return _matching(source, format)
    # A hub's name may end in a version (OpenHermes-2.5), a file's suffix begins with a letter.
    if format == "auto" and (not path.suffix or path.suffix[1:2].isdigit()) and " " not in source:
        return [Part(source, _hub_rows(source))]
    hint = " (a text is no data: give rows, such as {'text': ...})" if " " in source and not path.suffix else ""
    raise InputError(f"data file {_shortened(source)} not found{_nearest(path)}{hint}")


def _shortened(name: str) -> str:
    return repr(name if len(name) <= 200 else name[:199] + "…")


def _nearest(path: Path) -> str:
    try:
        neighbours = os.listdir(path.parent)
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, neighbours, n=1)
    return f"; did you mean {str(path.with_name(near[0]))!r}?" if near else ""


def _matching(pattern: str, format: Format) -> list[Part]:
    files = sorted(name for name in glob.glob(str(_path(pattern)), recursive=True) if os.path.isfile(name))
    if not files:
        raise InputError(f"no file matches {pattern!r}{_nearest(_path(pattern))}")
    return [Part(name, file_rows(Path(name), format)) for name in files]


def _hub_rows(source: str) -> list[Row]:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        loaded = load_dataset(name, split=split or "train")
    except Exception as error:
        raise InputError(
            f"{_shortened(source)} is no file, and does not load as a Hugging Face dataset: {first_line(error)[:300]}"
        ) from error
    return list(_in_memory(loaded, source))
