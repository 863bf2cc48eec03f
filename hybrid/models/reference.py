"""The frozen models that the policy is held close to."""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from hybrid.core import Batch, InputError
from hybrid.fused import TokenStats
from hybrid.models.adapt import four_bit_options, is_adapted, without_adapter
from hybrid.models.backbone import Backbone
from hybrid.models.policy import Policy, label_logprob, response_stats
from hybrid.models.window import windowed

__all__ = ["Reference"]


class Reference:
    """A frozen causal LM: no gradients, no dropout, no value head. Owns its backbone, and freezes it.

    weight: the factor of its KL where several references are summed.
    device, dtype: where and in what it lives; it may be another device and a smaller dtype than the policy's.
    shared: the backbone is a policy's with a LoRA adapter, and stays the policy's: the reference is the same model,
        there and in the dtype that it is, with the adapter switched off while it computes.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        weight: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        shared: bool = False,
    ):
        if not weight >= 0:
            raise InputError(f"a reference's weight must be >= 0, got {weight}")
        if shared:
            here = backbone.device, backbone.head_weight.dtype
            if (torch.device(device or here[0]), dtype or here[1]) != here:
                raise InputError(
                    f"the reference of a LoRA policy is the policy's own model, {here[1]} on {str(here[0])!r}: leave "
                    "its device and dtype out, or name a model for it"
                )
            self.backbone = backbone
        else:
            self.backbone = backbone.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.weight = weight
        self.shared = shared

    @classmethod
    def from_policy(cls, policy: Policy, **kwargs: Any) -> "Reference":
        """A frozen copy of the policy as it is now; of one with a LoRA adapter the model under it, not copied."""
        if is_adapted(policy.backbone.model):
            return cls(policy.backbone, shared=True, **kwargs)
        return cls(copy.deepcopy(policy.backbone), **kwargs)

    @classmethod
    def from_pretrained(cls, name_or_path: str, *, load_in_4bit: bool = False, **kwargs: Any) -> "Reference":
        """Load with `AutoModelForCausalLM`; load_in_4bit: its linear layers as nf4."""
        options = four_bit_options(kwargs.get("dtype") or torch.float32) if load_in_4bit else {}
        return cls(Backbone.from_pretrained(name_or_path, **options), **kwargs)

    @torch.no_grad()
    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        *,
        window: int | None = None,
        length: int = 0,
    ) -> Tensor:
        """Hidden states (B, P+T, D), on the reference's device.   window, length: see `Policy.forward`."""
        device = self.backbone.device
        position_ids = None if position_ids is None else position_ids.to(device)
        with without_adapter(self.backbone) if self.shared else nullcontext():
            if window is not None:
                return windowed(self.backbone, input_ids.to(device), attention_mask.to(device), window, length)
            return self.backbone(input_ids.to(device), attention_mask.to(device), position_ids)

    @torch.no_grad()
    def batch_logprob(self, batch: Batch, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """As `Policy.batch_logprob`, on the batch's device."""
        there = batch.to(self.backbone.device)
        hidden = self.hidden(there.input_ids, there.attention_mask, there.position_ids)
        logprob, trained = label_logprob(self.backbone, hidden, there, temperature=temperature)
        return logprob.to(batch.labels.device), trained.to(batch.labels.device)

    @torch.no_grad()
    def response_logprob(self, hidden: Tensor, input_ids: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Log-prob of the response tokens from its own `hidden`, (B, T), on the device of `input_ids`."""
        device = self.backbone.device
        stats: TokenStats = response_stats(
            self.backbone, hidden, input_ids.to(device), mask.to(device), temperature=temperature
        )
        assert stats.logprob is not None
        return stats.logprob.to(input_ids.device)
