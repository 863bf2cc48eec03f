"""What others offer for the same work, each as a function of our inputs that returns gradients, for kernels_cuda.py.

A peer that is not installed raises ImportError when it is called. All of them get what they need beside the head
(advantages, old log-probabilities) outside the clock.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["HEAD", "HEAD_LOSS", "HEAD_LOSS_KL", "LOGITS", "LOGITS_KL", "compiled_stats", "eager_stats", "gradients"]

ROW = 1024  # tokens of a sequence, for peers that want sequences
# trl/trainer/utils.py, 1.16: the vocabulary slice that its trainers pass.
TRL_SLICE = 32768


def gradients(loss: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def eager_stats(logits: Tensor, labels: Tensor, ref_logits: Tensor | None = None) -> tuple[Tensor, ...]:
    """logprob, entropy and, given a reference, kl, the plain way."""
    logp = torch.log_softmax(logits.float(), -1)
    p = logp.exp()
    stats = (logp.gather(1, labels.unsqueeze(1)).squeeze(1), -(p * logp).sum(1))
    if ref_logits is None:
        return stats
    return (*stats, (p * (logp - torch.log_softmax(ref_logits.float(), -1))).sum(1))


compiled_stats = torch.compile(eager_stats, dynamic=False)


def _total(stats: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.mean() for x in stats]).sum()


# From logits: (logits, labels, ref_logits) -> their gradient.


def _logits_by(stats: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda logits, labels, ref_logits=None: gradients(_total(stats(logits, labels, ref_logits)), [logits])


def trl_logits(logits: Tensor, labels: Tensor, ref_logits: None = None) -> tuple[Tensor, ...]:
    from trl.kernels import selective_log_softmax_and_entropy

    return gradients(_total(selective_log_softmax_and_entropy(logits.unsqueeze(0), labels.unsqueeze(0))), [logits])


def liger_grpo_logits(logits: Tensor, labels: Tensor, ref_logits: None = None) -> tuple[Tensor, ...]:
    """A whole GRPO loss. inplace=False: with True it writes the gradient into the caller's logits."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    completion = labels.view(-1, ROW)[:, 1:].contiguous()
    advantage = torch.ones(len(completion), device=logits.device)
    loss = triton_grpo_loss(
        logits.view(-1, ROW, logits.shape[1]),
        None,
        None,
        completion,
        advantage,
        temperature=1.0,
        beta=0.0,
        inplace=False,
    )[0]
    return gradients(loss.mean(), [logits])


LOGITS = {
    "eager": _logits_by(eager_stats),
    "torch.compile": _logits_by(compiled_stats),
    "trl logprob_entropy": trl_logits,
    "liger grpo": liger_grpo_logits,
}
LOGITS_KL = {name: LOGITS[name] for name in ("eager", "torch.compile")}


# From hidden states, without gradients: (hidden, weight, labels) -> log-probabilities.


def head_logprob(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, labels.unsqueeze(1)).squeeze(1)


HEAD = {"eager": head_logprob, "torch.compile": torch.compile(head_logprob, dynamic=False)}


# From hidden states: (hidden, weight, labels, ref_hidden, ref_weight) -> gradients of hidden and weight.


def eager_head(hidden: Tensor, weight: Tensor, labels: Tensor, *reference: Tensor) -> tuple[Tensor, ...]:
    return gradients(_head_loss(hidden, weight, labels, *reference), [hidden, weight])


def compiled_head(hidden: Tensor, weight: Tensor, labels: Tensor, *reference: Tensor) -> tuple[Tensor, ...]:
    return gradients(_compiled_head_loss(hidden, weight, labels, *reference), [hidden, weight])


def _head_loss(hidden: Tensor, weight: Tensor, labels: Tensor, *reference: Tensor) -> Tensor:
    logp = torch.log_softmax((hidden @ weight.T).float(), -1)
    loss = -logp.gather(1, labels.unsqueeze(1)).mean()
    if not reference:
        return loss
    with torch.no_grad():
        ref_logp = torch.log_softmax((reference[0] @ reference[1].T).float(), -1)
    return loss + (logp.exp() * (logp - ref_logp)).sum(1).mean()


_compiled_head_loss = torch.compile(_head_loss, dynamic=False)


def liger_flce(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Any = liger_fused_linear_cross_entropy(hidden, weight, labels)
    return gradients(loss[0] if isinstance(loss, tuple) else loss, [hidden, weight])


def liger_grpo(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    completion = labels.view(-1, ROW)
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)(
        hidden.view(-1, ROW, hidden.shape[1]),
        weight,
        completion,
        torch.ones_like(completion),
        torch.ones(len(completion), device=hidden.device),
    )[0]
    return gradients(loss, [hidden, weight])


def cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Exact: without the filter that leaves small gradients out."""
    from cut_cross_entropy import linear_cross_entropy

    return gradients(linear_cross_entropy(hidden, weight, labels, filter_eps=None), [hidden, weight])


def torch_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    options = torch.nn.LinearCrossEntropyOptions()
    loss = torch.nn.functional.linear_cross_entropy(hidden, weight, labels, options=options)
    return gradients(loss, [hidden, weight])


def trl_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    from trl.kernels import ChunkedLogProbFunction

    logprob = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, TRL_SLICE, None, 1.0, ())[0]
    return gradients(-logprob.mean(), [hidden, weight])


def trl_divergence(
    hidden: Tensor, weight: Tensor, labels: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> tuple[Tensor, ...]:
    """KL(policy || reference) alone, which leaves out the log-probability."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    kl = ChunkedDivergenceFunction.apply(hidden, weight, None, ref_hidden, ref_weight, None, 1.0)[0]
    return gradients(kl.mean(), [hidden, weight])


HEAD_LOSS = {
    "eager": eager_head,
    "torch.compile": compiled_head,
    "liger flce": liger_flce,
    "liger grpo": liger_grpo,
    "cut-cross-entropy, exact": cut_cross_entropy,
    "F.linear_cross_entropy": torch_head,
    "trl chunked_logprob": trl_chunked,
}
HEAD_LOSS_KL = {"eager": eager_head, "torch.compile": compiled_head, "trl chunked_divergence": trl_divergence}
