"""The PPO step: a rollout in, a loss out. No optimizer in here."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybrid.core import Rollout
from hybrid.functional import (
    Aggregation,
    kl_estimate,
    loss_divisor,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    policy_loss,
    value_loss,
)
from hybrid.fused import gae
from hybrid.models import Policy, before_response, response_stats

__all__ = ["Divisors", "PPOConfig", "minibatches", "ppo_batch_loss", "rollout_metrics", "with_advantages"]


@dataclass(frozen=True)
class PPOConfig:
    """PPO steps: one rollout, then several passes over it."""

    batch_size: int = 64  # prompts of one rollout
    minibatch_size: int = 16  # responses of one optimizer step
    microbatch_size: int | None = None  # rows of one forward and backward; None: the minibatch
    epochs: int = 4  # passes over one rollout
    lr_factor: float = 1.0  # on the optimizer's learning rate, in PPO steps
    clip: float = 0.2  # ratio kept in [1 - clip, 1 + clip]
    clip_high: float | None = None  # another upper range: [1 - clip, 1 + clip_high]
    dual_clip: float | None = None  # c > 1: a negative advantage costs at most c times itself
    aggregation: Aggregation = "token_mean"  # how the token losses of the rows are averaged
    fixed_length: int | None = None  # tokens that aggregation "fixed_length" divides each row by
    value_clip: float | None = 0.2  # value kept within this distance of its old value; None: not clipped
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantage: bool = True
    whiten_reward: bool = False  # unit variance, the mean kept
    target_kl: float | None = None  # nats per token (approx_kl); stop the passes beyond it

    @property
    def num_updates(self) -> int:
        """Optimizer steps that one rollout gives, where no early stop shortens it."""
        return self.epochs * math.ceil(self.batch_size / self.minibatch_size)

    def __post_init__(self) -> None:
        for name in ("batch_size", "minibatch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"PPOConfig.{name} must be >= 1, got {getattr(self, name)}")
        if self.minibatch_size > self.batch_size:
            raise ValueError(
                f"PPOConfig.minibatch_size must be at most batch_size = {self.batch_size}, got {self.minibatch_size}"
            )
        if self.microbatch_size is not None and not 1 <= self.microbatch_size <= self.minibatch_size:
            raise ValueError(
                f"PPOConfig.microbatch_size must lie in [1, minibatch_size = {self.minibatch_size}], "
                f"got {self.microbatch_size}"
            )
        if (self.aggregation == "fixed_length") != (self.fixed_length is not None):
            raise ValueError(
                f"PPOConfig.fixed_length goes with aggregation 'fixed_length' and only with it, got "
                f"{self.fixed_length} with {self.aggregation!r}"
            )
        if not 0 < self.clip < 1:
            raise ValueError(f"PPOConfig.clip must lie in (0, 1), got {self.clip}")
        for name in ("clip_high", "value_clip", "target_kl"):
            number = getattr(self, name)
            if number is not None and not number > 0:
                raise ValueError(f"PPOConfig.{name} must be > 0, got {number}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"PPOConfig.dual_clip must be > 1, got {self.dual_clip}")
        for name in ("lr_factor", "value_coef", "entropy_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"PPOConfig.{name} must be >= 0, got {getattr(self, name)}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"PPOConfig.{name} must lie in [0, 1], got {getattr(self, name)}")


def with_advantages(rollout: Rollout, config: PPOConfig) -> Rollout:
    """The rollout with `advantage` (whitened as configured) and `return_` (before whitening)."""
    reward = masked_whiten(rollout.reward, rollout.mask, False) if config.whiten_reward else rollout.reward
    advantage, return_ = gae(reward, rollout.old_value, rollout.mask, gamma=config.gamma, lam=config.lam)
    if config.whiten_advantage:
        advantage = masked_whiten(advantage, rollout.mask)
    return replace(rollout, advantage=advantage, return_=return_)


def minibatches(num_rows: int, config: PPOConfig, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Row indices of every minibatch of every epoch; each row once an epoch, the last one may be smaller.

    The first epoch keeps the rollout's order (its prompts were already drawn in random order): the same rows
    then meet in the same forward as when their old log-probs were computed, so the first ratios are exactly
    1. Later epochs are shuffled.
    """
    for epoch in range(config.epochs):
        order = torch.arange(num_rows) if epoch == 0 else torch.randperm(num_rows, generator=generator)
        yield from order.split(config.minibatch_size)


