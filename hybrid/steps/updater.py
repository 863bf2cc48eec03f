"""The one optimizer of both phases, its scheduler, and the watch over steps that had to be skipped."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hybrid.core import unknown_name
from hybrid.optim import optimizer_from, scheduler_from
from hybrid.steps.update import GradientConfig, Term, update

__all__ = ["Updater"]


class Updater:
    """Makes optimizer steps. Owns the optimizer and the scheduler, and steps the two together.

    optimizer, scheduler: config sections.   num_updates: optimizer steps of the run, None where not known.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        gradient: GradientConfig,
        *,
        num_updates: int | None = None,
    ):
        self.module, self.gradient = module, gradient
        self.optimizer = optimizer_from(module, optimizer)
        self.num_updates = num_updates
        self.skipped_in_a_row = 0
        self._section = scheduler
        self._made: list[LRScheduler | None] = []  # empty until the first use fixes the run's length

    @property
    def scheduler(self) -> LRScheduler | None:
        """The scheduler over `num_updates` steps as they stand when it is first used."""
        if not self._made:
            # The section's own length, where it gives one, goes before the run's.
            given = {key.lower() for key in self._section} & {"num_training_steps", "steps_per_epoch"}
            length = None if given else self.num_updates
            self._made.append(scheduler_from(self.optimizer, self._section, num_training_steps=length))
        return self._made[0]

    def __call__(self, terms: Sequence[Term[Any]], *, lr_factor: float = 1.0) -> dict[str, float]:
        """One optimizer step and one of the scheduler; see `update` for the metrics.

        Raises FloatingPointError after `gradient.max_skipped` steps in a row that were not finite.
        """
        scheduler = self.scheduler  # before the step: it sets the first rate
        metrics = update(
            self.module, self.optimizer, terms, max_grad_norm=self.gradient.max_norm, lr_factor=lr_factor
        )  # fmt: skip
        if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics["skipped"] else 0
        if self.skipped_in_a_row >= self.gradient.max_skipped:
            raise FloatingPointError(
                f"{self.skipped_in_a_row} updates in a row had a loss or gradient that is not finite "
                f"(the last: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}); no weight was changed "
                "by them. Lower optimizer.lr, or look at the rewards"
            )
        return metrics

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
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "num_updates": self.num_updates,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.num_updates, self.skipped_in_a_row = state["num_updates"], state["skipped_in_a_row"]
        self._made.clear()
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        # Last: making the scheduler set a rate, and the optimizer's own state holds the one it was at.
        self.optimizer.load_state_dict(state["optimizer"])
