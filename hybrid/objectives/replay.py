"""Self-imitation: the best responses that the memory has kept, learnt again as targets are."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from hybrid.core import InputError, Rollout
from hybrid.functional import masked_mean, masked_sum
from hybrid.models import response_stats
from hybrid.objectives.accumulate import Loss
from hybrid.objectives.earlier import rescored
from hybrid.objectives.objective import Objective, Parts, register_objective
from hybrid.objectives.ppo_config import PPOConfig

__all__ = ["Replay"]


@register_objective("replay")
class Replay(Objective[Rollout]):
    """The best kept responses, each by how much better it was than is expected of its prompt.

        loss = -sum over rows b and tokens t of  w_b log pi(token t of b)  /  number of tokens
        w_b  = max(R_b - V_b, 0)

    R: the response's score.   V: by `baseline` the running mean score of its prompt; or the value head's prediction
    for the prompt, which is of the reward that PPO sees, KL and shaping included.   Rows with w = 0 are left out.
    share: rows of a step, as a share of its rollout's. Which ones: prompts of medium difficulty first, of each its best
    response, of equal ones that of the lowest entropy.
    A step in which there is nothing to replay learns nothing from it.
    Sources: self-imitation learning (Oh et al. 2018, arXiv:1806.05635), without its value loss; ExGRPO
    (arXiv:2510.02245) for what is replayed.
    """

    rolls_out = True
    needs_memory = True

    def __init__(self, parts: Parts, ppo: PPOConfig, share: float = 0.25, baseline: Literal["mean", "value"] = "mean"):
        super().__init__(parts)
        self.ppo, self.share, self.baseline = ppo, share, baseline

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        if not 0 < settings.get("share", 1) <= 1:
            raise InputError(f"share must lie in (0, 1], got {settings['share']}")

    def check(self) -> None:
        memory = self.parts.memory
        if memory is None or not memory.keeps_responses:
            given = "there is none" if memory is None else f"{type(memory).__name__} keeps no responses"
            raise InputError(
                f"objective {self.name!r} replays what the run's memory has kept, and {given}: set "
                "memory.type=experience, or leave it out of mixing"
            )
        if self.baseline == "value" and not self.ppo.has_critic:
            raise InputError(
                f"objectives.{self.name}.baseline 'value' asks a value head that ppo.advantage {self.ppo.advantage!r} "
                "does not train: set it to mean"
            )
        super().check()

    def learnt(self, rollout: Rollout) -> Rollout:
        """The kept responses as a rollout of their own, `advantage` the weight w of each token's log-prob."""
        self.check()
        assert self.parts.memory is not None
        found = self.parts.memory.best(max(round(self.share * len(rollout)), 1))
        if not found:
            return rollout[:0]
        rows, means = zip(*found, strict=True)
        sizes = {"minibatch_size": self.ppo.minibatch_size, "microbatch_size": self.ppo.microbatch_size}
        kept = rescored(rows, self.parts, (), rollout, None, sizes)  # type: ignore[arg-type]
        expected = torch.tensor(means, device=kept.score.device) if self.baseline == "mean" else kept.old_value[:, 0]
        weight = (kept.score - expected).clamp(min=0)
        return replace(kept, advantage=weight.unsqueeze(1) * kept.mask)[weight.nonzero().squeeze(1)]

    def loss_of(self, whole: Rollout) -> Callable[[Rollout], Loss]:
        return partial(self._loss, num_tokens=whole.num_tokens)

    def _loss(self, part: Rollout, num_tokens: int) -> Loss:
        backbone = self.parts.policy.backbone
        hidden = backbone(part.input_ids, part.attention_mask)
        stats = response_stats(backbone, hidden, part.input_ids, part.mask, temperature=part.temperature)
        assert stats.logprob is not None and part.advantage is not None
        loss = -masked_sum(part.advantage * stats.logprob, part.mask) / max(num_tokens, 1)
        with torch.no_grad():
            nll = masked_mean(-stats.logprob, part.mask)
            weight = masked_mean(part.advantage, part.mask)
        return loss, {"replay_nll": nll, "replay_weight": weight}
