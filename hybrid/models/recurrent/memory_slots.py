"""An external memory beside a cell: slots that are read by content and by place, and written through a gate.

Of a step, for a head with key k, strength beta, gate g, shifts s over (-1, 0, 1) and sharpness gamma:

    content_i = softmax_i(beta cos(k, M_i))
    kept      = g content + (1 - g) w                         w: the head's weights of the step before
    moved_i   = s_-1 kept_{i+1} + s_0 kept_i + s_1 kept_{i-1}    circular
    w_i       = moved_i^gamma / sum_j moved_j^gamma

and first the write head, through its gate a, then the read head of what is there now:

    M_i <- M_i (1 - a w_i erase) + a w_i add,     r = sum_i w_i M_i

Source: Graves et al. 2014, sections 3.1 to 3.3 (arXiv:1410.5401); the gate of writing from Graves et al. 2016, "Hybrid
computing using a neural network with dynamic external memory". Unlike there the slots begin empty, all zeros, with both
heads on slot 0, and the cosine of an empty slot is 0: `cosine`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

__all__ = ["Memory", "addressed", "cosine", "empty_memory", "interface_size", "memory_step", "started"]

# Of squared norms in the cosine: a slot is empty as long as its norm is far below 0.01.
EMPTY = 1e-4
# Under the power of sharpening: its gradient at 0 is not finite for every gamma.
TINY = 1e-8


class Memory(NamedTuple):
    """slots: (B, M, W).   read, write: (B, M), the heads' weights, of sum 1.   value: (B, W), what was read last."""

    slots: Tensor
    read: Tensor
    write: Tensor
    value: Tensor


def empty_memory(num_rows: int, num_slots: int, width: int, like: Tensor) -> Memory:
    """Slots of zeros, both heads on the first, in the dtype and on the device of `like`."""
    slots = like.new_zeros(num_rows, num_slots, width)
    head = pad(like.new_ones(num_rows, 1), (0, num_slots - 1))
    return Memory(slots, head, head, like.new_zeros(num_rows, width))


def interface_size(width: int) -> int:
    """How many numbers a cell gives `memory_step`: of either head key and 6 others; what to erase, to add, the gate."""
    return 2 * (width + 6) + 2 * width + 1


def started(weight: Tensor) -> tuple[Tensor, Tensor]:
    """What a linear layer that makes the interface should begin with: its weight (`interface_size(W)`, D), and a bias.

    The write head goes on by one slot a token and writes there, as on a tape. The read head looks half by content, for
    what is written of a state like this one: its key begins as the same map as what is added.
    Associative recall was learnt in 200 updates from these, and not in 400 from zero biases and unlike maps: one trial
    each (benchmarks/NOTES.md).
    """
    width = (len(weight) - 13) // 4
    read, write, erase, add = 0, width + 6, 2 * width + 12, 3 * width + 12
    weight, bias = weight.clone(), weight.new_zeros(len(weight))
    weight[read : read + width] = weight[add : add + width]
    bias[read + width] = 4.0  # a strength of 4
    bias[write + width], bias[write + width + 1] = 4.0, -3.0  # 95 % where it was
    bias[write + width + 4] = 3.0  # 91 % of it a slot up
    bias[erase:add], bias[-1] = -2.0, 2.0  # little is erased, the gate open
    return weight, bias


def memory_step(interface: Tensor, memory: Memory) -> Memory:
    """Write, then read. interface: (B, `interface_size(W)`), any real numbers, squashed here into their ranges."""
    width = memory.slots.shape[2]
    read, write, erase, add, gate = interface.split([width + 6, width + 6, width, width, 1], 1)
    write_weights = _head(write, memory.slots, memory.write)
    strength = (gate.sigmoid() * write_weights).unsqueeze(2)
    slots = memory.slots * (1 - strength * erase.sigmoid().unsqueeze(1)) + strength * add.tanh().unsqueeze(1)
    read_weights = _head(read, slots, memory.read)
    return Memory(slots, read_weights, write_weights, torch.bmm(read_weights.unsqueeze(1), slots).squeeze(1))


def _head(numbers: Tensor, slots: Tensor, before: Tensor) -> Tensor:
    key, strength, gate, shift, sharpness = numbers.split([slots.shape[2], 1, 1, 3, 1], 1)
    return addressed(
        slots, before, key=key.tanh(), strength=softplus(strength), gate=gate.sigmoid(), shift=shift.softmax(1),
        sharpness=1 + softplus(sharpness),
    )  # fmt: skip


def addressed(
    slots: Tensor, before: Tensor, *, key: Tensor, strength: Tensor, gate: Tensor, shift: Tensor, sharpness: Tensor
) -> Tensor:
    """A head's weights (B, M), of sum 1; see above.

    slots: (B, M, W).   before: (B, M).   key: (B, W).   strength, gate, sharpness: (B, 1).   shift: (B, 3), of sum 1.
    """
    content = (strength * cosine(key, slots)).softmax(1)
    kept = gate * content + (1 - gate) * before
    down, stay, up = shift.unsqueeze(2).unbind(1)
    moved = down * kept.roll(-1, 1) + stay * kept + up * kept.roll(1, 1)
    sharp = (moved + TINY) ** sharpness
    return sharp / sharp.sum(1, keepdim=True)


def cosine(key: Tensor, slots: Tensor) -> Tensor:
    """(B, W), (B, M, W) -> (B, M): the cosine of the key and each slot, 0 of an empty one.

    k . M_i / sqrt((|k|^2 + eps) (|M_i|^2 + eps)),    eps = 1e-4
    """
    product = torch.bmm(slots, key.unsqueeze(2)).squeeze(2)
    norms = ((key**2).sum(1, keepdim=True) + EMPTY) * ((slots**2).sum(2) + EMPTY)
    return product * norms.rsqrt()
