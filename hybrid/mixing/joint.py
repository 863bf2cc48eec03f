"""Strategies whose every update has both losses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from hybrid.core import InputError
from hybrid.mixing.strategy import Plan, Strategy, check_range, register_strategy

__all__ = ["Joint", "Ptx"]


@register_strategy("joint")
@dataclass(frozen=True)
class Joint(Strategy):
    """One loss of both, with a weight that may fall from imitation to exploration.

        loss = mu * L_SFT + (1 - mu) * L_PPO

        constant   mu
        linear     from mu at the first step to final_mu at the last
        chord      from 0 to mu over `warmup_steps`, then along half a cosine to final_mu over `decay_steps`

    Every PPO update has a supervised batch of its own. mu = 1 is an SFT step and mu = 0 a PPO step, bit for bit.
    Source: CHORD (Zhang et al. 2025, arXiv:2508.11408); its schedule as in its released code (Trinity-RFT).
    """

    steps: int = 100
    mu: float = 0.5
    schedule: Literal["constant", "linear", "chord"] = "constant"
    final_mu: float | None = None  # of linear and chord; None: 0.05
    warmup_steps: int | None = None  # of chord; None: 0
    decay_steps: int | None = None  # of chord; None: the steps after the warm-up

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "steps", "decay_steps")
        check_range(self, 0, math.inf, "warmup_steps")
        check_range(self, 0.0, 1.0, "mu", "final_mu")
        takes = {"constant": (), "linear": ("final_mu",), "chord": ("final_mu", "warmup_steps", "decay_steps")}
        for name in ("final_mu", "warmup_steps", "decay_steps"):
            if getattr(self, name) is not None and name not in takes[self.schedule]:
                raise InputError(f"{name} is not of schedule {self.schedule!r}")

    def mu_at(self, step: int) -> float:
        """The weight of the supervised loss in step number `step`, from 0."""
        final = 0.05 if self.final_mu is None else self.final_mu
        if self.schedule == "constant":
            return self.mu
        if self.schedule == "linear":
            return self.mu + (final - self.mu) * min(step / max(self.steps - 1, 1), 1.0)
        warmup = self.warmup_steps or 0
        if step < warmup:
            return self.mu * step / warmup
        x = min((step - warmup) / (self.decay_steps or max(self.steps - 1 - warmup, 1)), 1.0)
        return final + (self.mu - final) * (1 + math.cos(math.pi * x)) / 2

    @property
    def num_steps(self) -> int:
        return self.steps

    @property
    def objectives(self) -> set[str]:
        plans = (self.plan(step, {}) for step in range(self.steps))
        return {name for plan in plans if plan is not None for name in plan.coefs}

    def for_epochs(self, epochs: float, sft_steps_per_epoch: int, ppo_steps_per_epoch: int) -> "Joint":
        """`epochs` passes over the prompts."""
        return replace(self, steps=math.ceil(epochs * ppo_steps_per_epoch))

    def plan(self, step: int, metrics: Mapping[str, float]) -> Plan | None:
        mu = self.mu_at(step)
        return Plan(step, {"ppo": 1 - mu, "sft": mu}) if step < self.steps else None


@register_strategy("ptx")
@dataclass(frozen=True)
class Ptx(Strategy):
    """PPO that keeps to the language of a second data set.

        loss = L_PPO + gamma * L_LM(ptx_data)

    Source: Ouyang et al. 2022, eq. 2 (arXiv:2203.02155), PPO-ptx, where gamma was 27.8 (on sums of another scale).
    """

    steps: int = 100
    gamma: float = 1.0

    needs_ptx: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "steps")
        check_range(self, 0.0, math.inf, "gamma")

    @property
    def num_steps(self) -> int:
        return self.steps

    @property
    def objectives(self) -> set[str]:
        return {"ppo", "ptx"} if self.gamma else {"ppo"}

    def for_epochs(self, epochs: float, sft_steps_per_epoch: int, ppo_steps_per_epoch: int) -> "Ptx":
        """`epochs` passes over the prompts."""
        return replace(self, steps=math.ceil(epochs * ppo_steps_per_epoch))

    def plan(self, step: int, metrics: Mapping[str, float]) -> Plan | None:
        return Plan(step, {"ppo": 1.0, "ptx": self.gamma}) if step < self.steps else None
