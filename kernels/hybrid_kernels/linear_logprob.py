"""Log-probability, entropy and KL from hidden states: `hybrid.functional.linear_logprob` on a GPU.

The logits (N, V) never exist, but for columns that the caller gives memory for, to save their second product. One
vocabulary slice at a time is a GEMM into a workspace (float32 out of bfloat16 operands where torch offers it), and
`epilogue` folds the slice into running statistics. The backward pass takes the product again: dlogits of a slice go to
a second workspace, then

    dweight[slice] = dlogits.T @ hidden     one GEMM that contracts over all N and is written once
    dhidden       += dlogits @ weight[slice]    in float32

so nothing is accumulated in a short dtype and no atomics are used: the gradients are deterministic.

Operations: 2 N V D forward and 6 N V D backward (4 with a frozen head), 2 N V D more each with a KL.
Bytes moved per token beside the GEMMs' operands, all of them workspace: forward 8 V (float32 written and read) for
each model; backward the same and, with 2-byte operands, 6 V for dlogits. Memory: 64 MiB of logits forward, 256 MiB
of logits and 128 MiB of 2-byte dlogits backward, 8 N D bytes for dhidden, and one copy of hidden (two with a shared
head).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.head import Head, autocast_dtype, padded, product, slices, stacked
from hybrid_kernels.launch import (
    IGNORE,
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

__all__ = ["SLICE_STEP", "check_inputs", "linear_logprob"]

# Bytes of the float32 workspace of all models. Forward: small enough that the epilogue finds most of it in the
# second-level cache of a large GPU (50 MiB and more). Backward: wide slices, for dhidden is read and written once a
# slice. On an H200 (commit 7022edd) 16 to 1024 MiB forward and 64 to 2048 MiB backward took the same time, within 3 %
# and 8 %.
FORWARD_BYTES = 64 * 2**20
BACKWARD_BYTES = 256 * 2**20
# Columns of a slice are a multiple of this and at least as many: the width of a GEMM's tile, and aligned rows.
SLICE_STEP = 256


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    want: Sequence[str] = ("logprob",),
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    keep_bytes: int = 0,
) -> TokenStats:
    """`token_stats` of the logits hidden @ weight.T + bias, which are never held, or no more of them than asked for.

    hidden: (..., D).   weight: (V, D).   bias: (V,): float32, bfloat16 or float16.
    labels: (...) int32 or int64, the token that hidden[t] predicts. Where it is -100 all results are 0, without
        gradient, whatever stands in hidden. Such rows still cost their share of the GEMMs, because leaving them out
        needs their number on the host: a caller who knows the valid positions passes only those.
    temperature, softcap, want: as in `token_stats`. "kl" needs ref_hidden (..., D') and ref_weight (V, D'); the
        reference gets no gradient. If ref_weight is weight, both products are one GEMM.
    keep_bytes: what the logits may take, 4 bytes each, that are kept for the backward pass, if there will be one. Of
        the others the product is taken again.
    Returns TokenStats of (...) float32. Gradients flow to hidden, weight and bias, in their dtypes, once:
    create_graph=True raises RuntimeError. Products take their operands in autocast's dtype where it is on, else in
    their common one, and accumulate in float32; all else is float32 in any case.
    Raises ValueError on shapes, dtypes or options that do not fit, TypeError on a DTensor.
    """
    reference = check_inputs(
        "linear_logprob", hidden, weight, labels, bias, temperature, softcap, want, ref_hidden, ref_weight, ref_bias
    )
    if keep_bytes < 0:
        raise ValueError(f"linear_logprob: keep_bytes must be at least 0, got {keep_bytes}")
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    *results, _, _ = _forward(
        hidden, weight, bias, labels, *reference, float(temperature), softcap, "entropy" in want,
        autocast_dtype(hidden), keep_bytes if trained else 0,
    )  # fmt: skip
    return wanted(want, results)


def check_inputs(
    function: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    want: Sequence[str],
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> list[Tensor | None]:
    """Refuse what does not fit. Returns the reference's tensors, detached; None where no KL is wanted."""
    floats = {
        "hidden": hidden, "weight": weight, "bias": bias,
        "ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias,
    }  # fmt: skip
    check(function, floats, labels, temperature, softcap, want)
    _check_head(function, "", hidden, weight, bias, labels)
    if "kl" not in want:
        return [None, None, None]
    if ref_hidden is None or ref_weight is None:
        raise ValueError(f"{function}: want 'kl' needs ref_hidden and ref_weight")
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(f"{function}: the vocabularies differ, {weight.shape[0]} and {ref_weight.shape[0]}")
    _check_head(function, "ref_", ref_hidden, ref_weight, ref_bias, labels)
    return [None if x is None else x.detach() for x in (ref_hidden, ref_weight, ref_bias)]


