"""Attention over short rows on a CPU, in the dtype in which it is fast."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from hybrid.functional import autocast_dtype

__all__ = ["short_attention"]

# Rows of fewer tokens go through float32: torch's bfloat16 attention takes 3 to 5 times longer at 80, as long at 192,
# and less at 512 (forward and backward; benchmarks/NOTES.md).
SHORT = 192


def short_attention(device: torch.device) -> AbstractContextManager[Any]:
    """Inside the block a CPU under bfloat16 autocast attends in float32 over short rows, and returns bfloat16."""
    takes_part = device.type == "cpu" and autocast_dtype(device) == torch.bfloat16
    return _InFloat32() if takes_part else nullcontext()


class _InFloat32(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or args[0].shape[-2] >= SHORT:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            long = [_float32(x) for x in args], {name: _float32(x) for name, x in kwargs.items()}
            return func(*long[0], **long[1]).to(torch.bfloat16)


def _float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x
