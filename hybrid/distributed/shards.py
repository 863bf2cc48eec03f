"""The parts of an optimizer's state that each process holds, on the disk: torch's distributed checkpoint."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

__all__ = ["read_shards", "with_tensors"]


def read_shards(folder: Path, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a folder that `dcp.save` wrote, by name: each one whole, whoever wrote how many parts of it.

    into: where they are read to, such as this process's parts alone; None: whole, by this process alone.
    """
    if into is not None:
        dcp.load(into, checkpoint_id=folder)
        return into
    found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    whole: dict[str, Any] = {
        name: torch.empty(x.size, dtype=x.properties.dtype)
        for name, x in found.items()
        if isinstance(x, TensorStorageMetadata)
    }
    dcp.load(whole, checkpoint_id=folder, no_dist=True)
    return whole


def with_tensors(state: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """An optimizer's state with tensors "NUMBER.NAME" put in: those of its parameters, in the order of its groups."""
    filled = {number: dict(of) for number, of in state["state"].items()}
    for name, x in tensors.items():
        number, _, key = name.partition(".")
        filled.setdefault(int(number), {})[key] = x
    return {**state, "state": filled}
