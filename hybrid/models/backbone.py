"""A Hugging Face causal LM taken apart at the seam PPO needs: hidden states here, the head's weight there."""

import inspect
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from hybrid.core import InputError, first_line, no_progress_bars
from hybrid.functional import autocast_dtype, rounded_operands, soft_capped
from hybrid.models.adapt import adopted
from hybrid.models.attention import short_attention
from hybrid.models.contract import check_contract, logit_scale, refusing, windows

__all__ = ["Backbone", "context_length"]

# What a trunk calls the keys and values, or the state, of the tokens it has seen: transformers from 5.24 on, before
# that, and of state-space models.
CACHES = ("cache", "past_key_values", "cache_params")

# bfloat16 @ bfloat16 -> float32: torch >= 2.8 on CUDA; ROCm builds raise.
_WIDENS = hasattr(torch.ops.aten.mm, "dtype_out") and torch.version.hip is None

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma's name, RecurrentGemma's


class Backbone(nn.Module):
    """Trunk and LM head of any `transformers` causal LM. Owns the model; gives hidden states, never logits.

    The trunk is what `get_decoder()` returns and the head what `get_output_embeddings()` returns. That
    head(trunk(x)) really is what the model itself computes, up to a constant factor (Cohere, Granite) and a
    soft-cap (Gemma 2), that padding changes nothing and that the cache gives what one forward gives, is checked once
    on a few tokens when it is built; a model that does not is refused by name (InputError). A LoRA adapter may be in
    it, or be put in later (`add_lora`).
    """

    def __init__(self, model: Any):
        super().__init__()
        _check_kind(model)
        self.model = model = adopted(model)
        head = model.get_output_embeddings()
        if not isinstance(getattr(head, "weight", None), Tensor):
            raise InputError(f"{type(model).__name__} has no LM head with a weight: not a causal language model?")
        parameters = inspect.signature(self.trunk.forward).parameters
        self._takes_positions = "position_ids" in parameters
        # Whether it is one of hybrid.models.recurrent: its cache is a state, its mask may hold segment numbers.
        self.keeps_state: bool = getattr(self.trunk, "keeps_state", False)
        names = ("state",) if self.keeps_state else CACHES
        self._cache = next((name for name in names if name in parameters), None)
        kinds = set(getattr(model.config, "layer_types", None) or ())
        self._is_recurrent = self.keeps_state or kinds == {"linear_attention"}  # Mamba
        if self._cache is None:
            raise InputError(f"{type(model).__name__} keeps no cache that a sampler can hand on; it is not supported")
        # logits <- softcap * tanh(logits / softcap)
        caps = [getattr(model.config.get_text_config(), name, None) for name in SOFTCAPS]
        self.softcap: float | None = next((cap for cap in caps if cap is not None), None)
        self.register_buffer("_outside", None, persistent=False)  # (V,) -inf at the ids that the tokenizer has not
        self._fitted: tuple[int, int] | None = None  # the tokenizer that it was made for
        self.keep_bytes = 0  # what logits may take that training keeps for its backward pass
        self.logit_scale = 1.0
        with refusing(model):
            self.logit_scale = logit_scale(self)
            check_contract(self)

    @classmethod
    def from_pretrained(cls, name_or_path: str, *, dtype: torch.dtype = torch.float32, **kwargs: Any) -> "Backbone":
        """Load with `AutoModelForCausalLM`; `kwargs` go to it. float32 by default: PPO's small updates
        round away in bfloat16 weights, and autocast gives the speed without that."""
        from transformers import AutoModelForCausalLM

        # Not even asked about: code that comes with a model is run for who says so in kwargs.
        options = {"trust_remote_code": False} | kwargs
        try:
            with no_progress_bars():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    name_or_path, dtype=dtype, output_loading_info=True, **options
                )
        except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
            message = f"model {str(name_or_path)!r} not found, or not a causal language model: {first_line(error)}"
            raise InputError(message) from error
        model, loading = loaded
        if missing := sorted(loading["missing_keys"]):
            raise InputError(
                f"model {str(name_or_path)!r} has no weights for {', '.join(missing[:3])}"
                f"{' ...' if len(missing) > 3 else ''}: it is another kind of model, or not whole; random ones would "
                "be trained in their place"
            )
        return cls(model)

    @property
    def trunk(self) -> nn.Module:
        decoder = self.model.get_decoder()
        return self.model.model if decoder is self.model else decoder  # Llama 4's is itself

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""
        return self.model.get_output_embeddings().weight

    @property
    def head_bias(self) -> Tensor | None:
        """(V,), or None; -inf at the ids that `fit_vocabulary` has ruled out."""
        bias = getattr(self.model.get_output_embeddings(), "bias", None)
        if self._outside is None:
            return bias
        return self._outside if bias is None else bias + self._outside

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
        Raises InputError for segment numbers without positions: its tokens would see other examples'.
        """
        mask: Tensor | None = attention_mask.long()
        if position_ids is None:
            # Our own masks are bool here: on a GPU none of them is waited for.
            if attention_mask.dtype != torch.bool and (attention_mask > 1).any():
                raise InputError("an attention_mask with numbers above 1 is of packed rows: give position_ids too")
            position_ids = positions(attention_mask)
        elif self.keeps_state:
            mask = attention_mask.long()
        elif windows(self.model.config):
            # Such a model cuts its windows out of the mask that it makes of the positions, where it is given none.
            mask = None
        else:
            mask = _segment_mask(attention_mask, self.head_weight.dtype)
        with short_attention(self.device):
            return self._scaled(self._run(input_ids, mask, position_ids, use_cache=False).last_hidden_state)

    def compile_trunk(self) -> None:
        """Have torch.compile make the trunk's forward and backward, for rows of any number and length.

        The same numbers to rounding. A copy of the backbone is not compiled.
        """
        self.trunk.compile(dynamic=True)

    @property
    def is_compiled(self) -> bool:
        """Whether `compile_trunk` was called."""
        return getattr(self.trunk, "_compiled_call_impl", None) is not None

    def fit_vocabulary(self, tokenizer: Any) -> None:
        """Give ids that the tokenizer has no token for no probability: in sampling and in log-probs alike.

        Raises InputError where the tokenizer has ids that the model has not.
        """
        if self._fitted == (id(tokenizer), len(tokenizer)):
            return
        ids = sorted(set(tokenizer.get_vocab().values()))
        rows = min(self.head_weight.shape[0], self.model.get_input_embeddings().weight.shape[0])
        if ids[-1] >= rows:
            raise InputError(
                f"the tokenizer has ids up to {ids[-1]}, and {type(self.model).__name__} has {rows} embeddings: it is "
                "another model's, or tokens were added to it without model.resize_token_embeddings(len(tokenizer))"
            )
        self._outside = None
        if len(ids) < self.head_weight.shape[0]:
            outside = torch.full((self.head_weight.shape[0],), -torch.inf, device=self.device)
            outside[ids] = 0.0
            self._outside = outside
        self._fitted = id(tokenizer), len(tokenizer)

    def share_vocabulary(self, other: "Backbone") -> None:
        """Rule out the ids that `other.fit_vocabulary` has ruled out."""
        self._outside, self._fitted = other._outside, other._fitted

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, D) -> (B, V) float32, soft-capped: for a few positions, never for a whole batch."""
        bias = None if self.head_bias is None else self.head_bias.float()
        # As the log-probs are later computed, so that what is drawn from is what is trained.
        operands = autocast_dtype(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False), rounded_operands(operands):
            if operands is not None and hidden.is_cuda and _WIDENS:
                short, weight = hidden.to(operands), self.head_weight.to(operands)
                z = torch.mm(short, weight.T, out_dtype=torch.float32)
                z = z if bias is None else z.add_(bias)
            else:
                z = nn.functional.linear(hidden.float(), self.head_weight.float(), bias)
            return soft_capped(z, self.softcap)

    def next_logits(
        self, input_ids: Tensor, attention_mask: Tensor, cache: Any = None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Logits (B, V) float32 after the last token, and the cache for the next call; see `next_hidden`."""
        hidden, cache = self.next_hidden(input_ids, attention_mask, cache, position_ids)
        return self.logits(hidden), cache

    def next_hidden(
        self, input_ids: Tensor, attention_mask: Tensor, cache: Any = None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """The hidden state (B, D) of the last token, and the cache for the next call.

        input_ids: (B, n), the tokens that the cache has not seen.   attention_mask: (B, seen + n); of a cache of fixed
        shape (B, room), true on what is not written yet.   position_ids: (B, n), None: counted over the mask.
        """
        num_new = input_ids.shape[1]
        mask = attention_mask.long()
        if position_ids is None:
            position_ids = positions(attention_mask)[:, -num_new:]
        assert self._cache is not None
        if self._is_recurrent:
            # A state has no columns to mask: of the new tokens alone it is asked which are padding.
            mask = mask[:, -num_new:]
        extra = {} if cache is None else {self._cache: cache}
        out = self._run(input_ids, mask, position_ids, use_cache=True, **extra)
        return self._scaled(out.last_hidden_state[:, -1]), getattr(out, self._cache)

    def carried(self, input_ids: Tensor, attention_mask: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Hidden states (B, T, D) as `forward` gives them, and the state after the last token, of a recurrent model.

        state: what the rows go on from, None: afresh.   attention_mask: (B, T); segment 1 goes on, others start anew.
        Raises InputError where the model keeps no state (`keeps_state`).
        """
        if not self.keeps_state:
            raise InputError(f"{type(self.model).__name__} keeps no state that it could carry on")
        out = self.trunk(input_ids=input_ids, attention_mask=attention_mask.long(), state=state, use_cache=True)
        return self._scaled(out.last_hidden_state), out.state

    def eos_ids(self, tokenizer: Any) -> list[int]:
        """Every token that ends a response: the tokenizer's EOS, and those of the model's generation config."""
        own = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        listed = own if isinstance(own, list) else [own]
        return sorted({token for token in [tokenizer.eos_token_id, *listed] if token is not None})

    def _scaled(self, hidden: Tensor) -> Tensor:
        dtype = self.head_weight.dtype
        if hidden.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16):
            hidden = hidden.to(dtype)  # a residual stream kept in float32 (Mamba), as the model itself does
        return hidden if self.logit_scale == 1.0 else hidden * self.logit_scale

    def _run(self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor, **kwargs: Any) -> Any:
        if self._takes_positions:
            kwargs["position_ids"] = position_ids
        # Compiled is what trains and scores; a cache's shape is another at every token.
        run = self.trunk.forward if kwargs["use_cache"] and self.is_compiled else self.trunk
        return run(input_ids=input_ids, attention_mask=mask, **kwargs)


