"""Prompts in clusters, by any embedder: what a chain may take for its states."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid.memory.shots import vectors_of

__all__ = ["clusters_of", "k_means"]

NUM_PASSES = 50


def clusters_of(texts: Sequence[str], embedder: str, number: int, seed: int) -> list[int]:
    """The cluster of each text. embedder: see `vectors_of`."""
    return k_means(vectors_of(texts, embedder), number, seed).tolist()


def k_means(vectors: Tensor, number: int, seed: int) -> Tensor:
    """The nearest of `number` centres for each vector, (N, D) -> (N,) int64; Lloyd's passes from k-means++'s choice.

    The same for the same seed; fewer clusters where there are fewer different vectors.
    Source: Arthur and Vassilvitskii 2007.
    """
    chance = random.Random(seed)
    centres = vectors[chance.randrange(len(vectors))].unsqueeze(0)
    while len(centres) < number:
        far = torch.cdist(vectors, centres).amin(1).square().tolist()
        if not any(far):
            break
        centres = torch.cat([centres, vectors[chance.choices(range(len(far)), weights=far)[0]].unsqueeze(0)])
    nearest = torch.cdist(vectors, centres).argmin(1)
    for _ in range(NUM_PASSES):
        centres = torch.stack(
            [vectors[nearest == i].mean(0) if (nearest == i).any() else centre for i, centre in enumerate(centres)]
        )
        moved = torch.cdist(vectors, centres).argmin(1)
        if torch.equal(moved, nearest):
            break
        nearest = moved
    return nearest
