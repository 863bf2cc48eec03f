"""HPT: for each prompt imitation or reinforcement, by how well the policy answers it, in one loss."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybrid.core import InputError, Rollout
from hybrid.functional import sft_loss
from hybrid.objectives.accumulate import Loss
from hybrid.objectives.demonstrations import answer_labels, check_groups_of, demonstrations, examples_of
from hybrid.objectives.objective import Parts, register_objective
from hybrid.objectives.ppo import PPO, Divisors, PolicyTerm, policy_term
from hybrid.objectives.ppo_config import PPOConfig
from hybrid.objectives.sft import SFTConfig
from hybrid.rollout import KLConfig, SamplingConfig, ScoreConfig

__all__ = ["HPT"]


@register_objective("hpt")
class HPT(PPO):
    """`ppo` on the prompts that the policy can answer, and `sft` on the targets of the others, in the same update.

        P    = the mean score of the responses to a prompt
        loss = sum over drawn tokens of PPO's loss / their number        of prompts with P > threshold
             + sft_coef * sum over target tokens of -log p / their number        of those with P <= threshold

    The advantages are those of the responses alone, whatever `ppo.advantage` is. A prompt that fails has one row, its
    target, in place of its responses; one without a target keeps them. Its tokens have `sft.token_weight`.
    Source: Lv et al. 2025 (arXiv:2509.04419), its switch; both means, and that the target is no part of the group, as
    in its released code, whose threshold is 0 successes of 8. Strategy `gate` imitates after the updates instead.
    """

    windowed = False
    needs_targets = True

    def __init__(
        self,
        parts: Parts,
        ppo: PPOConfig,
        kl: KLConfig,
        sampling: SamplingConfig,
        sft: SFTConfig,
        score: ScoreConfig | None = None,
        threshold: float = 0.0,
        sft_coef: float = 1.0,
    ):
        super().__init__(parts, ppo, kl, score)
        self.sampling, self.sft, self.threshold, self.sft_coef = sampling, sft, threshold, sft_coef

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        if settings.get("sft_coef", 1) < 0:
            raise InputError(f"sft_coef must be >= 0, got {settings['sft_coef']}")

    @classmethod
    def check_sections(cls, name: str, sections: Mapping[str, Any]) -> None:
        check_groups_of(name, sections)

    def learnt(self, rollout: Rollout) -> Rollout:
        examples, group = examples_of(rollout, self.name), rollout.group
        assert group is not None
        mean = {g: float(rollout.score[group == g].mean()) for g in examples}
        failed = {g: e for g, e in examples.items() if mean[g] <= self.threshold and answer_labels(e)}
        kept = torch.tensor([row for row, g in enumerate(group.tolist()) if g not in failed], dtype=torch.int64)
        rows = rollout[kept.to(group.device)]
        return demonstrations(rows, failed, self.parts, self.config, self.kl, self.score, self.sampling)

    def policy_term(self, whole: Rollout) -> PolicyTerm:
        return partial(_term, sft=self.sft, coef=self.sft_coef)


def _term(
    logprob: Tensor, rollout: Rollout, config: PPOConfig, divisors: Divisors, *, sft: SFTConfig, coef: float
) -> Loss:
    loss, metrics = policy_term(logprob, rollout, config, divisors)
    assert rollout.given is not None
    nll, _ = sft_loss(
        logprob, rollout.given, token_weight=sft.token_weight, markov_decay=sft.markov_decay,
        markov_window=sft.markov_window, num_tokens=divisors.given,
    )  # fmt: skip
    return loss + coef * nll, {**metrics, "demonstration_loss": nll.detach()}
