"""A file to rows, by its format. Text is parsed here, so that an error names the file and the line."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hybrid.core import InputError, first_line, parse_json
from hybrid.data.columnar import arrow_rows, parquet_rows
from hybrid.data.config import Format

__all__ = ["DATA_SUFFIXES", "Part", "Row", "checked_row", "file_rows", "format_of"]

Row = dict[str, Any]


class Part(NamedTuple):
    """The rows of one file or object, numbered from 1 in messages, and its name there."""

    name: str
    rows: list[Row]


FORMAT_OF_SUFFIX = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
DATA_SUFFIXES = (*FORMAT_OF_SUFFIX, *DECOMPRESS)
# How a file begins that is no text, whatever its name says.
SIGNATURES = {
    b"\x1f\x8b": "gzip data: name it .gz behind its suffix",
    b"BZh": "bzip2 data: name it .bz2 behind its suffix",
    b"\xfd7zXZ": "xz data: name it .xz behind its suffix",
    b"PAR1": "Parquet data: name it .parquet, or set data.format=parquet",
    b"ARROW1": "Arrow data: name it .arrow, or set data.format=arrow",
    b"\xff\xff\xff\xff": "Arrow data: name it .arrow, or set data.format=arrow",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as CSV",
    b"(\xb5/\xfd": "zstd data: unpack it",
}
# UTF-32's little-endian mark begins with UTF-16's.
ENCODING_OF_MARK = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def format_of(path: Path) -> str | None:
    """The format that a file's name tells; what is compressed has two suffixes."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in DECOMPRESS:
        suffixes = suffixes[:-1]
    return FORMAT_OF_SUFFIX.get(suffixes[-1]) if suffixes else None


def file_rows(path: Path, format: Format) -> list[Row]:
    """The rows of a file; none where it is empty. Raises InputError, with the line where there is one."""
    kind = format_of(path) if format == "auto" else format
    if kind is None:
        raise InputError(
            f"{path}: its suffix does not tell the format; known: {' '.join(FORMAT_OF_SUFFIX)}, text also with "
            f"{' '.join(DECOMPRESS)} behind it; or set data.format to json, jsonl, csv, text, parquet or arrow"
        )
    content = _content(path)
    if kind in COLUMNAR:
        return COLUMNAR[kind](content, str(path)) if content else []
    return PARSERS[kind](_text(content, path), path)


def checked_row(value: Any, where: str) -> Row:
    """The value as a row of its own. Raises InputError where it is no mapping of names."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: a row must be an object with named columns, got {type(value).__name__}")
    for name in value:
        if not isinstance(name, str):
            raise InputError(f"{where}: a column's name must be a text, got {name!r}")
    return dict(value)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"data file {str(path)!r} cannot be read: {error.strerror}") from error
    if unpack := DECOMPRESS.get(path.suffix.lower()):
        try:
            content = unpack(content)
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise InputError(f"{path}: not whole {path.suffix[1:]} data ({first_line(error)})") from error
    return content


def _text(content: bytes, path: Path) -> str:
    if begins := next((what for signature, what in SIGNATURES.items() if content.startswith(signature)), None):
        raise InputError(f"{path} holds {begins}")
    encoding = next((name for mark, name in ENCODING_OF_MARK.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding not in ("utf-8", "utf-8-sig"):
            raise InputError(f"{path}: begins as {encoding} and is not ({error.reason}); save it as UTF-8") from error
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); save it as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"{path}:{line}: holds a NUL byte: no text, or UTF-16 without its mark; save it as UTF-8")
    return text


def _json(text: str, path: Path, line: int = 1) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise InputError(f"{place}: not valid JSON ({error.msg}, column {error.colno})") from error
    except ValueError as error:
        raise InputError(f"{path}:{line}: {error}" if line > 1 else f"{path}: {error}") from error


def _json_rows(text: str, path: Path) -> list[Row]:
    if not text.strip():
        return []
    lines = _lines(text)
    if len(lines) > 1 and _is_object(lines[0][1]) and _is_object(lines[1][1]):
        raise InputError(f"{path} holds JSON Lines, an object a line: name it .jsonl, or set data.format=jsonl")
    value = _json(text, path)
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        if len(lists) != 1:
            raise InputError(
                f"{path}: needs a list of objects, or an object with one list, got {len(lists)} lists; "
                "objects a line are data.format=jsonl"
            )
        value = lists[0]
    if not isinstance(value, list):
        raise InputError(f"{path}: needs a list of objects, got {type(value).__name__}")
    return [checked_row(row, f"{path}, row {number}") for number, row in enumerate(value, start=1)]


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _lines(text: str) -> list[tuple[int, str]]:
    """(number, line) of the lines that are not blank; a line ends with LF, CR LF or, as on an old Mac, CR."""
    # Not str.splitlines: that also breaks at U+2028 and its like, which are legal inside a JSON string.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _jsonl_rows(text: str, path: Path) -> list[Row]:
    rows = []
    for number, line in _lines(text):
        try:
            rows.append(checked_row(_json(line.strip(), path, number), f"{path}:{number}"))
        except InputError:
            # Only now, for a large file is parsed twice by it.
            if not rows and _is_json(text):
                raise InputError(f"{path} holds one JSON value: name it .json, or set data.format=json") from None
            raise
    return rows


def _is_json(text: str) -> bool:
    try:
        value = parse_json(text)
    except ValueError:
        return False
    return "\n" in text.strip() or (isinstance(value, list) and all(isinstance(row, dict) for row in value))


def _csv_rows(text: str, path: Path) -> list[Row]:
    # A tab-separated file knows no quoting (IANA text/tab-separated-values): in GLUE's, quotes belong to the text.
    dialect: dict[str, Any] = {"strict": True}
    if ".tsv" in (suffix.lower() for suffix in path.suffixes[-2:]):
        dialect |= {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    # A field may be as long as the file; the limit is one for the whole process.
    limit = csv.field_size_limit(len(text) + 1)
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    header: list[str] = []
    rows = []
    try:
        for fields in reader:
            if not fields:
                continue
            if not header:
                header = _header(fields, f"{path}:{reader.line_num}", dialect)
            elif len(fields) != len(header):
                raise InputError(f"{path}:{reader.line_num}: {len(fields)} fields where the header has {len(header)}")
            else:
                rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not valid CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _header(fields: list[str], where: str, dialect: Mapping[str, Any]) -> list[str]:
    header = [name.strip() for name in fields]
    if "" in header:
        raise InputError(
            f"{where}: column {header.index('') + 1} of the header has no name; give it one (pandas writes its index "
            "so: to_csv(index=False))"
        )
    if len(set(header)) < len(header):
        raise InputError(f"{where}: the header names a column twice: {', '.join(header)}")
    delimiter = dialect.get("delimiter", ",")
    if len(header) == 1 and any(mark in header[0] for mark in ",;\t|"):
        raise InputError(f"{where}: the header is one field, {header[0]!r:.80}; fields are separated by {delimiter!r}")
    return header


def _text_rows(text: str, path: Path) -> list[Row]:
    return [{"text": line.strip()} for _, line in _lines(text)]


PARSERS: dict[str, Callable[[str, Path], list[Row]]] = {
    "json": _json_rows,
    "jsonl": _jsonl_rows,
    "csv": _csv_rows,
    "text": _text_rows,
}
COLUMNAR: dict[str, Callable[[bytes, str], list[Row]]] = {"parquet": parquet_rows, "arrow": arrow_rows}
