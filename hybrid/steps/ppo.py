"""The PPO step: a rollout in, a loss out. No optimizer in here."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybrid.core import InputError, Rollout
from hybrid.functional import (
    aggregate,
    group_advantage,
    importance_weight,
    kl_estimate,
    leave_one_out_advantage,
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
from hybrid.steps.ppo_config import PPOConfig

__all__ = ["Divisors", "check_groups", "minibatches", "ppo_batch_loss", "rollout_metrics", "with_advantages"]


def with_advantages(rollout: Rollout, config: PPOConfig) -> Rollout:
    """The rollout with `advantage` (whitened as configured) and, from a critic, `return_` (before whitening).

    A response that is alone in its group, as where the reward skipped the others, has advantage 0 against it.
    """
    reward, mask, return_ = rollout.reward, rollout.mask, None
    if config.whiten_reward:
        reward = masked_whiten(reward, mask, False)
    if config.advantage == "gae":
        advantage, return_ = gae(reward, rollout.old_value, mask, gamma=config.gamma, lam=config.lam)
    elif config.advantage == "reinforce++":
        # What GAE is without a critic: the discounted rewards to come.
        advantage, _ = gae(reward, torch.zeros_like(reward), mask, gamma=config.gamma, lam=1.0)
    else:
        advantage = _against_the_group(rollout, config).unsqueeze(1).expand_as(mask).masked_fill(~mask, 0.0)
    whiten = config.is_per_token if config.whiten_advantage is None else config.whiten_advantage
    if whiten:
        advantage = masked_whiten(advantage, mask)
    return replace(rollout, advantage=advantage, return_=return_)


def check_groups(rollout: Rollout, config: PPOConfig) -> None:
    """Raise InputError where responses are to be compared within their group and no two are of the same."""
    group = rollout.group
    if not config.is_per_token and (group is None or len(group.unique()) == len(group) > 1):
        raise InputError(
            f"ppo.advantage {config.advantage!r} compares the responses to one prompt, and no two of the "
            f"{len(rollout)} in this rollout answer the same; give each prompt several, or set ppo.advantage=gae"
        )


def _against_the_group(rollout: Rollout, config: PPOConfig) -> Tensor:
    """Each response's whole reward against the others of its prompt, (B,)."""
    if rollout.group is None:
        check_groups(rollout, config)
    group = rollout.group
    assert group is not None
    reward = masked_sum(rollout.reward, rollout.mask, 1)
    if config.advantage == "leave_one_out":
        return leave_one_out_advantage(reward, group)
    return group_advantage(reward, group, scale_by_std=config.advantage == "group")


