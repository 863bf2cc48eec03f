"""The fixed table of launch configurations: which tile a kernel takes on which GPU. Nothing is tuned at run time.

A tile is `lanes` x `width` columns of one row. `width` neighbouring columns are one thread's vector (8 bfloat16 are
the 16 bytes of the widest load), and each of the `lanes` keeps its own running statistics, so a loop over tiles
needs no exchange between threads. `lanes` / (32 * num_warps) vectors are in flight per thread.
"""

import os
from dataclasses import dataclass
from functools import cache

import torch

__all__ = ["VECTOR", "Config", "config_for", "shipped_configs"]

VECTOR = 8  # columns of a thread's vector: 16 bytes of bfloat16, twice 16 of float32


@dataclass(frozen=True)
class Config:
    """Launch shape of one kernel; programs are one row each."""

    lanes: int
    num_warps: int
    width: int = VECTOR

    @property
    def columns(self) -> int:
        return self.lanes * self.width


# Swept on an H200 (commit 7022edd, Triton 3.6, N = 8192 rows of bfloat16 logits, medians, noise 10 %): time over that
# of reading the logits once forward, of reading and writing them once backward, by lanes/warps.
#     V = 128256  forward   128/4 1.31  256/4 1.47  256/8 1.45  512/4 1.27  512/16 1.38
#                 backward  128/4 1.57  256/4 1.88  256/8 1.62              512/16 1.48
#     V =  50257  forward   128/4 1.93  512/8 1.89  the others 2.4 to 2.7
#                 backward  512/16 2.2  the others 2.3 to 3
# 512/4 spills registers with a KL. The slices of a few thousand columns that the head is taken in were not swept: there
# 128/4 has the most inner tiles. Other architectures take what the H200 took.
_CUDA = {
    "forward": {0: Config(lanes=128, num_warps=4)},
    "backward": {0: Config(lanes=128, num_warps=4), 2**15: Config(lanes=512, num_warps=16)},
}
# By kernel, backend and compute capability: the least number of columns in a row for each configuration, rising.
_TABLE = {(kernel, "cuda", arch): table for kernel, table in _CUDA.items() for arch in (80, 90, 100)} | {
    # By the compiler's report of registers, not by a clock; a wavefront has 64 threads.
    ("forward", "hip", 0): {0: Config(lanes=256, num_warps=4)},
    ("backward", "hip", 0): {0: Config(lanes=512, num_warps=4)},
    # The interpreter pays per tile and not per column; small enough that a small vocabulary has inner tiles.
    ("forward", "cpu", 0): {0: Config(lanes=32, num_warps=1)},
    ("backward", "cpu", 0): {0: Config(lanes=32, num_warps=1)},
}


def shipped_configs(kernel: str) -> dict[tuple[str, int], tuple[Config, ...]]:
    """Every configuration of a kernel that a GPU may get, by (backend, compute capability), for rising widths."""
    tables = {(backend, arch): table for (name, backend, arch), table in _TABLE.items() if name == kernel}
    return {target: tuple(table.values()) for target, table in tables.items() if target[0] != "cpu"}


def config_for(kernel: str, columns: int, device: torch.device) -> Config:
    """The configuration for rows of so many columns, by the newest listed architecture not newer than the device."""
    table = _table(kernel, device.type, device.index)
    return table[max(least for least in table if least <= columns)]


@cache
def _table(kernel: str, device_type: str, index: int | None) -> dict[int, Config]:
    if device_type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                f"hybrid_kernels: {kernel} got CPU tensors, and Triton runs on a GPU. Call the torch definition in "
                "hybrid.functional, or set TRITON_INTERPRET=1 before triton is imported to test the kernel"
            )
        return _TABLE[kernel, "cpu", 0]
    if torch.version.hip is not None:
        return _TABLE[kernel, "hip", 0]
    major, minor = torch.cuda.get_device_capability(index)
    listed = [arch for backend, arch in shipped_configs(kernel) if backend == "cuda"]
    older = [arch for arch in listed if arch <= 10 * major + minor]
    return _TABLE[kernel, "cuda", max(older, default=min(listed))]
