"""Tables to rows: Parquet and Arrow files, data frames, and data sets in memory.

In a table every row has every column, and every struct every key: what a row lacks is null there. So a null inside a
struct (a message without tool_calls) is a key that is not there; a null in a column stays, as None.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy

from hybrid.core import InputError, first_line

__all__ = ["arrow_rows", "dataset_rows", "frame_rows", "parquet_rows", "plain", "table_rows"]

# The formats of a `datasets.Dataset` in which a row is a table.
TABLES = ("arrow", "pandas", "polars")
# Numbers with fewer digits than Python's, by the names that Arrow, datasets and pandas have for them.
SHORT: dict[str, Any] = dict.fromkeys(("float16", "halffloat"), numpy.float16) | dict.fromkeys(
    ("float32", "float", "float[pyarrow]"), numpy.float32
)


def parquet_rows(content: bytes, name: str) -> list[dict[str, Any]]:
    """The rows of a Parquet file, by its bytes."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with _readable(name, "a Parquet file"):
        return table_rows(ParquetFile(pyarrow.BufferReader(content)).read(), name)


def arrow_rows(content: bytes, name: str) -> list[dict[str, Any]]:
    """The rows of an Arrow file or stream, or of a Feather file, by its bytes."""
    import pyarrow
    from pyarrow import feather, ipc

    is_file = content.startswith((b"ARROW1", b"FEA1"))
    with _readable(name, "an Arrow or Feather file"):
        buffer = pyarrow.BufferReader(content)
        return table_rows(feather.read_table(buffer) if is_file else ipc.open_stream(buffer).read_all(), name)


@contextmanager
def _readable(name: str, what: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{name} cannot be read as {what}: {first_line(error)}") from error


def table_rows(table: Any, name: str) -> list[dict[str, Any]]:
    """The rows of a pyarrow Table, or of anything that gives itself as one (a Polars frame)."""
    import pyarrow

    try:
        table = table if isinstance(table, pyarrow.Table) else pyarrow.table(table)
    except pyarrow.ArrowException as error:
        raise InputError(f"{name}: a {type(table).__name__} is no table ({first_line(error)})") from error
    _check_names(table.column_names, name)
    return list(_rows(table.to_pylist(), {field.name: field.type for field in table.schema}))


def frame_rows(frame: Any, name: str) -> list[dict[str, Any]]:
    """The rows of a pandas frame, without its index. What pandas calls missing (NaN, NA, NaT) is None."""
    import pandas

    _check_names(list(frame.columns), name)

    def cell(value: Any) -> Any:
        missing = value is pandas.NA or value is pandas.NaT or (isinstance(value, float) and value != value)
        return None if missing else value

    records = ({column: cell(value) for column, value in row.items()} for row in frame.to_dict("records"))
    return list(_rows(records, dict(zip(frame.columns, frame.dtypes, strict=True))))


def dataset_rows(dataset: Any) -> Iterable[dict[str, Any]]:
    """The rows of a `datasets.Dataset`, through its transform where it has one."""
    if dataset.format["type"] in TABLES:
        dataset = dataset.with_format(None, columns=dataset.format["columns"])
    # Ten times as fast as one row after the other, where no format is to be kept.
    rows = dataset.to_list() if dataset.format["type"] is None else dataset
    return _rows(rows, {name: getattr(feature, "dtype", None) for name, feature in dataset.features.items()})


def _rows(rows: Iterable[Mapping[str, Any]], kinds: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows in Python's own types.   kinds: the type of each column."""
    short = {column: number for column, kind in kinds.items() if (number := SHORT.get(str(kind).lower()))}
    for row in rows:
        values = {column: plain(value) for column, value in row.items()}
        for column, number in short.items():
            # 0.1 of 32 bits is 0.1 as a text, and 0.10000000149011612 in Python's 64.
            if isinstance(values.get(column), float):
                values[column] = float(str(number(values[column])))
        yield values


def plain(value: Any) -> Any:
    """Arrays and tensors as lists, their numbers as Python's, and no null inside a struct."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items() if inner is not None}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _check_names(names: Sequence[Any], name: str) -> None:
    for column in names:
        if not isinstance(column, str):
            raise InputError(f"{name}: a column's name must be a text, got {column!r}; rename the columns")
        if list(names).count(column) > 1:
            raise InputError(f"{name} has two columns called {column!r}; rename one")
