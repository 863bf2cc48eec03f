"""Rollouts that begin with a part of the answer."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import ClassVar

from hybrid.core import IGNORE, Batch, Encoded
from hybrid.mixing.strategy import Plan, Strategy, check_range, register_strategy
from hybrid.objectives import Parts

__all__ = ["Hint", "hinted", "longest_prompt", "num_hintable"]


@register_strategy("hint")
@dataclass(frozen=True)
class Hint(Strategy):
    """Gives a prefix of the target, shorter and shorter, and lets the policy find the rest.

        number of hinted tokens ~ Binomial(L, p(t)),   L: the target's tokens without EOS
        p(t) = final_share + (share - final_share) * (1 + cos(pi (t + 1) / hint_steps)) / 2,   0 from hint_steps on

    Rewards read hint and response as one text. PPO learns from the response; the hint is learnt by cross-entropy,
    with the factor sft_coef in the same loss (0: not at all).
    Source: UFT, eq. B.1 (Liu et al. 2025, arXiv:2505.16984).
    """

    steps: int = 100
    share: float = 0.95  # of the target, expected at first
    final_share: float = 0.05
    hint_steps: int | None = None  # None: all steps
    sft_coef: float = 0.0
    seed: int = 0  # of the lengths: a pure function of seed and step

    needs_targets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "steps", "hint_steps")
        check_range(self, 0.0, 1.0, "share", "final_share")
        check_range(self, 0.0, math.inf, "sft_coef")

    def share_at(self, step: int) -> float:
        """p(t), the expected share of the target that is given in step t, from 0."""
        hint_steps = self.hint_steps or self.steps
        if step >= hint_steps:
            return 0.0
        x = (step + 1) / hint_steps
        return self.final_share + (self.share - self.final_share) * (1 + math.cos(math.pi * x)) / 2

    @property
    def num_steps(self) -> int:
        return self.steps

    @property
    def objectives(self) -> set[str]:
        return {"ppo", "sft"} if self.sft_coef else {"ppo"}

    def for_epochs(self, epochs: float, sft_steps_per_epoch: int, ppo_steps_per_epoch: int) -> "Hint":
        """`epochs` passes over the prompts."""
        return replace(self, steps=math.ceil(epochs * ppo_steps_per_epoch))

    def plan(self, step: int, metrics: Mapping[str, float]) -> Plan | None:
        return Plan(step, {"ppo": 1.0, "sft": self.sft_coef}) if step < self.steps else None

    def prompts(self, examples: Sequence[Encoded], step: int) -> Sequence[Encoded]:
        self.memory["hint_share"] = share = self.share_at(step)
        generator = random.Random(f"{self.seed}/{step}")
        given = ((example, num_hintable(example)) for example in examples)
        return [hinted(example, sum(generator.random() < share for _ in range(length))) for example, length in given]

    def prompt_length(self, example: Encoded) -> int:
        return longest_prompt(example)

    def supervised(self, source: Parts, examples: Sequence[Encoded]) -> Iterator[Batch]:
        """The hints of these examples over and over, a minibatch's share at a time."""
        return cycle(source.batches_of([_hint_alone(e) for e in examples if e.num_hint]))

    def metrics(self) -> dict[str, float]:
        return {"hint_share": self.memory.get("hint_share", 0.0)}


def num_hintable(example: Encoded) -> int:
    """The most tokens that a hint may have: of those behind the prompt, up to where an untrained one (a user) stands.

    The last, EOS, is never given: the policy has one token to say at least.
    """
    labels = example.labels[len(example.prompt_ids) :]
    return max(next((t for t, label in enumerate(labels) if label == IGNORE), len(labels)) - 1, 0)


def hinted(example: Encoded, num_hint: int) -> Encoded:
    """The example whose prompt ends in the first `num_hint` tokens of its target."""
    prompt_ids = example.input_ids[: len(example.prompt_ids) + num_hint]
    return replace(example, prompt_ids=prompt_ids, num_hint=num_hint)


def longest_prompt(example: Encoded) -> int:
    """The tokens of an example's prompt with the longest hint."""
    return len(example.prompt_ids) + num_hintable(example)


def _hint_alone(example: Encoded) -> Encoded:
    """The example cut behind its hint, which alone is trained."""
    start = len(example.prompt_ids) - example.num_hint
    labels = (IGNORE,) * start + example.prompt_ids[start:]
    return replace(example, input_ids=example.prompt_ids, labels=labels)