def _check_head(
    function: str, prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> None:
    if hidden.shape[:-1] != labels.shape or weight.dim() != 2 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"{function}: {prefix}hidden {tuple(hidden.shape)} does not fit labels {tuple(labels.shape)} "
            f"and {prefix}weight {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{function}: {prefix}bias {tuple(bias.shape)} does not fit {tuple(weight.shape)}")


class _Models:
    """The logits of the policy and, for a KL, of the reference, slice by slice: the first columns in `kept` (rows of
    both, columns), which holds them already where it is `filled`, the others in one reused workspace."""

    def __init__(self, policy: Head, reference: Head | None, num_bytes: int, kept: Tensor, filled: bool = False):
        self.policy, self.num_rows = policy, len(policy.hidden)
        self.heads = [policy] if reference is None else stacked(policy, reference)
        self.sizes = [len(head.hidden) for head in self.heads]
        num_rows, vocabulary = sum(self.sizes), len(policy.weight)
        width = max(num_bytes // (4 * max(num_rows, 1)) // SLICE_STEP, 1) * SLICE_STEP
        self.width = min(width, -(-vocabulary // SLICE_STEP) * SLICE_STEP)
        self.kept, self.filled = kept[:num_rows], filled
        dtype = torch.promote_types(self.heads[0].logits_dtype, self.heads[-1].logits_dtype)
        width = self.width if kept.shape[1] < vocabulary else 0
        self.space = policy.hidden.new_empty((num_rows, width), dtype=dtype)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Rows, Rows | None]]:
        """Columns, the policy's weight there, and the logits of both. Each step may overwrite the one before."""
        vocabulary = len(self.policy.weight)
        num_kept = min(self.kept.shape[1], vocabulary)
        for columns in slices(0, num_kept, self.width) + slices(num_kept, vocabulary, self.width):
            keep = columns.start < num_kept
            weights = [head.columns(columns) for head in self.heads[: 1 if keep and self.filled else 2]]
            space = self.kept[:, padded(columns)] if keep else self.space[:, : len(weights[0])]
            if not (keep and self.filled):
                for head, weight, out in zip(self.heads, weights, space.split(self.sizes), strict=True):
                    product(head.hidden, weight.T, out)
            logits, ref = space[: self.num_rows], space[self.num_rows :]
            yield columns, weights[0], self._rows(logits), self._rows(ref) if len(ref) else None

    def _rows(self, logits: Tensor) -> Rows:
        return Rows(logits, max(self.num_rows, 1), 0, logits.stride(0))


def _new_kept(labels: Tensor, weight: Tensor, with_reference: bool, keep_bytes: int) -> Tensor:
    """Room for the float32 logits of all rows, in the whole vocabulary or as many times SLICE_STEP columns as fit."""
    num_rows, columns = labels.numel() * (1 + with_reference), 0
    if keep_bytes:
        columns, whole = keep_bytes // (4 * max(num_rows, 1)), padded(slice(0, len(weight))).stop
        columns = whole if columns >= whole else columns // SLICE_STEP * SLICE_STEP
    return labels.new_empty((num_rows, columns), dtype=torch.float32)


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels,"
    " Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, "
)


