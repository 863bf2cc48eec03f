"""An endless stream of batches that can be resumed from one number."""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from hybrid.core import Batch, Encoded, InputError, Labelled, Pairs
from hybrid.data.pack import collate, pack
from hybrid.data.pairs import Answer, collate_answers, collate_pairs

__all__ = ["AnswerLoader", "Endless", "Loader", "PairLoader"]

Item = TypeVar("Item")
Rows = TypeVar("Rows")

# Beyond this a batch, which repeats examples where there are fewer, fills the memory before it is seen.
MAX_BATCH = 1_000_000


class Endless(ABC, Generic[Item, Rows]):
    """Batches without end: epoch after epoch, each in an order that is a pure function of (seed, epoch).

    Every batch has exactly `batch_size` examples, so one may straddle two epochs; within an epoch every example is
    drawn once. Owns one number, how many examples were drawn: it is the whole state.
    `len(loader)` is the number of batches that cover an epoch.
    """

    def __init__(self, examples: Sequence[Item], batch_size: int, *, seed: int, pad_id: int, shuffle: bool = True):
        if not examples:
            raise InputError(f"a {type(self).__name__} needs at least one example")
        if batch_size < 1:
            raise InputError(f"batch_size must be >= 1, got {batch_size}")
        if batch_size > MAX_BATCH:
            raise InputError(f"batch_size must be at most {MAX_BATCH:,}, got {batch_size:,}")
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.pad_id = pad_id
        self.shuffle = shuffle
        self.position = 0
        self._order: tuple[int, Sequence[int]] = (0, self._epoch_order(0))

    def __len__(self) -> int:
        return math.ceil(len(self.examples) / self.batch_size)

    @property
    def epoch(self) -> int:
        """Full passes over the examples so far."""
        return self.position // len(self.examples)

    @abstractmethod
    def _batch(self, drawn: Sequence[Item]) -> Rows:
        """The examples that were drawn as a batch."""

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        drawn = [self._example(self.position + i) for i in range(self.batch_size)]
        self.position += self.batch_size
        return self._batch(drawn)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]

    def _example(self, position: int) -> Item:
        epoch, index = divmod(position, len(self.examples))
        if epoch != self._order[0]:
            self._order = (epoch, self._epoch_order(epoch))
        return self.examples[self._order[1][index]]

    def _epoch_order(self, epoch: int) -> Sequence[int]:
        indices = range(len(self.examples))
        # Seeded by both as one text: seed + epoch would give seed 1 the order that seed 0 has one epoch later.
        return random.Random(f"{self.seed}/{epoch}").sample(indices, len(indices)) if self.shuffle else indices


class Loader(Endless[Encoded, Batch]):
    """Batches of examples.

    packing_length: pack each batch's examples into as few rows of that many tokens as fit; None: one a row.
    """

    def __init__(
        self,
        examples: Sequence[Encoded],
        batch_size: int,
        *,
        seed: int,
        pad_id: int,
        packing_length: int | None = None,
        shuffle: bool = True,
    ):
        super().__init__(examples, batch_size, seed=seed, pad_id=pad_id, shuffle=shuffle)
        self.packing_length = packing_length

    def _batch(self, drawn: Sequence[Encoded]) -> Batch:
        if self.packing_length is None:
            return collate(drawn, pad_id=self.pad_id)
        return pack(drawn, max_length=self.packing_length, pad_id=self.pad_id)


class PairLoader(Endless[Encoded, Pairs]):
    """Batches of pairs."""

    def _batch(self, drawn: Sequence[Encoded]) -> Pairs:
        return collate_pairs(drawn, pad_id=self.pad_id)


class AnswerLoader(Endless[Answer, Labelled]):
    """Batches of answers that are good or bad."""

    def _batch(self, drawn: Sequence[Answer]) -> Labelled:
        return collate_answers(drawn, pad_id=self.pad_id)
