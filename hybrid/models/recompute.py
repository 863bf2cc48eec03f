"""Gradient checkpointing: the layers' activations are computed again in the backward pass instead of kept."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hybrid.core import InputError
from hybrid.models.attention import short_attention

__all__ = ["recompute_activations"]


class _Recomputed:
    """Mixed into a layer's class. Unlike transformers' own switch it also acts in eval mode, in which PPO trains."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Not reentrant: gradients reach LoRA adapters although the layer's input, frozen embeddings, has none.
        again = short_attention(args[0].device)  # the backward pass, which computes it again, is outside of the block
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again), **kwargs)


def recompute_activations(trunk: nn.Module) -> None:
    """Keep of each transformer layer only its input for the backward pass, which then computes the layer again.

    The gradient is the same. The memory of activations falls from all that each layer computes to one hidden state
    a layer; an update takes one more forward. Without gradients, as in generation, nothing changes.
    Raises InputError for a model whose layers are not transformers' checkpointing layers.
    Source: Chen et al. 2016 (arXiv:1604.06174).
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in trunk.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"model.gradient_checkpointing: {type(trunk).__name__} has no layers that support it")
    for layer in layers:
        kind = type(layer)
        if not issubclass(kind, _Recomputed):
            # A class, as FSDP2 and parametrizations do it: a wrapped method would not follow a copy of the layer.
            layer.__class__ = type(kind.__name__, (_Recomputed, kind), {})
