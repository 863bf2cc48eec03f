"""The keys and values of decoding, in memory that is taken once.

A prompt is read with transformers' own dynamic cache. What decodes its answers goes on in one of two:

    growing   as the dynamic one, but written into spare room instead of copied at every token
    fixed     tensors of the same shape at every token, as a captured graph needs them; the mask hides what is not
              written yet

Both hold several answers to one prompt, whose keys and values are then repeated.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["fixed_cache", "growing_cache", "rewrite"]


class _GrowingLayer(DynamicLayer):
    """The keys and values of one layer, (B, heads, seen, D), at the front of memory for `room` tokens."""

    keys: Tensor
    values: Tensor

    def __init__(self, layer: Any, room: int, repeats: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        seen = layer.keys.shape[2]
        self.memory = [_memory(x, room, repeats) for x in (layer.keys, layer.values)]
        self.keys, self.values = (
            _written(memory, x, seen, repeats)[:, :, :seen]
            for memory, x in zip(self.memory, (layer.keys, layer.values), strict=True)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        seen = self.keys.shape[2]
        now = seen + key_states.shape[2]
        for memory, states in zip(self.memory, (key_states, value_states), strict=True):
            memory[:, :, seen:now] = states
        self.keys, self.values = (memory[:, :, :now] for memory in self.memory)
        return self.keys, self.values


class _FixedLayer(CacheLayerMixin):
    """The keys and values of one layer, (B, heads, room, D), the first `seen` of them written.

    Of a layer with a window too: all tokens have their place, and the mask cuts the window out.
    """

    keys: Tensor
    values: Tensor
    is_compileable = True  # so transformers always makes the mask, and makes it without reading numbers to the host
    is_sliding = False

    def __init__(self, layer: Any, seen: int, room: int, repeats: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self.room = room
        self.seen = torch.zeros((), dtype=torch.long, device=self.device)
        self.keys, self.values = (_memory(x, room, repeats) for x in (layer.keys, layer.values))
        self.write(layer, seen, repeats)

    def write(self, layer: Any, seen: int, repeats: int) -> None:
        """Start behind the `seen` tokens of a layer, which may have kept only its window of them."""
        _written(self.keys, layer.keys, seen, repeats)
        _written(self.values, layer.values, seen, repeats)
        self.seen.fill_(seen)

    def lazy_initialization(self, *args: Any) -> None:
        """Nothing to do: a fixed layer begins with the prompts."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        place = self.seen + torch.arange(key_states.shape[2], device=self.device)
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        self.seen.add_(key_states.shape[2])
        return self.keys, self.values

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        return self.room, 0

    def get_seq_length(self) -> Any:
        return self.seen

    def get_max_length(self) -> int:
        return self.room

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


def growing_cache(cache: Any, room: int, repeats: int = 1) -> Any:
    """The cache of prompts with room for so many tokens in all, each prompt `repeats` times.

    A recurrent model of ours has a state that takes no room. None where it is of another kind, as Mamba's state is.
    """
    if getattr(cache, "is_state", False):
        cache.batch_repeat_interleave(repeats)
        return cache
    if _layers(cache) is None:
        return None
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = _GrowingLayer(layer, room, repeats)
        elif repeats > 1:  # a window is short, and goes on as it is
            layer.batch_repeat_interleave(repeats)
    return cache


def fixed_cache(cache: Any, seen: int, room: int, repeats: int = 1) -> Cache | None:
    """The cache of prompts of `seen` tokens as tensors for `room` tokens, each prompt `repeats` times.

    None where it is of another kind, as the state of a recurrent model is.
    """
    layers = _layers(cache)
    return None if layers is None else Cache(layers=[_FixedLayer(layer, seen, room, repeats) for layer in layers])


def rewrite(fixed: Any, cache: Any, seen: int, repeats: int = 1) -> None:
    """Put other prompts, as many, into a fixed cache."""
    for layer, written in zip(fixed.layers, cache.layers, strict=True):
        layer.write(written, seen, repeats)


def _layers(cache: Any) -> list[Any] | None:
    """Its layers, where all hold keys and values, of all tokens or of a window."""
    if type(cache) is not DynamicCache:
        return None
    known, layers = (DynamicLayer, DynamicSlidingWindowLayer), list[Any](cache.layers)
    return layers if all(type(layer) in known and layer.is_initialized for layer in layers) else None


def _memory(x: Tensor, room: int, repeats: int) -> Tensor:
    """Zeros, because what the mask hides is multiplied with 0 all the same: (B, heads, seen, D) -> (.., room, D)."""
    return x.new_zeros(x.shape[0] * repeats, x.shape[1], room, x.shape[3])


def _written(memory: Tensor, x: Tensor, seen: int, repeats: int) -> Tensor:
    """The memory with x at the end of its first `seen` places."""
    memory[:, :, seen - x.shape[2] : seen] = x.repeat_interleave(repeats, 0)
    return memory
