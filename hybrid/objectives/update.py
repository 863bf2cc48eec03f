"""One optimizer step out of several terms, with the phase's learning rate; none where it is not finite."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler

from hybrid.distributed import ALONE, World
from hybrid.objectives.accumulate import Term, accumulate, on_host

__all__ = ["GradientConfig", "over_updates", "scaled_lr", "update"]


@dataclass(frozen=True)
class GradientConfig:
    """What is done to the gradient of an optimizer step, in both phases."""

    max_norm: float = 1.0  # scaled down to this norm where it is longer
    max_skipped: int = 5  # stop the run after so many updates in a row whose loss or gradient is not finite

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise ValueError(f"GradientConfig.max_norm must be > 0, got {self.max_norm}")
        if self.max_skipped < 1:
            raise ValueError(f"GradientConfig.max_skipped must be >= 1, got {self.max_skipped}")


def update(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    terms: Sequence[Term[Any]],
    *,
    max_grad_norm: float = 1.0,
    scaler: GradScaler | None = None,
    row_limits: dict[str, int] | None = None,
    world: World = ALONE,
) -> dict[str, float]:
    """Accumulate the gradients of all terms, clip their norm, and step the optimizer once.

        loss = sum over terms of coef * loss_of(rows)
        rate = lr * mean over terms, weighted by coef, of lr_factor

    scaler: of float16's losses; None: no scaling.   row_limits: see `accumulate`, which may lower them.
    world: whose processes share the rows, and have the same metrics and weights afterwards.
    Returns the terms' metrics (of a name that several have, as NAME/metric), then loss (the sum; of several terms also
    each one's, as NAME_loss), grad_norm (before clipping), lr (of the first group), and skipped: 1.0 where the loss or
    the gradient was not finite, in which case no weight and no state of the optimizer has changed. With a scaler also
    loss_scale, and overflow: 1.0 where the gradient alone was not finite and the scale has been halved for it, which
    float16 needs now and then.
    """
    scaler = scaler or GradScaler(enabled=False)
    of_terms = accumulate(optimizer, terms, scaler, {} if row_limits is None else row_limits, world)
    scaler.unscale_(optimizer)
    norm = world.grad_norm(module)
    # What to do with the gradient is decided on the host: the one place of an update that waits for a GPU.
    merged, (grad_norm,) = on_host(of_terms, norm, world=world)
    metrics = _named_apart(terms, merged)
    loss = sum(term.coef * of_term["loss"] for term, of_term in zip(terms, merged, strict=True))
    finite = math.isfinite(grad_norm) and math.isfinite(loss)
    total = sum(term.coef for term in terms)
    with scaled_lr(optimizer, sum(term.coef / total * term.lr_factor for term in terms)):
        lr = optimizer.param_groups[0]["lr"]
        if finite:
            world.step(module, optimizer, norm, max_grad_norm)
    world.drop(optimizer)
    if scaler.is_enabled():
        scale = scaler.get_scale()
        overflow = not finite and math.isfinite(loss) and scale > 1
        # What is no overflow is no smaller scale's to mend, and leaves it alone.
        scaler.update(None if finite or overflow else scale)
        metrics |= {"loss_scale": scale, "overflow": float(overflow)}
    return {**metrics, "loss": loss, "grad_norm": grad_norm, "lr": lr, "skipped": float(not finite)}


def _named_apart(terms: Sequence[Term[Any]], merged: Sequence[dict[str, float]]) -> dict[str, float]:
    """The terms' metrics in one; what several of them have is told apart as NAME/metric."""
    counts = Counter(name for of_term in merged for name in of_term)
    metrics: dict[str, float] = {}
    for term, of_term in zip(terms, merged, strict=True):
        if len(terms) > 1:
            metrics[f"{term.name}_loss"] = of_term["loss"]
        for name, value in of_term.items():
            if name != "loss":
                metrics[name if counts[name] == 1 else f"{term.name}/{name}"] = value
    return metrics


def over_updates(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metrics of several updates as one: means, the maximum for `_max`, and `skipped_updates`, their number.

    Skipped ones count for nothing else, unless all were; what only some of them have is of those. Of no update at all,
    none.
    """
    if not steps:
        return {}
    made = [step for step in steps if not step["skipped"]] or steps
    merged = {}
    for name in dict.fromkeys(name for step in made for name in step):
        values = [step[name] for step in made if name in step]
        merged[name] = max(values) if name.endswith("_max") else fmean(values)
    merged["skipped_updates"] = sum(step["skipped"] for step in steps)
    del merged["skipped"]
    if "overflow" in merged:
        merged["overflow"] = sum(step["overflow"] for step in steps)
    return merged


@contextmanager
def scaled_lr(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """Every group's learning rate times `factor` inside the block; a scheduler never sees the factor."""
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
