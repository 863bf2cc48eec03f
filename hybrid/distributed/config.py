"""What a run says of its processes."""

from dataclasses import dataclass
from typing import Literal

from hybrid.core import InputError

__all__ = ["DistributedConfig"]


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run share its work. Of one process nothing of it is used.

    engine: who keeps which weights. ddp: all of them in every process. fsdp2: each process a part of weights, gradients
        and optimizer, by torch's `fully_shard`. deepspeed: by DeepSpeed's ZeRO, its own optimizer states (stage 1),
        gradients too (2), or weights too (3). auto: ddp.
    """

    engine: Literal["auto", "ddp", "fsdp2", "deepspeed"] = "auto"
    zero_stage: int = 2  # of deepspeed: 1, 2 or 3
    timeout: float = 45.0  # seconds after which a process that stands still, or is not heard of, ends the run

    def __post_init__(self) -> None:
        if self.zero_stage not in (1, 2, 3):
            raise InputError(f"DistributedConfig.zero_stage must be 1, 2 or 3, got {self.zero_stage}")
        if not self.timeout > 0:
            raise InputError(f"DistributedConfig.timeout must be > 0 seconds, got {self.timeout}")
