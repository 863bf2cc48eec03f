"""A Hugging Face causal LM taken apart at the seam PPO needs: hidden states here, the head's weight there."""

import inspect
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from hybrid.core import InputError, first_line
from hybrid.functional import soft_capped
from hybrid.models.adapt import adopted

__all__ = ["Backbone", "context_length"]


class Backbone(nn.Module):
    """Trunk and LM head of any `transformers` causal LM. Owns the model; gives hidden states, never logits.

    The trunk is what `get_decoder()` returns and the head what `get_output_embeddings()` returns; that
    head(trunk(x)) really is what the model itself computes, up to a constant factor (Cohere, Granite) and a
    soft-cap (Gemma 2), is checked once on a few tokens when it is built. A LoRA adapter may be in it, or be put in
    later (`add_lora`).
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model = adopted(model)
        head = model.get_output_embeddings()
        if not isinstance(getattr(head, "weight", None), Tensor):
            raise InputError(f"{type(model).__name__} has no LM head with a weight: not a causal language model?")
        parameters = inspect.signature(model.get_decoder().forward).parameters
        self._takes_positions = "position_ids" in parameters
        # logits <- softcap * tanh(logits / softcap)
        self.softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.logit_scale = _logit_scale(self)

    @classmethod
    def from_pretrained(cls, name_or_path: str, *, dtype: torch.dtype = torch.float32, **kwargs: Any) -> "Backbone":
        """Load with `AutoModelForCausalLM`; `kwargs` go to it. float32 by default: PPO's small updates
        round away in bfloat16 weights, and autocast gives the speed without that."""
        from transformers import AutoModelForCausalLM

        # Not even asked about: code that comes with a model is run for who says so in kwargs.
        options = {"trust_remote_code": False} | kwargs
        try:
            return cls(AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, **options))
        except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
            message = f"model {str(name_or_path)!r} not found, or not a causal language model: {first_line(error)}"
            raise InputError(message) from error

    @property
    def trunk(self) -> nn.Module:
        return self.model.get_decoder()

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""
        return self.model.get_output_embeddings().weight

    @property
    def head_bias(self) -> Tensor | None:
        """(V,), or None."""
        return getattr(self.model.get_output_embeddings(), "bias", None)

    @property
    def hidden_size(self) -> int:
        return self.head_weight.shape[1]

    @property
    def context_length(self) -> int | None:
        """Most tokens the model takes, prompt and response together; None where its config does not say."""
        return context_length(self.model.config)

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D), such that logits = hidden @ head_weight.T + head_bias, soft-capped by `softcap`.

        attention_mask: (B, T), true on tokens; or, with `position_ids`, segment numbers (see `Batch`).
        """
        if position_ids is None:
            mask, position_ids = attention_mask.long(), positions(attention_mask)
        else:
            mask = _segment_mask(attention_mask, self.head_weight.dtype)
        return self._scaled(self._run(input_ids, mask, position_ids, use_cache=False).last_hidden_state)

    @torch.no_grad()
    def check_packing(self) -> None:
        """Raise InputError unless packed segments give the hidden states that they have alone."""
        was_training = self.training
        self.eval()
        ids = torch.arange(1, 7, device=self.device).remainder(self.head_weight.shape[0]).unsqueeze(0)
        segments = torch.tensor([[1, 1, 1, 2, 2, 2]], device=self.device)
        try:
            packed = self(ids, segments, torch.tensor([[0, 1, 2] * 2], device=self.device))[:, 3:]
            alone = self(ids[:, 3:], torch.ones_like(ids[:, 3:]))
            # Rounding, of sums in another order, of the stored dtype.
            close = torch.allclose(packed, alone, rtol=1e-3, atol=64 * torch.finfo(packed.dtype).eps)
        except (ValueError, RuntimeError, IndexError):  # a model that takes no mask per segment
            close = False
        self.train(was_training)
        if not close:
            raise InputError(f"{type(self.model).__name__} cannot keep packed examples apart; set sft.packing to false")

    def next_logits(self, input_ids: Tensor, attention_mask: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Logits (B, V) float32 after the last token, and the cache for the next call.

        input_ids: (B, n), the tokens that the cache has not seen.   attention_mask: (B, seen + n).
        """
        position_ids = positions(attention_mask)[:, -input_ids.shape[1] :]
        extra = {} if cache is None else {"past_key_values": cache}
        out = self._run(input_ids, attention_mask.long(), position_ids, use_cache=True, **extra)
        hidden = self._scaled(out.last_hidden_state[:, -1])
        bias = None if self.head_bias is None else self.head_bias.float()
        # In float32 under autocast too: what is drawn from must be what the log-probs are later computed of.
        with torch.autocast(hidden.device.type, enabled=False):
            logits = nn.functional.linear(hidden.float(), self.head_weight.float(), bias)
            return soft_capped(logits, self.softcap), out.past_key_values

    def eos_ids(self, tokenizer: Any) -> list[int]:
        """Every token that ends a response: the tokenizer's EOS, and those of the model's generation config."""
        own = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        listed = own if isinstance(own, list) else [own]
        return sorted({token for token in [tokenizer.eos_token_id, *listed] if token is not None})

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden if self.logit_scale == 1.0 else hidden * self.logit_scale

    def _run(self, input_ids: Tensor, mask: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:
        if self._takes_positions:
            kwargs["position_ids"] = position_ids
        return self.trunk(input_ids=input_ids, attention_mask=mask, **kwargs)


def positions(attention_mask: Tensor) -> Tensor:
    """(B, T) position ids counted over the real tokens, so that left padding shifts nothing."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def context_length(config: Any) -> int | None:
    """The longest sequence a model's config allows, or None where it does not say."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def _segment_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T) additive attention mask of packed rows: causal, and only within one's own segment."""
    length = segments.shape[1]
    same = segments.unsqueeze(1) == segments.unsqueeze(2)
    allowed = same & torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min).unsqueeze(1)


@torch.no_grad()
def _logit_scale(backbone: Backbone) -> float:
    """The constant factor of the model's own logits over head(trunk(x)); 1 for nearly every family.

    Raises InputError where the two are not proportional, but for a soft-cap (a layer between trunk and head).
    """
    model = backbone.model
    was_training = model.training
    model.eval()
    ids = torch.arange(1, 5, device=backbone.device).remainder(backbone.head_weight.shape[0]).unsqueeze(0)
    mask = torch.ones_like(ids)
    hidden = backbone._run(ids, mask, positions(mask), use_cache=False).last_hidden_state
    bias = backbone.head_bias
    ours = nn.functional.linear(hidden, backbone.head_weight).float()
    theirs = model(input_ids=ids, attention_mask=mask).logits.float()
    model.train(was_training)
    # Before the soft-cap and the bias they differ by that factor, if by anything.
    cap, shift = backbone.softcap, 0.0 if bias is None else bias.float()
    linear = (theirs if cap is None else cap * torch.atanh((theirs / cap).clamp(-0.9999, 0.9999))) - shift
    scale = ((ours * linear).sum() / (ours**2).sum()).item() if ours.any() else 1.0
    scale = 1.0 if abs(scale - 1.0) < 1e-3 else scale
    # Rounding of the stored dtype: bf16 keeps 8 bits, and both sides are rounded.
    tolerance = 4 * torch.finfo(hidden.dtype).eps * theirs.abs().max().item() + 1e-4
    if (theirs - soft_capped(scale * ours + shift, cap)).abs().max() > tolerance:
        raise InputError(
            f"{type(model).__name__} computes its logits by more than its LM head on get_decoder()'s output "
            "(another layer); such models are not supported"
        )
    return scale
