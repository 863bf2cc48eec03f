"""Parameter groups: what decays, what does not, and the value head."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hybrid.core import InputError

__all__ = ["parameter_groups"]


def parameter_groups(
    model_or_params: nn.Module | Iterable[nn.Parameter],
    *,
    weight_decay: float = 0.01,
    decay_all: bool = False,
    value_head_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: weights that decay, those that do not, and the value head.

    Biases, norms and embeddings do not decay unless `decay_all`. Tied weights come once, frozen ones not at
    all. Bare parameters (no names, no modules) make one group that decays.
    Raises InputError where none can be trained, and for float16 ones, which the first step would make NaN.
    """
    if not isinstance(model_or_params, nn.Module):
        bare = _trainable(model_or_params)
        return [{"params": bare, "weight_decay": weight_decay}]
    _trainable(model_or_params.parameters())
    groups: dict[str, dict[str, Any]] = {
        "decay": {"params": [], "weight_decay": weight_decay},
        "no_decay": {"params": [], "weight_decay": 0.0},
        "value_head": {"params": [], "weight_decay": 0.0},
    }
    if value_head_lr is not None:
        groups["value_head"]["lr"] = value_head_lr
    seen: set[nn.Parameter] = set()
    for module_name, module in model_or_params.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            if module_name.split(".")[0] == "value_head":
                group = "value_head"
            else:
                plain = parameter.dim() < 2 or name.endswith("bias") or isinstance(module, nn.Embedding)
                group = "no_decay" if plain and not decay_all else "decay"
            groups[group]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise InputError("there is nothing to train: every parameter is frozen (requires_grad is False)")
    if any(p.dtype == torch.float16 for p in trainable):
        raise InputError(
            "float16 weights cannot be trained: their updates overflow or round away; load the model in float32 "
            "(model.dtype), and set model.precision=float16 to compute in float16"
        )
    return trainable
