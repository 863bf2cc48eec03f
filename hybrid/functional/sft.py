"""Masked cross-entropy, and the weightings of its tokens."""

from typing import Literal

import torch
from torch import Tensor

from hybrid.functional.masked import masked_mean, masked_sum
from hybrid.functional.precision import check_same_shape, to_float

__all__ = ["TokenWeight", "sft_loss"]

TokenWeight = Literal["one", "p", "p(1-p)", "markov"]


def sft_loss(
    logprob: Tensor,
    mask: Tensor,
    *,
    token_weight: TokenWeight = "one",
    markov_decay: float = 0.95,
    markov_window: int | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the target tokens.

        loss = -sum_t w_t * logprob_t / num_tokens

    logprob: (B, T), of the target tokens.   mask: (B, T), true where a token is trained.
    token_weight, each without gradient, p = exp(logprob):
        one      w = 1
        p        w = p, dynamic fine-tuning (Wu et al. 2025, arXiv:2508.05629)
        p(1-p)   w = p (1 - p), CHORD's phi (Zhang et al. 2025, arXiv:2508.11408)
        markov   w = markov_decay^min(n_t, markov_window), n_t the tokens of the row that follow t, scaled to mean 1
                 over the row: the most recent tokens weigh most, and before the window (None: the row) all weigh
                 alike
    num_tokens: the global count of trained tokens where these rows are part of a larger step.
    Returns `(loss, metrics)`; metrics over this mask, detached: nll (unweighted, nats per token).
    """
    check_same_shape(logprob=logprob, mask=mask)
    (logprob,) = to_float(logprob)
    mask = mask.bool()
    logprob = logprob.masked_fill(~mask, 0.0)
    weight = _token_weight(logprob.detach(), mask, token_weight, markov_decay, markov_window)
    if num_tokens is None:
        num_tokens = int(mask.sum())
    return masked_sum(-weight * logprob, mask) / max(num_tokens, 1), {"nll": masked_mean(-logprob.detach(), mask)}


def _token_weight(logprob: Tensor, mask: Tensor, kind: TokenWeight, decay: float, window: int | None) -> Tensor:
    """(B, T) weights of the trained tokens; what stands outside the mask is not used."""
    p = logprob.exp()
    if kind == "one":
        return torch.ones_like(p)
    if kind == "p":
        return p
    if kind == "p(1-p)":
        return p * (1 - p)
    if kind == "markov":
        if not 0 < decay <= 1:
            raise ValueError(f"sft_loss: markov_decay must lie in (0, 1], got {decay}")
        following = mask.sum(1, keepdim=True) - mask.cumsum(1)
        if window is not None:
            if window < 1:
                raise ValueError(f"sft_loss: markov_window must be >= 1, got {window}")
            following = following.clamp(max=window)
        weight = torch.pow(torch.full_like(p, decay), following)
        return weight / masked_mean(weight, mask, dim=1).clamp(min=1e-12).unsqueeze(1)
    raise ValueError(f"sft_loss: token_weight must be one of one, p, p(1-p), markov, got {kind!r}")
