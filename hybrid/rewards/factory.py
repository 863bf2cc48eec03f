"""From a spec to a reward: names looked up, parameters checked, and every error with its path in the spec."""

import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch

from hybrid.core import InputError, Registry, build, first_line, fits, parameters_of, parse_json, parse_yaml
from hybrid.rewards import leaves, mixture, self_play  # noqa: F401 - which register their types
from hybrid.rewards.base import Handling, Reward, canonical, rewards
from hybrid.rewards.compose import Component, Composite
from hybrid.rewards.leaves.python import PythonFunction
from hybrid.rewards.postprocess import Postprocess, postprocesses
from hybrid.rewards.samples import LONE_SURROGATE

__all__ = ["RewardType", "Spec", "json_spec", "known_rewards", "make_reward", "parameters_of_reward"]

Spec = Mapping[str, Any] | Callable[..., Any] | Reward | str | os.PathLike[str]

# What a spec may say of any reward, whatever its type.
COMMON = ("name", "weight", *parameters_of(Handling))

# A new file in leaves/ is a new reward: there is no list to add it to.
for _leaf in iter_modules(leaves.__path__):
    import_module(f"{leaves.__name__}.{_leaf.name}")


def make_reward(spec: Spec) -> Reward:
    """The reward that `spec` describes.

        make_reward({"type": "length_window", "max": 100, "postprocess": {"type": "clip", "min": 0.5}})
        make_reward(lambda response: len(response) / 100)
        make_reward("reward.yaml")

    spec: a dict, a function (see the type `python`), a Reward (returned as it is), or a JSON or YAML file of
    a dict. A dict may stand under the key "REWARD", whose neighbours are not read. Beside the parameters of
    its type it takes `name`, `weight` (its share among components), `postprocess` (a step, or a list of them in
    order) and the other fields of `Handling`: on_error, error_value, empty_value, max_chars.
    Raises InputError with the path in the spec. Nothing is loaded before the first score, or `setup`.
    """
    try:
        return _component(spec, "REWARD").reward
    except RecursionError:
        raise InputError("REWARD is nested too deeply, or is a file that names itself") from None


def json_spec(text: str, where: str) -> Any:
    """What the JSON of a spec holds. Raises InputError, also where a name stands twice in one object."""
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {first_line(error)}") from error
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


@dataclass(frozen=True)
class RewardType:
    """A type that specs can name. parameters: each as "name: type = default"."""

    name: str
    aliases: tuple[str, ...]
    parameters: tuple[str, ...]
    summary: str  # the first line of its docstring


def known_rewards() -> list[RewardType]:
    """Every type registered so far, by name."""
    return [
        RewardType(
            name=canonical.get(key, key),
            aliases=tuple(alias for alias, name in canonical.items() if name.lower() == key != alias),
            parameters=tuple(str(p) for p in parameters_of_reward(key).values()),
            summary=(inspect.getdoc(rewards[key]) or "").partition("\n")[0],
        )
        for key in rewards
        if canonical.get(key, key).lower() == key
    ]


def parameters_of_reward(kind: str) -> dict[str, inspect.Parameter]:
    """What a spec of that type takes, besides what every spec does."""
    return parameters_of(_factory(rewards[kind]))


def _component(spec: Any, path: str) -> Component:
    if isinstance(spec, Reward):
        return Component(spec)
    if callable(spec):
        spec = {"type": "python", "function": spec, "name": getattr(spec, "__name__", "python")}
    if isinstance(spec, (str, os.PathLike)):
        _check_texts(os.fspath(spec), path)
        return _component(_read(Path(spec), path), f"{os.fspath(spec)}: REWARD")
    if not isinstance(spec, Mapping):
        raise InputError(f"{path} must be a dict with a type, a function, a Reward or a file, got {spec!r}")
    if "REWARD" in spec:
        return _component(spec["REWARD"], path)
    return _from_dict(spec, path)


