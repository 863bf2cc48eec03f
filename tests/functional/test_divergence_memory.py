"""`linear_divergence` never holds the logits of all rows, forward or backward."""

import importlib

import pytest
import torch
from linear_case import Case
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybrid.functional import linear_divergence

MODULE = importlib.import_module("hybrid.functional.divergence")
KINDS = ["reverse", "forward", "jsd"]


class LargestMade(TorchDispatchMode):
    """Numbers of the largest tensor that any operation in the block has made."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.size = max([self.size, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def largest_made_and_saved(chunk, kind, monkeypatch):
    """Of 64 rows and 96 tokens, forward and backward."""
    monkeypatch.setattr(MODULE, "_CHUNK", chunk)
    case, saved = Case(shape=(64,), vocab=96), [0]

    def pack(x):
        saved.append(x.numel())
        return x

    inputs = case.trainable()
    with LargestMade() as made, saved_tensors_hooks(pack, lambda x: x):
        linear_divergence(
            case.hidden,
            case.weight,
            case.ref_hidden,
            case.ref_weight,
            bias=case.bias,
            ref_bias=case.ref_bias,
            kind=kind,
            softcap=3.0,
        ).sum().backward()
    assert all(x.grad is not None for x in inputs)
    return made.size, max(saved)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_all_rows_and_the_whole_vocabulary_is_made_or_saved(kind, monkeypatch):
    # The largest are the heads' gradients: 96 x 4, and a teacher's 96 x 5; a chunk is 4 x 96.
    made, saved = largest_made_and_saved(4 * 96, kind, monkeypatch)
    assert made <= 96 * 5 < 64 * 96
    assert saved <= 96 * 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_of_memory_sees_a_chunk_of_all_rows(kind, monkeypatch):
    made, _ = largest_made_and_saved(64 * 96, kind, monkeypatch)
    assert made == 64 * 96
