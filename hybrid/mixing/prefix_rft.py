"""Groups in which some responses begin with a part of the demonstration."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from hybrid.core import Encoded, InputError
from hybrid.mixing.hint import hinted, longest_prompt, num_hintable
from hybrid.mixing.strategy import Plan, Strategy, check_range, register_strategy

__all__ = ["PrefixRFT"]


@register_strategy("prefix_rft")
@dataclass(frozen=True)
class PrefixRFT(Strategy):
    """Gives a prefix of the target to `prefixed` of the responses to each prompt, and none to the others.

        number of hinted tokens = floor(l L),   l ~ U[low(t), share],   L: the target's tokens without EOS
        low(t) = final_share + (share - final_share) * (1 + cos(pi t / decay_steps)) / 2,   final_share after them

    Rewards read hint and response as one text. What is learnt of it says objective `prefix_rft`.
    Source: Huang et al. 2025 (arXiv:2507.01679), as a reader of its appendix describes it: low falls over 500 steps.
    """

    steps: int = 100
    share: float = 0.95  # of the target, at most
    final_share: float = 0.05  # of the target, at least, at the end
    decay_steps: int | None = None  # None: all steps
    prefixed: int = 1  # of `ppo.samples_per_prompt` responses
    seed: int = 0  # of the lengths: a pure function of seed and step

    needs_targets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "steps", "decay_steps", "prefixed")
        check_range(self, 0.0, 1.0, "share")
        check_range(self, 0.0, self.share, "final_share")

    def low_at(self, step: int) -> float:
        """low(t) in step t, from 0."""
        x = min(step / (self.decay_steps or self.steps), 1.0)
        return self.final_share + (self.share - self.final_share) * (1 + math.cos(math.pi * x)) / 2

    @property
    def num_steps(self) -> int:
        return self.steps

    @property
    def objectives(self) -> set[str]:
        return {"prefix_rft"}

    def for_epochs(self, epochs: float, sft_steps_per_epoch: int, ppo_steps_per_epoch: int) -> "PrefixRFT":
        """`epochs` passes over the prompts."""
        return replace(self, steps=math.ceil(epochs * ppo_steps_per_epoch))

    def plan(self, step: int, metrics: Mapping[str, float]) -> Plan | None:
        return Plan(step, {"prefix_rft": 1.0}) if step < self.steps else None

    def repeated(self, examples: Sequence[Encoded], num_responses: int, step: int) -> Sequence[Encoded]:
        if self.prefixed >= num_responses:
            raise InputError(
                f"prefixed must be less than the {num_responses} responses to a prompt, got {self.prefixed}: what a "
                "hint is worth is seen beside responses without one"
            )
        self.memory["prefix_low"] = low = self.low_at(step)
        generator = random.Random(f"{self.seed}/{step}")
        rows: list[Encoded] = []
        for example in examples:
            shares = [generator.uniform(low, self.share) for _ in range(self.prefixed)]
            rows += [example] * (num_responses - self.prefixed)
            rows += [hinted(example, math.floor(share * num_hintable(example))) for share in shares]
        return rows

    def prompt_length(self, example: Encoded) -> int:
        return longest_prompt(example)

    def metrics(self) -> dict[str, float]:
        return {"prefix_low": self.memory.get("prefix_low", self.share)}
