"""SRFT: imitation and reinforcement in one loss, each weighted by how sure the policy is."""

from typing import Any

import torch
from torch import Tensor

from hybrid.core import InputError, Rollout
from hybrid.functional import entropy_weight, reinforce_loss, shaped_loss
from hybrid.objectives.accumulate import Loss
from hybrid.objectives.luffy import LUFFY
from hybrid.objectives.objective import Parts, register_objective
from hybrid.objectives.ppo import Divisors, PolicyTerm, policy_term, weights_of
from hybrid.objectives.ppo_config import PPOConfig
from hybrid.rollout import KLConfig, SamplingConfig, ScoreConfig

__all__ = ["SRFT"]


@register_objective("srft")
class SRFT(LUFFY):
    """The demonstration imitated and, as in `luffy`, reinforced; the responses reinforced by whether they are good.

        loss = sum over given tokens of -w_SFT log p / their number
             - sum over given tokens of A p / (p + gamma) / number of all
             - sum over drawn tokens of (w_RL where the response is good, -1 where it is not) log p / number of all
        w_SFT = sft_weight * exp(-H),   w_RL = rl_weight * exp(H)

    H: the mean entropy of the row's tokens under the policy before the step's updates, nats. The demonstration counts
    the more the surer the policy is in it, a good response the less.   success: a response with at least this score is
    good.   Drawn tokens have no ratio: `ppo.clip` and its like do not act, so it is made for ppo.epochs = 1; those that
    another distribution has drawn have their weights by `ppo.importance`.
    Source: Fu et al. 2025 (arXiv:2506.19767), whose text was not at hand: the four losses as a reader's notes have
    them, the weights and the shape of the second one as in HPT's released code (arXiv:2509.04419), which compares with
    it and takes H of the policy as it is during the updates.
    """

    def __init__(
        self,
        parts: Parts,
        ppo: PPOConfig,
        kl: KLConfig,
        sampling: SamplingConfig,
        score: ScoreConfig | None = None,
        gamma: float = 0.1,
        sft_weight: float = 0.5,
        rl_weight: float = 0.1,
        success: float = 0.5,
    ):
        super().__init__(parts, ppo, kl, sampling, score, gamma)
        self.sft_weight, self.rl_weight, self.success = sft_weight, rl_weight, success

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        super().check_settings(**settings)
        for name in ("sft_weight", "rl_weight"):
            if settings.get(name, 0) < 0:
                raise InputError(f"{name} must be >= 0, got {settings[name]}")

    def divisors(self, whole: Rollout) -> Divisors:
        given = 0 if whole.given is None else int(whole.given.sum())
        return Divisors(whole.num_tokens, super().divisors(whole).policy, given)

    def policy_term(self, whole: Rollout) -> PolicyTerm:
        return self._term

    def _term(self, logprob: Tensor, rollout: Rollout, config: PPOConfig, divisors: Divisors) -> Loss:
        given, advantage = rollout.given, rollout.advantage
        assert given is not None and advantage is not None
        w_sft = entropy_weight(rollout.entropy, rollout.mask, self.sft_weight, -1).unsqueeze(1)
        w_rl = entropy_weight(rollout.entropy, rollout.mask, self.rl_weight, 1)
        good = torch.where(rollout.score >= self.success, w_rl, -torch.ones_like(w_rl)).unsqueeze(1)
        drawn_weight, _ = weights_of(rollout, config)
        good = good.expand_as(logprob) if drawn_weight is None else good * drawn_weight
        divided: dict[str, Any] = {
            "aggregation": config.aggregation, "fixed_length": config.fixed_length, "num_tokens": divisors.policy
        }  # fmt: skip
        imitated = reinforce_loss(logprob, w_sft.expand_as(logprob), given, num_tokens=divisors.given)
        shaped = shaped_loss(logprob, advantage, given, gamma=self.gamma, **divided)
        own = reinforce_loss(logprob, good, rollout.drawn, **divided)
        _, metrics = policy_term(logprob.detach(), rollout, config, divisors)  # its ratios, for the log
        losses = {"policy_loss": own, "demonstration_loss": shaped, "imitation_loss": imitated}
        return own + shaped + imitated, {**metrics, **{name: x.detach() for name, x in losses.items()}}
