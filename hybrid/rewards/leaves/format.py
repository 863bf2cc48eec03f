"""A reward for responses of an asked-for form: JSON, lists, paragraphs, or whatever a pattern or a schema says."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import groupby
from typing import Any, Literal

from hybrid.core import InputError, first_line
from hybrid.rewards.base import Reward, register_reward
from hybrid.rewards.extras import require
from hybrid.rewards.leaves.matching import TimedPattern, check_timeout

__all__ = ["Format"]

# Beside `kind`, what each kind reads.
READS = {
    "json": (),
    "numbered_list": ("min_items", "max_items"),
    "bullet_list": ("min_items", "max_items"),
    "paragraphs": ("min_items", "max_items"),
    "regex": ("pattern", "timeout"),
    "json_schema": ("schema", "timeout"),
}
# Nine digits: a longer number is no item's, and Python refuses to read one of thousands.
NUMBERED = re.compile(r"\s*(\d{1,9})[.)]\s+\S")
BULLET = re.compile(r"\s*[-*+•‣◦\u2013\u2014]\s+\S")


@register_reward("format")
@dataclass
class Format(Reward):
    """How far the response has the form `kind`: 1 if it has, with partial credit, 0 if not at all.

        json            1 if the response is JSON; 0.5 if it holds an object or array, in a fence or amid prose
        json_schema     as json, times 1 / (1 + n) for n errors; 0 where the schema wants another type
        bullet_list     share of the lines that are items, times how near their number is to the range
        numbered_list   the same; the first number must be 1, and every other one more than the one before it
        paragraphs      how near the number of paragraphs is to the range
        regex           1 if the whole response matches `pattern` (of the `regex` module), else 0

    Nearness to the range of min_items to max_items: 1 inside, n / min below, max / n above. JSON is strict: no
    NaN, no comments; what is nested too deeply to be read is invalid. Blank lines do not count; they part paragraphs.
    """

    reads = ("response",)

    kind: Literal["json", "numbered_list", "bullet_list", "paragraphs", "regex", "json_schema"]
    min_items: int | None = None  # None: 1 for lists, and 2 paragraphs (or as few as max_items says)
    max_items: int | None = None  # None: any number
    pattern: str | None = None
    schema: dict[str, Any] | None = None  # a JSON Schema, without references to other files
    timeout: float = 1.0  # seconds for one search of a pattern, the schema's own included; then RewardTimeout

    def __post_init__(self) -> None:
        reads = READS[self.kind]
        for field in fields(self):
            given = getattr(self, field.name) != field.default
            if field.name != "kind" and given and field.name not in reads:
                raise InputError(
                    f"{field.name} is not read by kind {self.kind!r}; it reads {', '.join(reads) or 'none'}"
                )
        if "min_items" in reads:
            self._range = self._checked_range()
        for name in ("pattern", "schema"):
            if name in reads and getattr(self, name) is None:
                raise InputError(f"{name} must be given with kind {self.kind!r}")
        check_timeout(self.timeout)
        if self.pattern is not None:
            self._pattern = TimedPattern(self.pattern, self.timeout, reward=self.component_name)
        if self.schema is not None:
            self._validator = _validator(self.schema, self.timeout, self.component_name)

    def _checked_range(self) -> tuple[int, float]:
        most = float("inf") if self.max_items is None else self.max_items
        if most < 1:
            raise InputError(f"max_items must be at least 1, got {self.max_items}")
        default = 2 if self.kind == "paragraphs" and most > 1 else 1
        least = default if self.min_items is None else self.min_items
        if not 1 <= least <= most:
            raise InputError(f"min_items must be at least 1 and at most max_items ({self.max_items}), got {least}")
        return least, most

    def _score_one(self, response: str, target: str, prompt: str, item: Any) -> float:
        if self.kind == "regex":
            return float(self._pattern.found_in(response, whole=True))
        if self.kind == "json":
            return _json(response)[1]
        if self.kind == "json_schema":
            return self._schema_score(response)
        lines = [line for line in response.splitlines() if line.strip()]
        if self.kind == "paragraphs":
            return self._nearness(_num_paragraphs(response))
        num_items = _num_numbered(lines) if self.kind == "numbered_list" else sum(map(bool, map(BULLET.match, lines)))
        return num_items / max(len(lines), 1) * self._nearness(num_items)

    def _nearness(self, count: int) -> float:
        least, most = self._range
        return count / least if count < least else min(1.0, most / count)

    def _schema_score(self, response: str) -> float:
        value, score = _json(response)
        if not score:
            return 0.0
        try:
            errors = list(self._validator.iter_errors(value))
        except (RecursionError, OverflowError):  # nested deeper, or a number larger, than can be judged
            return 0.0
        if any(error.validator == "type" and not error.path for error in errors):
            return 0.0
        return score / (1 + len(errors))


def _num_numbered(lines: list[str]) -> int:
    count = previous = 0
    for line in lines:
        if match := NUMBERED.match(line):
            number = int(match[1])
            count += number == previous + 1
            previous = number
    return count


def _num_paragraphs(text: str) -> int:
    return sum(filled for filled, _ in groupby(text.splitlines(), key=lambda line: bool(line.strip())))


def _json(text: str) -> tuple[Any, float]:
    """The JSON in a text, and 1 if it is all of it, 0.5 if it stands amid other text, 0 if there is none."""
    for part, score in _candidates(text.strip()):
        try:
            return json.loads(part, parse_constant=_refused, parse_int=_integer), score
        except (json.JSONDecodeError, RecursionError, _NotJson):
            continue
    return None, 0.0


def _candidates(text: str) -> Iterator[tuple[str, float]]:
    yield text, 1.0
    for part in (*text.split("```")[1::2], text):
        spans = [(part.find(opening), part.rfind(closing) + 1) for opening, closing in ("{}", "[]")]
        yield from ((part[start:end], 0.5) for start, end in sorted(spans) if 0 <= start < end)


class _NotJson(ValueError):
    """Python reads it, and JSON has no such thing."""


def _refused(constant: str) -> None:
    raise _NotJson(f"JSON has no {constant}")


def _integer(digits: str) -> int | float:
    # Python refuses to make an int of more than 4,300 digits, which JSON allows.
    return int(digits) if len(digits) <= 4000 else float(digits)


def _validator(schema: dict[str, Any], timeout: float, reward: str) -> Any:
    """A validator that fetches nothing and whose patterns cannot hang. Raises InputError if `schema` is none."""
    require("jsonschema", reward=reward)
    import jsonschema
    from jsonschema import validators
    from referencing import Registry

    kind = validators.validator_for(schema, default=validators.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InputError(f"schema is no JSON Schema: at {error.json_path}, {first_line(error)}") from error
    except RecursionError as error:
        raise InputError("schema is nested too deeply") from error

    compiled = cache(lambda text: TimedPattern(text, timeout, reward=reward))
    for key, value in _entries(schema):
        if key == "pattern" and isinstance(value, str):
            compiled(value)
        if key == "patternProperties":
            # jsonschema searches with `re` here, which has no time-out.
            raise InputError("schema must not use patternProperties: its patterns could hang; use propertyNames")

    def pattern(validator: Any, text: str, value: Any, schema: Any) -> Iterator[Any]:
        if validator.is_type(value, "string") and not compiled(text).found_in(value):
            yield jsonschema.ValidationError(f"{value!r} does not match {text!r}")

    def unique_items(validator: Any, unique: bool, value: Any, schema: Any) -> Iterator[Any]:
        # jsonschema compares each item with each.
        if unique and validator.is_type(value, "array") and len(set(map(_comparable, value))) < len(value):
            yield jsonschema.ValidationError("an array has non-unique elements")

    # jsonschema fetches references over the network unless it is given a registry.
    validator = validators.extend(kind, {"pattern": pattern, "uniqueItems": unique_items})(schema, registry=Registry())
    _check_references(validator)
    return validator


def _comparable(value: Any) -> Any:
    """A JSON value as one that can be in a set, where 1 is 1.0 and not true."""
    if isinstance(value, dict):
        return frozenset((key, _comparable(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return tuple(map(_comparable, value))
    return (type(value).__name__, value) if isinstance(value, (bool, str)) else value


def _check_references(validator: Any) -> None:
    """Raises InputError where a reference leads nowhere, or round in a circle."""
    from referencing.exceptions import Unresolvable

    entries = list(_entries(validator.schema))
    if any(key == "$id" for key, _ in entries):
        return  # below it a reference may mean another place: it is followed when it is met
    try:
        for reference in [value for key, value in entries if key == "$ref" and isinstance(value, str)]:
            list(validator.evolve(schema={"$ref": reference}).iter_errors(None))
    except Unresolvable as error:
        raise InputError(f"schema refers to what it does not hold: {first_line(error)}") from error
    except RecursionError as error:
        raise InputError("schema refers to itself without end") from error


def _entries(node: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a schema with its value, at any depth."""
    if isinstance(node, dict):
        yield from node.items()
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
        yield from _entries(inner)