def minibatches(num_rows: int, config: PPOConfig, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Row indices of every minibatch of every epoch; each row once an epoch, the last one may be smaller.

    The first epoch keeps the rollout's order (its prompts were already drawn in random order): the same rows
    then meet in the same forward as when their old log-probs were computed, so the first ratios are exactly
    1. Later epochs are shuffled.
    """
    # A split of nothing has one part, which is empty.
    for epoch in range(config.epochs if num_rows else 0):
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

    Entropy and KL are averaged as the policy's token losses are (`aggregation`), values over tokens.

    The value loss is there where the advantage has a critic; without, the value head gets no gradient.
    kl_loss_coef: the weight of the KL to the references as a loss, of kind k2 or k3; 0 where it is in the
        reward.
    divisors: those of the whole optimizer step, where these rows are a part of it.
    Returns `(loss, metrics)`. Metrics ending in `loss` add up over the parts; the others are token means
    (ratio_max a maximum).
    """
    if rollout.advantage is None or (config.has_critic and rollout.return_ is None):
        raise ValueError("ppo_batch_loss: the rollout has no advantages; call with_advantages(rollout, config) first")
    mask = rollout.mask
    divisors = divisors or Divisors.of(rollout, config)
    out = policy(rollout.input_ids, rollout.attention_mask)
    # The entropy's gradient costs a pass over the vocabulary: asked for only where it enters the loss.
    want = ("logprob", "entropy") if config.entropy_coef else ("logprob",)
    stats = response_stats(
        policy.backbone, out.hidden, rollout.input_ids, mask, temperature=rollout.temperature, want=want
    )
    assert stats.logprob is not None
    weight, weight_metrics = _importance_weight(rollout, config)
    policy_term, policy_metrics = policy_loss(
        stats.logprob,
        rollout.old_logprob,
        rollout.advantage,
        mask,
        clip=config.clip,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        surrogate=config.surrogate,
        weight=weight,
        aggregation=config.aggregation,
        fixed_length=config.fixed_length,
        num_tokens=divisors.policy,
    )
    loss = policy_term
    metrics = {
        "policy_loss": policy_term.detach(),
        "policy_clip_fraction": policy_metrics.pop("clip_fraction"),
        **policy_metrics,
        **weight_metrics,
    }
    if config.has_critic:
        value_term, metrics["value_clip_fraction"] = _value_term(out.value, rollout, config, divisors)
        loss = loss + config.value_coef * value_term
        metrics["value_loss"] = value_term.detach()
    if stats.entropy is not None:
        entropy = aggregate(stats.entropy, mask, config.aggregation, num_tokens=divisors.policy)
        loss = loss - config.entropy_coef * entropy
    if kl_loss_coef:
        kl = _kl_to_references(stats.logprob, rollout, kl_kind)
        kl_term = aggregate(kl, mask, config.aggregation, num_tokens=divisors.policy)
        loss = loss + kl_loss_coef * kl_term
        metrics["kl_loss"] = kl_term.detach()
    return loss, metrics


def _value_term(value: Tensor, rollout: Rollout, config: PPOConfig, divisors: Divisors) -> tuple[Tensor, Tensor]:
    """(the value loss, the share of clipped values); value: (B, P+T)."""
    assert rollout.return_ is not None
    mask = rollout.mask
    term, metrics = value_loss(
        before_response(value, mask.shape[1]), rollout.old_value, rollout.return_, mask,
        clip=config.value_clip, num_tokens=divisors.tokens,
    )  # fmt: skip
    return term, metrics["clip_fraction"]


def _importance_weight(rollout: Rollout, config: PPOConfig) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(the tokens' weights, or None; what there is to log of them)."""
    if config.importance is None:
        return None, {}
    if rollout.sampling_logprob is None:
        raise InputError(
            f"ppo.importance {config.importance!r} needs the log-probs that the responses were drawn with, and this "
            f"rollout has no sampling_logprob; give step(logprobs=...), or set ppo.importance=null"
        )
    return importance_weight(
        rollout.old_logprob, rollout.sampling_logprob, rollout.mask,
        level=config.importance, mode=config.importance_mode, cap=config.importance_cap,
    )  # fmt: skip


def _kl_to_references(logprob: Tensor, rollout: Rollout, kind: str) -> Tensor:
    """The KL to the references, weighted and summed, (B, T)."""
    total = torch.zeros_like(logprob)
    for weight, ref_logprob in zip(rollout.ref_weight, rollout.ref_logprob, strict=True):
        total = total + weight * kl_estimate(logprob, ref_logprob, kind)
    return total


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """What a rollout with advantages says before any update: rewards, KL, entropy, values, lengths.

    reward is the reward function's score, before shaping and KL.   kl: nats per response.   entropy: nats per
    token.   value_error: mean squared error of the values against the returns, which only a critic has.
    sampling_gap, sampling_gap_max: |sampling_logprob - old_logprob|, nats per token, mean and maximum.
    """
    mask, score = rollout.mask, rollout.score
    metrics = {
        "reward": score.mean(),
        "reward_std": score.std(unbiased=len(score) > 1),
        "kl": masked_sum(rollout.kl, mask, 1).mean(),
        "entropy": masked_mean(rollout.entropy, mask),
        "response_length": mask.sum(1).float().mean(),
        "eos_share": rollout.ended.float().mean(),
    }
    if rollout.sampling_logprob is not None:
        gap = (rollout.sampling_logprob - rollout.old_logprob).abs()
        metrics |= {"sampling_gap": masked_mean(gap, mask), "sampling_gap_max": gap.max()}
    if rollout.return_ is not None:
        half_error, value_metrics = value_loss(rollout.old_value, rollout.old_value, rollout.return_, mask, clip=None)
        metrics |= {
            "return_mean": masked_mean(rollout.return_, mask),
            "return_var": masked_var(rollout.return_, mask),
            "value_mean": masked_mean(rollout.old_value, mask),
            "value_error": 2 * half_error,
            "explained_variance": value_metrics["explained_variance"],
        }
    return {name: float(x) for name, x in metrics.items()} | dict(rollout.reward_metrics)
