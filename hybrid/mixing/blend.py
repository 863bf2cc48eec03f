"""One loss of any objectives, each with a coefficient that stays; or one objective alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hybrid.core import InputError
from hybrid.mixing.strategy import Plan, Strategy, check_range, register_strategy
from hybrid.objectives import objective_class

__all__ = ["Blend", "Single"]


@register_strategy("blend")
@dataclass(frozen=True)
class Blend(Strategy):
    """Every step is the same sum.

        loss = sum over names of coefs[name] * L_name

    With an objective that rolls out (`ppo`) a step is a rollout and the updates that PPO makes of it, else one update.
    Of an objective alone that does not roll out the coefficient is 1.
    """

    steps: int = 100
    coefs: dict[str, float] = field(default_factory=lambda: {"ppo": 1.0, "sft": 1.0})

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "steps")
        for name, coef in self.coefs.items():
            objective_class(name)
            if isinstance(coef, bool) or not isinstance(coef, (int, float)) or not 0 <= coef < math.inf:
                raise InputError(f"coefs.{name} must be a number >= 0, got {coef!r}")
        try:
            Plan(0, self.coefs)
        except ValueError as error:
            raise InputError(f"coefs: {error}") from error

    @property
    def num_steps(self) -> int:
        return self.steps

    @property
    def objectives(self) -> set[str]:
        return set(Plan(0, self.coefs).coefs)

    def for_epochs(self, epochs: float, sft_steps_per_epoch: int, ppo_steps_per_epoch: int) -> "Blend":
        """`epochs` passes over the prompts where it rolls out, else over the training data."""
        each = ppo_steps_per_epoch if self.rolls_out else sft_steps_per_epoch
        return replace(self, steps=math.ceil(epochs * each))

    def plan(self, step: int, metrics: Mapping[str, float]) -> Plan | None:
        return Plan(step, self.coefs) if step < self.steps else None


@register_strategy("objective")
@dataclass(frozen=True)
class Single(Strategy):
    """Every step is one objective: `dpo`, `reward_model`, `distill` or any other.

    With an objective that rolls out (`ppo`, `online_dpo`) a step is a rollout and the updates made of it, else one
    update. `HybridTrainer.train(epochs)` makes it as long as so many passes over the objective's data take.
    """

    objective: str = "sft"
    steps: int = 100

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "steps")
        objective_class(self.objective)

    @property
    def num_steps(self) -> int:
        return self.steps

    @property
    def objectives(self) -> set[str]:
        return {self.objective}

    def for_epochs(self, epochs: float, sft_steps_per_epoch: int, ppo_steps_per_epoch: int) -> "Single":
        each = ppo_steps_per_epoch if self.rolls_out else sft_steps_per_epoch
        return replace(self, steps=math.ceil(epochs * each))

    def plan(self, step: int, metrics: Mapping[str, float]) -> Plan | None:
        return Plan(step, {self.objective: 1.0}) if step < self.steps else None
