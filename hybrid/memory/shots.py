"""Past good answers in front of a prompt: a few-shot memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hybrid.core import IGNORE, Encoded, InputError, load_object
from hybrid.memory.visits import Kept

__all__ = ["Nearness", "shot_ids", "vectors_of", "with_shots"]


def vectors_of(texts: Sequence[str], embedder: str) -> Tensor:
    """(N, D) float64. embedder: "module:name" of a function, texts -> (N, D) numbers."""
    embed: Callable[[list[str]], Any] = load_object(embedder, what="memory.embedder")
    vectors = torch.as_tensor(embed(list(texts)), dtype=torch.float64)
    if vectors.dim() != 2 or len(vectors) != len(texts):
        raise InputError(
            f"memory.embedder {embedder!r} must give each of {len(texts)} texts a vector, got {tuple(vectors.shape)}"
        )
    return vectors


class Nearness:
    """Which texts are nearest in meaning, by the cosine of an embedder's vectors, which it keeps."""

    def __init__(self, embedder: str):
        self.embedder = embedder
        self._units: dict[str, Tensor] = {}

    def nearest(self, text: str, others: Mapping[str, str], number: int) -> list[str]:
        """The names of the others, {name: text}, that are nearest to the text, the nearest first."""
        if not others:
            return []
        cosine = torch.stack([self._unit(other) for other in others.values()]) @ self._unit(text)
        names = list(others)
        return [names[i] for i in cosine.argsort(descending=True, stable=True)[:number].tolist()]

    def _unit(self, text: str) -> Tensor:
        if text not in self._units:
            # Alone, so that its vector is the same to the last bit whatever else was asked: a resumed run asks less.
            self._units[text] = normalize(vectors_of([text], self.embedder)[0], dim=0)
        return self._units[text]


def shot_ids(kept: Kept, eos_id: int | None = None) -> tuple[int, ...]:
    """A prompt, without what once stood in front of it, its answer, and EOS where that has none at its end."""
    ids = kept.prompt[kept.num_shots :] + kept.response
    return ids if eos_id is None or ids[-1] == eos_id else (*ids, eos_id)


def with_shots(example: Encoded, nearest: Iterable[Kept], room: int, eos_id: int | None = None) -> Encoded:
    """The example behind as many of these answers as fit into `room` tokens, the nearest one next to it.

    Each stands there as the tokens that it was drawn as, and ends with EOS. Nothing of it is trained.
    """
    front: tuple[int, ...] = ()
    for kept in nearest:
        ids = shot_ids(kept, eos_id)
        if len(ids) + len(front) <= room:
            front = ids + front
    return _behind(front, example) if front else example


def _behind(front: tuple[int, ...], example: Encoded) -> Encoded:
    return replace(
        example,
        input_ids=front + example.input_ids,
        labels=(IGNORE,) * len(front) + example.labels,
        prompt_ids=front + example.prompt_ids,
        num_shots=len(front),
        rejected=None if example.rejected is None else _behind(front, example.rejected),
    )
