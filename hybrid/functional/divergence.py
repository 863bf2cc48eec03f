"""Divergence of a policy from a teacher over the whole vocabulary, from hidden states, without ever holding N x V.

Rows go through both heads a chunk at a time; backward takes each chunk's products again. Memory is that of a few
chunks, for one more product of each head.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hybrid.functional.logprob import check_scale, kl_of_logprobs
from hybrid.functional.precision import autocast_dtype, check_same_shape, float_dtype, rounded_operands

__all__ = ["DivergenceKind", "linear_divergence"]

DivergenceKind = Literal["reverse", "forward", "jsd"]

# Numbers of one chunk's logits, 16 MiB in float32; about six such tensors are held at once. Each chunk reads both heads
# and writes the gradient of one, so that much fewer rows would wait for memory.
_CHUNK = 2**22

_Head = tuple[Tensor, Tensor, Tensor | None]  # hidden (N, D), weight (V, D), bias (V,)


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    kind: DivergenceKind = "reverse",
    mix: float = 0.5,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Per token the divergence of the policy p from the teacher q over all V tokens, nats.

        p = softmax(z / temperature), z = hidden @ weight.T + bias, soft-capped; q alike from the teacher's
        reverse   KL(p || q), `linear_logprob`'s kl: p stays where q has mass
        forward   KL(q || p): p covers q
        jsd       mix KL(q || m) + (1 - mix) KL(p || m),   m = mix q + (1 - mix) p

    hidden: (..., D).   weight: (V, D).   ref_hidden: (..., D').   ref_weight: (V, D').   bias, ref_bias: (V,); -inf
        takes a token out of the vocabulary, of both sides, or the KL is infinite and has no gradient; the jsd never is.
        (A soft-cap makes it a legal -softcap, as in `token_logprob`.)
    mix: of jsd alone, in (0, 1): the weight of the teacher, which is the first distribution of GKD's eq. 1 and mix its
        beta. jsd / mix tends to forward for mix -> 0 and jsd / (1 - mix) to reverse for mix -> 1, where jsd is 0.
    softcap, ref_softcap: the bound of each side's logits, None where there is none.
    mask: (...) bool; rows where it is false give 0, have no gradient and may hold anything, NaN too.
    Returns (...) float32 (float64 where an input is). Under autocast the operands of the products may be rounded to
    its dtype (`rounded_operands`). A head in another dtype than the result's is held once more in that one.
    Gradients flow to hidden, weight and bias, once: create_graph=True raises RuntimeError.
    Raises ValueError for shapes that do not fit, an unknown kind, and numbers out of range.
    Source: GKD, Agarwal et al. 2023 (arXiv:2306.13649).
    """
    _check_options(kind, mix, temperature, softcap, ref_softcap)
    _check_shapes((hidden, weight, bias), (ref_hidden, ref_weight, ref_bias), mask)
    shape = hidden.shape[:-1]
    kept = torch.ones(shape, dtype=torch.bool, device=hidden.device) if mask is None else mask.bool()
    rows = kept.reshape(-1).nonzero().squeeze(1)
    options = (kind, mix, temperature, softcap, ref_softcap)
    out = _LinearDivergence.apply(
        hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows),
        weight,
        bias,
        ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]).index_select(0, rows),
        ref_weight.detach(),
        None if ref_bias is None else ref_bias.detach(),
        options,
        autocast_dtype(hidden.device),
    )
    return out.new_zeros(math.prod(shape)).index_put((rows,), out).view(shape)


def _divergence(kind: str, mix: float, logp: Tensor, logq: Tensor) -> Tensor:
    """Log-probs of policy and teacher, (n, V), to (n,), as `linear_divergence` defines it."""
    if kind == "reverse":
        return kl_of_logprobs(logp, logq)
    if kind == "forward":
        return kl_of_logprobs(logq, logp)
    logm = _mixture(mix, logp, logq)
    return mix * kl_of_logprobs(logq, logm) + (1 - mix) * kl_of_logprobs(logp, logm)


def _gradient(kind: str, mix: float, logp: Tensor, logq: Tensor) -> Tensor:
    """The derivative of `_divergence` to z, logp = log_softmax(z), (n, V).

    forward   p - q
    reverse   p (log p - log q - KL(p || q))
    jsd       (1 - mix) p (log p - log m - KL(p || m)): what m itself would add cancels
    """
    p = logp.exp()
    if kind == "forward":
        return p.sub_(logq.exp())
    scale, other = (1.0, logq) if kind == "reverse" else (1 - mix, _mixture(mix, logp, logq))
    gap = (logp - other).masked_fill_(p == 0, 0.0)
    return gap.sub_((p * gap).sum(-1, keepdim=True)).mul_(p).mul_(scale)


def _mixture(mix: float, logp: Tensor, logq: Tensor) -> Tensor:
    return torch.logaddexp(logq + math.log(mix), logp + math.log1p(-mix))


