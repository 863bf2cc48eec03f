"""The one optimizer of both phases, its scheduler, and the watch over steps that had to be skipped."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hybrid.core import InputError, RunStopped, unknown_name
from hybrid.distributed import ALONE, World
from hybrid.objectives.accumulate import Term
from hybrid.objectives.precision import Precision, grad_scaler
from hybrid.objectives.update import GradientConfig, update
from hybrid.optim import optimizer_from, scheduler_from, warmup_steps

__all__ = ["Updater"]

logger = logging.getLogger(__name__)


class Updater:
    """Makes optimizer steps. Owns the optimizer, the scheduler and float16's scaler, and steps them together.

    optimizer, scheduler: config sections.   num_updates: optimizer steps of the run, None where not known.
    precision: what the terms compute in.   world: whose processes share an update's rows; it has the module already.
    on_skip: called with the terms and the metrics of an update that was skipped because it was not finite.
    row_limits: see `accumulate`; what the memory was found to allow holds for the rest of the run.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        gradient: GradientConfig,
        *,
        num_updates: int | None = None,
        precision: Precision = "float32",
        world: World = ALONE,
    ):
        self.module, self.gradient, self.world = module, gradient, world
        if precision == "float16" and not world.scales:
            raise InputError(
                f"model.precision float16 scales its losses, which distributed.engine {world.engine} does not know of: "
                "take bfloat16, or the engine ddp"
            )
        self.optimizer = optimizer_from(module, optimizer)
        world.adopt(self.optimizer, max_norm=gradient.max_norm)
        self.scaler = grad_scaler(precision, next(module.parameters()).device)
        self.row_limits: dict[str, int] = {}
        self.on_skip: Callable[[Sequence[Term[Any]], Mapping[str, float]], None] | None = None
        self.num_updates = num_updates
        self.skipped_in_a_row = 0
        self._section = scheduler
        self._made: list[LRScheduler | None] = []  # empty until the first use fixes the run's length

    def begin(self, num_updates: int | None) -> None:
        """A run of so many optimizer steps: the scheduler starts anew, from the rates that it started from.

        Warns of a warm-up that the run does not outlast.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])
        self.num_updates = num_updates
        self._made.clear()
        warmup = warmup_steps(self._section, self._length)
        if num_updates is not None and 0 < num_updates <= warmup:
            logger.warning(
                "the scheduler warms up for %d optimizer steps, and this run makes %d: the learning rate never reaches "
                "optimizer.lr; lower scheduler.num_warmup_steps, or give scheduler.warmup_ratio", warmup, num_updates
            )  # fmt: skip

    @property
    def _length(self) -> int | None:
        """The run's, where the section does not give one of its own, which goes before it."""
        given = {key.lower() for key in self._section} & {"num_training_steps", "steps_per_epoch"}
        return None if given else self.num_updates

    @property
    def scheduler(self) -> LRScheduler | None:
        """The scheduler over `num_updates` steps as they stand when it is first used."""
        if not self._made:
            self._made.append(scheduler_from(self.optimizer, self._section, num_training_steps=self._length))
        return self._made[0]

    def __call__(self, terms: Sequence[Term[Any]]) -> dict[str, float]:
        """One optimizer step and one of the scheduler; see `update` for the metrics.

        The scheduler counts skipped steps too, so that it ends where the run does.
        Raises RunStopped after `gradient.max_skipped` in a row that were not finite; float16's overflows, which a
        smaller scale mends, are not counted.
        """
        scheduler = self.scheduler  # before the step: it sets the first rate
        metrics = update(
            self.module, self.optimizer, terms, max_grad_norm=self.gradient.max_norm,
            scaler=self.scaler, row_limits=self.row_limits, world=self.world,
        )  # fmt: skip
        if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
            with warnings.catch_warnings():
                # torch's guess at a wrong order, where the run's first update was skipped.
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                scheduler.step()
        if not metrics["skipped"]:
            self.skipped_in_a_row = 0
        elif not metrics.get("overflow"):
            self._count_skipped(terms, metrics)
        return metrics

    def _count_skipped(self, terms: Sequence[Term[Any]], metrics: Mapping[str, float]) -> None:
        self.skipped_in_a_row += 1
        if self.on_skip is not None:
            self.on_skip(terms, metrics)
        if self.skipped_in_a_row >= self.gradient.max_skipped:
            wide = ", set model.precision=bfloat16" if self.scaler.is_enabled() else ""
            raise RunStopped(
                f"{self.skipped_in_a_row} updates in a row had a loss or gradient that is not finite "
                f"(the last: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}); no weight was changed "
                f"by them. Lower optimizer.lr{wide}, or look at the rewards"
            )

    def evaluated(self, metrics: Mapping[str, float], watched: str) -> None:
        """Tell a scheduler that waits for a plateau what the evaluation found."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            if watched not in metrics:
                raise unknown_name("eval.metric", watched, metrics)
            self.scheduler.step(metrics[watched])

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, beside the weights."""
        scheduler = self.scheduler
        return {
            "optimizer": self.world.optimizer_state(self.optimizer),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "num_updates": self.num_updates,
            "skipped_in_a_row": self.skipped_in_a_row,
            "scaler": self.scaler.state_dict(),
            "row_limits": dict(self.row_limits),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.num_updates, self.skipped_in_a_row = state["num_updates"], state["skipped_in_a_row"]
        self.row_limits = dict(state["row_limits"])
        self.scaler.load_state_dict(state["scaler"])
        self._made.clear()
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        # Last: making the scheduler set a rate, and the optimizer's own state holds the one it was at.
        self.world.load_optimizer_state(self.optimizer, state["optimizer"])
