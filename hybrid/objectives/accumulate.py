"""The gradient of one update, microbatch by microbatch; smaller ones where the memory asks for it."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler

from hybrid.core import Record, RunStopped, first_line, is_out_of_memory, microbatches
from hybrid.distributed import ALONE, World

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


class Job(NamedTuple):
    """One forward and backward pass. term: its number.   factor: 0 for rows that only keep step with the others'."""

    term: int
    rows: Any
    factor: float = 1.0


class Failure(NamedTuple):
    """Where the memory ran out. term: its number.   said: in what words."""

    term: int
    said: str


def accumulate(
    optimizer: torch.optim.Optimizer,
    terms: Sequence[Term[Any]],
    scaler: GradScaler,
    row_limits: dict[str, int],
    world: World = ALONE,
) -> list[Metrics]:
    """Leave the gradient of all terms, times the scaler's scale, in the parameters.

    Returns each term's metrics, its loss among them, on the device: nothing waits for them here (`on_host`).
    row_limits: rows of a microbatch that the memory has been found to allow, by the term's name. Where it runs out,
        the term's is halved in there, with a warning, and all terms start anew with the same random numbers: the
        gradient is the one that the smaller microbatches give.
    world: whose processes share each term's rows; the gradient is of all, the metrics are of this one's.
    Raises RunStopped where not even one row at a time fits.
    """
    device = terms[0].rows.attention_mask.device
    random_state = _random_state(device)
    while True:
        world.drop(optimizer)
        sizes = [
            min(term.microbatch_size or len(term.rows), row_limits.get(term.name, len(term.rows))) for term in terms
        ]
        passes = [job for n, term in enumerate(terms) for job in _jobs(n, term.rows, sizes[n], world)]
        with world.own_randomness(device):
            outcome = _attempt(terms, passes, scaler, world)
        if not isinstance(outcome, Failure):
            return outcome
        failed, size = terms[outcome.term], sizes[outcome.term]
        row_limits[failed.name] = _halved(failed, min(size, world.largest(len(failed.rows))), outcome.said)
        world.drop(optimizer)
        torch.cuda.empty_cache()
        _set_random_state(device, random_state)


def _jobs(term: int, rows: Any, size: int, world: World) -> list[Job]:
    """This process's microbatches of a term's rows, as many as that process has which has most."""
    if world.size == 1:
        return [Job(term, part) for part in microbatches(rows, size)]
    share = world.share(len(rows))
    own = microbatches(rows[share], size) if share.start < share.stop else []
    idle = -(-world.largest(len(rows)) // size) - len(own)
    return [Job(term, part) for part in own] + [Job(term, rows[:1], factor=0.0)] * idle


def _attempt(
    terms: Sequence[Term[Any]], jobs: Sequence[Job], scaler: GradScaler, world: World
) -> list[Metrics] | Failure:
    """Add the terms' gradients to what is there. Returns this process's metrics, or what failed in any.

    The error itself ends here: its traceback would keep the failed forward's tensors in memory.
    """
    metrics: list[Metrics] = [[] for _ in terms]
    failure: Failure | None = None
    for number, job in enumerate(jobs, start=1):
        term, last = terms[job.term], number == len(jobs)
        # In the last pass the processes' gradients meet: before it one that has none can still say so.
        if last and world.size > 1 and (told := world.first(failure)) is not None:
            return told
        if failure is not None:
            continue
        try:
            loss, found = world.loss(term.loss_of, job.rows, last=last)
            world.backward(scaler.scale(job.factor * term.coef * loss))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if (last and world.size > 1) or not world.retries:
                raise RunStopped(
                    f"out of memory with {len(job.rows)} {term.name} rows at a time ({first_line(error)}), while other "
                    f"processes wait for this one: set {_setting(term)} lower, or model.gradient_checkpointing=true"
                ) from None
            failure = Failure(job.term, first_line(error))
        else:
            if job.factor:
                metrics[job.term].append((job.rows.mean_over, {"loss": loss.detach(), **found}))
    return failure or metrics


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
        f"To start with that: {_setting(term)}={half}",
        stacklevel=2,
    )
    return half


def _setting(term: Term[Any]) -> str:
    """Where the config says how many of a term's rows go through one forward."""
    return f"{term.section and term.section + '.'}microbatch_size"


def on_host(
    terms: Sequence[Metrics], *others: Tensor, world: World = ALONE
) -> tuple[list[dict[str, float]], list[float]]:
    """The terms' metrics, of all processes, and other scalars as numbers, in one read from the device.

    Of a term's microbatches losses are added, `_max` is the maximum, the rest a mean weighted by `Rows.mean_over`.
    """
    device = others[0].device
    scalars = [*(x for parts in terms for _, metrics in parts for x in metrics.values()), *others]
    exact = torch.float32 if device.type == "mps" else torch.float64
    numbers = iter(torch.stack([torch.as_tensor(x, dtype=exact, device=device) for x in scalars]).tolist())
    own = [[(count, {name: next(numbers) for name in metrics}) for count, metrics in parts] for parts in terms]
    of_all = world.each(lambda: own)
    return [_merged(list(chain(*parts))) for parts in zip(*of_all, strict=True)], list(numbers)


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


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of the CPU, and of the GPU that the rows are on."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    on_cpu, on_gpu = state
    torch.set_rng_state(on_cpu)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu, device)