def _from_dict(spec: Mapping[str, Any], path: str) -> Component:
    kind, settings = _type_of(spec, path, rewards)
    factory, parameters = _factory(rewards[kind]), parameters_of_reward(kind)
    # A parameter of the reward's own goes first: `domain` has a `name`.
    also = [key for key in COMMON if key not in parameters]
    common = {key: settings.pop(key) for key in also if key in settings}

    name = common.pop("name", canonical.get(kind.lower(), kind))
    if not isinstance(name, str) or not name or "/" in name:
        raise InputError(f"{path}.name must be a text without '/', got {name!r}")
    weight = common.pop("weight", 1.0)
    if not fits(weight, float) or not math.isfinite(weight):
        raise InputError(f"{path}.weight must be a finite number, got {weight!r}")
    common["postprocess"] = _steps(common.get("postprocess", []), f"{path}.postprocess")
    if isinstance(factory, type) and issubclass(factory, Composite):
        settings |= _inner_rewards(factory, settings, path)

    _check_device(settings.get("device"), path)
    _check_texts(settings, path)
    reward = build(factory, settings, what=f"reward {kind!r}", path=path, also=also)
    handling = build(Handling, common, what=f"reward {kind!r}", path=path)
    # It may be a frozen dataclass.
    object.__setattr__(reward, "component_name", name)
    object.__setattr__(reward, "handling", handling)
    object.__setattr__(reward, "spec", spec)
    return Component(reward, float(weight))


def _inner_rewards(factory: type[Composite], settings: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Those of a composite's settings that are specs, as Components."""
    made: dict[str, Any] = {
        key: _component(settings[key], f"{path}.{key}")
        for key, words in factory.inner_specs.items()
        if settings.get(key) is not None and settings[key] not in words
    }
    if "components" in settings:
        listed = _listed(settings["components"], f"{path}.components")
        made["components"] = [_component(inner, inner_path) for inner_path, inner in listed]
    return made


def _check_texts(value: Any, path: str, *, nul_too: bool = True) -> None:
    """Raises InputError for half a character, which no response holds, and for NUL, which no file or host has.

    The texts of a list, such as a corpus, may hold NUL.
    """
    if isinstance(value, str) and (LONE_SURROGATE.search(value) or (nul_too and "\0" in value)):
        raise InputError(f"{path} must hold neither NUL nor half a character (a lone surrogate), got {value!r}")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_texts(inner, f"{path}.{key}", nul_too=nul_too)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _check_texts(inner, f"{path}[{index}]", nul_too=False)


def _check_device(device: Any, path: str) -> None:
    """Every reward that takes a `device` means torch's. Whether this machine has it is seen when a model loads."""
    if isinstance(device, str):
        try:
            torch.device(device)
        except RuntimeError:
            raise InputError(f"{path}.device must be like cpu, cuda or cuda:0, got {device!r}") from None


def _steps(spec: Any, path: str) -> tuple[Postprocess, ...]:
    steps: list[Postprocess] = []
    for step_path, step in [(path, spec)] if isinstance(spec, Mapping) else _listed(spec, path):
        if not isinstance(step, Mapping):
            raise InputError(f"{step_path} must be a dict with a type, got {step!r}")
        kind, settings = _type_of(step, step_path, postprocesses)
        steps.append(build(postprocesses[kind], settings, what=f"postprocess {kind!r}", path=step_path))
    return tuple(steps)


def _listed(specs: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(specs, (list, tuple)):
        raise InputError(f"{path} must be a list, got {specs!r}")
    return ((f"{path}[{index}]", spec) for index, spec in enumerate(specs))


def _type_of(spec: Mapping[str, Any], path: str, registry: Registry[Any]) -> tuple[str, dict[str, Any]]:
    """The type that `spec` names, known to `registry`, and the rest of it."""
    settings = dict(spec)
    if "type" not in settings:
        raise InputError(f"{path}.type is missing; known: {', '.join(registry)}")
    kind = str(settings.pop("type"))
    try:
        registry[kind]
    except InputError as error:
        raise InputError(f"{path}.type: {error}") from None
    return kind, settings


def _factory(registered: Callable[..., Any]) -> Callable[..., Any]:
    return registered if isinstance(registered, type) else partial(PythonFunction, registered)


def _read(file: Path, path: str) -> Any:
    if file.suffix not in (".json", ".yaml", ".yml"):
        raise InputError(f"{path} must be a .json, .yaml or .yml file, or {{'type': ...}}; got {str(file)!r}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: {file} is not UTF-8: {error.reason} at byte {error.start}") from error
    if file.suffix == ".json":
        return json_spec(text, str(file))
    import yaml  # PyYAML comes with transformers

    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not YAML: {error}") from error
