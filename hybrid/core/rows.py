"""What rows of a batch are asked, whatever they hold: how long they are, parts of them, another device."""

from dataclasses import fields, replace
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

__all__ = ["Record", "Rows", "by_length", "extents", "handed_on", "microbatches", "moved", "used_columns"]


class Rows(Protocol):
    """What an update learns from: so many rows, any part of which can stand for itself."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor | slice, /) -> Self: ...

    @property
    def attention_mask(self) -> Tensor:
        """(..., T), 0 on padding."""

    @property
    def extents(self) -> Tensor:
        """See `extents`, a column for each row."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are trained."""

    @property
    def mean_over(self) -> float:
        """What the metrics of these rows are means over, so that those of parts can be joined."""

    def trimmed(self) -> Self:
        """Without columns that are padding in all rows."""

    def to(self, device: torch.device | str, /) -> Self:
        """The same on another device."""


Record = TypeVar("Record", bound=Rows)
T = TypeVar("T")


def extents(attention_mask: Tensor, valid: Tensor) -> Tensor:
    """(3, B) int64 on the CPU, in one read: each row's first token, the column behind its last, how many are valid.

    attention_mask: (B, L), 0 on padding.   valid: (B, T) bool.
    """
    seen = attention_mask != 0
    columns = torch.arange(1, seen.shape[1] + 1, device=seen.device)
    end = (seen * columns).amax(1)
    start = seen.shape[1] - (seen * columns.flip(0)).amax(1)
    return torch.stack([start, end, valid.sum(1)]).cpu()


def by_length(extents: Tensor, size: int | None) -> list[Tensor]:
    """The rows in groups of at most `size` (None: one group); where there are several, longest first."""
    num_rows = extents.shape[1]
    if size is None or size >= num_rows:
        return [torch.arange(num_rows)]
    return list((extents[1] - extents[0]).argsort(descending=True, stable=True).split(size))


def microbatches(rows: Record, size: int | None) -> list[Record]:
    """Parts of at most `size` rows of about the same length."""
    groups = by_length(rows.extents, size)
    return [rows] if len(groups) == 1 else [rows[group] for group in groups]


def used_columns(extents: Tensor, prompt_length: int) -> tuple[int, int]:
    """From the first token of any row to the last, and always to one behind the prompts."""
    return int(extents[0].min()), max(int(extents[1].max()), prompt_length + 1)


def handed_on(whole: Record, part: Record, rows: Tensor | slice) -> Record:
    """The part, with the extents that the whole has read already."""
    if "extents" in vars(whole):
        vars(part)["extents"] = whole.extents[:, rows.cpu() if isinstance(rows, Tensor) else rows]
    return part


def moved(record: T, device: torch.device | str) -> T:
    """The record with every tensor of its fields, and of the records in them, on `device`."""
    dataclass: Any = record
    values = {f.name: getattr(record, f.name) for f in fields(dataclass)}
    there: T = replace(dataclass, **{name: x.to(device) for name, x in values.items() if hasattr(x, "to")})
    return there
