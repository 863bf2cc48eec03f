"""The JSON Schema of every spec that `make_reward` takes, for editors and validators."""

import inspect
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from hybrid.core import Registry, parameters_of
from hybrid.rewards.base import Handling
from hybrid.rewards.compose import Component
from hybrid.rewards.factory import known_rewards, parameters_of_reward
from hybrid.rewards.postprocess import postprocesses

__all__ = ["reward_schema"]

REWARD, STEP = {"$ref": "#/$defs/reward"}, {"$ref": "#/$defs/postprocess"}
OF_TYPE = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", type(None): "null"}
SPECIAL: dict[str, dict[str, Any]] = {
    "components": {"type": "array", "items": REWARD, "minItems": 1},
    "postprocess": {"anyOf": [STEP, {"type": "array", "items": STEP}]},
}


def reward_schema() -> dict[str, Any]:
    """Every registered type with its parameters, as draft 2020-12."""
    common = {
        "name": {"type": "string"},
        "weight": {"type": "number"},
        **{key: _parameter(key, parameter) for key, parameter in parameters_of(Handling).items()},
    }
    kinds = [
        _object([kind.name, *kind.aliases], parameters_of_reward(kind.name), kind.summary, common)
        for kind in known_rewards()
    ]
    steps = [
        _object([name], parameters_of(step), _first_line(step), {}) for name, step in _factories(postprocesses).items()
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "HybridTrainer reward",
        "anyOf": [REWARD, {"type": "object", "properties": {"REWARD": REWARD}, "required": ["REWARD"]}],
        "$defs": {"reward": {"anyOf": kinds}, "postprocess": {"anyOf": steps}},
    }


def _object(
    names: list[str], parameters: Mapping[str, inspect.Parameter], summary: str, common: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "description": summary,
        "type": "object",
        "properties": {
            "type": {"enum": names},
            **common,
            **{key: _parameter(key, parameter) for key, parameter in parameters.items()},
        },
        "required": ["type", *(key for key, p in parameters.items() if p.default is p.empty)],
        "additionalProperties": False,
    }


def _parameter(key: str, parameter: inspect.Parameter) -> dict[str, Any]:
    if key in SPECIAL:
        return SPECIAL[key]
    schema = _of_annotation(parameter.annotation)
    return schema if parameter.default is parameter.empty else {**schema, "default": parameter.default}


def _of_annotation(annotation: Any) -> dict[str, Any]:
    """The schema of the annotations that `hybrid.core.fits` checks; anything goes for the others."""
    origin = get_origin(annotation) or annotation
    if origin is Component:
        return REWARD
    if origin is Literal:
        return {"enum": list(get_args(annotation))}
    if origin in (Union, UnionType):
        options = [_of_annotation(option) for option in get_args(annotation)]
        return {"anyOf": [option for option in options if option]}
    if origin is list:
        return {"type": "array", **({"items": _of_annotation(args[0])} if (args := get_args(annotation)) else {})}
    return {"type": OF_TYPE[origin]} if origin in OF_TYPE else {}


def _factories(registry: Registry[Any]) -> dict[str, Any]:
    return {name: registry[name] for name in registry}


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]
