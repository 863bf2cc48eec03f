"""What an update is computed in: autocast, and the scale that keeps float16 gradients from vanishing."""

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch.amp import GradScaler

__all__ = ["Precision", "autocast", "grad_scaler"]

Precision = Literal["float32", "bfloat16", "float16"]


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products in `precision`; the weights keep their dtype, and losses and log-probs are float32."""
    dtype = torch.float16 if precision == "float16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "float32")


def grad_scaler(precision: Precision, device: torch.device) -> GradScaler:
    """The loss's scale in float16: halved after an overflow, doubled after 2000 updates without one. Else 1.

    Source: Micikevicius et al. 2018, section 3.2 (arXiv:1710.03740); the schedule is torch's default.
    """
    return GradScaler(device.type, enabled=precision == "float16")
