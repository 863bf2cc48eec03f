"""Log-probability, entropy and exact KL of a categorical over the vocabulary, from its logits.

These are the definitions. `linear_logprob` gives the same numbers from hidden states, without the logits.
Logits of -inf (a masked vocabulary) are legal: such a token has probability 0 and adds 0 to every sum.
Everywhere p = softmax(z / temperature), and z is logits, or c tanh(logits / c) where softcap is a number c (which
makes a logit of -inf a legal -c: mask after the cap).
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid.functional.precision import to_float

__all__ = [
    "IGNORE",
    "TokenStats",
    "check_scale",
    "check_want",
    "entropy",
    "full_kl",
    "kl_of_logprobs",
    "soft_capped",
    "token_logprob",
    "token_stats",
]

IGNORE = -100  # a label that is no token: its log-probability is 0 and has no gradient


@dataclass(frozen=True)
class TokenStats:
    """Per token, in the labels' shape: what was wanted, and None for the rest."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None


def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    want: Collection[str] = ("logprob",),
    ref_logits: Tensor | None = None,
) -> TokenStats:
    """What one pass over the logits can tell: `token_logprob`, `entropy` and `full_kl` of every token.

    logits, ref_logits: (..., V).   labels: (...) int32 or int64.
    want: any of "logprob", "entropy", "kl". "kl" is KL(policy || reference) and needs ref_logits, which get no
        gradient.
    Rows whose label is IGNORE give 0, have no gradient and may hold anything, NaN too.
    """
    check_want("token_stats", want, ref_logits=ref_logits)
    ignored = labels == IGNORE
    # Cast here, so that the gradients of all three meet in float32.
    logits = to_float(logits)[0].masked_fill(ignored.unsqueeze(-1), 0.0)
    stats = {}
    if "logprob" in want:
        stats["logprob"] = token_logprob(logits, labels, temperature=temperature, softcap=softcap)
    if "entropy" in want:
        stats["entropy"] = entropy(logits, temperature=temperature, softcap=softcap)
    if "kl" in want and ref_logits is not None:
        ref_logits = ref_logits.detach().masked_fill(ignored.unsqueeze(-1), 0.0)
        stats["kl"] = full_kl(logits, ref_logits, temperature=temperature, softcap=softcap)
    return TokenStats(**{name: x.masked_fill(ignored, 0.0) for name, x in stats.items()})


def token_logprob(logits: Tensor, labels: Tensor, *, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    """log p at the labels.

    logits: (..., V).   labels: (...) int32 or int64, no shift: logits[t] must already be the ones that predict
        labels[t].
    Returns (...) float; 0 where the label is IGNORE.
    """
    ignored = labels == IGNORE
    logits = logits.masked_fill(ignored.unsqueeze(-1), 0.0)
    logprob = _log_softmax(logits, temperature, softcap)
    logprob = logprob.gather(-1, labels.masked_fill(ignored, 0).long().unsqueeze(-1)).squeeze(-1)
    return logprob.masked_fill(ignored, 0.0)


def entropy(logits: Tensor, *, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    """-sum_v p_v log p_v, nats.   (..., V) -> (...)."""
    logprob = _log_softmax(logits, temperature, softcap)
    return -(logprob.exp() * _finite(logprob)).sum(-1)


def full_kl(logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) over the whole vocabulary, nats.   (..., V) twice -> (...).

    Infinite where the policy gives mass to a token that the reference forbids.
    """
    logits, ref_logits = to_float(logits, ref_logits)
    return kl_of_logprobs(_log_softmax(logits, temperature, softcap), _log_softmax(ref_logits, temperature, softcap))


def kl_of_logprobs(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """`full_kl` of what are log-probabilities already.   (..., V) twice -> (...)."""
    p = logprob.exp()
    difference = (logprob - ref_logprob).masked_fill(p == 0, 0.0)
    return (p * difference).sum(-1)


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """c tanh(logits / c), within (-c, c), as Gemma 2 bounds its logits; the logits themselves where softcap is None."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def check_scale(temperature: float, softcap: float | None) -> None:
    """Raise ValueError unless both can divide logits."""
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")


def check_want(function: str, want: Collection[str], **reference: Tensor | None) -> None:
    """Raise ValueError unless `want` names statistics, and the reference is there where "kl" is one of them."""
    if not want or set(want) - {"logprob", "entropy", "kl"}:
        raise ValueError(f"{function}: want must be some of logprob, entropy, kl, got {want!r}")
    missing = [name for name, x in reference.items() if x is None]
    if "kl" in want and missing:
        raise ValueError(f"{function}: want 'kl' needs {' and '.join(missing)}")


def _log_softmax(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    check_scale(temperature, softcap)
    (logits,) = to_float(logits)
    return torch.log_softmax(soft_capped(logits, softcap) / temperature, -1)


def _finite(logprob: Tensor) -> Tensor:
    """log p with 0 in place of -inf, so that p log p and its gradient are 0 there and not NaN."""
    return logprob.masked_fill(logprob == -torch.inf, 0.0)
