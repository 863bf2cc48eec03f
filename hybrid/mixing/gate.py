"""Imitation where exploration finds nothing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hybrid.core import Encoded, Rollout
from hybrid.mixing.strategy import Kind, Plan, Strategy, check_range, register_strategy

__all__ = ["Gate"]


@register_strategy("gate")
@dataclass(frozen=True)
class Gate(Strategy):
    """PPO on the prompts that the policy can answer, SFT on the targets of those where it fails.

        a prompt fails where  max (or mean) of its responses' scores  <=  threshold

    Its responses stay out of the PPO updates, and its example goes to the buffer. When that holds `buffer` examples,
    the next step is supervised, on all of them. A prompt without a target has nothing to be taught: PPO keeps it.
    Source: SuperRL (arXiv:2506.01096) and ReLIFT (arXiv:2506.07527): no response succeeds, at once or from a
    buffer; HPT (Lv et al. 2025, arXiv:2509.04419): the mean is at most a threshold. They weigh both losses in one
    update, or interleave; here the supervised update follows the PPO updates of the rollout.
    """

    ppo_steps: int = 100
    threshold: float = 0.0
    judge_by: Literal["max", "mean"] = "max"  # the best response of a prompt, or their mean
    buffer: int = 1  # failed examples that make a supervised step; 1: at once

    needs_targets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "ppo_steps", "buffer")
        check_range(self, -math.inf, math.inf, "threshold")
        self.memory.update(rollouts=0, failed=[], failed_share=0.0)

    @property
    def num_steps(self) -> None:
        return None

    @property
    def objectives(self) -> set[str]:
        return {"sft", "ppo"}

    def num_updates(self, updates: Mapping[Kind, int]) -> int:
        """The most there can be: a scheduler that ends late is better than one that starts again."""
        return self.ppo_steps * (updates["ppo"] + updates["sft"])

    def for_epochs(self, epochs: float, sft_steps_per_epoch: int, ppo_steps_per_epoch: int) -> "Gate":
        """`epochs` passes over the prompts."""
        return replace(self, ppo_steps=math.ceil(epochs * ppo_steps_per_epoch))

    def plan(self, step: int, metrics: Mapping[str, float]) -> Plan | None:
        failed, cycle = self.memory["failed"], self.memory["rollouts"]
        if len(failed) >= self.buffer:
            self.memory["failed"] = []
            return Plan(cycle - 1, {"sft": 1.0}, failed)
        if cycle == self.ppo_steps:
            return None
        self.memory["rollouts"] += 1
        return Plan(cycle, {"ppo": 1.0})

    def trained_rows(self, rollout: Rollout, examples: Sequence[Encoded]) -> Tensor:
        assert rollout.group is not None  # collect numbers the prompts
        groups = rollout.group.tolist()
        scores: dict[int, list[float]] = {}
        for group, score in zip(groups, rollout.score.tolist(), strict=True):
            scores.setdefault(group, []).append(score)
        judged = {g: max(s) if self.judge_by == "max" else sum(s) / len(s) for g, s in scores.items()}
        failed = {g for g in judged if judged[g] <= self.threshold and examples[g].has_target}
        self.memory["failed"] += [examples[g] for g in sorted(failed)]
        self.memory["failed_share"] = len(failed) / len(judged)
        return torch.tensor([row for row, g in enumerate(groups) if g not in failed], dtype=torch.long)

    def metrics(self) -> dict[str, float]:
        return {"failed_share": self.memory["failed_share"], "buffered": float(len(self.memory["failed"]))}

    def state_dict(self) -> dict[str, Any]:
        # The row it came from may hold what no file can; a supervised step does not read it.
        return {**self.memory, "failed": [asdict(replace(example, item={})) for example in self.memory["failed"]]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        ids = ("input_ids", "labels", "prompt_ids")
        failed = [Encoded(**{**row, **{name: tuple(row[name]) for name in ids}}) for row in state.get("failed", ())]
        super().load_state_dict({**state, "failed": failed})
