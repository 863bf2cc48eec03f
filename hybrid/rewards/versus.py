"""Two answers to one prompt, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from hybrid.rewards.base import Reward, RewardError

__all__ = ["Compares", "Versus", "mean_of_orders"]


@runtime_checkable
class Compares(Protocol):
    """A reward that can also say which of two answers is the better."""

    def comparison(self) -> Reward:
        """A reward whose item is a `Versus`: 1 where the response is better, 0.5 for a draw, 0 where the other is."""


@dataclass(frozen=True)
class Versus:
    """other: the answer that a response is held against.   item: the sample's own."""

    other: str
    item: Any = None


def mean_of_orders(
    first: Sequence[float | RewardError], second: Sequence[float | RewardError]
) -> list[float | RewardError]:
    """What to make of both orders' verdicts on the response: their mean, or the error of one."""
    return [
        a if isinstance(a, RewardError) else b if isinstance(b, RewardError) else (a + b) / 2
        for a, b in zip(first, second, strict=True)
    ]
