"""One cell of a row: the text in it, or why it is none."""

import math
from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

from hybrid.core import InputError

__all__ = ["LEAVE_OUT", "cell", "check_unicode", "is_bool", "is_list", "is_missing", "text_in", "text_of"]

LEAVE_OUT = "leave such rows out with data.filter"

# numpy's are no int and no float.
NUMBERS = (Real, Decimal)


def cell(row: Mapping[str, Any], column: str, where: str, way_out: str) -> Any:
    """The row's value in a column. Raises InputError where there is none, with the way out."""
    if column not in row:
        raise InputError(f"{where} has no {column!r}, which the data is read by; {way_out}")
    if is_missing(row[column]):
        shown = "null" if row[column] is None else row[column]
        raise InputError(f"{where}: column {column!r} is {shown}, a missing value; {way_out}")
    return row[column]


def text_in(row: Mapping[str, Any], column: str, where: str, way_out: str = LEAVE_OUT) -> str:
    """The text in a row's column; see `cell` and `text_of`."""
    return text_of(cell(row, column, where, way_out), column, where, way_out)


def is_missing(value: Any) -> bool:
    """Whether a value says that there is none: None, and what pandas puts there (nan, NA, NaT)."""
    # Decimal's signalling nan cannot be compared.
    is_nan = value.is_nan() if isinstance(value, Decimal) else isinstance(value, Real) and value != value
    return value is None or is_nan or type(value).__name__ in ("NAType", "NaTType")


def text_of(value: Any, column: str, where: str, way_out: str) -> str:
    """The text that a value is; a number is what it prints as. Raises InputError for any other, also true and inf."""
    if isinstance(value, str):
        check_unicode(value, f"{where}: column {column!r}")
        return value
    is_truth = is_bool(value)
    if is_truth or not isinstance(value, NUMBERS) or not math.isfinite(value):
        got = str(value).lower() if is_truth or isinstance(value, NUMBERS) else type(value).__name__
        raise InputError(f"{where}: column {column!r} must hold text, got {got}; {way_out}")
    return str(value)


def is_bool(value: Any) -> bool:
    """Whether a value is true or false; numpy's is no bool."""
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")


def is_list(value: Any) -> bool:
    """Whether a value is a list, or an array of one dimension or more."""
    return isinstance(value, (list, tuple)) or (hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0)


def check_unicode(text: str, where: str) -> None:
    """Raises InputError where a text holds half of a character, as JSON can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} holds half a character ({text[error.start]!a}, a lone surrogate), which is no Unicode text; "
            "mend it, or leave such rows out with data.filter"
        ) from error
