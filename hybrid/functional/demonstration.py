"""What is learnt from demonstrations that stand beside the policy's own responses."""

import math
from typing import Any

import torch
from torch import Tensor

from hybrid.functional.masked import masked_mean
from hybrid.functional.ppo import aggregate
from hybrid.functional.precision import check_same_shape, to_float

__all__ = ["entropy_threshold", "entropy_weight", "reinforce_loss", "shaped_loss"]


def shaped_loss(logprob: Tensor, advantage: Tensor, mask: Tensor, *, gamma: float = 0.1, **divided: Any) -> Tensor:
    """The policy loss of tokens that another policy has chosen, whose rare ones count more (LUFFY).

        loss = sum_t -A_t f(p_t) / num_tokens,      f(x) = x / (x + gamma),   p = exp(logprob)

    p is the importance ratio to a demonstrator that is certain of its tokens, as LUFFY takes it; it is not clipped.
    The gradient of a token's log-prob is A_t gamma p / (p + gamma)^2: largest where p = gamma, and not where p is 1.

    logprob, advantage: (B, T).   mask: (B, T), true on the demonstration's tokens.
    divided: aggregation, fixed_length and num_tokens, as in `aggregate`.
    Raises ValueError for different shapes and a gamma that is not above 0.
    Source: Yan et al. 2025 (arXiv:2504.14945); f, a demonstrator's probability of 1 and the missing clip as in its
    released code, which was read in the copy that HPT's (arXiv:2509.04419) has of it.
    """
    check_same_shape(logprob=logprob, advantage=advantage, mask=mask)
    if not gamma > 0:
        raise ValueError(f"shaped_loss: gamma must be > 0, got {gamma}")
    logprob, advantage = to_float(logprob, advantage)
    mask = mask.bool()
    logprob = logprob.masked_fill(~mask, 0.0)
    # x / (x + gamma) of a probability that is no float any more, too.
    shaped = torch.sigmoid(logprob - math.log(gamma))
    return aggregate(-advantage.detach().masked_fill(~mask, 0.0) * shaped, mask, **divided)


def reinforce_loss(logprob: Tensor, weight: Tensor, mask: Tensor, **divided: Any) -> Tensor:
    """The log-probs, weighted: REINFORCE's loss, and of weights that are not negative an imitation's.

        loss = sum_t -weight_t logprob_t / num_tokens       (no gradient through weight)

    logprob, weight: (B, T).   mask: (B, T).   divided: as in `shaped_loss`.
    """
    check_same_shape(logprob=logprob, weight=weight, mask=mask)
    logprob, weight = to_float(logprob, weight)
    outside = ~mask.bool()
    loss = -weight.detach().masked_fill(outside, 0.0) * logprob.masked_fill(outside, 0.0)
    return aggregate(loss, mask, **divided)


@torch.no_grad()
def entropy_weight(entropy: Tensor, mask: Tensor, coef: float, sign: int) -> Tensor:
    """A weight for each row by how sure the policy is in it, (B,).

        w = coef * exp(sign * H),   H: the mean entropy over the row's tokens, nats

    entropy, mask: (B, T).   sign -1: what the policy is sure of counts more; 1: what it is unsure of does.
    Source: SRFT (Fu et al. 2025, arXiv:2506.19767).
    """
    return coef * (sign * masked_mean(entropy, mask, 1)).exp()


@torch.no_grad()
def entropy_threshold(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """The entropy that the `share` of the tokens with the most have at least, a scalar; inf where there is no token.

    entropy, mask: (B, T).   share: in (0, 1]; of n tokens ceil(share n) are meant, and all that tie with the last.
    """
    if not 0 < share <= 1:
        raise ValueError(f"entropy_threshold: share must lie in (0, 1], got {share}")
    (entropy,) = to_float(entropy)
    found = entropy[mask.bool()]
    if not len(found):
        return entropy.new_tensor(math.inf)
    return found.topk(math.ceil(share * len(found))).values[-1]
