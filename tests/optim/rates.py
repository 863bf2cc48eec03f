"""An optimizer with two rates, and the rates that a schedule gives it."""

import torch
from torch import nn

BASES = (2e-3, 8e-3)


def optimizer(class_=torch.optim.AdamW, **arguments):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": base} for base in BASES]
    return class_(groups, lr=BASES[0], **arguments)


def rates(optimizer, scheduler, steps):
    """(steps + 1) x groups: the rates from step 0 on."""
    listed = [[group["lr"] for group in optimizer.param_groups]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        listed.append([group["lr"] for group in optimizer.param_groups])
    return torch.tensor(listed, dtype=torch.float64)
