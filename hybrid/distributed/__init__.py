"""Many processes: the only room that knows ranks. Without a launcher `World` is one process, and the oracle."""

from hybrid.distributed.config import DistributedConfig
from hybrid.distributed.connect import connect
from hybrid.distributed.launch import first_speaks, run_processes
from hybrid.distributed.world import ALONE, World

__all__ = ["ALONE", "DistributedConfig", "World", "connect", "first_speaks", "run_processes"]
