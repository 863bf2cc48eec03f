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


# Chosen by registers and bytes in flight from the compiler's report, not yet by a clock: 128 threads with two
# vectors each are 4 KiB of loads per program, and eight such programs or more fit on a multiprocessor.
_TABLE = {
    ("forward", "cuda", 80): Config(lanes=256, num_warps=4),
    ("forward", "cuda", 90): Config(lanes=256, num_warps=4),
    ("forward", "cuda", 100): Config(lanes=256, num_warps=4),
    ("backward", "cuda", 80): Config(lanes=256, num_warps=4),
    ("backward", "cuda", 90): Config(lanes=256, num_warps=4),
    ("backward", "cuda", 100): Config(lanes=256, num_warps=4),
    # A wavefront has 64 threads.
    ("forward", "hip", 0): Config(lanes=256, num_warps=4),
    ("backward", "hip", 0): Config(lanes=512, num_warps=4),
    # The interpreter pays per tile and not per column; small enough that a small vocabulary has inner tiles.
    ("forward", "cpu", 0): Config(lanes=32, num_warps=1),
    ("backward", "cpu", 0): Config(lanes=32, num_warps=1),
}


def shipped_configs(kernel: str) -> dict[tuple[str, int], Config]:
    """Every configuration of a kernel that a GPU may get, by (backend, compute capability)."""
    return {(backend, arch): c for (name, backend, arch), c in _TABLE.items() if name == kernel and backend != "cpu"}


def config_for(kernel: str, device: torch.device) -> Config:
    """The configuration for a device: that of the newest listed architecture which is not newer than it."""
    return _config(kernel, device.type, device.index)


@cache
def _config(kernel: str, device_type: str, index: int | None) -> Config:
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
