"""Hidden states of a model that sees the last few tokens only, as if nothing stood before them."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["windowed"]

# Windows of one forward.
CHUNK = 256


def windowed(
    trunk: Callable[[Tensor, Tensor], Tensor], input_ids: Tensor, attention_mask: Tensor, window: int, length: int
) -> Tensor:
    """Hidden states (B, P+T, D) at the positions that predict the last `length` tokens, 0 at others.

        hidden[b, j] = trunk(tokens j - window + 1 ... j of row b, alone)[-1]

    trunk: (input_ids, attention_mask) -> hidden states, of a causal model.   input_ids, attention_mask: (B, P+T), the
    tokens of a row without a gap.
    A mask that hides what is before the window is something else: in a layer above the first a token still sees, by
    the states of those before it, what they saw. So each position past the first `window` tokens is a row of its own:
    a forward and backward over window * T tokens in place of P + T. Rows of at most `window` tokens cost what they
    always do, and give the same to the last bit.
    """
    mask = attention_mask.bool()
    seen = mask.cumsum(1)
    wanted = mask.clone()
    wanted[:, -1] = False
    wanted[:, : max(mask.shape[1] - length - 1, 0)] = False
    late = wanted & (seen > window)
    if not late.any():
        return trunk(input_ids, attention_mask)
    rows, ends = late.nonzero(as_tuple=True)
    columns = ends.unsqueeze(1) + torch.arange(1 - window, 1, device=ends.device)
    ids = input_ids[rows.unsqueeze(1), columns]
    last = torch.cat([trunk(part, torch.ones_like(part, dtype=torch.bool))[:, -1] for part in ids.split(CHUNK)])
    early = wanted & ~late
    whole = early.any(1).nonzero().squeeze(1)
    hidden = last.new_zeros(*input_ids.shape, last.shape[-1])
    if len(whole):
        inside = mask[whole] & (seen[whole] <= window)
        start, end = _extent(inside)
        first = trunk(input_ids[whole, start:end], inside[:, start:end])
        places = early[whole, start:end].nonzero(as_tuple=True)
        hidden = hidden.index_put((whole[places[0]], places[1] + start), first[places].to(hidden.dtype))
    return hidden.index_put((rows, ends), last)


def _extent(mask: Tensor) -> tuple[int, int]:
    """The columns that hold anything, from and to."""
    columns = mask.any(0).nonzero()
    return int(columns[0]), int(columns[-1]) + 1
