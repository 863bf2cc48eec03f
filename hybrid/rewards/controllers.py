"""Rules for the weights of a mixture's components: from weights and numbers to weights, on a simplex with a floor."""

import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from hybrid.rewards.extras import require

__all__ = [
    "balance",
    "check_upgrad",
    "cosines_to_last",
    "covariance_gain",
    "exp3",
    "floored",
    "hedge",
    "min_norm",
    "simplex",
    "upgrad",
]

Weights = list[float]


def floored(weights: Sequence[float], floor: float) -> Weights:
    """The nearest weights, in KL from the given ones, that sum to 1 with none below `floor`.

    Those that would be below stand at the floor, and the others keep their ratios.
    weights: K, at least 0, not all 0.   floor: K * floor <= 1.
    """
    low: set[int] = set()
    while True:
        free = math.fsum(w for i, w in enumerate(weights) if i not in low)
        left = 1 - floor * len(low)
        if not free:  # only weights of 0 are left above the floor, if any
            return [floor if i in low else left / (len(weights) - len(low)) for i in range(len(weights))]
        placed = [floor if i in low else w * left / free for i, w in enumerate(weights)]
        below = {i for i, w in enumerate(placed) if w < floor}
        if not below:
            return placed
        low |= below


def hedge(weights: Sequence[float], gains: Sequence[float], *, eta: float, floor: float) -> Weights:
    """w_i exp(eta gain_i) / sum, then floored.

    Source: multiplicative weights, Freund & Schapire 1997 (A decision-theoretic generalization of on-line learning).
    """
    largest = max(gains)
    return floored([w * math.exp(eta * (gain - largest)) for w, gain in zip(weights, gains, strict=True)], floor)


def covariance_gain(metric: Sequence[float], score: Sequence[float]) -> float:
    """Cov(metric, score) / std(metric): how fast the metric grows, in its standard deviations, for a tilt to the score.

    Where p'(y) is proportional to p(y) exp(eta r(y)), dE[m]/d eta = Cov_p(m, r) at eta = 0. With a score of variance 1
    it is their correlation. 0 where the metric does not vary.
    """
    if len(metric) < 2:
        return 0.0
    mean_m, mean_r = fmean(metric), fmean(score)
    covariance = fmean((m - mean_m) * (r - mean_r) for m, r in zip(metric, score, strict=True))
    std = math.sqrt(fmean((m - mean_m) ** 2 for m in metric))
    return covariance / std if std > 1e-12 * max(1.0, abs(mean_m)) else 0.0


def exp3(weights: Sequence[float], arm: int, gain: float, *, eta: float, floor: float) -> Weights:
    """w_arm exp(eta gain / (K p_arm)) / sum, then floored; p_arm = weights[arm], with which probability it was tried.

    gain: in [-1, 1]. The floor is the exploration: no probability is below it.
    Source: EXP3, Auer et al. 2002 (The nonstochastic multiarmed bandit problem), whose gains lie in [0, 1]: 0 for no
    change leaves the weights as they are, and has the smaller variance.
    """
    gains = [gain / (len(weights) * p) if i == arm else 0.0 for i, p in enumerate(weights)]
    return hedge(weights, gains, eta=eta, floor=floor)


def balance(start: Sequence[float], deviations: Sequence[float], *, floor: float) -> Weights:
    """start_i / deviation_i, over their sum, then floored: each weighted component varies as its start says.

    One that does not vary has nothing to balance, and stands at the floor; where none does, the start is what counts.
    """
    raw = [w / d if d > 0 else 0.0 for w, d in zip(start, deviations, strict=True)]
    return floored(raw if any(raw) else start, floor)


def min_norm(gram: Tensor) -> Weights:
    """The weights on the simplex that minimise w' G w: the shortest convex combination of K gradients.

    gram: (K, K), G_ij = <g_i, g_j>. By pairs: weight goes from the component with the largest derivative to the one
    with the smallest, as far as helps, until no pair gains.
    Source: MGDA, Desideri 2012 (C. R. Acad. Sci. 350), Sener & Koltun 2018 (arXiv:1810.04650).
    """
    products = gram.double()
    weights = torch.full((len(products),), 1 / len(products), dtype=torch.float64)
    scale = float(products.diagonal().max())
    # Each round is linear in the error: 1,000 are far more than a handful of components need.
    for _ in range(1000):
        slope = products @ weights
        to, source = int(slope.argmin()), int(slope.masked_fill(weights <= 0, -math.inf).argmax())
        gain = float(slope[source] - slope[to])
        if gain <= 1e-12 * scale:
            break
        curvature = float(products[to, to] + products[source, source] - 2 * products[to, source])
        step = min(float(weights[source]), gain / curvature if curvature > 0 else math.inf)
        weights[to] += step
        weights[source] -= step
    return simplex(weights)


def check_upgrad() -> None:
    """Raises InputError with what to install where `upgrad` cannot run."""
    for module in ("torchjd", "qpsolvers", "quadprog"):
        require(module, reward="mixture", install="hybrid-trainer[gradients]")


def upgrad(gram: Tensor) -> Weights:
    """The weights of UPGrad: every gradient made to conflict with none, then their mean; scaled to sum to 1.

    gram: (K, K), G_ij = <g_i, g_j>.
    Source: Quinton & Rey 2024 (arXiv:2406.16232), by torchjd.
    """
    check_upgrad()
    from torchjd.aggregation import UPGradWeighting

    return simplex(UPGradWeighting()(gram.double()))


def simplex(weights: Tensor) -> Weights:
    """Weights over their sum, none below 0."""
    kept = weights.double().clamp(min=0)
    numbers: Weights = (kept / kept.sum()).tolist()
    return numbers


def cosines_to_last(gram: Tensor) -> list[float]:
    """Of each gradient but the last its cosine to the last; 0 where one of the two is 0.

    gram: (K + 1, K + 1).
    The one-step meta-gradient: with theta' = theta + lr sum_i w_i g_i, dM(theta')/dw_i = lr <g_i, grad M>.
    """
    norms = gram.double().diagonal().clamp(min=0).sqrt()
    lengths = norms[:-1] * norms[-1]
    cosines: list[float] = torch.where(lengths > 0, gram[:-1, -1] / lengths.clamp(min=1e-300), 0.0).tolist()
    return cosines
