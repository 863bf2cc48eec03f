"""The policy: one module with trunk, LM head, value head and, where asked, reward head: one optimizer owns them all."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid.core import IGNORE, Batch, InputError, no_progress_bars
from hybrid.fused import TokenStats, linear_logprob
from hybrid.models.adapt import (
    LoraConfig,
    add_lora,
    four_bit_options,
    holds_adapter,
    is_adapted,
    load_adapter,
    merged,
    save_adapter,
    under_adapter,
)
from hybrid.models.backbone import Backbone
from hybrid.models.heads import RewardHead, ValueHead
from hybrid.models.window import windowed
from hybrid.run.checkpoint import disk_errors, filled_folder

__all__ = ["Policy", "PolicyOutput", "before_response", "label_logprob", "last_token", "response_stats"]

VALUE_HEAD_FILE = "value_head.safetensors"
REWARD_HEAD_FILE = "reward_head.safetensors"


@dataclass(frozen=True)
class PolicyOutput:
    """hidden: (B, T, D), logits = hidden @ head_weight.T + head_bias.   value: (B, T) float32."""

    hidden: Tensor
    value: Tensor


class Policy(nn.Module):
    """A causal LM with a value head on the shared trunk, and a reward head where one was added. Owns them all.

    policy = Policy.from_pretrained("gpt2")
    out = policy(input_ids, attention_mask)      # .hidden (B, T, D), .value (B, T)
    policy.save_pretrained("out")                # AutoModelForCausalLM.from_pretrained("out") works
    policy.add_reward_head()
    policy.scores(input_ids, attention_mask)     # (B,)
    """

    reward_head: RewardHead | None

    def __init__(self, model: Any, *, value_dropout: float = 0.0):
        super().__init__()
        self.backbone = model if isinstance(model, Backbone) else Backbone(model)
        self.value_head = ValueHead(self.backbone.hidden_size, dropout=value_dropout).to(self.backbone.device)
        self.reward_head = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        value_dropout: float = 0.0,
        lora: LoraConfig | None = None,
        load_in_4bit: bool = False,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> "Policy":
        """Load a model that transformers, peft or `save_pretrained` wrote; the heads beside it are read as well.

        lora: train new adapters on the frozen model; an adapter that is in the folder is trained on.
        load_in_4bit: the frozen model's linear layers as nf4 (needs an adapter).
        dtype: of the weights, or of what is computed with 4-bit ones; adapters and value head are float32.
        kwargs: whatever `AutoModelForCausalLM.from_pretrained` takes.
        Raises InputError where no such model is found.
        """
        name, base = str(name_or_path), under_adapter(name_or_path)
        if load_in_4bit:
            if lora is None and base is None:
                raise InputError("4-bit weights cannot be trained: load_in_4bit needs lora, adapters to train on them")
            kwargs |= four_bit_options(dtype)
        backbone = Backbone.from_pretrained(name, dtype=dtype, **kwargs)
        if lora is not None:
            add_lora(backbone.model, lora)
        policy = cls(backbone, value_dropout=value_dropout)
        policy._load_beside(Path(name_or_path))
        return policy

    def load_weights(self, folder: str | Path) -> None:
        """Take the weights that `save_pretrained` wrote for a policy made alike: of an adapted one the adapter."""
        if is_adapted(self.backbone.model) != holds_adapter(folder):
            there = "an adapter's weights" if holds_adapter(folder) else "a whole model's weights"
            raise InputError(f"{str(folder)!r} holds {there}, which this policy cannot take: see model.lora")
        if not holds_adapter(folder):
            loaded = Policy.from_pretrained(folder, dtype=self.backbone.head_weight.dtype)
            # The heads come from their own files, below.
            self.backbone.load_state_dict(loaded.backbone.state_dict())
            self.value_head.load_state_dict(loaded.value_head.state_dict())
        self._load_beside(Path(folder))

    def add_reward_head(self) -> None:
        """Give the policy a reward head where it has none."""
        if self.reward_head is None:
            self.reward_head = RewardHead(self.backbone.hidden_size).to(self.backbone.device)

    def _load_beside(self, folder: Path) -> None:
        """The heads, and the adapter with the bits it was saved with."""
        if (folder / VALUE_HEAD_FILE).is_file():
            _load_head(self.value_head, folder / VALUE_HEAD_FILE, "value head")
        if (folder / REWARD_HEAD_FILE).is_file():
            # What the new head is drawn as is overwritten: no random number of the run is spent on it.
            with torch.random.fork_rng(devices=[]):
                self.add_reward_head()
            assert self.reward_head is not None
            _load_head(self.reward_head, folder / REWARD_HEAD_FILE, "reward head")
        if holds_adapter(folder):
            load_adapter(self.backbone.model, folder)

    def save_pretrained(self, folder: str | Path, *, tokenizer: Any = None, merge: bool = True) -> None:
        """Write a plain transformers folder with the heads beside it.

        merge: an adapter is merged into the weights of a copy. False: it is written alone, bit for bit, and the folder
            refers to the frozen model by name.
        tokenizer: saved too, and its EOS written among those that plain `generate` stops at.
        Nothing is written there before all of it is complete; other files in the folder stay.
        """
        from safetensors.torch import save_file

        model = self.backbone.model
        with no_progress_bars(), filled_folder(folder, stale=("model*.safetensors*", REWARD_HEAD_FILE)) as temporary:
            if not is_adapted(model):
                model.save_pretrained(temporary)
            elif merge:
                merged(model).save_pretrained(temporary)
            else:
                save_adapter(model, temporary)
            heads = {VALUE_HEAD_FILE: self.value_head, REWARD_HEAD_FILE: self.reward_head}
            for file, head in heads.items():
                if head is not None:
                    state = {name: x.detach().cpu().contiguous() for name, x in head.state_dict().items()}
                    save_file(state, temporary / file)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
                if merge or not is_adapted(model):
                    self._save_stops(tokenizer, temporary)

    def _save_stops(self, tokenizer: Any, folder: Path) -> None:
        """Have plain `generate` stop where our sampler does: at the tokenizer's EOS as well as at the model's own."""
        generation, stops = copy.copy(self.backbone.model.generation_config), self.backbone.eos_ids(tokenizer)
        if len(stops) > 1:
            generation.eos_token_id = stops
            generation.save_pretrained(folder)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        *,
        window: int | None = None,
        length: int = 0,
    ) -> PolicyOutput:
        """input_ids, attention_mask: (B, T); padding on either side.   position_ids: see `Batch`.

        window, length: see only so many tokens before each of the last `length` (`windowed`); None: all.
        """
        if window is None:
            hidden = self.backbone(input_ids, attention_mask, position_ids)
        else:
            hidden = windowed(self.backbone, input_ids, attention_mask, window, length)
        return PolicyOutput(hidden, self.value_head(hidden))

    def scores(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """The reward head's number at each row's last token, (B,) float32.

        input_ids, attention_mask: (B, T); padding on either side.   position_ids: see `Batch`.
        Raises InputError where there is no reward head.
        """
        if self.reward_head is None:
            raise InputError("this policy has no reward head, so it has no scores: call policy.add_reward_head() first")
        hidden = self.backbone(input_ids, attention_mask, position_ids)
        rows, columns = torch.arange(len(input_ids), device=hidden.device), last_token(attention_mask)
        return self.reward_head(hidden[rows, columns])

    def batch_logprob(self, batch: Batch, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(log-prob of every label from the token before it, whether it is trained), each (B, T-1), of packed rows too.

        Column t is of token t + 1; the log-prob is 0 where it is not trained. Sum both over a batch's parts and divide
        by the whole's `num_tokens`.
        """
        hidden = self.backbone(batch.input_ids, batch.attention_mask, batch.position_ids)
        return label_logprob(self.backbone, hidden, batch, temperature=temperature)


