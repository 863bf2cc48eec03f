"""An LSTM and a GRU language model as transformers knows models. A saved one carries this file and its neighbours."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.generation import utils as generation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .by_time import by_time
from .configuration_recurrent import RecurrentConfig
from .memory_slots import Memory, empty_memory, interface_size, memory_step, started

__all__ = ["RecurrentForCausalLM", "RecurrentModel", "RecurrentOutput", "RecurrentState"]

LayerState = tuple[Tensor, ...]


class RecurrentState:
    """What a model remembers of B rows: of each layer its tensors, (B, ...), and how many columns it has seen.

    A step makes a new one, and leaves this as it is.
    """

    is_state = True  # how hybrid's sampler tells it from keys and values

    def __init__(self, layers: list[LayerState], seen: int = 0):
        self.layers, self.seen = layers, seen

    def map(self, change: Callable[[Tensor], Tensor]) -> "RecurrentState":
        """Another with every tensor changed."""
        return RecurrentState([tuple(change(x) for x in layer) for layer in self.layers], self.seen)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, which then stand together."""
        self.layers = self.map(lambda x: x.repeat_interleave(repeats, 0)).layers

    def reorder_cache(self, rows: Tensor) -> None:
        """Take these rows, as beam search does."""
        self.layers = self.map(lambda x: x.index_select(0, rows.to(x.device))).layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that were seen, padding among them."""
        return self.seen


@dataclass
class RecurrentOutput(ModelOutput):
    """last_hidden_state: (B, T, D).   logits: (B, T, V).   state: the state after the last column."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    state: RecurrentState | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class _TrainsAlways:
    """A kernel without dropout of its own is the same in either mode, and cuDNN's has a backward in training mode only;
    PPO trains in eval mode."""

    def train(self, mode: bool = True) -> Any:
        return super().train(True)  # type: ignore[misc]


class _LSTM(_TrainsAlways, nn.LSTM):
    pass


class _GRU(_TrainsAlways, nn.GRU):
    pass


def _unrounded(x: Tensor) -> Any:
    """Computation in the weights' own dtype: roundings of a state would add up from token to token."""
    return torch.autocast(x.device.type, enabled=False)


