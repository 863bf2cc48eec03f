"""The one optimizer of both phases, by name."""

from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter
from math import inf
from typing import Any

import torch
from torch import nn

from hybrid.core import InputError, Registry, parameters_of
from hybrid.optim.backend import require
from hybrid.optim.groups import parameter_groups
from hybrid.optim.keys import Key, Known, key_like, lower_keys, read_keys
from hybrid.optim.optimizer_table import COMMON, KEYS, ROWS, OptimizerRow

__all__ = [
    "check_optimizer",
    "check_sharing",
    "known_optimizers",
    "make_optimizer",
    "optimizer_from",
    "register_optimizer",
]

Factory = Callable[..., torch.optim.Optimizer]
_optimizers: Registry[Factory] = Registry("optimizer")
register_optimizer = _optimizers.register
for _row in ROWS:
    _optimizers.register(_row.name, *_row.aliases)(_row)


def make_optimizer(
    model_or_params: nn.Module | Iterable[nn.Parameter],
    name: str = "adamw",
    lr: float = 1e-5,
    config: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer called `name` over the trainable parameters.

    name: in any case; `known_optimizers()` lists them.   lr: per step, > 0.
    config: flat keys, in any case. All take WEIGHT_DECAY (0.01), DECAY_ALL (false: biases, norms and embeddings
        do not decay) and VALUE_HEAD_LR (lr); the others are each optimizer's own. A key of another optimizer
        is ignored, with a line in the log.
    Raises InputError on an unknown name or key, a value that does not parse or that the backend cannot honour,
    a backend that is not installed, or one that cannot run on the parameters' device: never at the first step.
    """
    factory, values = _read(name, lr, config)
    groups = parameter_groups(model_or_params, **{key: values.pop(key) for key in COMMON})
    if not sum(len(group["params"]) for group in groups):
        raise InputError(f"optimizer {name!r} has nothing to train: no parameter requires a gradient")
    try:
        return factory(groups, lr=lr, **values)
    except (ValueError, NotImplementedError) as error:
        raise error if isinstance(error, InputError) else InputError(f"optimizer {name!r}: {error}") from error


def optimizer_from(
    model_or_params: nn.Module | Iterable[nn.Parameter], section: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer of a config section: `make_optimizer`'s arguments, flat, in any case."""
    return make_optimizer(model_or_params, *_split(section))


def check_optimizer(section: Mapping[str, Any]) -> None:
    """Refuse a bad `optimizer` section of a config, before there is a model to optimize. Imports no backend."""
    _read(*_split(section), quiet=True)


def check_sharing(section: Mapping[str, Any], engine: str) -> None:
    """Refuse a config section's optimizer where it cannot step the parts of weights that an engine gives it.

    One that is not ours is believed.
    """
    name, *_ = _split(section)
    row = _optimizers[name]
    if isinstance(row, OptimizerRow) and engine not in row.engines:
        known = ", ".join(row.name for row in ROWS if engine in row.engines)
        raise InputError(
            f"optimizer {name!r} does not step parts of weights, which distributed.engine {engine} has; known that "
            f"do: {known}; or take distributed.engine ddp"
        )


def known_optimizers() -> list[Known]:
    """Every optimizer of this package: its name, aliases, backend, keys with defaults, and a line on it."""
    return [
        Known(row.name, row.aliases, row.backend, {key: spec.default for key, spec in row.keys.items()}, row.summary)
        for row in ROWS
    ]


def _split(section: Mapping[str, Any]) -> tuple[str, float, dict[str, Any]]:
    config = lower_keys(section)
    name, lr = config.pop("name", "adamw"), config.pop("lr", 1e-5)
    try:
        return name, float("" if isinstance(lr, bool) else lr), config
    except (TypeError, ValueError):
        raise InputError(f"optimizer.lr must be a number, got {lr!r}") from None


def _read(
    name: str, lr: float, config: Mapping[str, Any] | None, *, quiet: bool = False
) -> tuple[Factory, dict[str, Any]]:
    """The row (or a plug-in's factory) and the values of its keys, checked as far as they can be without a model."""
    if not 0 < lr < inf:
        raise InputError(f"optimizer.lr must be > 0, got {lr}")
    factory = _optimizers[name]
    own = factory.keys if isinstance(factory, OptimizerRow) else _plugin_keys(factory)
    values = read_keys("optimizer", name, config, own, KEYS, quiet=quiet)
    if isinstance(factory, OptimizerRow):
        _check_row(factory, values)
    return factory, values


def _check_row(row: OptimizerRow, values: Mapping[str, Any]) -> None:
    """Refuse values that do not go together, or that the backend cannot honour, and a backend that is missing."""
    name = row.name
    for key, only in row.fixed.items():
        if values[key] != only:
            raise InputError(
                f"optimizer.{key} must be {str(only).lower()} for {name!r}, got {values[key]}: {row.backend} has no "
                f"other; use {row.instead!r}"
            )
    for asking, needed in row.needs:
        if (asking is None or values[asking]) and not values[needed]:
            because = repr(name) if asking is None else f"optimizer.{asking}={values[asking]}"
            allowed = "true" if KEYS[needed].kind == "flag" else "> 0"
            raise InputError(f"optimizer.{needed} must be {allowed} for {because}, got {values[needed]}")
    if values.get("nesterov") and values.get("dampening"):
        raise InputError(f"optimizer.dampening must be 0 for nesterov=true, got {values['dampening']}")
    require(name, row.backend)


def _plugin_keys(factory: Factory) -> dict[str, Key]:
    """The keys of a registered factory: what it takes after its groups and `lr`, and the common ones."""
    taken = list(parameters_of(factory).values())[1:]
    own = {
        p.name.lower(): KEYS[p.name.lower()] if p.default is Parameter.empty else key_like(p.default)
        for p in taken
        if p.name != "lr" and (p.default is not Parameter.empty or p.name.lower() in KEYS)
    }
    return own | COMMON
