"""The losses of proximal policy optimisation: clipped, unclipped and CISPO policy loss, clipped value loss."""

from typing import Literal, get_args

import torch
from torch import Tensor

from hybrid.functional.masked import masked_mean, masked_sum, masked_var
from hybrid.functional.precision import check_same_shape, to_float

__all__ = [
    "Aggregation",
    "ImportanceLevel",
    "ImportanceMode",
    "RatioLevel",
    "Surrogate",
    "aggregate",
    "importance_weight",
    "loss_divisor",
    "policy_loss",
    "token_reward",
    "value_loss",
]

Aggregation = Literal["token_mean", "sequence_mean", "fixed_length"]
Surrogate = Literal["ppo", "cispo"]
RatioLevel = Literal["token", "sequence"]
ImportanceLevel = Literal["token", "sequence"]
ImportanceMode = Literal["truncate", "mask"]


def token_reward(score: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """The per-token reward that GAE receives: the KL penalty, and the score where it was earned.

        r_t = -kl_coef * kl_t,   plus the score at the last valid token (a response's own, EOS included)

    score: (B,), or (B, T) for a score per token, added where it stands; one that stands outside the mask
        (on a padding or a user's token) is refused with ValueError rather than lost.
    kl: (B, T).   mask: (B, T), true on the response's own tokens.   Returns (B, T), 0 outside the mask.
    """
    check_same_shape(kl=kl, mask=mask)
    score, kl = to_float(score, kl)
    mask = mask.bool()
    if not mask.any(1).all():
        raise ValueError("token_reward: every row needs at least one valid token to carry its score")
    reward = (-kl_coef * kl).masked_fill(~mask, 0.0)
    if score.dim() == 2:
        check_same_shape(score=score, mask=mask)
        if (score.masked_fill(mask, 0.0) != 0).any():
            raise ValueError("token_reward: a per-token score stands on a token outside the mask")
        return reward + score.masked_fill(~mask, 0.0)
    position = torch.arange(mask.shape[1], device=mask.device)
    check_same_shape(score=score, **{"mask[:, 0]": mask[:, 0]})
    last = (position * mask).argmax(1, keepdim=True)
    return reward.scatter_add(1, last, score.unsqueeze(1))


def loss_divisor(mask: Tensor, aggregation: Aggregation = "token_mean", fixed_length: int | None = None) -> int:
    """What the summed loss of these rows is divided by: the count that `num_tokens` is the global form of.

    token_mean: valid tokens.   sequence_mean: rows.   fixed_length: rows * fixed_length.
    """
    if aggregation == "token_mean":
        return int(mask.bool().sum())
    if aggregation == "sequence_mean":
        return mask.shape[0]
    if aggregation == "fixed_length":
        if not fixed_length:
            raise ValueError("aggregation 'fixed_length' needs fixed_length, the tokens to divide each row by")
        return mask.shape[0] * fixed_length
    raise _unknown(aggregation)


def aggregate(
    x: Tensor,
    mask: Tensor,
    aggregation: Aggregation = "token_mean",
    *,
    fixed_length: int | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """Per-token terms of a loss (B, T) as one number, over the mask; the arguments as in `policy_loss`."""
    if num_tokens is None:
        num_tokens = loss_divisor(mask, aggregation, fixed_length)
    elif aggregation not in get_args(Aggregation):
        raise _unknown(aggregation)
    if aggregation == "sequence_mean":
        x = x / mask.sum(1, keepdim=True).clamp(min=1)
    return masked_sum(x, mask) / max(num_tokens, 1)


def _unknown(aggregation: str) -> ValueError:
    return ValueError(f"aggregation must be token_mean, sequence_mean or fixed_length, got {aggregation!r}")


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    surrogate: Surrogate = "ppo",
    ratio: RatioLevel = "token",
    weight: Tensor | None = None,
    aggregation: Aggregation = "token_mean",
    fixed_length: int | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate, to be minimised.

        ratio_t = exp(logprob_t - old_logprob_t)                        ratio token
        ratio_t = exp(mean of logprob - old_logprob over the row)       ratio sequence (GSPO)
        kept    = clip(ratio, 1 - clip, 1 + clip_high)
        ppo:    loss = sum_t max(-A_t ratio_t, -A_t kept_t) / num_tokens
        cispo:  loss = sum_t -A_t kept_t logprob_t / num_tokens             (no gradient through kept)

    logprob, old_logprob, advantage: (B, T).   mask: (B, T), true on the response's own tokens.
    clip: None keeps every ratio; where it is 1 the gradient is then that of -A logprob, of REINFORCE and A2C.
    clip_high: the upper range, `clip` where None.   dual_clip: c > 1; where A < 0 the loss is at most -c A.
    ratio: of "sequence" each token's gradient is its own, as in GSPO-token: where the tokens of a row have one
        advantage this is GSPO, value and gradient, and with aggregation "sequence_mean" its objective as published.
    weight: (B, T), a constant factor on each token's loss (`importance_weight`). The divisor stays as it is.
    aggregation: `token_mean` (default), `sequence_mean` (each row's token mean, then the mean of rows),
        `fixed_length` (each row's sum over fixed_length, then the mean of rows).
    num_tokens: the global divisor where these rows are part of a larger step: the sum of `loss_divisor`
        over all microbatches and processes. None: these rows are the whole.

    Returns `(loss, metrics)`: a scalar, connected to the graph even where the mask is empty, and detached
    token means over this mask: approx_kl (0.5 (logprob - old_logprob)²), clip_fraction (tokens where the
    clipped term is the larger one; cispo: whose ratio was clipped), ratio_mean, ratio_max.
    Raises ValueError for different shapes, an unknown ratio, a dual_clip of at most 1, and what needs a clip or
    surrogate "ppo" where there is none.
    Source: Schulman et al. 2017, eq. 7 (arXiv:1707.06347); dual clip: Ye et al. 2020, eq. 5
    (arXiv:1912.09729); CISPO: MiniMax-M1, 2025 (arXiv:2506.13585); GSPO: Zheng et al. 2025 (arXiv:2507.18071).
    """
    check_same_shape(logprob=logprob, old_logprob=old_logprob, advantage=advantage, mask=mask)
    _check_clipping(clip, clip_high, dual_clip, surrogate)
    if ratio not in ("token", "sequence"):
        raise ValueError(f"policy_loss: ratio must be token or sequence, got {ratio!r}")
    logprob, old_logprob, advantage = to_float(logprob, old_logprob, advantage)
    mask = mask.bool()
    # Outside the mask anything may stand, and exp of anything may be inf: 0 * inf would poison the gradient.
    log_ratio = (logprob - old_logprob.detach()).masked_fill(~mask, 0.0)
    advantage = advantage.detach().masked_fill(~mask, 0.0)
    change = _ratio(log_ratio, mask, ratio)
    kept = change
    if clip is not None:
        kept = change.clamp(1.0 - clip, 1.0 + (clip if clip_high is None else clip_high))
    if surrogate == "cispo":
        loss, is_clipped = -advantage * kept.detach() * logprob.masked_fill(~mask, 0.0), kept != change
    else:
        loss, is_clipped = _pessimistic(-advantage * change, -advantage * kept)
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)
    if weight is not None:
        check_same_shape(weight=weight, mask=mask)
        loss = loss * weight.detach()

    total = aggregate(loss, mask, aggregation, fixed_length=fixed_length, num_tokens=num_tokens)
    return total, _ratio_metrics(log_ratio, change, is_clipped, mask)


def _ratio(log_ratio: Tensor, mask: Tensor, level: RatioLevel) -> Tensor:
    """See `policy_loss`, (B, T); log_ratio is 0 outside the mask."""
    if level == "token":
        return log_ratio.exp()
    of_row = masked_mean(log_ratio.detach(), mask, 1).unsqueeze(1)
    # The value is the row's, the gradient the token's.
    return (log_ratio - log_ratio.detach() + of_row).masked_fill(~mask, 0.0).exp()


def _pessimistic(unclipped: Tensor, clipped: Tensor) -> tuple[Tensor, Tensor]:
    """The larger of both losses, and where that is the clipped one."""
    return torch.maximum(unclipped, clipped), clipped > unclipped


@torch.no_grad()
def _ratio_metrics(log_ratio: Tensor, ratio: Tensor, is_clipped: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {
        "approx_kl": masked_mean(0.5 * log_ratio**2, mask),
        "clip_fraction": masked_mean(is_clipped.to(ratio.dtype), mask),
        "ratio_mean": masked_mean(ratio, mask),
        "ratio_max": ratio.masked_fill(~mask, 0.0).max(),
    }


def _check_clipping(clip: float | None, clip_high: float | None, dual_clip: float | None, surrogate: str) -> None:
    if surrogate not in ("ppo", "cispo"):
        raise ValueError(f"policy_loss: surrogate must be ppo or cispo, got {surrogate!r}")
    if clip is None and clip_high is not None:
        raise ValueError(f"policy_loss: clip_high is {clip_high}, but clip is None: nothing is clipped")
    if dual_clip is not None and (clip is None or surrogate == "cispo"):
        raise ValueError(f"policy_loss: dual_clip goes with a clip and surrogate 'ppo', got {clip} and {surrogate!r}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"policy_loss: dual_clip must be > 1, got {dual_clip}")


@torch.no_grad()
def importance_weight(
    old_logprob: Tensor,
    sampling_logprob: Tensor,
    mask: Tensor,
    *,
    level: ImportanceLevel = "token",
    mode: ImportanceMode = "truncate",
    cap: float = 2.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The factor that corrects a loss for tokens that were drawn from another distribution than the policy's.

        ratio_t = exp(old_logprob_t - sampling_logprob_t)               level token
        ratio   = exp(sum_t (old_logprob_t - sampling_logprob_t))       level sequence: the row's, at all its tokens
        weight  = min(ratio, cap)                                       mode truncate
        weight  = ratio where 1 / cap <= ratio <= cap, else 0           mode mask

    old_logprob, sampling_logprob: (B, T), of the same tokens under the policy and under what drew them.
    mask: (B, T), true on the response's own tokens.   cap: >= 1; 1 truncates every weight to at most 1.
    Returns `(weight, metrics)`: (B, T), 0 outside the mask, without gradient; and over the tokens of this mask
    importance_mean and importance_max of the ratio, importance_cut_fraction of what truncation or mask changed.
    Raises ValueError for different shapes, an unknown level or mode, a cap below 1.
    Source: truncation: Yao et al. 2025 (fengyao.notion.site/off-policy-rl); sequence level and mask: Liu et al.
    2025 (richardli.xyz/rl-collapse).
    """
    check_same_shape(old_logprob=old_logprob, sampling_logprob=sampling_logprob, mask=mask)
    if level not in ("token", "sequence") or mode not in ("truncate", "mask"):
        raise ValueError(
            f"importance_weight: level must be token or sequence and mode truncate or mask, got {level!r} and {mode!r}"
        )
    if not cap >= 1:
        raise ValueError(f"importance_weight: cap must be >= 1, got {cap}")
    old_logprob, sampling_logprob = to_float(old_logprob, sampling_logprob)
    mask = mask.bool()
    log_ratio = (old_logprob - sampling_logprob).masked_fill(~mask, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(mask)
    # 20: exp(20) = 5e8 is beyond any sensible cap, and finite.
    ratio = log_ratio.clamp(max=20.0).exp()
    outside = (ratio < 1 / cap) | (ratio > cap)
    weight = ratio.clamp(max=cap) if mode == "truncate" else ratio.masked_fill(outside, 0.0)
    metrics = {
        "importance_mean": masked_mean(ratio, mask),
        "importance_max": ratio.masked_fill(~mask, 0.0).max(),
        "importance_cut_fraction": masked_mean((weight != ratio).to(weight.dtype), mask),
    }
    return weight.masked_fill(~mask, 0.0), metrics


def value_loss(
    value: Tensor,
    old_value: Tensor,
    return_: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    num_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped squared error of the value head.

        loss = 0.5 * sum_t max((V_t - R_t)², (clip(V_t, V_old - clip, V_old + clip) - R_t)²) / num_tokens

    value, old_value, return_: (B, T).   mask: (B, T).   clip: None for the plain squared error.
    num_tokens: the global count of valid tokens, as in `policy_loss`.
    Returns `(loss, metrics)`; metrics over this mask, detached: clip_fraction (tokens where the clipped
    term is the larger one) and explained_variance, 1 - var(R - V) / var(R), 0 where R does not vary.
    Source: the released code of Schulman et al. 2017 (openai/baselines, ppo2).
    """
    check_same_shape(value=value, old_value=old_value, return_=return_, mask=mask)
    value, old_value, return_ = to_float(value, old_value, return_)
    mask = mask.bool()
    old_value, return_ = old_value.detach(), return_.detach()
    value = value.masked_fill(~mask, 0.0)
    old_value, return_ = old_value.masked_fill(~mask, 0.0), return_.masked_fill(~mask, 0.0)
    error = (value - return_) ** 2
    clipped_error = error
    if clip is not None:
        clipped_error = (old_value + (value - old_value).clamp(-clip, clip) - return_) ** 2
    if num_tokens is None:
        num_tokens = loss_divisor(mask)
    with torch.no_grad():
        variance = masked_var(return_, mask)
        explained = 1.0 - masked_var(return_ - value, mask) / variance
        metrics = {
            "clip_fraction": masked_mean((clipped_error > error).to(error.dtype), mask),
            "explained_variance": torch.where(variance > 0, explained, torch.zeros_like(variance)),
        }
    return 0.5 * masked_sum(torch.maximum(error, clipped_error), mask) / max(num_tokens, 1), metrics
