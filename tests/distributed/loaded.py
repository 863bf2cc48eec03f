"""A program for one process or several: resume a run, and write the state that its optimizer would go on with."""

import sys

import torch
from torch.distributed.tensor import DTensor

from hybrid import HybridTrainer


def main(folder: str, file: str, *overrides: str) -> None:
    trainer = HybridTrainer.resume(folder, overrides)
    state = trainer.world.optimizer_state(trainer.optimizer)["state"]
    whole = {
        number: {key: x.full_tensor() if isinstance(x, DTensor) else x for key, x in of.items()}
        for number, of in state.items()
    }
    with trainer.world.gathered():
        weights = {name: x.detach().clone() for name, x in trainer.policy.named_parameters()}
    if trainer.world.writes:
        torch.save({"state": whole, "weights": weights}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
