"""What a strategy is: it says which step comes next, and with which factors of the two losses."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from hybrid.core import Batch, Encoded, InputError, Registry, Rollout, build

__all__ = [
    "Kind",
    "Plan",
    "Source",
    "Strategy",
    "check_range",
    "make_strategy",
    "passes",
    "register_strategy",
    "strategy_names",
]

Kind = Literal["sft", "ppo", "joint"]


def passes(name: str, value: Any) -> float:
    """So many passes over the data, or InputError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise InputError(f"{name} must be a number of passes over the data, 0 or more, got {value!r}")
    return value


@dataclass(frozen=True)
class Plan:
    """One step to take: how much each of the two losses counts in it.

    sft_coef alone, then 1: one supervised update.   ppo_coef alone: a rollout, and the PPO updates on it.
    both: a rollout, and PPO updates whose loss is ppo_coef * L_PPO + sft_coef * L_SFT.
    cycle: the number of the cycle it belongs to, from 0.
    examples: what a supervised step trains on; none: the next batch of the training data.
    """

    cycle: int
    sft_coef: float = 0.0
    ppo_coef: float = 0.0
    examples: tuple[Encoded, ...] = ()

    def __post_init__(self) -> None:
        if min(self.sft_coef, self.ppo_coef) < 0 or self.sft_coef == self.ppo_coef == 0:
            raise ValueError(f"a Plan needs factors >= 0, and one above, got {self.sft_coef} and {self.ppo_coef}")
        if not self.ppo_coef and self.sft_coef != 1:
            # No optimizer of ours but sgd would see it: it would only look like an effect.
            raise ValueError(
                f"a Plan's sft_coef must be 1 where it stands alone, got {self.sft_coef}; sft.lr_factor scales the step"
            )

    @property
    def kind(self) -> Kind:
        """A loss with factor 0 is not computed at all: the step is then bit for bit one of the other kind."""
        if not self.ppo_coef:
            return "sft"
        return "joint" if self.sft_coef else "ppo"


class Source(Protocol):
    """Where supervised batches come from; the trainer is one."""

    @property
    def loader(self) -> Iterator[Batch]:
        """Endless batches of the training data."""

    @property
    def ptx_loader(self) -> Iterator[Batch]:
        """Endless batches of the second data set."""

    def batches_of(self, examples: Sequence[Encoded]) -> list[Batch]:
        """These examples in batches of a supervised step's size."""


class Strategy(ABC):
    """Decides the steps of a run. The loop asks for a `plan`, then lets the hooks act on that step's rollout.

    A strategy is a dataclass whose fields are its spec. What it remembers between steps (`state_dict`) is saved
    with every checkpoint; a strategy without memory is a pure function of the step.
    """

    needs_targets: ClassVar[bool] = False  # answers to the prompts, also where it asks for no supervised step
    needs_ptx: ClassVar[bool] = False  # the second data set

    @abstractmethod
    def plan(self, step: int, metrics: Mapping[str, float]) -> Plan | None:
        """The step number `step` (from 0), given the metrics of the step before it; None: the end."""

    @property
    @abstractmethod
    def num_steps(self) -> int | None:
        """How many steps there will be, or None where that depends on what happens."""

    @property
    @abstractmethod
    def kinds(self) -> set[Kind]:
        """The kinds of step it may ask for."""

    @abstractmethod
    def for_epochs(self, epochs: float, sft_steps_per_epoch: int, ppo_steps_per_epoch: int) -> "Strategy":
        """The same mixture, as long as `epochs` passes over the data take."""

    def num_updates(self, updates: Mapping[Kind, int]) -> int | None:
        """Optimizer steps of the whole run, given how many a step of each kind makes; None where not known."""
        if self.num_steps is None:
            return None
        plans = (self.plan(step, {}) for step in range(self.num_steps))
        return sum(updates[plan.kind] for plan in plans if plan is not None)

    # Hooks of a step with a rollout

    def prompts(self, examples: Sequence[Encoded], step: int) -> Sequence[Encoded]:
        """The examples whose prompts are rolled out."""
        return examples

    def prompt_length(self, example: Encoded) -> int:
        """The most tokens that `prompts` may make of an example's prompt."""
        return len(example.prompt_ids)

    def trained_rows(self, rollout: Rollout, examples: Sequence[Encoded]) -> Tensor | None:
        """The rows of the rollout that PPO learns from, (n,) int64; None: all.

        examples: those that were rolled out; `rollout.group` numbers them.
        """
        return None

    def supervised(self, source: Source, examples: Sequence[Encoded]) -> Iterator[Batch]:
        """The supervised batches of a joint step, one for each update."""
        return source.loader

    def metrics(self) -> dict[str, float]:
        """What there is to log of the last step."""
        return {}

    # Memory

    @cached_property
    def memory(self) -> dict[str, Any]:
        """What it remembers between steps; the fields are its spec, and stay."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The memory as JSON."""
        return dict(self.memory)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.memory.update(state)

    def spec(self) -> dict[str, Any] | None:
        """What `make_strategy` makes it from; None of one that is not registered, or no dataclass."""
        names = [name for name in _strategies if _strategies[name] is type(self)]
        if not names or not is_dataclass(self):
            return None
        return {"strategy": names[0], **{f.name: getattr(self, f.name) for f in fields(self)}}


_strategies: Registry[type[Strategy]] = Registry("strategy")
register_strategy = _strategies.register


def make_strategy(spec: Mapping[str, Any]) -> Strategy:
    """A strategy from a flat spec: its name under `strategy` ("alternate" by default), its fields beside it."""
    fields = {key: value for key, value in spec.items() if key != "strategy"}
    name = spec.get("strategy", "alternate")
    return build(_strategies[name], fields, what=f"mixing strategy {name!r}", path="mixing")


def strategy_names() -> list[str]:
    """The names that `make_strategy` knows."""
    return list(_strategies)


def check_range(owner: Strategy, low: float, high: float, *names: str) -> None:
    """Raise InputError unless these fields lie in [low, high]; None stands for a default and is fine."""
    for name in names:
        number = getattr(owner, name)
        if number is not None and not low <= number <= high:
            upper = f"lie in [{low}, {high}]" if high < float("inf") else f"be >= {low}"
            raise InputError(f"{name} must {upper}, got {number!r}")
