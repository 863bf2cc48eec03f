"""Running mean and deviation of a reward's scores."""

import math
from collections.abc import Sequence
from statistics import fmean

__all__ = ["Moments"]


class Moments:
    """Mean m and variance v of scores, the newer batches counting more.

        first batch    m = mean(x),  v = var(x)
        every other    delta = mean(x) - m,  m += (1 - d) delta,  v = d v + (1 - d) var(x) + d (1 - d) delta^2

    the exact moments of the old scores with weight d and the new ones with 1 - d.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.mean = self.variance = 0.0
        self.is_known = False

    def take(self, scores: Sequence[float]) -> None:
        """A batch's scores; none change nothing."""
        if not scores:
            return
        mean = fmean(scores)
        variance = fmean((x - mean) ** 2 for x in scores)
        if not self.is_known:
            self.mean, self.variance, self.is_known = mean, variance, True
            return
        kept, new, delta = self.decay, 1 - self.decay, mean - self.mean
        self.mean += new * delta
        self.variance = kept * self.variance + new * variance + kept * new * delta**2

    @property
    def deviation(self) -> float:
        """The standard deviation; 0 where it is no more than rounding."""
        deviation = math.sqrt(self.variance)
        return deviation if deviation > 1e-9 * abs(self.mean) else 0.0

    def standardised(self, score: float) -> float:
        """(score - mean) / deviation; 0 where the scores have not varied."""
        return (score - self.mean) / self.deviation if self.deviation else 0.0

    def state(self) -> list[float]:
        """Mean and variance; nothing before the first batch."""
        return [self.mean, self.variance] if self.is_known else []

    def load(self, state: Sequence[float]) -> None:
        """Take up what `state` gave."""
        self.is_known = bool(state)
        self.mean, self.variance = state or (0.0, 0.0)
