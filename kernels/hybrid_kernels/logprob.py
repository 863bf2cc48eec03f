"""Log-probability, entropy and exact KL from logits: `hybrid.functional.token_stats` in one pass over the logits.

The maths is in `epilogue`. Bytes moved per token, with L = V * itemsize: forward L (2 L with a reference), backward
L read and L written (one more L with a reference). No memory but the gradient, the results and 28 bytes a token.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.launch import (
    Rows,
    TokenStats,
    backward,
    check,
    check_labels,
    forward,
    new_results,
    no_second_derivative,
    wanted,
)

__all__ = ["token_stats"]


def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    want: Sequence[str] = ("logprob",),
    ref_logits: Tensor | None = None,
) -> TokenStats:
    """Log-probability of the labels, entropy, and KL to the reference, from one read of the logits.

    logits: (..., V) float32, bfloat16 or float16, no shift: logits[t] already predict labels[t].
    labels: (...) int32 or int64. Where it is -100 all results are 0, without gradient, and the logits are not read.
    temperature, softcap: z <- softcap * tanh(z / softcap), then z <- z / temperature, for both models.
    want: any of "logprob", "entropy", "kl". "kl" is KL(policy || reference) and needs ref_logits (..., V), which
        get no gradient.
    Returns TokenStats of (...) float32; None for what is not wanted. Gradients flow to logits, in their dtype, once:
    create_graph=True raises RuntimeError.
    Raises ValueError on shapes, dtypes or options that do not fit, TypeError on a DTensor.
    """
    check("token_stats", {"logits": logits, "ref_logits": ref_logits}, labels, temperature, softcap, want)
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"token_stats: logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}")
    if "kl" in want and ref_logits is None:
        raise ValueError("token_stats: want 'kl' needs ref_logits")
    if ref_logits is not None and ref_logits.shape != logits.shape:
        raise ValueError(f"token_stats: ref_logits {tuple(ref_logits.shape)} and logits {tuple(logits.shape)} differ")
    ref = ref_logits.detach() if ref_logits is not None and "kl" in want else None
    *results, _ = _forward(logits, labels, ref, float(temperature), softcap, "entropy" in want)
    return wanted(want, results)


@torch.library.custom_op(
    "hybrid_kernels::token_stats",
    mutates_args=(),
    schema="(Tensor logits, Tensor labels, Tensor? ref_logits, float temperature, float? softcap, bool entropy)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vocabulary = logits.shape[-1]
    check_labels("token_stats", labels, vocabulary)
    results = new_results(labels, entropy, ref_logits is not None)
    rows, ref = _rows(logits, ref_logits)
    forward(
        rows, ref, labels.contiguous(), results, columns=slice(0, vocabulary), total_columns=vocabulary,
        temperature=temperature, softcap=softcap, entropy=entropy,
    )  # fmt: skip
    return results


@_forward.register_fake
def _(logits, labels, ref_logits, temperature, softcap, entropy):
    return new_results(labels, entropy, ref_logits is not None)


@torch.library.custom_op(
    "hybrid_kernels::token_stats_backward",
    mutates_args=(),
    schema="(Tensor? g_logprob, Tensor? g_entropy, Tensor? g_kl, Tensor logits, Tensor labels, Tensor? ref_logits,"
    " Tensor logprob, Tensor entropy, Tensor kl, Tensor state, float temperature, float? softcap) -> Tensor",
)
def _backward(
    g_logprob: Tensor | None,
    g_entropy: Tensor | None,
    g_kl: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    logprob: Tensor,
    entropy: Tensor,
    kl: Tensor,
    state: Tensor,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows, ref = _rows(logits, ref_logits)
    backward(
        [None if g is None else g.contiguous() for g in (g_logprob, g_entropy, g_kl)], rows, ref, labels.contiguous(),
        (logprob, entropy, kl, state), grad.view(-1, logits.shape[-1]), columns=slice(0, logits.shape[-1]),
        temperature=temperature, softcap=softcap,
    )  # fmt: skip
    return grad


@_backward.register_fake
def _(g_logprob, g_entropy, g_kl, logits, labels, ref_logits, logprob, entropy, kl, state, temperature, softcap):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _rows(logits: Tensor, ref_logits: Tensor | None) -> tuple[Rows, Rows | None]:
    return Rows.of(logits), None if ref_logits is None else Rows.of(ref_logits)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, labels, ref_logits, ctx.temperature, ctx.softcap, ctx.entropy = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, ref_logits, *output)


def _grad(ctx: Any, g_logprob: Any, g_entropy: Any, g_kl: Any, g_state: Any) -> tuple:
    no_second_derivative("token_stats")
    logits, labels, ref_logits, *results = ctx.saved_tensors
    grads = (g_logprob, g_entropy if ctx.entropy else None, g_kl if ref_logits is not None else None)
    grad = None
    if ctx.needs_input_grad[0] and any(g is not None for g in grads):
        grad = _backward(*grads, logits, labels, ref_logits, *results, ctx.temperature, ctx.softcap)
    return grad, None, None, None, None, None


_forward.register_autograd(_grad, setup_context=_setup)
