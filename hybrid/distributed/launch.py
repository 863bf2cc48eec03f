"""Who has started this process, and beside how many others; and starting them."""

import logging
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybrid.core import InputError

__all__ = ["Place", "first_speaks", "run_processes", "slurm_variables"]

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run: its number of all, of how many, and its number on its machine."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def found(cls) -> "Place | None":
        """What torchrun, deepspeed's launcher or Slurm's srun say of this process; None where none started it."""
        os.environ.update({k: v for k, v in slurm_variables(os.environ).items() if k not in os.environ})
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return None
        if missing := [name for name in NAMES if name not in os.environ]:
            raise InputError(f"RANK and WORLD_SIZE are set, and {', '.join(missing)} is not: start runs with torchrun")
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if not 0 <= rank < size:
            raise InputError(f"RANK must be below WORLD_SIZE, got {rank} of {size}")
        return cls(rank, size, int(os.environ.get("LOCAL_RANK", rank)))


def slurm_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables as srun's tell them; none outside a step of several tasks.

    The address is that of the step's first machine. Source: srun's manual, "Output environment variables".
    """
    # SLURM_NTASKS is of the job: an sbatch script, which is one process, has it as well.
    if "RANK" in environ or int(environ.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return {}
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "localhost"))
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": _first_node(nodes),
        "MASTER_PORT": str(29500 + int(environ.get("SLURM_JOB_ID", 0)) % 1000),
    }


def _first_node(nodes: str) -> str:
    """ "gpu[03-07,9],cpu1" -> "gpu03"."""
    name, bracket, numbers = nodes.partition("[")
    if not bracket or "," in name:
        return name.partition(",")[0]
    return name + numbers.partition("]")[0].partition(",")[0].partition("-")[0]


def first_speaks() -> None:
    """Let the first process say what is wrong for all: its end is the others', before they come back from here."""
    if int(os.environ.get("RANK", 0)):
        time.sleep(2)


def run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run `hybrid` with the arguments in so many processes of this machine, by torchrun; its exit status.

    The first process to fail gives the status, and ends the others.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if count < 1:
        raise InputError(f"--nproc must be at least 1, got {count}")
    # Its processes say what went wrong themselves.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # torch's hint, of each process and each model, that an update had a use for all weights.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Each of them would take all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex, max_restarts=0, monitor_interval=0.5,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "hybrid", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        # A signal's number is negative here, and 128 more in a shell.
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stopped:
        # Handed on to the processes, which have ended by now.
        return 128 + int(stopped.sigval)
    return 0
