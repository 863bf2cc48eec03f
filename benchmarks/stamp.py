"""What a measured figure depends on, besides its settings."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["commit", "device_name", "stamp"]


def stamp(*packages: str, device: str | None = None) -> dict[str, Any]:
    """Commit, device and the versions of Python, torch, transformers and these packages, for a result's file."""
    return {
        "commit": commit(),
        "device": device_name(device),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in ("torch", "transformers", *packages)},
    }


def commit() -> str:
    """The checkout's, "unknown" outside of one."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def device_name(device: str | None = None) -> str:
    """As it stands in a result's file name: nvidia-h200, cpu-2-threads.   device: cuda or cpu; None: what there is."""
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        return torch.cuda.get_device_name().replace(" ", "-").lower()
    return f"cpu-{torch.get_num_threads()}-threads"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
