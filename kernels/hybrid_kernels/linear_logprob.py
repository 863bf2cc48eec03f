"""Log-probability, entropy and KL from hidden states: `hybrid.functional.linear_logprob` on a GPU.

The logits (N, V) never exist. One vocabulary slice at a time is a GEMM into a workspace (float32 out of bfloat16
operands where torch offers it), and `epilogue` folds the slice into running statistics. The backward pass takes the
product again: dlogits of a slice go to a second workspace, then

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

__all__ = ["SLICE_STEP", "check_inputs", "linear_logprob", "operand_dtype", "product", "product_dtype"]

# Bytes of the float32 workspace of all models. Forward: small enough that the epilogue finds most of it in the
# second-level cache of a large GPU (50 MiB and more). Backward: wide slices, for dhidden is read and written once a
# slice. Both are chosen by arithmetic, not yet by a clock.
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
) -> TokenStats:
    """`token_stats` of the logits hidden @ weight.T + bias, which are never held.

    hidden: (..., D).   weight: (V, D).   bias: (V,): float32, bfloat16 or float16.
    labels: (...) int32 or int64, the token that hidden[t] predicts. Where it is -100 all results are 0, without
        gradient, whatever stands in hidden. Such rows still cost their share of the GEMMs, because leaving them out
        needs their number on the host: a caller who knows the valid positions passes only those.
    temperature, softcap, want: as in `token_stats`. "kl" needs ref_hidden (..., D') and ref_weight (V, D'); the
        reference gets no gradient. If ref_weight is weight, both products are one GEMM.
    Returns TokenStats of (...) float32. Gradients flow to hidden, weight and bias, in their dtypes, once:
    create_graph=True raises RuntimeError. Products take the operands' common dtype (float32 where they differ) and
    accumulate in float32, also under autocast.
    Raises ValueError on shapes, dtypes or options that do not fit, TypeError on a DTensor.
    """
    reference = check_inputs(
        "linear_logprob", hidden, weight, labels, bias, temperature, softcap, want, ref_hidden, ref_weight, ref_bias
    )
    *results, _ = _forward(
        hidden, weight, bias, labels, *reference, float(temperature), softcap, "entropy" in want
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


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the products take. CPUs are here for the interpreter, and have no bfloat16 product into float32."""
    return torch.promote_types(hidden.dtype, weight.dtype) if hidden.is_cuda else torch.float32


def product_dtype(hidden: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a product of such operands comes out as: float32 where torch offers it."""
    return torch.float32 if _WIDENS or not hidden.is_cuda else dtype


class _Head:
    """Logits of (hidden, weight), a vocabulary slice at a time, in one reused workspace."""

    def __init__(self, hidden: Tensor, weight: Tensor, columns: int):
        self.dtype = operand_dtype(hidden, weight)
        self.hidden, self.weight = hidden.to(self.dtype), weight
        self.space = hidden.new_empty((len(hidden), columns), dtype=product_dtype(hidden, self.dtype))

    def columns(self, columns: slice) -> Tensor:
        return self.weight[columns].to(self.dtype)

    def logits(self, weight: Tensor) -> Tensor:
        return product(self.hidden, weight.T, self.space[:, : len(weight)])


# bfloat16 @ bfloat16 -> float32: torch >= 2.8 on CUDA; ROCm builds raise.
_WIDENS = hasattr(torch.ops.aten.mm, "dtype_out") and torch.version.hip is None


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, with whatever the dtype of out can be had for."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if out.dtype == torch.float32 and _WIDENS and a.is_cuda:
        return torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    return out.copy_(torch.mm(a, b))


class _Models:
    """The logits of the policy and, for a KL, of the reference, slice by slice."""

    def __init__(self, policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor] | None, num_bytes: int):
        hidden, weight = policy
        num_rows, self.vocabulary = len(hidden), len(weight)
        models = 1 if reference is None else 2
        width = max(num_bytes // (4 * models * max(num_rows, 1)) // SLICE_STEP, 1) * SLICE_STEP
        self.width = min(width, -(-self.vocabulary // SLICE_STEP) * SLICE_STEP)
        self.num_rows = num_rows
        self.shared = reference is not None and _same(weight, reference[1]) and hidden.dtype == reference[0].dtype
        if self.shared and reference is not None:
            hidden = torch.cat([hidden, reference[0]])
        self.policy = _Head(hidden, weight, self.width)
        self.reference = None if reference is None or self.shared else _Head(reference[0], reference[1], self.width)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Rows, Rows | None]]:
        """Columns, the policy's weight there, and the logits of both. Each step overwrites the one before."""
        for start in range(0, self.vocabulary, self.width):
            columns = slice(start, min(start + self.width, self.vocabulary))
            weight = self.policy.columns(columns)
            logits, ref = self.policy.logits(weight), None
            if self.shared:
                logits, ref = logits[: self.num_rows], logits[self.num_rows :]
            elif self.reference is not None:
                ref = self.reference.logits(self.reference.columns(columns))
            yield columns, weight, self._rows(logits), None if ref is None else self._rows(ref)

    def _rows(self, logits: Tensor) -> Rows:
        return Rows(logits, max(self.num_rows, 1), 0, self.width)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels,"
    " Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, "
)


