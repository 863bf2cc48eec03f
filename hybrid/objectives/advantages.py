"""What PPO learns from a rollout: its advantages, its minibatches, and what there is to say of it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hybrid.core import InputError, Rollout
from hybrid.functional import (
    group_advantage,
    leave_one_out_advantage,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    value_loss,
    varied_groups,
)
from hybrid.fused import gae
from hybrid.objectives.ppo_config import PPOConfig

__all__ = ["check_groups", "minibatches", "rollout_metrics", "shares", "varied_rows", "with_advantages"]


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


def varied_rows(rollout: Rollout, num_groups: int) -> tuple[Tensor, int]:
    """The rows of the first `num_groups` groups whose scores differ, (n,) int64, and the number of these groups."""
    assert rollout.group is not None  # collect numbers the prompts
    varied = varied_groups(rollout.score, rollout.group)
    chosen = rollout.group[varied].unique()[:num_groups]
    return torch.isin(rollout.group, chosen).nonzero().squeeze(1), len(chosen)


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


def shares(
    sizes: Mapping[str, int], num_rows: int, config: PPOConfig, generator: torch.Generator | None = None
) -> Iterator[dict[str, Tensor]]:
    """What each objective that rolls out learns from in each update: indices into what it has of the rollout, by name.

    sizes: how much each has.   num_rows: the rollout's rows, whose minibatches say how many updates there are.
    Those that have all rows share the minibatches; of others each epoch goes into as many parts as there are of them.
    """
    count = math.ceil(num_rows / config.minibatch_size)
    parts: dict[str, Sequence[Tensor]] = {}
    for number, picked in enumerate(minibatches(num_rows, config, generator)):
        epoch, part = divmod(number, count)
        for name, size in sizes.items() if part == 0 else ():
            if size != num_rows:
                order = torch.arange(size) if epoch == 0 else torch.randperm(size, generator=generator)
                parts[name] = order.tensor_split(count)
        yield {name: parts[name][part] if name in parts else picked for name in sizes}


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