def _check_kind(model: Any) -> None:
    """Raise InputError for what is no transformers causal LM at all."""
    name = type(model).__name__
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise InputError(f"a policy is made of a transformers causal language model, got {name}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder with a decoder, not a causal language model; such are not supported")
    if getattr(model.config, "output_router_logits", False):
        raise InputError(
            f"{name} asks for its router's loss (config.output_router_logits), which is not computed here; load "
            "it with output_router_logits=False"
        )


def positions(attention_mask: Tensor) -> Tensor:
    """(B, T) position ids counted over the real tokens, so that left padding shifts nothing."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def context_length(config: Any) -> int | None:
    """The longest sequence a model's config allows, or None where it does not say.

    Past the length at which a rope changes its frequencies (longrope, dynamic) a token's meaning depends on how long
    the longest row of its batch is, and keys in a cache go stale: up to there.
    """
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if longest is None or longest <= 0:  # XLNet's -1
        return None
    return min([longest, *_rope_switches(text)])


def _rope_switches(config: Any) -> list[int]:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # One for all layers, or one for each type of layer.
    kinds = [rope, *(inner for inner in rope.values() if isinstance(inner, dict))]
    switching = [kind for kind in kinds if kind.get("rope_type", kind.get("type")) in ("longrope", "dynamic")]
    own = getattr(config, "original_max_position_embeddings", None)
    lengths = [kind.get("original_max_position_embeddings") or own for kind in switching]
    return [int(length) for length in lengths if length]


def _segment_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T) additive attention mask of packed rows: causal, and only within one's own segment."""
    length = segments.shape[1]
    same = segments.unsqueeze(1) == segments.unsqueeze(2)
    allowed = same & torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min).unsqueeze(1)
