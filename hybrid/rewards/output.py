"""What a reward says about a batch: the scores, and what each reward of the tree had to do with them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

import torch
from torch import Tensor

__all__ = ["Part", "RewardOutput"]


@dataclass
class Part:
    """What one reward of the tree said about a batch of B. None: a row that it failed on or was not asked about.

    raw: its own word.   score: that after its postprocessing, with its fallbacks.   weighted: what it adds to a
    `weighted_sum`, w·score/Σw; elsewhere its score.   counts: invalid, timeouts, cache_hits, truncated and
    whatever else the reward counts.   seconds: what it took, its components included.
    """

    raw: list[float | None]
    score: list[float | None]
    weighted: list[float | None]
    counts: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def metrics(self) -> dict[str, float]:
        """Mean and standard deviation of each of the three over the rows that have one, and the counts."""
        numbers: dict[str, float] = {}
        for name, column in (("raw", self.raw), ("score", self.score), ("weighted", self.weighted)):
            if values := [value for value in column if value is not None]:
                numbers |= {f"{name}_mean": fmean(values), f"{name}_std": pstdev(values)}
        return numbers | self.counts

    def spread_over(self, rows: Sequence[int], num_rows: int) -> "Part":
        """The same for a batch of `num_rows`, of which only `rows` were asked about."""

        def column(values: Iterable[float | None]) -> list[float | None]:
            by_row = dict(zip(rows, values, strict=True))
            return [by_row.get(i) for i in range(num_rows)]

        return Part(column(self.raw), column(self.score), column(self.weighted), self.counts, self.seconds)


class RewardOutput(list[float]):
    """The scores of a batch of B responses: a list of B floats that also knows where they come from.

    Every score is finite, or nan where `valid` is not: only where the spec says `on_error: skip` of the
    whole, or a function of TRL's form says None.
    parts: by name, "outer/inner" where they nest; of a reward without components, its own.
    raw: the scores before the reward's own postprocessing.
    """

    def __init__(self, scores: Iterable[float], raw: list[float | None], parts: dict[str, Part]):
        super().__init__(scores)
        self.raw, self.parts = raw, parts

    @property
    def values(self) -> Tensor:
        """(B,) float32."""
        return torch.tensor(self, dtype=torch.float32)

    @property
    def valid(self) -> Tensor:
        """(B,) bool: the rows that have a score."""
        return ~torch.tensor(self, dtype=torch.float64).isnan()

    @property
    def components(self) -> dict[str, list[float | None]]:
        """The raw scores of each part."""
        return {name: part.raw for name, part in self.parts.items()}

    def metrics(self) -> dict[str, float]:
        """Every part's numbers for the log: "reward/part/raw_mean" and so on, and "seconds_reward/part"."""
        numbers = {f"reward/{name}/{key}": x for name, part in self.parts.items() for key, x in part.metrics().items()}
        return numbers | {f"seconds_reward/{name}": part.seconds for name, part in self.parts.items()}
