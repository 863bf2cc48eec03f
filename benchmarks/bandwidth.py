"""The bandwidth of this machine's memory, as a copy has it."""

import time
from statistics import median

import torch

__all__ = ["copy_bandwidth"]

# Of them one is timed, so that a GPU is waited for once only.
COPIES = 4


def copy_bandwidth(device: str, mib: int, *, rounds: int = 9) -> float:
    """Bytes read and written a second by copies of so many MiB, the median.   device: cpu or cuda."""
    source = torch.zeros(mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = []
    for _ in range(rounds):
        _wait(device)
        began = time.perf_counter()
        for _ in range(COPIES):
            target.copy_(source)
        _wait(device)
        times.append(time.perf_counter() - began)
    return 2 * COPIES * source.nbytes / median(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
