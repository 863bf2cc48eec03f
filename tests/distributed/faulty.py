"""A program for several processes: a run of a config in which one process does something at a step."""

import os
import signal
import sys
import time

import torch

from hybrid import HybridConfig, HybridTrainer

FAULTS = {
    "raise": lambda: (_ for _ in ()).throw(ValueError("the data are cursed")),
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(1000),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "none": lambda: None,
}


def main(config: str, fault: str, rank: int, step: int) -> int:
    trainer = HybridTrainer(config=HybridConfig.from_file(config))
    take, loss = trainer.take, trainer.world.loss
    failed = []

    def taken(*args, **kwargs):
        if fault in FAULTS and (trainer.world.rank, trainer.num_steps) == (rank, step):
            FAULTS[fault]()
        return take(*args, **kwargs)

    def lost(*args, **kwargs):
        here = (trainer.world.rank, trainer.num_steps) == (rank, step)
        if fault.startswith("memory") and here and (fault == "memory" or not failed):
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return loss(*args, **kwargs)

    trainer.take, trainer.world.loss = taken, lost
    trainer.train()
    return 0 if trainer.stopped_by is None else 128 + trainer.stopped_by


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3], *map(int, sys.argv[3:5])))
