"""All weights in every process, their gradients added up: torch's DistributedDataParallel."""

import warnings
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hybrid.distributed.processes import LossModule, Processes
from hybrid.distributed.world import LossOf

__all__ = ["DDP"]


class DDP(Processes):
    """Every process holds all; the gradients meet in the update's last backward pass."""

    engine = "ddp"
    _module: DistributedDataParallel

    def wrap(self, policy: nn.Module) -> None:
        # An update without PPO does not use the value head: what nobody used has no gradient anywhere.
        with warnings.catch_warnings():
            # Of a name that newer ones have changed.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            self._module = DistributedDataParallel(
                LossModule(policy), find_unused_parameters=True, broadcast_buffers=False
            )

    def loss(self, loss_of: LossOf, rows: Any, *, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        with nullcontext() if last else self._module.no_sync():
            loss, metrics = self._module(loss_of, rows)
        return loss, metrics
