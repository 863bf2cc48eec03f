"""Rows of unlike length and side of padding as recurrent kernels take them: first all first tokens, then all second."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ByTime", "by_time"]


class ByTime(NamedTuple):
    """The N tokens of a (B, T) batch that are none of the padding, as S sequences, the longest first.

    rows, columns: (N,), where each stands in the batch; in order of time, and of the sequences at one time.
    batch_sizes: (L,) int64 on the CPU, of how many sequences there is a token at that time.
    begins: (S,), the row whose state a sequence goes on from; B: from a fresh state.
    ends: (B,), the sequence whose end is the row's state; S + b: the row has no token, its state stays as it is.
    """

    rows: Tensor
    columns: Tensor
    batch_sizes: Tensor
    begins: Tensor
    ends: Tensor


def by_time(mask: Tensor) -> ByTime:
    """The layout of rows. mask: (B, T); 0 on padding, wherever it stands; else the number of the token's segment.

    Segment 1 goes on from the row's state, each higher number starts anew. A mask of ones and zeros has one segment a
    row. Reads from the device once.
    """
    num_rows, length = mask.shape
    numbers = mask.long()
    real = numbers > 0
    latest = numbers.cummax(1).values
    before = torch.nn.functional.pad(latest[:, :-1], (1, 0))
    starts = real & (numbers > before)
    count = real.long().cumsum(1) - 1
    place = count - torch.where(starts, count, 0).cummax(1).values
    sequence = starts.flatten().long().cumsum(0).view(num_rows, length) - 1
    rows, columns = real.nonzero(as_tuple=True)
    place, sequence = place[rows, columns], sequence[rows, columns]
    lengths = torch.bincount(sequence)
    num_sequences = len(lengths)
    order = lengths.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(num_sequences, device=mask.device)
    in_time = (place * num_sequences + rank[sequence]).argsort()
    first_rows, first_columns = starts.nonzero(as_tuple=True)
    goes_on = numbers[first_rows, first_columns] == 1
    begins = torch.where(goes_on, first_rows, num_rows)[order]
    # A row's sequences stand one after the other: its last is the one before the next row's first.
    counts = starts.sum(1)
    last = (counts.cumsum(0) - 1).clamp(min=0)
    kept = num_sequences + torch.arange(num_rows, device=mask.device)
    ends = torch.where(counts > 0, rank[last], kept) if num_sequences else kept
    return ByTime(rows[in_time], columns[in_time], torch.bincount(place).cpu(), begins, ends)
