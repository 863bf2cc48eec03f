"""Which step comes next: strategies that mix supervised and PPO steps."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any, Literal

from hybrid.core import InputError, Registry, build

__all__ = ["Alternate", "Plan", "Sequential", "Strategy", "make_strategy", "register_strategy"]

Kind = Literal["sft", "ppo"]


@dataclass(frozen=True)
class Plan:
    """One step to take.   cycle: the number of the cycle it belongs to, from 0."""

    kind: Kind
    cycle: int


class Strategy(ABC):
    """Decides the order of the steps. Holds no state of the run: `plan` is a function of what it is given."""

    @abstractmethod
    def plan(self, step: int, metrics: Mapping[str, float]) -> Plan | None:
        """The step number `step` (from 0), given the metrics of the step before it; None: the end."""

    @property
    @abstractmethod
    def num_steps(self) -> int | None:
        """How many steps there will be, or None where that depends on the metrics."""

    @property
    @abstractmethod
    def kinds(self) -> set[Kind]:
        """The kinds of step it may ask for."""

    def num_updates(self, updates: Mapping[Kind, int]) -> int | None:
        """Optimizer steps of the whole run, given how many a step of each kind makes; None where not known."""
        if self.num_steps is None:
            return None
        plans = (self.plan(step, {}) for step in range(self.num_steps))
        return sum(updates[plan.kind] for plan in plans if plan is not None)

    def spec(self) -> dict[str, Any] | None:
        """What `make_strategy` makes it from; None of one that is not registered, or no dataclass."""
        names = [name for name in _strategies if _strategies[name] is type(self)]
        return {"strategy": names[0], **asdict(self)} if names and is_dataclass(self) else None

    @abstractmethod
    def for_epochs(self, epochs: float, sft_steps_per_epoch: int, ppo_steps_per_epoch: int) -> "Strategy":
        """The same mixture, as long as `epochs` passes over the data take."""


_strategies: Registry[type[Strategy]] = Registry("strategy")
register_strategy = _strategies.register


def make_strategy(spec: Mapping[str, Any]) -> Strategy:
    """A strategy from a flat spec: its name under `strategy` ("alternate" by default), its fields beside it."""
    fields = {key: value for key, value in spec.items() if key != "strategy"}
    name = spec.get("strategy", "alternate")
    return build(_strategies[name], fields, what=f"mixing strategy {name!r}", path="mixing")


def _check_counts(owner: "Sequential | Alternate", at_least_one_of: tuple[str, ...]) -> None:
    for name, number in vars(owner).items():
        if number < 0:
            raise InputError(f"{name} must be >= 0, got {number!r}")
    if not any(getattr(owner, name) for name in at_least_one_of):
        raise InputError(f"{' and '.join(at_least_one_of)} = 0 leave no step to take")


def _kinds(sft_steps: int, ppo_steps: int) -> set[Kind]:
    counts: dict[Kind, int] = {"sft": sft_steps, "ppo": ppo_steps}
    return {kind for kind, count in counts.items() if count}


@register_strategy("sequential")
@dataclass(frozen=True)
class Sequential(Strategy):
    """All supervised steps, then all PPO steps: the baseline that every mixture is measured against."""

    sft_steps: int = 100
    ppo_steps: int = 100

    def __post_init__(self) -> None:
        _check_counts(self, ("sft_steps", "ppo_steps"))

    @property
    def num_steps(self) -> int:
        return self.sft_steps + self.ppo_steps

    @property
    def kinds(self) -> set[Kind]:
        return _kinds(self.sft_steps, self.ppo_steps)

    def for_epochs(self, epochs: float, sft_steps_per_epoch: int, ppo_steps_per_epoch: int) -> "Sequential":
        """Each phase takes `epochs` passes; a phase with no steps stays out."""
        return Sequential(
            math.ceil(epochs * sft_steps_per_epoch) if self.sft_steps else 0,
            math.ceil(epochs * ppo_steps_per_epoch) if self.ppo_steps else 0,
        )

    def plan(self, step: int, metrics: Mapping[str, float]) -> Plan | None:
        if step >= self.num_steps:
            return None
        return Plan("sft", 0) if step < self.sft_steps else Plan("ppo", 1)


@register_strategy("alternate")
@dataclass(frozen=True)
class Alternate(Strategy):
    """Cycles of some supervised steps and some PPO steps."""

    cycles: int = 40
    sft_steps_per_cycle: int = 3
    ppo_steps_per_cycle: int = 1

    def __post_init__(self) -> None:
        _check_counts(self, ("cycles",))
        _check_counts(self, ("sft_steps_per_cycle", "ppo_steps_per_cycle"))

    @property
    def num_steps(self) -> int:
        return self.cycles * (self.sft_steps_per_cycle + self.ppo_steps_per_cycle)

    @property
    def kinds(self) -> set[Kind]:
        return _kinds(self.sft_steps_per_cycle, self.ppo_steps_per_cycle)

    def for_epochs(self, epochs: float, sft_steps_per_epoch: int, ppo_steps_per_epoch: int) -> "Alternate":
        """As many cycles as the supervised steps need for `epochs` passes (the PPO steps, where there are none)."""
        if self.sft_steps_per_cycle:
            cycles = epochs * sft_steps_per_epoch / self.sft_steps_per_cycle
        else:
            cycles = epochs * ppo_steps_per_epoch / self.ppo_steps_per_cycle
        return replace(self, cycles=math.ceil(cycles))

    def plan(self, step: int, metrics: Mapping[str, float]) -> Plan | None:
        cycle, position = divmod(step, self.sft_steps_per_cycle + self.ppo_steps_per_cycle)
        if cycle >= self.cycles:
            return None
        return Plan("sft" if position < self.sft_steps_per_cycle else "ppo", cycle)