@torch.library.custom_op(
    "hybrid_kernels::linear_logprob",
    mutates_args=(),
    schema=f"({_INPUTS} float temperature, float? softcap, bool entropy) -> (Tensor, Tensor, Tensor, Tensor)",
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_labels("linear_logprob", labels, len(weight))
    results = new_results(labels, entropy, ref_hidden is not None)
    reference = None if ref_hidden is None or ref_weight is None else (_flat(ref_hidden), ref_weight)
    with torch.autocast(hidden.device.type, enabled=False):
        for columns, _, logits, ref in _Models((_flat(hidden), weight), reference, FORWARD_BYTES):
            forward(
                logits, ref, labels.contiguous(), results, columns=columns, total_columns=len(weight), bias=bias,
                ref_bias=ref_bias, temperature=temperature, softcap=softcap, entropy=entropy,
            )  # fmt: skip
    return results


@_forward.register_fake
def _(hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, temperature, softcap, entropy):
    return new_results(labels, entropy, ref_hidden is not None)


@torch.library.custom_op(
    "hybrid_kernels::linear_logprob_backward",
    mutates_args=(),
    schema=f"(Tensor? g_logprob, Tensor? g_entropy, Tensor? g_kl, {_INPUTS} Tensor logprob, Tensor entropy, Tensor kl,"
    " Tensor state, float temperature, float? softcap, bool[] needs) -> (Tensor, Tensor, Tensor)",
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
    temperature: float,
    softcap: float | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    rows, labels = _flat(hidden), labels.contiguous()
    grads = [None if g is None else g.contiguous() for g in (g_logprob, g_entropy, g_kl)]
    dhidden, dweight, dbias = _new_gradients(hidden, weight, bias, needs)
    reference = None
    if ref_hidden is not None and ref_weight is not None and g_kl is not None:
        reference = _flat(ref_hidden), ref_weight
    with torch.autocast(hidden.device.type, enabled=False):
        models = _Models((rows, weight), reference, BACKWARD_BYTES)
        dtype = models.policy.dtype
        space = rows.new_empty((len(rows), models.width), dtype=dtype)
        if needs[0]:
            total = rows.new_zeros(rows.shape, dtype=torch.float32)
            part = torch.empty_like(total)
        if needs[1]:
            # 0 * NaN is NaN: what stands in an ignored row must not reach dweight.
            valid = rows.to(dtype).masked_fill(labels.reshape(-1, 1) == IGNORE, 0.0)
        for columns, weight_slice, logits, ref in models:
            dlogits = space[:, : len(weight_slice)]
            backward(
                grads, logits, ref, labels, (logprob, entropy, kl, state), dlogits, columns=columns, bias=bias,
                ref_bias=ref_bias, temperature=temperature, softcap=softcap,
            )  # fmt: skip
            if needs[0]:
                total += product(dlogits, weight_slice, part)
            if needs[1]:
                product(dlogits.T, valid, dweight[columns])
            if needs[2]:
                dbias[columns] = dlogits.sum(0, dtype=torch.float32)
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
    *tensors, ctx.temperature, ctx.softcap, ctx.entropy = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _grad(ctx: Any, g_logprob: Any, g_entropy: Any, g_kl: Any, g_state: Any) -> tuple:
    no_second_derivative("linear_logprob")
    saved = ctx.saved_tensors  # once: checkpointing recomputes for it
    tensors, results = saved[:7], saved[7:]
    grads = (g_logprob, g_entropy if ctx.entropy else None, None if tensors[4] is None else g_kl)
    needs = [bool(need) for need in (*ctx.needs_input_grad[:2], tensors[2] is not None and ctx.needs_input_grad[2])]
    found: Sequence[Tensor] = ()
    if any(needs) and any(g is not None for g in grads):
        found = _backward(*grads, *tensors, *results, ctx.temperature, ctx.softcap, needs)
    outputs = [x if need else None for x, need in zip(found, needs, strict=False)] or [None] * 3
    return (*outputs, *[None] * 7)


_forward.register_autograd(_grad, setup_context=_setup)
