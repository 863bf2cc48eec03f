"""Building a registered thing from a flat mapping, its signature being the one source of names, types and defaults."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from hybrid.core.errors import InputError, unknown_name

__all__ = ["build", "check_settings", "fits", "parameters_of"]


def build(
    factory: Callable[..., Any], settings: Mapping[str, Any], *, what: str, path: str, also: Iterable[str] = ()
) -> Any:
    """`factory(**settings)`, checked as `check_settings` does, and that none is missing.

    Raises InputError with the path; one that the factory itself raises gets the path in front.
    """
    parameters = check_settings(factory, settings, what=what, path=path, also=also)
    for key, parameter in parameters.items():
        if key not in settings and parameter.default is parameter.empty:
            raise InputError(f"{path}.{key} is missing; {what} needs it")
    try:
        return factory(**settings)
    except InputError as error:
        # "min must be", or "components[1].weight must be"
        joint = "." if re.split(r"[ .\[]", str(error))[0] in parameters else ": "
        raise InputError(f"{path}{joint}{error}") from error


def check_settings(
    factory: Callable[..., Any], settings: Mapping[str, Any], *, what: str, path: str, also: Iterable[str] = ()
) -> dict[str, inspect.Parameter]:
    """The factory's parameters, where every key of the settings is one, and every value of its annotated type.

    what: names the thing in errors ("reward 'bleu'").   path: where the settings stand ("REWARD.components[1]").
    also: other keys that are legal at that place, for the nearest-name hint.   Raises InputError with the path.
    """
    parameters = parameters_of(factory)
    for key, value in settings.items():
        if key not in parameters:
            error = unknown_name(f"parameter of {what}:", str(key), [*parameters, *also])
            raise InputError(f"{path}.{key}: {error}")
        if not fits(value, parameters[key].annotation):
            raise InputError(f"{path}.{key} must be {_described(parameters[key].annotation)}, got {value!r}")
    return parameters


def parameters_of(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What a class or function takes by name, with the default that it would get."""
    parameters = inspect.signature(factory, eval_str=True).parameters
    made = {
        field.name: field.default_factory()
        for field in (fields(factory) if is_dataclass(factory) else ())
        if field.default_factory is not MISSING
    }
    return {
        name: p.replace(default=made[name]) if name in made else p
        for name, p in parameters.items()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of an annotated type, for the types a file can hold; any other type passes."""
    origin = get_origin(annotation) or annotation
    if origin is Literal:
        return value in get_args(annotation)
    if origin in (Union, UnionType):
        return any(fits(value, option) for option in get_args(annotation))
    if origin in (int, float):
        return isinstance(value, (int, origin)) and not isinstance(value, bool)
    if origin is list and isinstance(value, list):
        return all(fits(entry, option) for option in get_args(annotation) for entry in value)
    if origin in (bool, str, list, dict, type(None)):
        return isinstance(value, origin)
    return callable(value) if origin is Callable else True


def _described(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(repr, get_args(annotation)))}"
    return inspect.formatannotation(annotation)
