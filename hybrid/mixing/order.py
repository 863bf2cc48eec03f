"""Strategies that order whole steps: first one kind, then the other; or in turns, at a ratio that may move."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from hybrid.core import InputError
from hybrid.mixing.strategy import Kind, Plan, Strategy, check_range, register_strategy

__all__ = ["Alternate", "Sequential"]


def _taken(sft_steps: int, ppo_steps: int) -> set[str]:
    """The objectives of the two whose steps are not 0."""
    taken = {name for name, count in (("sft", sft_steps), ("ppo", ppo_steps)) if count}
    if not taken:
        raise InputError("sft_steps and ppo_steps = 0 leave no step to take")
    return taken


def _between(start: tuple[int, int], final: tuple[int, int], x: float) -> tuple[int, int]:
    """The two counts at x between start (0) and final (1), rounded; never both nothing."""
    if not x:
        return start
    sft, ppo = (math.floor(a + x * (b - a) + 0.5) for a, b in zip(start, final, strict=True))
    return (sft, ppo) if sft + ppo else (int(start[0] > start[1]), int(start[0] <= start[1]))


@register_strategy("sequential")
@dataclass(frozen=True)
class Sequential(Strategy):
    """All supervised steps, then all PPO steps: the baseline that every mixture is measured against."""

    sft_steps: int = 100
    ppo_steps: int = 100

    def __post_init__(self) -> None:
        check_range(self, 0, math.inf, "sft_steps", "ppo_steps")
        _taken(self.sft_steps, self.ppo_steps)

    @property
    def num_steps(self) -> int:
        return self.sft_steps + self.ppo_steps

    @property
    def objectives(self) -> set[str]:
        return _taken(self.sft_steps, self.ppo_steps)

    def for_epochs(self, epochs: float, sft_steps_per_epoch: int, ppo_steps_per_epoch: int) -> "Sequential":
        """Each phase takes `epochs` passes; a phase with no steps stays out."""
        return replace(
            self,
            sft_steps=math.ceil(epochs * sft_steps_per_epoch) if self.sft_steps else 0,
            ppo_steps=math.ceil(epochs * ppo_steps_per_epoch) if self.ppo_steps else 0,
        )

    def plan(self, step: int, metrics: Mapping[str, float]) -> Plan | None:
        if step >= self.num_steps:
            return None
        return Plan(0, {"sft": 1.0}) if step < self.sft_steps else Plan(1, {"ppo": 1.0})


@register_strategy("alternate")
@dataclass(frozen=True)
class Alternate(Strategy):
    """Cycles of some supervised steps and some PPO steps.

    With a curriculum the counts move from `..._per_cycle` to `final_..._per_cycle`, rounded, as x goes from 0 to 1:

        linear   x = cycle / (cycles - 1)
        cosine   x = (1 - cos(pi * cycle / (cycles - 1))) / 2
        reward   x = (reward - first reward) / (target_reward - first reward), within [0, 1], of the last PPO step
                 before the cycle; it may go back
    """

    cycles: int = 40
    sft_steps_per_cycle: int = 3
    ppo_steps_per_cycle: int = 1
    curriculum: Literal["none", "linear", "cosine", "reward"] = "none"
    final_sft_steps_per_cycle: int | None = None  # None: ppo_steps_per_cycle, the ratio turned round
    final_ppo_steps_per_cycle: int | None = None  # None: sft_steps_per_cycle
    target_reward: float | None = None  # of curriculum "reward"

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "cycles")
        counts = ("sft_steps_per_cycle", "ppo_steps_per_cycle")
        check_range(self, 0, math.inf, *counts, *(f"final_{name}" for name in counts))
        if not any(getattr(self, name) for name in counts):
            raise InputError(f"{' and '.join(counts)} = 0 leave no step to take")
        if self.curriculum == "none":
            for name in (*(f"final_{count}" for count in counts), "target_reward"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name} needs a curriculum, got 'none'")
        elif not sum(self._final):
            raise InputError(f"final_{' and final_'.join(counts)} = 0 leave no step to take")
        if (self.curriculum == "reward") != (self.target_reward is not None):
            raise InputError("target_reward goes with curriculum 'reward', and only with it")
        if self.curriculum == "reward" and not self.ppo_steps_per_cycle:
            raise InputError("ppo_steps_per_cycle must be >= 1 for curriculum 'reward': no other step measures it")
        # Of curriculum "reward": the counts of the cycles so far, the first reward and the last.
        self.memory.update(counts=[], first=None, last=None)

    @property
    def _final(self) -> tuple[int, int]:
        sft, ppo = self.final_sft_steps_per_cycle, self.final_ppo_steps_per_cycle
        return self.ppo_steps_per_cycle if sft is None else sft, self.sft_steps_per_cycle if ppo is None else ppo

    def _counts(self, cycle: int) -> tuple[int, int]:
        """The supervised and the PPO steps of a cycle."""
        start = (self.sft_steps_per_cycle, self.ppo_steps_per_cycle)
        if self.curriculum != "reward":
            return _between(start, self._final, self._progress(cycle))
        counts: list[list[int]] = self.memory["counts"]
        if cycle == len(counts):
            counts.append(list(_between(start, self._final, self._progress(cycle))))
        sft, ppo = counts[cycle]
        return sft, ppo

    def _progress(self, cycle: int) -> float:
        """x of the curriculum, from 0 to 1; of "reward" as it stands now."""
        if self.curriculum == "reward":
            first, last, target = self.memory["first"], self.memory["last"], self.target_reward
            if first is None or target is None:
                return 0.0
            return 1.0 if target <= first else float(min(max((last - first) / (target - first), 0.0), 1.0))
        if self.curriculum == "none" or self.cycles == 1:
            return 0.0
        x = cycle / (self.cycles - 1)
        return (1 - math.cos(math.pi * x)) / 2 if self.curriculum == "cosine" else x

    @property
    def num_steps(self) -> int | None:
        if self.curriculum == "reward":
            return None
        return sum(sum(self._counts(cycle)) for cycle in range(self.cycles))

    @property
    def objectives(self) -> set[str]:
        final = (0, 0) if self.curriculum == "none" else self._final
        return _taken(self.sft_steps_per_cycle + final[0], self.ppo_steps_per_cycle + final[1])

    def num_updates(self, updates: Mapping[Kind, int]) -> int | None:
        """By cycles: a plan looks for its cycle from the first one on, and there may be thousands."""
        if self.num_steps is None:
            return None
        counts = [self._counts(cycle) for cycle in range(self.cycles)]
        return sum(sft * updates["sft"] + ppo * updates["ppo"] for sft, ppo in counts)

    def for_epochs(self, epochs: float, sft_steps_per_epoch: int, ppo_steps_per_epoch: int) -> "Alternate":
        """As many cycles as the supervised steps need for `epochs` passes (the PPO steps, where there are none).

        Of a curriculum's changing counts, the mean of the first and the last is taken.
        """
        start = (self.sft_steps_per_cycle, self.ppo_steps_per_cycle)
        final = start if self.curriculum == "none" else self._final
        sft, ppo = (start[0] + final[0]) / 2, (start[1] + final[1]) / 2
        cycles = epochs * sft_steps_per_epoch / sft if sft else epochs * ppo_steps_per_epoch / ppo
        return replace(self, cycles=math.ceil(cycles))

    def plan(self, step: int, metrics: Mapping[str, float]) -> Plan | None:
        if "reward" in metrics:
            first = self.memory["first"]
            self.memory.update(first=metrics["reward"] if first is None else first, last=metrics["reward"])
        for cycle in range(self.cycles):
            sft, ppo = self._counts(cycle)
            if step < sft + ppo:
                return Plan(cycle, {"sft": 1.0}) if step < sft else Plan(cycle, {"ppo": 1.0})
            step -= sft + ppo
        return None
