"""A policy's matrices in the dtype that it computes in, so that a sampler need not cast them at every token."""

import copy

import torch
from torch import nn

from hybrid.models.backbone import Backbone

__all__ = ["Shadow"]


class Shadow:
    """The backbone with the float32 weights of its linear layers in `dtype`; all else is its own, not copied.

    Under autocast to that dtype `backbone` computes what the original does, bit for bit, without the casts; it is what
    the original was at the last `refresh`. Takes half of the linear layers' memory.
    An adapter stays one: added into short weights, W' = W + (alpha / rank) B A, a small update would round away.
    """

    def __init__(self, original: Backbone, dtype: torch.dtype):
        from transformers.pytorch_utils import Conv1D

        self.original, self.dtype = original, dtype
        own = {id(x): x for x in (*original.parameters(), *original.buffers())}
        self.backbone = copy.deepcopy(original, own)
        head = original.model.get_output_embeddings()
        self._long: list[torch.Tensor] = []
        self._short: list[torch.Tensor] = []
        for name, layer in original.named_modules():
            # On a CPU the head's weight is rounded while it is multiplied, into float32 logits.
            on_cpu = layer is head and not layer.weight.is_cuda
            if isinstance(layer, (nn.Linear, Conv1D)) and layer.weight.dtype == torch.float32 and not on_cpu:
                short = nn.Parameter(torch.empty_like(layer.weight, dtype=dtype), requires_grad=False)
                self.backbone.get_submodule(name).weight = short
                self._long.append(layer.weight)
                self._short.append(short)
        self._made_of = _places(original)
        self.refresh()

    def is_of(self, backbone: Backbone, dtype: torch.dtype) -> bool:
        """Whether it is what one would be made into now: the layers may be others, or elsewhere, than they were."""
        now = _places(backbone)
        return backbone is self.original and dtype == self.dtype and now == self._made_of

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the original's weights as they are now."""
        if self._short:  # an LSTM has no linear layers
            torch._foreach_copy_(self._short, self._long)
        self.backbone.share_vocabulary(self.original)


def _places(backbone: Backbone) -> list[tuple[int, torch.device]]:
    return [(id(x), x.device) for x in backbone.parameters()]
