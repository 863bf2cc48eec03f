"""One optimizer step out of several microbatches, with the phase's learning rate."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from hybrid.core import Batch, Rollout

__all__ = ["GradientConfig", "Loss", "Rows", "Term", "over_updates", "scaled_lr", "split", "update"]

Rows = TypeVar("Rows", Batch, Rollout)
Loss = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class GradientConfig:
    """What is done to the gradient of an optimizer step, in both phases."""

    max_norm: float = 1.0  # scaled down to this norm where it is longer
    max_skipped: int = 5  # stop the run after so many steps in a row whose loss or gradient is not finite

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise ValueError(f"GradientConfig.max_norm must be > 0, got {self.max_norm}")
        if self.max_skipped < 1:
            raise ValueError(f"GradientConfig.max_skipped must be >= 1, got {self.max_skipped}")


def split(rows: Rows, size: int | None) -> list[Rows]:
    """Microbatches of at most `size` rows; None: all rows in one."""
    size = size or len(rows)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@dataclass(frozen=True)
class Term(Generic[Rows]):
    """One summand of an update's loss: these rows, under this loss.

    loss_of: rows -> (loss, metrics), for the rows and for any part of them. The loss is already divided by the
        count of the WHOLE update, so that the losses of parts, and their gradients, simply add up.
    coef: the factor of the loss.   microbatch_size: rows of one forward and backward; None: all.
    """

    name: str
    rows: Rows
    loss_of: Callable[[Rows], Loss]
    coef: float = 1.0
    microbatch_size: int | None = None


def update(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    terms: Sequence[Term[Any]],
    *,
    max_grad_norm: float = 1.0,
    lr_factor: float = 1.0,
) -> dict[str, float]:
    """Accumulate the gradients of all terms, clip their norm, and step the optimizer once.

        loss = sum over terms of coef * loss_of(rows)

    Returns the step's metrics. Within a term losses are added, `_max` is the maximum, the rest a mean weighted by
    tokens. Then loss (the sum; of several terms also each one's, as NAME_loss), grad_norm (before clipping), lr (of
    the first group), and skipped: 1.0 where the loss or the gradient was not finite, in which case no weight has
    changed.
    """
    optimizer.zero_grad(set_to_none=True)
    metrics: dict[str, float] = {}
    total = 0.0
    for term in terms:
        merged = _accumulate(term)
        total += term.coef * merged["loss"]
        if len(terms) > 1:
            metrics[f"{term.name}_loss"] = merged["loss"]
        metrics |= merged
    grad_norm = float(nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm))
    finite = math.isfinite(grad_norm) and math.isfinite(total)
    with scaled_lr(optimizer, lr_factor):
        lr = optimizer.param_groups[0]["lr"]
        if finite:
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**metrics, "loss": total, "grad_norm": grad_norm, "lr": lr, "skipped": float(not finite)}


def _accumulate(term: Term[Any]) -> dict[str, float]:
    """Add the term's gradient to what is there, microbatch by microbatch. Returns its merged metrics."""
    parts: list[tuple[int, dict[str, Tensor]]] = []
    for microbatch in split(term.rows, term.microbatch_size):
        loss, metrics = term.loss_of(microbatch)
        (term.coef * loss).backward()
        parts.append((microbatch.num_tokens, {"loss": loss.detach(), **metrics}))
    return _merged(parts)


def over_updates(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metrics of several updates as one: means, the maximum for `_max`, and `skipped_updates`, their number.

    Of no update at all, none.
    """
    if not steps:
        return {}
    merged = {
        name: max(step[name] for step in steps) if name.endswith("_max") else fmean(step[name] for step in steps)
        for name in steps[0]
    }
    merged["skipped_updates"] = sum(step["skipped"] for step in steps)
    del merged["skipped"]
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


def _merged(parts: list[tuple[int, dict[str, Tensor]]]) -> dict[str, float]:
    total = max(sum(count for count, _ in parts), 1)
    merged = {}
    for name in parts[0][1]:
        values = [float(metrics[name]) for _, metrics in parts]
        if name.endswith("loss"):
            merged[name] = sum(values)
        elif name.endswith("_max"):
            merged[name] = max(values)
        else:
            merged[name] = sum(count * x for (count, _), x in zip(parts, values, strict=True)) / total
    return merged
