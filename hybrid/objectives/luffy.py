"""LUFFY: the prompt's demonstration as one more response of its group."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from hybrid.core import InputError, Rollout
from hybrid.functional import loss_divisor, shaped_loss
from hybrid.objectives.accumulate import Loss
from hybrid.objectives.advantages import with_advantages
from hybrid.objectives.demonstrations import check_groups_of, demonstrations, examples_of
from hybrid.objectives.objective import Parts, register_objective
from hybrid.objectives.ppo import PPO, Divisors, PolicyTerm, policy_term
from hybrid.objectives.ppo_config import PPOConfig
from hybrid.rollout import KLConfig, SamplingConfig, ScoreConfig

__all__ = ["LUFFY"]


@register_objective("luffy")
class LUFFY(PPO):
    """`ppo` on a rollout whose groups have a demonstration each, the target of their prompt.

        A      of all responses of a group, its demonstration among them, by `ppo.advantage`
        loss = (sum over drawn tokens of PPO's loss  -  sum over given tokens of A p / (p + gamma)) / number of both

    p: the policy's probability of the demonstration's token. The demonstration is scored by the reward, so that it
    pulls where the policy fails, and less and less where it does not. A prompt without a target has none.
    The authors' settings are ppo.advantage group_mean, ppo.clip null, and aggregation fixed_length.
    Source: Yan et al. 2025 (arXiv:2504.14945); see `functional.shaped_loss`.
    """

    windowed = False
    needs_targets = True

    def __init__(
        self,
        parts: Parts,
        ppo: PPOConfig,
        kl: KLConfig,
        sampling: SamplingConfig,
        score: ScoreConfig | None = None,
        gamma: float = 0.1,
    ):
        super().__init__(parts, ppo, kl, score)
        self.sampling, self.gamma = sampling, gamma

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        if not settings.get("gamma", 1) > 0:
            raise InputError(f"gamma must be > 0, got {settings['gamma']}")

    @classmethod
    def check_sections(cls, name: str, sections: Mapping[str, Any]) -> None:
        check_groups_of(name, sections)
        if (ppo := sections["ppo"]).is_per_token:
            raise InputError(
                f"config: objective {name!r} compares the responses to a prompt with its demonstration: set "
                f"ppo.advantage to group, group_mean or leave_one_out, got {ppo.advantage!r}"
            )

    def learnt(self, rollout: Rollout) -> Rollout:
        chosen = examples_of(rollout, self.name)
        rows = demonstrations(rollout, chosen, self.parts, self.config, self.kl, self.score, self.sampling)
        return with_advantages(rows, self.config)

    def divisors(self, whole: Rollout) -> Divisors:
        policy = loss_divisor(whole.mask, self.config.aggregation, self.config.fixed_length)
        return Divisors(whole.num_tokens, policy)

    def policy_term(self, whole: Rollout) -> PolicyTerm:
        return partial(luffy_term, gamma=self.gamma)


def luffy_term(logprob: Tensor, rollout: Rollout, config: PPOConfig, divisors: Divisors, *, gamma: float) -> Loss:
    """(the loss of drawn and given tokens, what there is to log of it); see `LUFFY`."""
    loss, metrics = policy_term(logprob, rollout, config, divisors)
    if rollout.given is None or rollout.advantage is None:
        return loss, metrics
    shaped = shaped_loss(
        logprob, rollout.advantage, rollout.given, gamma=gamma, aggregation=config.aggregation,
        fixed_length=config.fixed_length, num_tokens=divisors.policy,
    )  # fmt: skip
    return loss + shaped, {**metrics, "demonstration_loss": shaped.detach()}
