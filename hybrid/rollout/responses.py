"""Responses as tensors, whole ones or their beginnings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

__all__ = ["Responses"]


@dataclass(frozen=True)
class Responses:
    """ids: (B, T) int64, right-padded.   mask: (B, T) bool, up to and including the first EOS, or the token that
        completes a stop string.
    ended: (B,) bool, whether one of these came.
    logprob: (B, T) float32, of each token under the very distribution it was drawn from, 0 outside the mask; None
        where that is not known.
    metrics: what the decoder that found them has to log.
    """

    ids: Tensor
    mask: Tensor
    ended: Tensor
    logprob: Tensor | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def empty(cls, num_rows: int, length: int, *, pad_id: int, device: torch.device) -> "Responses":
        """Beginnings of no token yet, with room for `length`."""
        ids = torch.full((num_rows, length), pad_id, dtype=torch.long, device=device)
        none = torch.zeros_like(ids, dtype=torch.bool)
        return cls(ids, none, torch.zeros(num_rows, dtype=torch.bool, device=device), torch.zeros(ids.shape).to(device))

    @classmethod
    def of_lists(cls, rows: Sequence[Sequence[int]], length: int, *, pad_id: int, device: torch.device) -> "Responses":
        """Beginnings of these ids, with room for `length`; none has ended, and no log-prob is known."""
        lengths = torch.tensor([len(row) for row in rows], device=device)
        filled = [[*row, *[pad_id] * (length - len(row))] for row in rows]
        ids = torch.tensor(filled, dtype=torch.long, device=device).view(len(rows), length)
        mask = torch.arange(length, device=device) < lengths.unsqueeze(1)
        return cls(ids, mask, torch.zeros(len(rows), dtype=torch.bool, device=device))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: the tokens of each."""
        return self.mask.sum(1)

    def lists(self) -> list[list[int]]:
        """The ids of each, without padding."""
        return [ids[:length] for ids, length in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]

    def of(self, rows: Sequence[int] | Tensor | slice) -> "Responses":
        """Some of the rows."""
        logprob = None if self.logprob is None else self.logprob[rows]
        return replace(self, ids=self.ids[rows], mask=self.mask[rows], ended=self.ended[rows], logprob=logprob)

    def widened(self, length: int, *, pad_id: int) -> "Responses":
        """The same with room for `length` tokens."""
        more = length - self.ids.shape[1]
        logprob = None if self.logprob is None else nn.functional.pad(self.logprob, (0, more))
        ids = nn.functional.pad(self.ids, (0, more), value=pad_id)
        return replace(self, ids=ids, mask=nn.functional.pad(self.mask, (0, more)), logprob=logprob)

    def trimmed(self) -> "Responses":
        """Without the room behind the longest."""
        end = int(self.lengths.max())
        logprob = None if self.logprob is None else self.logprob[:, :end]
        return replace(self, ids=self.ids[:, :end], mask=self.mask[:, :end], logprob=logprob)

    @classmethod
    def joined(cls, parts: Sequence["Responses"]) -> "Responses":
        """All rows of several, of one width."""
        logprobs = [part.logprob for part in parts if part.logprob is not None]
        return cls(
            torch.cat([part.ids for part in parts]),
            torch.cat([part.mask for part in parts]),
            torch.cat([part.ended for part in parts]),
            torch.cat(logprobs) if len(logprobs) == len(parts) else None,
        )

    @classmethod
    def widest(cls, parts: Sequence["Responses"], *, pad_id: int) -> "Responses":
        """All rows of several, in the width of the widest."""
        width = max(part.ids.shape[1] for part in parts)
        return cls.joined([part.widened(width, pad_id=pad_id) for part in parts])

    def put(self, rows: Tensor, others: "Responses") -> "Responses":
        """The same with others at these rows, (n,) int64; all of one width."""
        logprob = None
        if self.logprob is not None and others.logprob is not None:
            logprob = self.logprob.index_copy(0, rows, others.logprob)
        return replace(
            self,
            ids=self.ids.index_copy(0, rows, others.ids),
            mask=self.mask.index_copy(0, rows, others.mask),
            ended=self.ended.index_copy(0, rows, others.ended),
            logprob=logprob,
        )

    def where(self, chosen: Tensor, other: "Responses") -> "Responses":
        """Row by row these where `chosen`, (B,), and the other's elsewhere; both of one width."""
        column = chosen.unsqueeze(1)
        logprob = None
        if self.logprob is not None and other.logprob is not None:
            logprob = torch.where(column, self.logprob, other.logprob)
        return replace(
            self,
            ids=torch.where(column, self.ids, other.ids),
            mask=torch.where(column, self.mask, other.mask),
            ended=torch.where(chosen, self.ended, other.ended),
            logprob=logprob,
        )
