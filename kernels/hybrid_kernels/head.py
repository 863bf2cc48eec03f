"""The products of a language model's head: what their operands are, and what they come out as.

Outside autocast the operands take the common dtype of hidden states and weight, under it autocast's, as torch's own
products do; but a product of short operands comes out in float32, wherever torch offers that. A float32 weight under
bfloat16 autocast thus has logits that were never rounded, and a gradient that is accumulated and kept in float32.

A product with a side that is no multiple of 8 may leave the tensor cores' fast path: that of GPT-2's head, V = 50257,
took 6.8 ms on an H200 instead of 0.9. So products see a vocabulary that is a multiple of 64: the last rows of the
weight are copied, and rows of 0 added. Their columns hold what nobody reads in a workspace of logits and 0 in one of
dlogits; their rows are left out of a gradient.
"""

import torch
from torch import Tensor, nn

__all__ = ["WEIGHT_COLUMNS", "Head", "autocast_dtype", "padded", "product", "slices", "stacked"]

# What the columns of a product are a multiple of: whole vectors of 16 bytes, and a usual width of a GEMM's tile.
STEP = 64

# Rows of the weight that are cast at a time, and of its gradient that are added up at a time: 64 MiB at D = 4096.
WEIGHT_COLUMNS = 8192

# bfloat16 @ bfloat16 -> float32: torch >= 2.8 on CUDA; ROCm builds raise.
_WIDENS = hasattr(torch.ops.aten.mm, "dtype_out") and torch.version.hip is None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes in on x's device; None where it is off. Neither a backward pass nor the code of an
    operator runs under the caller's autocast: who wants to know asks where the caller calls."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class Head:
    """One model's hidden states (..., D), as (N, D), and weight (V, D): operands of a dtype, by default their common
    one.

    The weight is cast a slice of its rows at a time, so that there is no copy of all of it.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, dtype: torch.dtype | None):
        self.dtype = dtype or torch.promote_types(hidden.dtype, weight.dtype)
        self.hidden, self.weight = hidden.reshape(-1, hidden.shape[-1]).to(self.dtype), weight

    @property
    def logits_dtype(self) -> torch.dtype:
        return torch.float32 if _WIDENS or not self.hidden.is_cuda else self.dtype

    def columns(self, columns: slice) -> Tensor:
        """The rows of the weight that give the `padded` columns of the logits."""
        rows, missing = self.weight[columns].to(self.dtype), padded(columns).stop - columns.stop
        return nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows

    def slices(self) -> list[slice]:
        """The vocabulary in as few slices as need no large copy: two, the second shorter than STEP, if none is cast."""
        size = len(self.weight)
        return slices(0, size, WEIGHT_COLUMNS if self.weight.dtype != self.dtype else size // STEP * STEP or size)


def padded(columns: slice) -> slice:
    """A slice of the vocabulary as a product sees it."""
    return slice(columns.start, columns.start + -(-(columns.stop - columns.start) // STEP) * STEP)


def slices(start: int, stop: int, width: int) -> list[slice]:
    return [slice(at, min(at + width, stop)) for at in range(start, stop, width)]


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, accumulated in float32, with whatever the dtype of out can be had for.

    Where a has more rows than out, they are padding.
    """
    if len(a) > len(out):
        return out.copy_(product(a, b, out.new_empty((len(a), out.shape[1])))[: len(out)])
    if not a.is_cuda:
        # CPUs are here for the interpreter, and have no bfloat16 product into float32.
        a, b = a.float(), b.float()
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if out.dtype == torch.float32 and _WIDENS and a.is_cuda:
        return torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    return out.copy_(torch.mm(a, b))


def stacked(policy: Head, reference: Head) -> list[Head]:
    """Both; or, where they share the weight, one head for the policy's rows with the reference's below."""
    a, b = policy.weight, reference.weight
    same = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    if not same or policy.dtype != reference.dtype:
        return [policy, reference]
    return [Head(torch.cat([policy.hidden, reference.hidden]), a, policy.dtype)]