@torch.library.custom_op(
    "hybrid_kernels::linear_logprob",
    mutates_args=(),
    schema=f"({_INPUTS} float temperature, float? softcap, bool entropy, ScalarType? autocast,"
    " int keep_bytes) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    autocast: torch.dtype | None,
    keep_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_labels("linear_logprob", labels, len(weight))
    results = new_results(labels, entropy, ref_hidden is not None)
    kept = _new_kept(labels, weight, ref_hidden is not None, keep_bytes)
    with torch.autocast(hidden.device.type, enabled=False):
        policy = Head(hidden, weight, autocast)
        reference = None if ref_hidden is None or ref_weight is None else Head(ref_hidden, ref_weight, autocast)
        for columns, _, logits, ref in _Models(policy, reference, FORWARD_BYTES, kept):
            forward(
                logits, ref, labels.contiguous(), results, columns=columns, total_columns=len(weight), bias=bias,
                ref_bias=ref_bias, temperature=temperature, softcap=softcap, entropy=entropy,
            )  # fmt: skip
    return *results, kept


@_forward.register_fake
def _(
    hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, temperature, softcap, entropy, autocast, keep_bytes
):
    kept = _new_kept(labels, weight, ref_hidden is not None, keep_bytes)
    return *new_results(labels, entropy, ref_hidden is not None), kept


@torch.library.custom_op(
    "hybrid_kernels::linear_logprob_backward",
    mutates_args=(),
    schema=f"(Tensor? g_logprob, Tensor? g_entropy, Tensor? g_kl, {_INPUTS} Tensor logprob, Tensor entropy, Tensor kl,"
    " Tensor state, Tensor kept, float temperature, float? softcap, ScalarType? autocast, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward(
    g_logprob: Tensor | None,
    g_entropy: Tensor | None,
    g_kl: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    logprob: Tensor,
    entropy: Tensor,
    kl: Tensor,
    state: Tensor,
    kept: Tensor,
    temperature: float,
    softcap: float | None,
    autocast: torch.dtype | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    labels = labels.contiguous()
    grads = [None if g is None else g.contiguous() for g in (g_logprob, g_entropy, g_kl)]
    dhidden, dweight, dbias = _new_gradients(hidden, weight, bias, needs)
    with torch.autocast(hidden.device.type, enabled=False):
        policy, reference = Head(hidden, weight, autocast), None
        if g_kl is not None and ref_hidden is not None and ref_weight is not None:
            reference = Head(ref_hidden, ref_weight, autocast)
        models = _Models(policy, reference, BACKWARD_BYTES, kept, filled=True)
        space = policy.hidden.new_empty((len(policy.hidden), models.width))
        if needs[0]:
            total = policy.hidden.new_zeros(policy.hidden.shape, dtype=torch.float32)
            part = torch.empty_like(total)
        if needs[1]:
            # 0 * NaN is NaN: what stands in an ignored row must not reach dweight.
            valid = policy.hidden.masked_fill(labels.reshape(-1, 1) == IGNORE, 0.0)
        for columns, weight_slice, logits, ref in models:
            dlogits, width = space[:, : len(weight_slice)], columns.stop - columns.start
            backward(
                grads, logits, ref, labels, (logprob, entropy, kl, state), dlogits[:, :width], columns=columns,
                bias=bias, ref_bias=ref_bias, temperature=temperature, softcap=softcap,
            )  # fmt: skip
            dlogits[:, width:] = 0.0
            if needs[0]:
                total += product(dlogits, weight_slice, part)
            if needs[1]:
                product(dlogits.T, valid, dweight[columns])
            if needs[2]:
                dbias[columns] = dlogits[:, :width].sum(0, dtype=torch.float32)
        if needs[0]:
            dhidden.copy_(total.view(hidden.shape))
    return dhidden, dweight, dbias


def _new_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> tuple:
    return tuple(
        hidden.new_empty((0,)) if x is None or not need
        else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    )  # fmt: skip


@_backward.register_fake
def _(g_logprob, g_entropy, g_kl, hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, *rest):
    return _new_gradients(hidden, weight, bias, rest[-1])


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.temperature, ctx.softcap, ctx.entropy, ctx.autocast, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _grad(ctx: Any, g_logprob: Any, g_entropy: Any, g_kl: Any, g_state: Any, g_kept: Any) -> tuple:
    no_second_derivative("linear_logprob")
    saved = ctx.saved_tensors  # once: checkpointing recomputes for it
    tensors, results = saved[:7], saved[7:]
    grads = (g_logprob, g_entropy if ctx.entropy else None, None if tensors[4] is None else g_kl)
    needs = [bool(need) for need in (*ctx.needs_input_grad[:2], tensors[2] is not None and ctx.needs_input_grad[2])]
    found: Sequence[Tensor] = ()
    if any(needs) and any(g is not None for g in grads):
        found = _backward(*grads, *tensors, *results, ctx.temperature, ctx.softcap, ctx.autocast, needs)
    outputs = [x if need else None for x, need in zip(found, needs, strict=False)] or [None] * 3
    return (*outputs, *[None] * 9)


_forward.register_autograd(_grad, setup_context=_setup)
