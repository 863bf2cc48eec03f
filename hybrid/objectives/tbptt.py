"""Long texts, window by window, by a recurrent policy that carries its state from one update to the next."""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybrid.core import IGNORE, Batch, InputError
from hybrid.functional import sft_loss
from hybrid.models import label_logprob
from hybrid.objectives.accumulate import Loss
from hybrid.objectives.objective import Objective, Parts, register_objective

__all__ = ["TBPTT", "Windows"]


@dataclass(frozen=True)
class Windows:
    """One window of each stream.

    batch: (B, W + 1); its segment 1 goes on where the stream's last window ended, each higher number is another text.
    streams: (B,) int64, which stream each row is of.
    """

    batch: Batch
    streams: Tensor

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, rows: Tensor | slice) -> "Windows":
        return Windows(self.batch[rows], self.streams[rows])

    @property
    def attention_mask(self) -> Tensor:
        return self.batch.attention_mask

    @property
    def extents(self) -> Tensor:
        return self.batch.extents

    @property
    def num_tokens(self) -> int:
        return self.batch.num_tokens

    @property
    def mean_over(self) -> float:
        return self.batch.num_tokens

    def trimmed(self) -> "Windows":
        """Itself: a window has no padding."""
        return self

    def to(self, device: torch.device | str) -> "Windows":
        """The same windows with every tensor on `device`."""
        return Windows(self.batch.to(device), self.streams.to(device))


@register_objective("tbptt")
class TBPTT(Objective[Windows]):
    """Truncated back-propagation through time: the cross-entropy of windows, each read in the state that the last left.

        loss = -(1 / tokens) sum over streams and t of log p(x_t | x_{<t});    the state before the window is a constant

    All training texts, prompts too, are one row of tokens, shuffled anew in each epoch and cut into `streams` parts of
    one length that are read side by side, `window` tokens an update. The state starts anew with each text and each
    epoch. What remains at the end of the parts is left out of that epoch. Place and state are in the checkpoints.
    An update predicts `streams` times `window` tokens, but for each text's first.
    Raises InputError where the policy is none of `hybrid.models.recurrent`, and where the texts are too short.
    Source: Williams & Peng 1990, "An efficient gradient-based algorithm for on-line training of recurrent network
    trajectories".
    """

    def __init__(self, parts: Parts, streams: int = 8, window: int = 64):
        super().__init__(parts)
        self.check_settings(streams=streams, window=window)
        backbone = parts.policy.backbone
        if not backbone.keeps_state:
            raise InputError(
                f"objective 'tbptt' carries the state of a recurrent model, and {type(backbone.model).__name__} has "
                "none to carry: make one with hybrid.models.new_recurrent, or take objective 'sft'"
            )
        self.streams, self.window = streams, window
        self.position = 0  # windows that were drawn of each stream
        # The state before the windows that were drawn last, and after them, once they were learnt from.
        self._before: Any = None
        self._after: Any = None
        self._texts: tuple[int, Tensor, Tensor, Tensor] | None = None

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        # In 2 tokens not both can be a text's first: there is always one to predict.
        for name, least in (("streams", 1), ("window", 2)):
            if settings.get(name, least) < least:
                raise ValueError(f"{name} must be >= {least}, got {settings[name]}")

    def rows(self) -> Iterator[Windows]:
        self.check()
        while True:
            yield self._next()

    def rows_of(self, given: Any) -> Windows:
        """Rows by hand, at most as many as there are streams, go on from the streams' states in order."""
        batch = self.parts.batch(given)
        if len(batch) > self.streams:
            raise InputError(f"objective 'tbptt' has {self.streams} streams, got {len(batch)} rows")
        return Windows(batch, torch.arange(len(batch), device=batch.input_ids.device))

    def check(self) -> None:
        """Refuse, before a run's first step, texts that are too short for one window."""
        if not self._num_windows:
            raise InputError(
                f"objective 'tbptt': the training data have {self._num_tokens} tokens, too few for {self.streams} "
                f"streams with a window of {self.window} each; lower objectives.tbptt.streams or .window"
            )

    def loss_of(self, whole: Windows) -> Callable[[Windows], Loss]:
        backbone, before, num_tokens = self.parts.policy.backbone, self._before, whole.num_tokens

        def loss(part: Windows) -> Loss:
            batch = part.batch
            state = None if before is None else before.map(lambda x: x[part.streams])
            # The last token is predicted only: the next window begins with it.
            hidden, after = backbone.carried(batch.input_ids[:, :-1], batch.attention_mask[:, :-1], state)
            self._keep(after, part.streams)
            logprob, trained = label_logprob(backbone, pad(hidden, (0, 0, 0, 1)), batch)
            return sft_loss(logprob, trained, num_tokens=num_tokens)

        return loss

    def state_dict(self) -> dict[str, Any]:
        state = self._after
        layers = None if state is None else [tuple(x.clone() for x in layer) for layer in state.layers]
        return {"position": self.position, "state": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position, self._before, self._after = state["position"], None, None
        if state["state"] is not None:
            from hybrid.models.recurrent.modeling_recurrent import RecurrentState  # here: it loads transformers

            device = self.parts.policy.device
            self._after = RecurrentState(state["state"]).map(lambda x: x.to(device))

    def _keep(self, state: Any, streams: Tensor) -> None:
        """Put the states of some streams after their windows among those of all."""
        if self._after is None:
            self._after = state.map(lambda x: x.new_zeros(self.streams, *x.shape[1:]))
        for kept, layer in zip(self._after.layers, state.layers, strict=True):
            for x, new in zip(kept, layer, strict=True):
                x[streams] = new.detach()

    def _next(self) -> Windows:
        epoch, number = divmod(self.position, self._num_windows)
        # Windows that nothing was learnt from have left no state: what follows starts anew.
        self._before, self._after = (self._after if number else None), None
        self.position += 1
        ids, labels, texts = self._epoch(epoch)
        starts = torch.arange(self.streams) * ((len(ids) - 1) // self.streams) + number * self.window
        places = starts.unsqueeze(1) + torch.arange(self.window + 1)
        segments = texts[places] - texts[(starts - 1).clamp(min=0)].unsqueeze(1) + 1
        return Windows(Batch(ids[places], segments, labels[places]), torch.arange(self.streams)).to(
            self.parts.policy.device
        )

    @cached_property
    def _num_tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.parts.loader.examples)

    @property
    def _num_windows(self) -> int:
        """Of an epoch."""
        return (self._num_tokens - 1) // self.streams // self.window

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens in the epoch's order, their labels, and the number of the text that each is of: (N,) each."""
        if self._texts is None or self._texts[0] != epoch:
            loader = self.parts.loader
            order = random.Random(f"{loader.seed}/tbptt/{epoch}").sample(loader.examples, len(loader.examples))
            ids = torch.tensor([token for e in order for token in e.input_ids])
            # All of a text is trained but its first token, which nothing predicts.
            labels = torch.tensor([label for e in order for label in (IGNORE, *e.input_ids[1:])])
            texts = torch.repeat_interleave(torch.tensor([len(e.input_ids) for e in order]))
            self._texts = epoch, ids, labels, texts
        return self._texts[1:]
