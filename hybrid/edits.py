"""What of a run's config.yaml may be edited before the run is resumed."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrid.config import HybridConfig
from hybrid.core import InputError

__all__ = ["MAY_CHANGE", "check_edits"]

logger = logging.getLogger(__name__)

# When a run measures, saves, shows and gives up, and what only costs time or memory. All else is what it learns: a
# checkpoint's optimizer, scheduler, order of data and random streams belong to it.
MAY_CHANGE = (
    "checkpoint",
    "distributed",
    "eval.every",
    "eval.patience",
    "eval.min_delta",
    "kl.limit",
    "kl.patience",
    "gradient.max_skipped",
    "model.compile",
    "model.gradient_checkpointing",
    "model.head_memory",
    "ppo.microbatch_size",
    "sft.microbatch_size",
    "rollout.cuda_graphs",
    "rollout.engine",
    "rollout.shadow",
    "rollout.vllm",
    "run.trackers",
    "run.output",
)


def check_edits(saved: HybridConfig, config: HybridConfig, checkpoint: Path) -> None:
    """Say what a resumed run does otherwise than before, a line for each key.

    saved: the config that `checkpoint` was written with.   config: the one that the run is to go on with.
    Raises InputError, with all of them, where keys differ that are not in MAY_CHANGE.
    """
    before, after = _leaves(saved.written()), _leaves(config.written())
    changed = {
        key: f"{key} {before.get(key)!r} → {after.get(key)!r}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    }
    fixed = [line for key, line in changed.items() if not _may_change(key)]
    if fixed:
        raise InputError(
            f"a resumed run cannot change {', '.join(fixed)} (as {str(checkpoint)!r} has it → as asked); put it back "
            f"in its config.yaml, or start a new run from these weights: model.name={checkpoint / 'model'}"
        )
    for key, line in changed.items():
        if key != "run.output":  # the folder was moved
            logger.warning("resumed from %s with a change: %s", checkpoint.name, line)


def _may_change(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)


def _leaves(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Every value by its dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and value
        found |= _leaves(value, f"{path}{key}.") if inner else {f"{path}{key}": value}
    return found
