"""Optimizers and schedulers by name, over parameter groups that decay what should decay."""

from hybrid.optim.groups import parameter_groups
from hybrid.optim.keys import Known
from hybrid.optim.listing import listing, listing_markdown
from hybrid.optim.optimizer import (
    check_optimizer,
    check_sharing,
    known_optimizers,
    make_optimizer,
    optimizer_from,
    register_optimizer,
)
from hybrid.optim.scheduler import (
    check_scheduler,
    known_schedulers,
    make_scheduler,
    plateau_mode,
    register_scheduler,
    scheduler_from,
    warmup_steps,
)

__all__ = [
    "Known",
    "check_optimizer",
    "check_scheduler",
    "check_sharing",
    "known_optimizers",
    "known_schedulers",
    "listing",
    "listing_markdown",
    "make_optimizer",
    "make_scheduler",
    "optimizer_from",
    "parameter_groups",
    "plateau_mode",
    "register_optimizer",
    "register_scheduler",
    "scheduler_from",
    "warmup_steps",
]
