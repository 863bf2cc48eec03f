"""What a strategy is: it says which step comes next, and which objectives are in it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from hybrid.core import Batch, Encoded, InputError, Registry, Rollout, build
from hybrid.objectives import Parts, objective_class, objective_names

__all__ = [
    "Kind",
    "Plan",
    "Strategy",
    "check_range",
    "make_strategy",
    "passes",
    "register_strategy",
    "strategy_names",
]


def passes(name: str, value: Any) -> float:
    """So many passes over the data, or InputError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise InputError(f"{name} must be a number of passes over the data, 0 or more, got {value!r}")
    return value


# How a step is called in logs: its objective's name, or "joint" where it has several.
Kind = str


@dataclass(frozen=True, init=False)
class Plan:
    """One step to take: which objectives are in its loss, and how much each of them counts.

        Plan(cycle, {"ppo": 0.9, "sft": 0.1})

    One whose objectives include one that rolls out (`ppo`) begins with a rollout, and has as many updates as PPO makes
    of it; any other is one update. An objective alone has the coefficient 1 where it does not roll out: no optimizer
    but sgd would see another.
    cycle: the number of the cycle it belongs to, from 0.
    examples: what a supervised step trains on; none: the next batch of the training data.
    sft_coef, ppo_coef: another way to write these two. A coefficient of 0 leaves the objective out.
    """

    cycle: int
    coefs: Mapping[str, float]
    examples: tuple[Encoded, ...] = ()

    def __init__(
        self,
        cycle: int,
        coefs: Mapping[str, float] | None = None,
        examples: Sequence[Encoded] = (),
        *,
        sft_coef: float = 0.0,
        ppo_coef: float = 0.0,
    ):
        given = {"ppo": ppo_coef, "sft": sft_coef} if coefs is None else dict(coefs)
        if not all(0 <= coef < math.inf for coef in given.values()) or not any(given.values()):
            raise ValueError(f"a Plan needs coefficients >= 0, and one above, got {given}")
        # What rolls out comes first, in whatever order they were named: the same sum, to the last bit.
        names = sorted((name for name in given if given[name]), key=lambda name: not objective_class(name).rolls_out)
        if len(names) == 1 and not objective_class(names[0]).rolls_out and given[names[0]] != 1:
            raise ValueError(
                f"a Plan's {names[0]}_coef must be 1 where it stands alone, got {given[names[0]]}; "
                f"{names[0]}.lr_factor scales the step"
            )
        object.__setattr__(self, "cycle", cycle)
        object.__setattr__(self, "coefs", {name: given[name] for name in names})
        object.__setattr__(self, "examples", tuple(examples))

    @property
    def sft_coef(self) -> float:
        """The coefficient of `sft`, 0 where it is not in it."""
        return self.coefs.get("sft", 0.0)

    @property
    def ppo_coef(self) -> float:
        """The coefficient of `ppo`, 0 where it is not in it."""
        return self.coefs.get("ppo", 0.0)

    @property
    def rolls_out(self) -> bool:
        """Whether the step begins with a rollout."""
        return any(objective_class(name).rolls_out for name in self.coefs)

    @property
    def needs_reward(self) -> bool:
        """Whether the responses that it learns from have to be scored."""
        return any(objective_class(name).rolls_out and objective_class(name).needs_reward for name in self.coefs)

    @property
    def kind(self) -> Kind:
        """What the step is called. An objective with coefficient 0 is not computed at all: the step is then bit for bit
        one without it."""
        return next(iter(self.coefs)) if len(self.coefs) == 1 else "joint"


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
    def objectives(self) -> set[str]:
        """The objectives that its plans may name."""
        # Strategies that know of two losses only say `kinds`.
        of = {"sft": {"sft"}, "ppo": {"ppo"}, "joint": {"sft", "ppo"}}
        return {name for kind in self.kinds for name in of.get(kind, {kind})}

    @property
    def kinds(self) -> set[Kind]:
        """The kinds of step that it may ask for."""
        raise NotImplementedError(f"{type(self).__name__} must say which objectives its plans may name")

    @property
    def rolls_out(self) -> bool:
        """Whether any of its steps may begin with a rollout."""
        return any(objective_class(name).rolls_out for name in self.objectives)

    @property
    def needs_reward(self) -> bool:
        """Whether any of its steps needs responses with scores."""
        return any(objective_class(name).rolls_out and objective_class(name).needs_reward for name in self.objectives)

    @abstractmethod
    def for_epochs(self, epochs: float, sft_steps_per_epoch: int, ppo_steps_per_epoch: int) -> "Strategy":
        """The same mixture, as long as `epochs` passes over the data take."""

    def num_updates(self, updates: Mapping[Kind, int]) -> int | None:
        """Optimizer steps of the whole run, given how many a step makes with a rollout ("ppo", "joint") and without
        ("sft"); None where not known."""
        if self.num_steps is None:
            return None
        plans = (self.plan(step, {}) for step in range(self.num_steps))
        return sum(updates["ppo"] if plan.rolls_out else 1 for plan in plans if plan is not None)

    # Hooks of a step with a rollout

    def prompts(self, examples: Sequence[Encoded], step: int) -> Sequence[Encoded]:
        """The examples whose prompts are rolled out."""
        return examples

    def repeated(self, examples: Sequence[Encoded], num_responses: int, step: int) -> Sequence[Encoded] | None:
        """What each response of the rollout answers, `num_responses` to each of these in turn; None: its prompt."""
        return None

    def prompt_length(self, example: Encoded) -> int:
        """The most tokens that `prompts` may make of an example's prompt."""
        return len(example.prompt_ids)

    def trained_rows(self, rollout: Rollout, examples: Sequence[Encoded]) -> Tensor | None:
        """The rows of the rollout that PPO learns from, (n,) int64; None: all.

        examples: those that were rolled out; `rollout.group` numbers them.
        """
        return None

    def supervised(self, source: Parts, examples: Sequence[Encoded]) -> Iterator[Batch]:
        """The batches of objective `sft` in a step with a rollout of these examples, one for each update."""
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
    if name in objective_names() and name not in strategy_names():
        raise InputError(
            f"{name!r} is an objective, not a strategy: mixing: {{strategy: objective, objective: {name}}}"
        )
    made: Strategy = build(_strategies[name], fields, what=f"mixing strategy {name!r}", path="mixing")
    return made


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
