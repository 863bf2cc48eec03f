"""JSON as its standard has it, and nothing that two readers would read as two things."""

import json
from typing import Any

__all__ = ["parse_json"]


def parse_json(text: str) -> Any:
    """What a JSON text says.

    Raises json.JSONDecodeError, which has the place, and for what Python's own reader lets pass or fails at otherwise
    a plain ValueError: a name twice in one object, NaN and Infinity, a number too long, nesting too deep.
    """
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        # Python's: sys.get_int_max_str_digits
        raise ValueError("it holds a number of too many digits") if "integer string" in str(error) else error from None


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object, and only one can count")
    return content


def _no_number(literal: str) -> Any:
    raise ValueError(f"{literal} is no JSON; write null")


DECODER = json.JSONDecoder(object_pairs_hook=_once_each, parse_constant=_no_number)