def label_logprob(
    backbone: Backbone, hidden: Tensor, batch: Batch, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """See `Policy.batch_logprob`; hidden: (B, T, D) of the batch's rows."""
    trained = batch.labels[:, 1:] != IGNORE
    stats = response_stats(backbone, hidden, batch.labels, trained, temperature=temperature)
    assert stats.logprob is not None
    return stats.logprob, trained


def response_stats(
    backbone: Backbone,
    hidden: Tensor,
    input_ids: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    want: tuple[str, ...] = ("logprob",),
    reference: Backbone | None = None,
    ref_hidden: Tensor | None = None,
) -> TokenStats:
    """What `want` names, (B, T) for the T response tokens, 0 outside the mask.

    hidden: (B, P+T, D) of `backbone`.   input_ids: (B, P+T).   mask: (B, T).
    reference, ref_hidden: the other side of "kl", same layout.
    Only response positions go through the head: token t is predicted by the position before it.
    Of a `Batch` all tokens but a row's first are the response: the entropy, say, of what `batch_logprob` gives is had
    with the same mask and want=("entropy",).
    """
    length = mask.shape[1]
    labels = input_ids[:, input_ids.shape[1] - length :].masked_fill(~mask, IGNORE)
    other: dict[str, Any] = {}
    if reference is not None and ref_hidden is not None:
        if reference.softcap != backbone.softcap:
            raise InputError(
                f"the exact KL needs a reference with the policy's soft-cap, {backbone.softcap}; "
                f"it has {reference.softcap}"
            )
        other = {
            "ref_hidden": before_response(ref_hidden, length).to(hidden.device),
            "ref_weight": reference.head_weight.to(hidden.device),
            "ref_bias": None if reference.head_bias is None else reference.head_bias.to(hidden.device),
        }
    return linear_logprob(
        before_response(hidden, length),
        backbone.head_weight,
        labels,
        bias=backbone.head_bias,
        temperature=temperature,
        softcap=backbone.softcap,
        want=want,
        keep_bytes=backbone.keep_bytes,
        **other,
    )


def before_response(x: Tensor, length: int) -> Tensor:
    """The positions that predict the last `length` tokens: (B, P+T, ...) -> (B, T, ...)."""
    return x[:, -length - 1 : -1]


def last_token(attention_mask: Tensor) -> Tensor:
    """(B, T) -> (B,): the column of each row's last token, whichever side its padding is on."""
    # From 1 on: a column 0 would tie with the padding.
    numbers = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    return (numbers * (attention_mask > 0)).argmax(1)


def _load_head(head: nn.Module, file: Path, what: str) -> None:
    """Take a head's weights from a file. Raises InputError where they are of another model."""
    from safetensors.torch import load_file

    with disk_errors(f"read the {what} {str(file)!r}"):
        state = load_file(file)
    sizes = [{name: tuple(x.shape) for name, x in s.items()} for s in (state, head.state_dict())]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the {what} {str(file)!r} is another model's: it has {sizes[0]}, this model's is {sizes[1]}; "
            "remove it to start a new one"
        )
    head.load_state_dict(state)
