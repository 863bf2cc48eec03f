"""Advantages: of each response token against a critic, or of whole responses against others to the same prompt."""

import torch
from torch import Tensor

from hybrid.functional.precision import check_same_shape, to_float

__all__ = ["gae", "group_advantage", "leave_one_out_advantage", "varied_groups"]


@torch.no_grad()
def gae(reward: Tensor, value: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates over the valid tokens of each row.

        delta_t = reward_t + gamma * value_{t+1} - value_t
        A_t     = delta_t + gamma * lam * A_{t+1}          (value and A are 0 past the last valid token)
        return_ = A + value

    Here t + 1 is the NEXT VALID token: tokens with mask 0 inside a row (tool or user turns) are skipped,
    as if they were not there.

    reward, value: (B, T) float.   mask: (B, T), true on the policy's own tokens.
    Returns `(advantage, return_)`, (B, T), 0 outside the mask, without gradient.
    Raises ValueError if the shapes differ or gamma or lam lies outside [0, 1].
    Source: Schulman et al. 2016, eq. 16 (arXiv:1506.02438).

    The recursion is a linear recurrence A_t = c_t * A_{t+1} + delta_t and is solved by doubling: after k
    rounds A_t covers 2^k tokens, so T tokens take log2(T) tensor operations. A skipped token is the
    identity of that recurrence, c = 1 and delta = 0.
    """
    check_same_shape(reward=reward, value=value, mask=mask)
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"gae: {name} must lie in [0, 1], got {number}")
    reward, value = to_float(reward, value)
    mask = mask.bool()
    reward, value = reward.masked_fill(~mask, 0.0), value.masked_fill(~mask, 0.0)

    advantage = reward + gamma * _next_valid(value, mask) - value
    advantage = advantage.masked_fill(~mask, 0.0)
    carry = torch.full_like(advantage, gamma * lam).masked_fill(~mask, 1.0)
    length, step = mask.shape[1], 1
    while step < length:
        advantage[:, :-step] = advantage[:, :-step] + carry[:, :-step] * advantage[:, step:]
        carry[:, :-step] = carry[:, :-step] * carry[:, step:]
        step *= 2
    advantage = advantage.masked_fill(~mask, 0.0)
    return advantage, advantage + value


def _next_valid(x: Tensor, mask: Tensor) -> Tensor:
    """x at the next valid position after t, 0 where there is none.   x, mask: (B, T)."""
    length = x.shape[1]
    position = torch.arange(length, device=x.device).expand_as(mask)
    # Smallest valid index >= t, as a running minimum from the right; `length` stands for "none".
    index = position.masked_fill(~mask, length).flip(1).cummin(1).values.flip(1)
    index = torch.nn.functional.pad(index[:, 1:], (0, 1), value=length)  # (B, T): > t instead of >= t
    return torch.nn.functional.pad(x, (0, 1)).gather(1, index)


@torch.no_grad()
def group_advantage(score: Tensor, group: Tensor, *, scale_by_std: bool = True) -> Tensor:
    """Each score against the mean of its group, in standard deviations of the group.

        A_i = (score_i - mean) / (std + 1e-4)          (GRPO)
        A_i =  score_i - mean                          (scale_by_std=False: Dr. GRPO)

    score: (B,) float.   group: (B,) int, equal where the responses answer the same prompt; any ids, in any
    order, groups of any size.   std: the unbiased one.   Returns (B,), without gradient; exactly 0 where a
    group's scores are all equal, as a group of one's are.
    Raises ValueError if the shapes differ.
    Source: GRPO: Shao et al. 2024 (arXiv:2402.03300); Dr. GRPO: Liu et al. 2025 (arXiv:2503.20783).
    """
    deviation, same, size = _deviation(score, group)
    if not scale_by_std:
        return deviation
    variance = _group_sum(deviation**2, same) / (size - 1).clamp(min=1)
    # Unbiased, and 1e-4: as TRL has it (verl adds 1e-6).
    return deviation / (variance.sqrt() + 1e-4)


@torch.no_grad()
def leave_one_out_advantage(score: Tensor, group: Tensor) -> Tensor:
    """Each score against the mean of the OTHERS of its group (RLOO); 0 in a group of one.

        A_i = score_i - sum_{j != i} score_j / (n - 1) = n / (n - 1) * (score_i - mean)

    score, group: (B,), as in `group_advantage`.   Returns (B,), without gradient.
    Raises ValueError if the shapes differ.
    Source: Ahmadian et al. 2024 (arXiv:2402.14740); Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline
    for Free!".
    """
    deviation, _, size = _deviation(score, group)
    return deviation * (size / (size - 1).clamp(min=1))


def varied_groups(score: Tensor, group: Tensor) -> Tensor:
    """Whether a row's group has two scores that differ, (B,) bool: the others have no advantage to learn from.

    score: (B,) float.   group: (B,) int, as in `group_advantage`.
    Raises ValueError if the shapes differ.
    Source: the dynamic sampling of DAPO (Yu et al. 2025, arXiv:2503.14476), whose constraint is that of 0/1 scores:
    some right, some wrong.
    """
    check_same_shape(score=score, group=group)
    differs = score.unsqueeze(1) != score.unsqueeze(0)
    same = group.unsqueeze(1) == group.unsqueeze(0)
    # Of the whole group: all its rows have one answer.
    return (same & (differs & same).any(1)).any(1)


def _deviation(score: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """score - mean of its group (B,); whether two rows are of one group (B, B); the size of each row's group (B,)."""
    check_same_shape(score=score, group=group)
    (score,) = to_float(score)
    same = group.unsqueeze(1) == group.unsqueeze(0)
    size = same.sum(1).to(score.dtype)
    deviation = score - _group_sum(score, same) / size
    # Once more on what is left: rounding of the first mean would give equal scores an advantage.
    return deviation - _group_sum(deviation, same) / size, same, size


def _group_sum(x: Tensor, same: Tensor) -> Tensor:
    """The sum over each row's group, (B,) -> (B,). Of all pairs, because a GPU adds by index in any order."""
    return torch.where(same, x, 0.0).sum(1)
