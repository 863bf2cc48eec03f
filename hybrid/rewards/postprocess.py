"""What is done to a reward's scores after it has spoken, in the order the spec lists it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from hybrid.core import InputError, Registry

__all__ = ["Clip", "EMANormalize", "Postprocess", "Scale", "postprocesses"]

postprocesses: Registry[Callable[..., Any]] = Registry("postprocess")


class Postprocess:
    """One step: B finite scores in, B scores out. A step that remembers overrides the two state methods."""

    remembers: ClassVar[bool] = False  # a single score so large that it drowns the others would do so for long

    def __call__(self, scores: list[float]) -> list[float]:
        raise NotImplementedError(f"{type(self).__name__} must implement __call__")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""


@postprocesses.register("clip")
@dataclass(frozen=True)
class Clip(Postprocess):
    """Scores kept in [min, max]."""

    min: float = 0.0
    max: float = 1.0

    def __post_init__(self) -> None:
        _check_finite(min=self.min, max=self.max)
        if self.min > self.max:
            raise InputError(f"min must be at most max ({self.max}), got {self.min}")

    def __call__(self, scores: list[float]) -> list[float]:
        return [min(max(score, self.min), self.max) for score in scores]


@postprocesses.register("scale")
@dataclass(frozen=True)
class Scale(Postprocess):
    """mul · score + add."""

    mul: float = 1.0
    add: float = 0.0

    def __post_init__(self) -> None:
        _check_finite(mul=self.mul, add=self.add)

    def __call__(self, scores: list[float]) -> list[float]:
        return [self.mul * score + self.add for score in scores]


@postprocesses.register("ema_normalize")
@dataclass
class EMANormalize(Postprocess):
    """Scores measured from their running mean, in running standard deviations.

        on the first score x:  m = x, v = 1
        on every score x:      m = d m + (1 - d) x,  v = d v + (1 - d) (x - m)²,  (x - m) / √(v + eps)

    A batch is fed in order. m and v are saved in checkpoints; a score that failed never enters them.
    """

    remembers = True

    decay: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise InputError(f"decay must lie in [0, 1], got {self.decay}")
        if not 0 < self.eps < math.inf:
            raise InputError(f"eps must be > 0, got {self.eps}")
        self._mean: float | None = None
        self._var = 1.0

    def __call__(self, scores: list[float]) -> list[float]:
        return [self._normalized(score) for score in scores]

    def _normalized(self, x: float) -> float:
        # No overflow: scores are float32 numbers, and these are Python's doubles.
        d = self.decay
        self._mean = d * (x if self._mean is None else self._mean) + (1 - d) * x
        self._var = d * self._var + (1 - d) * (x - self._mean) ** 2
        return (x - self._mean) / math.sqrt(self._var + self.eps)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean, "var": self._var}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mean, var = state["mean"], state["var"]
        if not (mean is None or isinstance(mean, float)) or not isinstance(var, float):
            raise ValueError(f"ema_normalize: mean and var must be numbers, got {mean!r} and {var!r}")
        self._mean, self._var = mean, var


def _check_finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise InputError(f"{name} must be finite, got {value}")
