"""Learning-rate schedulers, by name."""

import warnings
from collections.abc import Callable, Mapping
from inspect import Parameter
from math import ceil
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hybrid.core import InputError, Registry, parameters_of
from hybrid.optim.keys import Key, Known, key_like, lower_keys, read_keys
from hybrid.optim.scheduler_table import COUNTS, ROWS, WARMUP, SchedulerRow, share

__all__ = [
    "check_scheduler",
    "known_schedulers",
    "make_scheduler",
    "plateau_mode",
    "register_scheduler",
    "scheduler_from",
    "warmup_steps",
]

Factory = Callable[..., LRScheduler | None]
_schedulers: Registry[Factory] = Registry("scheduler")
register_scheduler = _schedulers.register
for _row in ROWS:
    _schedulers.register(_row.name, *_row.aliases)(_row)

KEYS = {key for row in ROWS for name, spec in row.all_keys.items() for key in (name, *spec.aliases)}
# Steps of a run that does not say how long it is: the specification's.
DEFAULT_STEPS = 1000


def make_scheduler(
    optimizer: torch.optim.Optimizer,
    name: str | None,
    config: Mapping[str, Any] | None = None,
    *,
    num_training_steps: int | None = None,
    num_warmup_steps: int | None = None,
    steps_per_epoch: int | None = None,
    epochs: float | None = None,
) -> LRScheduler | None:
    """The scheduler called `name` over every group of the optimizer; None for "none", "null", "no" and "".

    Step it once per optimizer step; `reduce_on_plateau` with the metric, after each evaluation.
    total steps: num_training_steps, else steps_per_epoch x epochs, else those of the config, else 1000.
    warm-up steps: num_warmup_steps, else the config's NUM_WARMUP_STEPS, else WARMUP_RATIO (0) x total, rounded up.
    config: flat keys, in any case; `known_schedulers()` lists them. A key of another scheduler is ignored, with a
        line in the log. LAST_EPOCH (-1): the last step already done; the scheduler starts after it.
    Every group keeps its own base rate; a rate in a key (MAX_LR, BASE_LR; LR_END) is for the first group, and one with
    another rate keeps its ratio to it. MIN_LR is the same for all groups, but in cosine_with_min_lr.
    Raises InputError on an unknown name or key, or a value that does not parse or fit.
    """
    factory, values = _read(name, config)
    total = _total(values, num_training_steps, steps_per_epoch, epochs)
    counts = {"total": total, "warmup": _warmup(values, total, num_warmup_steps)}
    last_epoch = values["last_epoch"]
    values = {key: value for key, value in values.items() if key not in COUNTS and key not in WARMUP}
    if not isinstance(factory, SchedulerRow):
        taken = parameters_of(factory)
        counts = {f"num_{key}_steps": count for key, count in zip(("training", "warmup"), counts.values(), strict=True)}
        counts = {key: count for key, count in counts.items() if key in taken}
    if last_epoch >= 0:
        _rewind(optimizer)
    try:
        scheduler = factory(optimizer, **counts, **values)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"scheduler {name!r}: {error}") from error
    if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
        _replay(scheduler, last_epoch + 1)
    return scheduler


def scheduler_from(
    optimizer: torch.optim.Optimizer, section: Mapping[str, Any], *, num_training_steps: int | None = None
) -> LRScheduler | None:
    """The scheduler of a config section: a name ("none" without one) and its keys, flat, in any case.

    num_training_steps: optimizer steps of the whole run; where given it goes before the section's own.
    """
    config = lower_keys(section)
    return make_scheduler(optimizer, config.pop("name", None), config, num_training_steps=num_training_steps)


def warmup_steps(section: Mapping[str, Any], num_training_steps: int | None) -> int:
    """Optimizer steps until the scheduler of a config section is at its full rate; 0 for one without a warm-up."""
    config = lower_keys(section)
    _, values = _read(config.pop("name", None), config, quiet=True)
    return _warmup(values, _total(values, num_training_steps, None, None), None) if "warmup_ratio" in values else 0


def check_scheduler(section: Mapping[str, Any]) -> None:
    """Refuse a bad `scheduler` section of a config, before there is an optimizer."""
    config = lower_keys(section)
    _read(config.pop("name", None), config, quiet=True)


def plateau_mode(section: Mapping[str, Any]) -> str | None:
    """Which end of its metric reduce_on_plateau takes for the better, min or max; None for any other scheduler."""
    config = lower_keys(section)
    factory, values = _read(config.pop("name", None), config, quiet=True)
    return values["mode"] if factory is _schedulers["reduce_on_plateau"] else None


def known_schedulers() -> list[Known]:
    """Every scheduler of this package: its name, aliases, backend, keys with defaults, and a line on it."""
    return [
        Known(row.name, row.aliases, "torch", {key: spec.default for key, spec in row.all_keys.items()}, row.summary)
        for row in ROWS
    ]


def _read(name: str | None, config: Mapping[str, Any] | None, *, quiet: bool = False) -> tuple[Factory, dict[str, Any]]:
    """The row (or a plug-in's factory) and the values of its keys."""
    name = str(name) or "none"
    factory = _schedulers[name]
    own = factory.all_keys if isinstance(factory, SchedulerRow) else _plugin_keys(factory)
    values = read_keys("scheduler", name, config, own, KEYS, quiet=quiet)
    rivals = [key for key in factory.rivals if values[key] is not None] if isinstance(factory, SchedulerRow) else []
    if len(rivals) > 1:
        raise InputError(f"{' and '.join(f'scheduler.{key}' for key in rivals)} say the same; give one of them")
    return factory, values


def _plugin_keys(factory: Factory) -> dict[str, Key]:
    """The keys of a registered factory: what it takes after the optimizer, with a default, and the common ones."""
    taken = list(parameters_of(factory).values())[1:]
    own = {p.name.lower(): key_like(p.default) for p in taken if p.default is not Parameter.empty}
    return own | WARMUP | COUNTS


def _total(values: Mapping[str, Any], steps: int | None, steps_per_epoch: int | None, epochs: float | None) -> int:
    """Optimizer steps of the run: the argument, then the arguments' product, then the same of the config, then 1000."""
    whole = epochs is not None and steps_per_epoch is not None
    if steps is None and not whole:
        steps = values["num_training_steps"]
    steps_per_epoch = values["steps_per_epoch"] if steps_per_epoch is None else steps_per_epoch
    epochs = values["epochs"] if epochs is None else epochs
    if steps is None and steps_per_epoch is not None and epochs is not None:
        steps = ceil(steps_per_epoch * epochs - 1e-9)
    steps = DEFAULT_STEPS if steps is None else steps
    if steps < 1:
        raise InputError(f"scheduler.num_training_steps must be > 0, got {steps}")
    return int(steps)


def _warmup(values: Mapping[str, Any], total: int, steps: int | None) -> int:
    if steps is None:
        steps = values.get("num_warmup_steps")
    if steps is None:
        steps = share(values.get("warmup_ratio") or 0.0, total)
    if steps < 0:
        raise InputError(f"scheduler.num_warmup_steps must be >= 0, got {steps}")
    return int(steps)


def _rewind(optimizer: torch.optim.Optimizer) -> None:
    """Back to the base rates, where the optimizer remembers them."""
    for group in optimizer.param_groups:
        group["lr"] = group.get("initial_lr", group["lr"])


def _replay(scheduler: LRScheduler, steps: int) -> None:
    """Take the steps already done again: exact for every scheduler, where torch's own `last_epoch` is not."""
    with warnings.catch_warnings():
        # "before optimizer.step()": so it is, they were done in another life.
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(steps):
            scheduler.step()
