"""The gradient of one update, microbatch by microbatch; smaller ones where the memory asks for it."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor
from torch.amp import GradScaler

from hybrid.core import Record, RunStopped, first_line, is_out_of_memory, microbatches

__all__ = ["Loss", "Metrics", "Term", "accumulate", "on_host"]

Loss = tuple[Tensor, dict[str, Tensor]]
# Of each microbatch what its metrics are means over (`Rows.mean_over`), and what there is to log.
Metrics = list[tuple[float, dict[str, Tensor]]]


@dataclass(frozen=True)
class Term(Generic[Record]):
    """One summand of an update's loss: these rows, under this loss.

    loss_of: rows -> (loss, metrics), for the rows and for any part of them. The loss is already divided by the
        count of the WHOLE update, so that the losses of parts, and their gradients, simply add up.
    coef: the factor of the loss.   microbatch_size: rows of one forward and backward; None: all.
    lr_factor: the factor of the optimizer's learning rate. An update has one rate: of several terms it is the mean of
        their factors, weighted by coef.
    section: of the config, where its microbatch_size stands; "" where it is in none.
    """

    name: str
    rows: Record
    loss_of: Callable[[Record], Loss]
    coef: float = 1.0
    microbatch_size: int | None = None
    lr_factor: float = 1.0
    section: str = ""


def accumulate(
    optimizer: torch.optim.Optimizer, terms: Sequence[Term[Any]], scaler: GradScaler, row_limits: dict[str, int]
) -> list[Metrics]:
    """Leave the gradient of all terms, times the scaler's scale, in the parameters.

    Returns each term's metrics, its loss among them, on the device: nothing waits for them here (`on_host`).
    row_limits: rows of a microbatch that the memory has been found to allow, by the term's name. Where it runs out,
        the term's is halved in there, with a warning, and all terms start anew with the same random numbers: the
        gradient is the one that the smaller microbatches give.
    Raises RunStopped where not even one row at a time fits.
    """
    random_state = _random_state(optimizer)
    while True:
        optimizer.zero_grad(set_to_none=True)
        metrics = []
        for term in terms:
            size = min(term.microbatch_size or len(term.rows), row_limits.get(term.name, len(term.rows)))
            outcome = _attempt(term, size, scaler)
            if isinstance(outcome, str):
                break
            metrics.append(outcome)
        else:
            return metrics
        row_limits[term.name] = _halved(term, size, outcome)
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        _set_random_state(optimizer, random_state)


def _attempt(term: Term[Any], size: int, scaler: GradScaler) -> Metrics | str:
    """Add the term's gradient to what is there. Returns its metrics, or what was said where the memory ran out.

    The error itself ends here: its traceback would keep the failed forward's tensors in memory.
    """
    parts: Metrics = []
    try:
        for microbatch in microbatches(term.rows, size):
            loss, metrics = term.loss_of(microbatch)
            scaler.scale(term.coef * loss).backward()
            parts.append((microbatch.mean_over, {"loss": loss.detach(), **metrics}))
    except RuntimeError as error:
        if is_out_of_memory(error):
            return first_line(error)
        raise
    return parts


def _halved(term: Term[Any], size: int, failure: str) -> int:
    """Half of the microbatch that did not fit, at least 1; says so."""
    if size == 1:
        raise RunStopped(
            f"out of memory with one {term.name} row at a time ({failure}). Shorten the rows (data.max_length, "
            "sampling.max_new_tokens), or set model.gradient_checkpointing=true, model.lora={} or a smaller model.name"
        )
    half = size // 2
    warnings.warn(
        f"out of memory with {size} {term.name} rows at a time; from here on {half}, which gives the same gradient. "
        f"To start with that: {term.section and term.section + '.'}microbatch_size={half}",
        stacklevel=2,
    )
    return half


def on_host(terms: Sequence[Metrics], *others: Tensor) -> tuple[list[dict[str, float]], list[float]]:
    """The terms' metrics and other scalars as numbers, in one read from the device.

    Of a term's microbatches losses are added, `_max` is the maximum, the rest a mean weighted by `Rows.mean_over`.
    """
    device = others[0].device
    scalars = [*(x for parts in terms for _, metrics in parts for x in metrics.values()), *others]
    exact = torch.float32 if device.type == "mps" else torch.float64
    numbers = iter(torch.stack([torch.as_tensor(x, dtype=exact, device=device) for x in scalars]).tolist())
    merged = [
        _merged([(count, {name: next(numbers) for name in metrics}) for count, metrics in parts]) for parts in terms
    ]
    return merged, list(numbers)


def _merged(parts: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    total = sum(count for count, _ in parts) or 1
    merged = {}
    for name in parts[0][1]:
        values = [metrics[name] for _, metrics in parts]
        if name.endswith("loss"):
            merged[name] = sum(values)
        elif name.endswith("_max"):
            merged[name] = max(values)
        else:
            merged[name] = sum(count * x for (count, _), x in zip(parts, values, strict=True)) / total
    return merged


def _random_state(optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor | None]:
    """Of the CPU, and of the GPU that the parameters are on."""
    device = optimizer.param_groups[0]["params"][0].device
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(optimizer: torch.optim.Optimizer, state: tuple[Tensor, Tensor | None]) -> None:
    on_cpu, on_gpu = state
    torch.set_rng_state(on_cpu)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu, optimizer.param_groups[0]["params"][0].device)
