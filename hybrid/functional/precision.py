"""The one rule for precision: float64 in, float64 out; everything else is computed in float32.

Of a large product under autocast the operands alone are shorter: `rounded_operands`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "check_same_shape", "float_dtype", "rounded_operands", "to_float"]


def float_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def to_float(*tensors: Tensor) -> list[Tensor]:
    """The tensors in their common `float_dtype`."""
    dtype = float_dtype(*tensors)
    return [t.to(dtype) for t in tensors]


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError, with every name and shape, unless all shapes are equal."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes must be equal, got " + ", ".join(f"{n} {s}" for n, s in shapes.items()))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in there; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


@contextmanager
def rounded_operands(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside the block a CPU may round the operands of float32 products to `dtype`; it adds and returns float32.

    It does so where it multiplies bfloat16 in hardware (AVX512-BF16, AMX), 3.5 to 5.7 times faster than float32, and
    only for bfloat16. Elsewhere, and for None, nothing changes. No autocast has any say inside.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # torch >= 2.9
    with torch.autocast("cpu", enabled=False):
        if dtype != torch.bfloat16 or matmul is None:
            yield
            return
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before
