"""One cell of a row: the text in it, or why it is none."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from hybrid.core import InputError

__all__ = ["cell", "check_unicode", "text_of"]


def cell(row: Mapping[str, Any], column: str, where: str, way_out: str) -> Any:
    """The row's value in a column. Raises InputError where it has none (or null), with the way out."""
    if column not in row:
        raise InputError(f"{where} has no {column!r}, which the data is read by; {way_out}")
    if row[column] is None:
        raise InputError(f"{where}: column {column!r} is null; {way_out}")
    return row[column]


def text_of(value: Any, column: str, where: str, way_out: str) -> str:
    """The text that a value is; a number is what it prints as. Raises InputError for any other, also true and nan."""
    # numpy's true is no bool.
    if isinstance(value, bool) or type(value).__name__ == "bool":
        raise InputError(f"{where}: column {column!r} must hold text, got {str(bool(value)).lower()}; {way_out}")
    if isinstance(value, str):
        check_unicode(value, f"{where}: column {column!r}")
        return value
    # Not only floats: numpy's numbers are none.
    if not isinstance(value, Real):
        # pandas' marks of a missing value.
        missing = type(value).__name__ in ("NAType", "NaTType")
        got = "a missing value" if missing else type(value).__name__
        raise InputError(f"{where}: column {column!r} must hold text, got {got}; {way_out}")
    if not math.isfinite(value):
        raise InputError(f"{where}: column {column!r} is {value}, which is no text; {way_out}")
    return str(value)


def check_unicode(text: str, where: str) -> None:
    """Raises InputError where a text holds half of a character, as JSON can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} holds half a character ({text[error.start]!a}, a lone surrogate), which is no Unicode text; "
            "mend it, or leave such rows out with data.filter"
        ) from error