@dataclass(frozen=True)
class Divisors:
    """What the summed losses of one optimizer step are divided by.

    tokens: its valid tokens.   policy: the same, or what the policy loss's aggregation counts instead.
    """

    tokens: int
    policy: int

    @classmethod
    def of(cls, rollout: Rollout, config: PPOConfig) -> "Divisors":
        """Those of a step over all these rows."""
        return cls(rollout.num_tokens, loss_divisor(rollout.mask, config.aggregation, config.fixed_length))


def ppo_batch_loss(
    policy: Policy,
    rollout: Rollout,
    config: PPOConfig,
    *,
    kl_loss_coef: float = 0.0,
    kl_kind: str = "k3",
    divisors: Divisors | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of these rows of a rollout that has advantages.

        loss = policy_loss + value_coef * value_loss - entropy_coef * entropy + kl_loss_coef * kl

    kl_loss_coef: the weight of the KL to the references as a loss, of kind k2 or k3; 0 where it is in the
        reward.
    divisors: those of the whole optimizer step, where these rows are a part of it.
    Returns `(loss, metrics)`. Metrics ending in `loss` add up over the parts; the others are token means
    (ratio_max a maximum).
    """
    if rollout.advantage is None or rollout.return_ is None:
        raise ValueError("ppo_batch_loss: the rollout has no advantages; call with_advantages(rollout, config) first")
    mask, length = rollout.mask, rollout.mask.shape[1]
    divisors = divisors or Divisors.of(rollout, config)
    out = policy(rollout.input_ids, rollout.attention_mask)
    # The entropy's gradient costs a pass over the vocabulary: asked for only where it enters the loss.
    want = ("logprob", "entropy") if config.entropy_coef else ("logprob",)
    stats = response_stats(
        policy.backbone, out.hidden, rollout.input_ids, mask, temperature=rollout.temperature, want=want
    )
    assert stats.logprob is not None
    policy_term, policy_metrics = policy_loss(
        stats.logprob,
        rollout.old_logprob,
        rollout.advantage,
        mask,
        clip=config.clip,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        aggregation=config.aggregation,
        fixed_length=config.fixed_length,
        num_tokens=divisors.policy,
    )
    value = before_response(out.value, length)
    value_term, value_metrics = value_loss(
        value, rollout.old_value, rollout.return_, mask, clip=config.value_clip, num_tokens=divisors.tokens
    )
    loss = policy_term + config.value_coef * value_term
    if stats.entropy is not None:
        loss = loss - config.entropy_coef * masked_sum(stats.entropy, mask) / max(divisors.tokens, 1)
    metrics = {
        "policy_loss": policy_term.detach(),
        "value_loss": value_term.detach(),
        "policy_clip_fraction": policy_metrics.pop("clip_fraction"),
        "value_clip_fraction": value_metrics["clip_fraction"],
        **policy_metrics,
    }
    if kl_loss_coef:
        kl_term = _kl_to_references(stats.logprob, rollout, kl_kind) / max(divisors.tokens, 1)
        loss = loss + kl_loss_coef * kl_term
        metrics["kl_loss"] = kl_term.detach()
    return loss, metrics


def _kl_to_references(logprob: Tensor, rollout: Rollout, kind: str) -> Tensor:
    """The KL to every reference, by weight, summed over the valid tokens."""
    total = logprob.new_zeros(())
    for weight, ref_logprob in zip(rollout.ref_weight, rollout.ref_logprob, strict=True):
        total = total + weight * masked_sum(kl_estimate(logprob, ref_logprob, kind), rollout.mask)
    return total


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """What a rollout with advantages says before any update: rewards, KL, entropy, values, lengths.

    reward is the reward function's score, before shaping and KL.   kl: nats per response.   entropy: nats per
    token.   value_error: mean squared error of the values against the returns.
    """
    assert rollout.return_ is not None
    mask, score = rollout.mask, rollout.score
    half_error, value_metrics = value_loss(rollout.old_value, rollout.old_value, rollout.return_, mask, clip=None)
    metrics = {
        "reward": score.mean(),
        "reward_std": score.std(unbiased=len(score) > 1),
        "kl": masked_sum(rollout.kl, mask, 1).mean(),
        "entropy": masked_mean(rollout.entropy, mask),
        "return_mean": masked_mean(rollout.return_, mask),
        "return_var": masked_var(rollout.return_, mask),
        "value_mean": masked_mean(rollout.old_value, mask),
        "value_error": 2 * half_error,
        "explained_variance": value_metrics["explained_variance"],
        "response_length": mask.sum(1).float().mean(),
        "eos_share": rollout.ended.float().mean(),
    }
    return {name: float(x) for name, x in metrics.items()} | dict(rollout.reward_metrics)
