"""One token a row out of its logits, by the inverse of the cumulative distribution."""

import torch
from torch import Tensor

__all__ = ["draw", "truncated"]

# Tokens whose probabilities are added up before the search, which then looks into one such block.
_BLOCK = 256


def draw(
    logits: Tensor, uniform: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(token, log-prob under what it was drawn from), (B,) each.

        token = the first v with p_0 + ... + p_v > uniform,    p = softmax(logits / temperature), cut to top_k, top_p

    logits: (B, V) float32; -inf is legal.
    uniform: (B,) in [0, 1), by which alone chance comes in; float64, or float32 where a device has no other.
    temperature 0: the likeliest token, which is certain: its log-prob is 0.
    Sums are in uniform's dtype: over blocks first, then inside the one that was found, so that in float64 each token's
    share of [0, 1) is its probability to float32's rounding, however many there are. No token of probability 0 is
    drawn; of logits that are not finite it may be any. Reads nothing to the host.
    """
    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits))
    z = truncated(logits if temperature == 1 else logits / temperature, top_k, top_p)
    z = z - z.amax(-1, keepdim=True)
    p = z.exp()
    summed = _block_sums(p, uniform.dtype).cumsum(-1)  # (B, blocks)
    total = summed[:, -1:]
    block, rest = _found(summed, uniform.unsqueeze(1) * total)
    vocab = p.shape[1]
    tokens = block * _BLOCK + torch.arange(_BLOCK, device=p.device)  # (B, _BLOCK), past the vocabulary in the last one
    inside = p.gather(1, tokens.clamp(max=vocab - 1)).masked_fill_(tokens >= vocab, 0.0).to(uniform.dtype).cumsum(-1)
    place, _ = _found(inside, rest)
    token = (block * _BLOCK + place).clamp_(max=vocab - 1)
    logprob = z.gather(1, token) - total.log().float()
    return token.squeeze(1), logprob.squeeze(1)


def _block_sums(p: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, V) -> (B, blocks), of numbers added by 16 in float32: that moves no share by 1e-7."""
    rows, vocab = p.shape
    whole = vocab // _BLOCK * _BLOCK
    sums = p[:, :whole].reshape(rows, -1, _BLOCK // 16, 16).sum(-1).sum(-1, dtype=dtype)
    last = p[:, whole:].sum(-1, keepdim=True, dtype=dtype)
    return torch.cat([sums, last], 1) if whole < vocab else sums


def _found(summed: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of ascending sums (B, n) the first that is larger than target (B, 1), and what target is past the one before."""
    last = summed[:, -1:]
    # Rounding may have put the target at the very end, behind which nothing has a share.
    target = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    place = torch.searchsorted(summed, target, right=True).clamp_(max=summed.shape[1] - 1)
    before = torch.where(place > 0, summed.gather(1, (place - 1).clamp(min=0)), 0.0)
    return place, target - before


def truncated(z: Tensor, top_k: int, top_p: float) -> Tensor:
    """The logits, -inf where they are not among the top_k likeliest, or the fewest that hold top_p."""
    if 0 < top_k < z.shape[-1]:
        z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, index = z.sort(descending=True)
        probs = ordered.softmax(-1)
        # Keep a token while the ones before it hold less than top_p: the likeliest is always kept.
        outside = probs.cumsum(-1) - probs >= top_p
        z = z.masked_fill(outside.scatter(1, index, outside), -torch.inf)
    return z
