"""This process among those of its run."""

import os
from importlib.util import find_spec

from hybrid.core import InputError
from hybrid.distributed.config import DistributedConfig
from hybrid.distributed.launch import Place
from hybrid.distributed.world import ALONE, World

__all__ = ["connect"]


def connect(config: DistributedConfig | None = None) -> World:
    """The world of this process, which waits until all others of its run are there; `ALONE` where none was launched.

    Raises InputError where the launcher's variables do not fit together, where processes ask for different engines,
    and where the engine is not installed.
    """
    config, place = config or DistributedConfig(), Place.found()
    if place is None or place.size == 1:
        return ALONE
    if config.engine == "deepspeed" and find_spec("deepspeed") is None:
        raise InputError(
            "config: distributed.engine deepspeed needs DeepSpeed, which is not installed: "
            "pip install hybrid-trainer[deepspeed]"
        )
    # Here: a run of one process loads nothing of it.
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    from hybrid.distributed.ddp import DDP
    from hybrid.distributed.fsdp2 import FSDP2
    from hybrid.distributed.zero import DeepSpeed

    engines = {"auto": DDP, "ddp": DDP, "fsdp2": FSDP2, "deepspeed": DeepSpeed}
    world = engines[config.engine](place, config)
    settings = world.each(lambda: config)
    if other := next((x for x in settings if x != config), None):
        raise InputError(f"the processes of the run have different `distributed` sections: {config} and {other}")
    return world