class KernelLayer(GradientCheckpointingLayer):
    """A cell that torch runs over all of time in one kernel."""

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        self.has_cell_state = config.cell == "lstm"
        self.cell = (_LSTM if self.has_cell_state else _GRU)(config.hidden_size, config.hidden_size)

    def fresh(self, num_rows: int, like: Tensor) -> LayerState:
        zeros = like.new_zeros(num_rows, self.cell.hidden_size)
        return (zeros, zeros) if self.has_cell_state else (zeros,)

    def forward(self, x: Tensor, batch_sizes: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """x: (N, D), laid out by time.   state: of S sequences.   Returns (N, D), and the state at each one's end."""
        before = tuple(s.unsqueeze(0) for s in state)
        with _unrounded(x):
            packed = PackedSequence(x.to(self.cell.all_weights[0][0].dtype), batch_sizes)
            out, after = self.cell(packed, before if self.has_cell_state else before[0])
        return out.data, tuple(s.squeeze(0) for s in (after if self.has_cell_state else (after,)))


class Interface(nn.Linear):
    """From a cell's h to what `memory_step` takes. Begins as `started` says."""


class SlotLayer(GradientCheckpointingLayer):
    """A cell that reads and writes an external memory at every token: [x; last read] -> h, then the memory's step.

    Gives h + U r, with what it has just read. A loop over time.
    """

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        size, self.num_slots, self.width = config.hidden_size, config.memory_slots, config.memory_width
        self.has_cell_state = config.cell == "lstm"
        self.cell: Any = (nn.LSTMCell if self.has_cell_state else nn.GRUCell)(size + self.width, size)
        self.interface = Interface(size, interface_size(self.width))
        self.value = nn.Linear(self.width, size, bias=False)

    def fresh(self, num_rows: int, like: Tensor) -> LayerState:
        zeros = like.new_zeros(num_rows, self.cell.hidden_size)
        cell = (zeros, zeros) if self.has_cell_state else (zeros,)
        # float32 at least: the squares and powers of addressing leave float16's range.
        wide = zeros.new_zeros((), dtype=torch.promote_types(like.dtype, torch.float32))
        return (*cell, *empty_memory(num_rows, self.num_slots, self.width, wide))

    def forward(self, x: Tensor, batch_sizes: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """x: (N, D), laid out by time.   state: of S sequences.   Returns (N, D), and the state at each one's end."""
        outs, finished = [], []
        for now in x.to(self.cell.weight_hh.dtype).split(batch_sizes.tolist()):
            if len(now) < len(state[0]):
                finished.append(tuple(s[len(now) :] for s in state))
                state = tuple(s[: len(now)] for s in state)
            out, state = self._step(now, state)
            outs.append(out)
        # The shortest sequences, which stand last, have ended first.
        ended = [state, *reversed(finished)]
        return torch.cat(outs), tuple(torch.cat(parts) for parts in zip(*ended, strict=True))

    def _step(self, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        cell, memory = state[:-4], Memory(*state[-4:])
        inputs = torch.cat([x, memory.value.to(x.dtype)], 1)
        # The linear layers alone in autocast's dtype: what they give is no state.
        with _unrounded(x):
            cell = self.cell(inputs, cell) if self.has_cell_state else (self.cell(inputs, cell[0]),)
        interface = self.interface(cell[0]).to(memory.slots.dtype)
        with _unrounded(x):
            memory = memory_step(interface, memory)
        return cell[0] + self.value(memory.value.to(x.dtype)), (*cell, *memory)


class RecurrentPreTrainedModel(PreTrainedModel):
    """What transformers asks of models: how weights begin, and what it may do with them."""

    config_class = RecurrentConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["KernelLayer", "SlotLayer"]  # noqa: RUF012
    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Cells as `_init_cell`, the memory's interface as `started`, all else from N(0, `initializer_range`^2)."""
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            self._init_cell(module)
            return
        super()._init_weights(module)
        if isinstance(module, Interface):
            for parameter, start in zip((module.weight, module.bias), started(module.weight), strict=True):
                init.copy_(parameter, start)

    def _init_cell(self, module: Any) -> None:
        """Uniform in +-1 / sqrt(D), as torch does, but with the LSTM's forget gate open: a bias of 1.

        Source of the bias: Jozefowicz et al. 2015, "An empirical exploration of recurrent network architectures".
        """
        size = module.hidden_size
        for name, parameter in module.named_parameters():
            if "weight" in name:
                init.uniform_(parameter, -(size**-0.5), size**-0.5)
                continue
            init.zeros_(parameter)
            if "bias_ih" in name and isinstance(module, (nn.LSTM, nn.LSTMCell)):
                bias = torch.zeros_like(parameter)
                bias[size : 2 * size] = 1.0
                init.copy_(parameter, bias)


class RecurrentModel(RecurrentPreTrainedModel):
    """The trunk: embeddings and cells."""

    keeps_state = True  # how hybrid knows it: a cache called `state`, and a mask that may hold segment numbers

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        kinds: list[type[KernelLayer | SlotLayer]] = [KernelLayer] * config.num_hidden_layers
        if config.memory_slots:
            kinds[-1] = SlotLayer
        self.layers = nn.ModuleList(kind(config) for kind in kinds)
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: RecurrentState | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> RecurrentOutput:
        """input_ids: (B, T), or inputs_embeds (B, T, D).   attention_mask: (B, T), see `by_time`; None: no padding.

        state: the state that the rows go on from.   use_cache: give the state after the last column.
        A padded token moves no state; its hidden state is 0.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = x.new_ones(x.shape[:2], dtype=torch.long) if attention_mask is None else attention_mask
        if mask.shape != x.shape[:2]:
            raise ValueError(f"attention_mask must be {tuple(x.shape[:2])}, as the new tokens, got {tuple(mask.shape)}")
        run = self._all_tokens if state is None or x.shape[1] > 1 else self._one_token
        state = self._fresh(len(x), x) if state is None else state
        hidden, layers = run(x, mask, state.layers)
        after = RecurrentState(layers, state.seen + x.shape[1]) if use_cache else None
        return RecurrentOutput(last_hidden_state=hidden, state=after)

    def _fresh(self, num_rows: int, like: Tensor) -> RecurrentState:
        layers: Any = self.layers
        return RecurrentState([layer.fresh(num_rows, like) for layer in layers])

    def _all_tokens(self, x: Tensor, mask: Tensor, states: list[LayerState]) -> tuple[Tensor, list[LayerState]]:
        (num_rows, length), where = x.shape[:2], by_time(mask)
        fresh = self._fresh(1, x).layers
        data, after = x[where.rows, where.columns], []
        for layer, state, start in zip(self.layers, states, fresh, strict=True):
            begins = tuple(torch.cat([s, f.to(s.dtype)])[where.begins] for s, f in zip(state, start, strict=True))
            if len(data):
                data, ended = layer(self.dropout(data), where.batch_sizes, begins)
            else:
                ended = begins
            after.append(tuple(torch.cat([e, s])[where.ends] for e, s in zip(ended, state, strict=True)))
        data = self.dropout(data)
        hidden = data.new_zeros(num_rows, length, data.shape[1])
        return hidden.index_put((where.rows, where.columns), data), after

    def _one_token(self, x: Tensor, mask: Tensor, states: list[LayerState]) -> tuple[Tensor, list[LayerState]]:
        """A step of decoding: nothing is read from the device."""
        data, after = x[:, 0], []
        goes_on, num_rows = mask[:, 0] > 0, torch.tensor([len(x)])
        for layer, state in zip(self.layers, states, strict=True):
            data, ended = layer(self.dropout(data), num_rows, state)
            after.append(
                tuple(
                    torch.where(goes_on.view(-1, *[1] * (s.dim() - 1)), e, s) for e, s in zip(ended, state, strict=True)
                )
            )
        return torch.where(goes_on.unsqueeze(1), self.dropout(data), 0.0).unsqueeze(1), after


class RecurrentForCausalLM(RecurrentPreTrainedModel, GenerationMixin):
    """Trunk and LM head.

        model = RecurrentForCausalLM(RecurrentConfig(vocab_size=100, cell="gru"))
        out = model(input_ids, attention_mask, use_cache=True)     # .logits (B, T, V), .state

    Its cache is its state: a `RecurrentState`, which a step takes and returns.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        self.model = RecurrentModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> RecurrentModel:
        return self.model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: RecurrentState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> RecurrentOutput:
        """See `RecurrentModel.forward`. labels: (B, T), -100 where not trained, unshifted as transformers has them.

        logits_to_keep: of the last so many columns; 0: of all.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        out = self.model(input_ids, attention_mask, state=state, inputs_embeds=inputs_embeds, use_cache=use_cache)
        hidden = out.last_hidden_state
        logits = self.lm_head(hidden[:, -logits_to_keep:].to(self.lm_head.weight.dtype))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return RecurrentOutput(loss=loss, logits=logits, state=out.state)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        state: RecurrentState | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Only what the state has not seen."""
        given: dict[str, Any] = {"state": state, "use_cache": use_cache}
        seen = 0 if state is None else state.seen
        if attention_mask is not None:
            given["attention_mask"] = attention_mask[:, seen:]
        if inputs_embeds is not None and state is None:
            return given | {"inputs_embeds": inputs_embeds}
        if inputs_embeds is not None:
            seen -= inputs_embeds.shape[1]  # the prompt came without ids
        return given | {"input_ids": input_ids[:, seen:]}

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused (ValueError) by a transformers whose beams would go on in each other's states."""
        search: Any = super()._beam_search  # type: ignore[misc]
        # transformers 5.0 reorders what is called past_key_values, and nothing else.
        reorders = "state" in generation.ALL_CACHE_NAMES and "ALL_CACHE_NAMES" in search.__code__.co_names
        if kwargs.get("use_cache", True) and not reorders:
            raise ValueError(
                "this transformers does not reorder a recurrent model's state in beam search; take use_cache=False, or "
                "a later transformers"
            )
        return search(*args, **kwargs)

    def _update_model_kwargs_for_generation(  # type: ignore[override]
        self, outputs: RecurrentOutput, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        return model_kwargs if outputs.state is None else model_kwargs | {"state": outputs.state}