class _LinearDivergence(torch.autograd.Function):
    """hidden: (N, D), ref_hidden: (N, D'). Returns (N,)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        options: tuple[Any, ...],
        operands: torch.dtype | None,
    ) -> Tensor:
        heads = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        ctx.save_for_backward(*heads)
        ctx.options, ctx.operands = options, operands
        kind, mix, temperature, softcap, ref_softcap = options
        with torch.autocast(hidden.device.type, enabled=False), rounded_operands(operands):
            policy, ref = _in_one_dtype(*heads)
            out = policy[0].new_empty(len(hidden))
            for rows in _chunks(len(hidden), len(weight)):
                logp, _ = _logprobs(policy, rows, temperature, softcap)
                logq, _ = _logprobs(ref, rows, temperature, ref_softcap)
                out[rows] = _divergence(kind, mix, logp, logq)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would let a second derivative through, as zero, where `grad` is a constant.
        if torch.is_grad_enabled():
            raise RuntimeError("linear_divergence: gradients flow once; create_graph=True is not supported")
        hidden, weight, bias, *_ = heads = ctx.saved_tensors
        kind, mix, temperature, softcap, ref_softcap = ctx.options
        with torch.autocast(hidden.device.type, enabled=False), rounded_operands(ctx.operands):
            policy, ref = _in_one_dtype(*heads)
            wanted = zip(policy, ctx.needs_input_grad[:3], strict=True)
            grads = [torch.zeros_like(x) if x is not None and needed else None for x, needed in wanted]
            for rows in _chunks(len(hidden), len(weight)):
                logp, log_partition = _logprobs(policy, rows, temperature, softcap)
                logq, _ = _logprobs(ref, rows, temperature, ref_softcap)
                dz = _gradient(kind, mix, logp, logq).mul_(grad[rows].unsqueeze(1))
                dz.mul_(_slope(logp.add_(log_partition), temperature, softcap))
                _add_gradients_(grads, dz, policy, rows)
        of_inputs = zip(grads, (hidden, weight, bias), strict=True)
        return (*(None if g is None else g.to(x.dtype) for g, x in of_inputs), *[None] * 5)


def _in_one_dtype(*heads: Tensor | None) -> tuple[_Head, _Head]:
    """Policy and teacher in the dtype of the computation."""
    dtype = float_dtype(*(x for x in heads if x is not None))
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = (x if x is None else x.to(dtype) for x in heads)
    assert hidden is not None and weight is not None and ref_hidden is not None and ref_weight is not None
    return (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)


def _chunks(num_rows: int, vocab: int) -> Iterator[slice]:
    size = max(1, _CHUNK // max(vocab, 1))
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def _logprobs(head: _Head, rows: slice, temperature: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Of a chunk's logits z, (n, V): log_softmax(z), and the log-partition that was taken from it, (n, 1)."""
    hidden, weight, bias = head
    z = hidden[rows] @ weight.T if bias is None else torch.addmm(bias, hidden[rows], weight.T)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    z.div_(temperature)
    # The maximum goes first: a partition that holds it would lose digits to large logits.
    top = z.amax(-1, keepdim=True)
    log_sum = z.sub_(top).logsumexp(-1, keepdim=True)
    return z.sub_(log_sum), top + log_sum


def _slope(z: Tensor, temperature: float, softcap: float | None) -> Tensor | float:
    """d z / d product: z temperature / softcap is the tanh, whose derivative is 1 - tanh^2."""
    if softcap is None:
        return 1.0 / temperature
    return (z * (temperature / softcap)).square_().neg_().add_(1.0).div_(temperature)


def _add_gradients_(grads: list[Tensor | None], dz: Tensor, head: _Head, rows: slice) -> None:
    """What a chunk's dz, (n, V), adds to the gradients of hidden, weight and bias."""
    hidden, weight, _ = head
    dhidden, dweight, dbias = grads
    if dhidden is not None:
        torch.mm(dz, weight, out=dhidden[rows])
    if dweight is not None:
        dweight.addmm_(dz.T, hidden[rows])
    if dbias is not None:
        dbias += dz.sum(0)


def _check_options(kind: str, mix: float, temperature: float, softcap: float | None, ref_softcap: float | None) -> None:
    if kind not in get_args(DivergenceKind):
        raise ValueError(f"linear_divergence: kind must be reverse, forward or jsd, got {kind!r}")
    if kind == "jsd" and not 0 < mix < 1:
        raise ValueError(
            f"linear_divergence: mix must lie in (0, 1), got {mix}; at the ends jsd is 0, and kind 'forward' (towards "
            "0) or 'reverse' (towards 1) is what it tends to"
        )
    check_scale(temperature, softcap)
    check_scale(temperature, ref_softcap)


def _check_shapes(policy: _Head, ref: _Head, mask: Tensor | None) -> None:
    for side, (hidden, weight, bias) in (("", policy), ("ref_", ref)):
        if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"linear_divergence: {side}hidden {tuple(hidden.shape)} does not fit {side}weight {tuple(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"linear_divergence: {side}bias {tuple(bias.shape)} does not fit {side}weight {tuple(weight.shape)}"
            )
    if policy[1].shape[0] != ref[1].shape[0]:
        raise ValueError(
            f"linear_divergence: the vocabularies differ, {policy[1].shape[0]} and {ref[1].shape[0]}; policy and "
            "teacher must share their tokens"
        )
    tokens = {"hidden[..., 0]": policy[0][..., 0], "ref_hidden[..., 0]": ref[0][..., 0]}
    check_same_shape(**tokens | ({} if mask is None else {"mask": mask}))
