"""Learning-rate schedules as factors: step -> what every group's base rate is multiplied by.

Everywhere: t the step (0 before the first), N the `total` steps, W the `warmup` steps of them, and
p = (t - W) / (N - W), held in [0, 1]: past N the last value stays. In the warm-up the factor is t / W.
Source: transformers/optimization.py, which these equal for t <= N.
"""

from math import cos, pi, sqrt

__all__ = [
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_with_restarts",
    "falling",
    "inverse_sqrt",
    "linear",
    "polynomial",
    "warmup_stable_decay",
]


def constant(step: int) -> float:
    """1."""
    return 1.0


def constant_with_warmup(step: int, *, warmup: int) -> float:
    """1 after the warm-up."""
    return _warm(step, warmup) if step < warmup else 1.0


def linear(step: int, *, total: int, warmup: int) -> float:
    """1 - p."""
    return _warm(step, warmup) if step < warmup else 1 - _progress(step, total, warmup)


def inverse_sqrt(step: int, *, warmup: int, timescale: float | None) -> float:
    """sqrt(S / (t - W + S)), with S the timescale: W where it is None, or 10000 without a warm-up."""
    if step < warmup:
        return _warm(step, warmup)
    scale = timescale or warmup or 10_000
    return sqrt(scale / (step - warmup + scale))


def cosine(step: int, *, total: int, warmup: int, num_cycles: float, floor: float = 0.0) -> float:
    """floor + (1 - floor) (1 + cos(2 pi c p)) / 2, with c the number of cycles: a half falls once."""
    if step < warmup:
        return _warm(step, warmup)
    return floor + (1 - floor) * (1 + cos(2 * pi * num_cycles * _progress(step, total, warmup))) / 2


def cosine_with_restarts(step: int, *, total: int, warmup: int, num_cycles: float) -> float:
    """(1 + cos(pi (c p mod 1))) / 2, and 0 from the end on."""
    if step < warmup:
        return _warm(step, warmup)
    progress = _progress(step, total, warmup)
    return 0.0 if progress >= 1 else (1 + cos(pi * (num_cycles * progress % 1))) / 2


def polynomial(step: int, *, total: int, warmup: int, power: float, end: float) -> float:
    """end + (1 - end) (1 - p)^power."""
    if step < warmup:
        return _warm(step, warmup)
    return float(end + (1 - end) * (1 - _progress(step, total, warmup)) ** power)


def warmup_stable_decay(
    step: int,
    *,
    total: int,
    warmup: int,
    num_stable_steps: int | None,
    num_decay_steps: int,
    warmup_type: str,
    decay_type: str,
    min_lr_ratio: float,
    num_cycles: float,
) -> float:
    """From m up to 1 over the warm-up, 1 while stable, down to m over the decay; m is `min_lr_ratio`.

        rise(x): x, (1 - cos(pi x)) / 2 or 1 - sqrt(1 - x)    by `warmup_type`: linear, cosine, 1-sqrt
        fall(x): 1 - x, (1 + cos(2 pi c x)) / 2 or 1 - sqrt(x)    by `decay_type`

    num_stable_steps: None: what the warm-up and the decay leave of the total.
    Source: Hu et al. 2024 (arXiv:2404.06395), section 4.
    """
    stable = max(total - warmup - num_decay_steps, 0) if num_stable_steps is None else num_stable_steps
    if step < warmup:
        x = step / warmup
        shape = {"linear": x, "cosine": (1 - cos(pi * x)) / 2, "1-sqrt": 1 - sqrt(1 - x)}[warmup_type]
    elif step < warmup + stable:
        return 1.0
    elif step < warmup + stable + num_decay_steps:
        x = (step - warmup - stable) / num_decay_steps
        shape = {"linear": 1 - x, "cosine": (1 + cos(2 * pi * num_cycles * x)) / 2, "1-sqrt": 1 - sqrt(x)}[decay_type]
    else:
        shape = 0.0
    return min_lr_ratio + (1 - min_lr_ratio) * shape


def falling(step: int, *, total: int, floor: float) -> float:
    """floor + (1 - floor) max(0, 1 - t / N)."""
    return floor + (1 - floor) * max(0.0, 1 - step / total)


def _warm(step: int, warmup: int) -> float:
    return step / warmup


def _progress(step: int, total: int, warmup: int) -> float:
    """p; it is 1 at once where the warm-up fills the total."""
    return min(1.0, (step - warmup) / (total - warmup)) if total > warmup else 1.0
