"""A part of all weights, gradients and optimizer states in each process: torch's `fully_shard`."""

import shutil
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hybrid.distributed.processes import LossModule, Processes
from hybrid.distributed.shards import read_shards, with_tensors
from hybrid.distributed.world import LossOf

__all__ = ["FSDP2"]

# What would shard gathered weights again where one process alone saves or loads them.
HOOKS = ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


class FSDP2(Processes):
    """Each layer is gathered for its own forward and backward pass, what is not a layer for all of them.

    Source: torch.distributed.fsdp.fully_shard; Zhao et al. 2023 (arXiv:2304.11277) describe its predecessor.
    """

    engine = "fsdp2"
    whole = False
    cuts = True
    retries = False  # out of memory, a process has left the others in the middle of their gathers
    _whole: LossModule
    _root: FSDPModule  # the same
    _layers: list[FSDPModule]

    def wrap(self, policy: nn.Module) -> None:
        # The value head's last dimension is dropped, and nobody writes into what is left.
        warnings.filterwarnings("ignore", message=".*FSDPValueHead.* returned a view", category=UserWarning)
        # The heads apart: they are float32, whatever the trunk is in, and what is gathered together has one dtype.
        heads = [child for name, child in policy.named_children() if name != "backbone"]
        self._layers = [fully_shard(layer) for layer in (*_layers(policy), *heads)]
        self._whole = LossModule(policy)
        self._root = fully_shard(self._whole)
        # Its first forward says which module is the root.
        self._whole(lambda rows: (torch.zeros(()), {}), None)
        self._root.reshard()

    def loss(self, loss_of: LossOf, rows: Any, *, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        self._root.set_requires_gradient_sync(last)
        loss, metrics = self._whole(loss_of, rows)
        return loss, metrics

    def grad_norm(self, module: nn.Module) -> Tensor:
        norm = super().grad_norm(module)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @contextmanager
    def _gathering(self) -> Iterator[None]:
        modules = [self._root, *self._layers]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        kept = [(inner, name, getattr(inner, name)) for inner in self._whole.modules() for name in HOOKS]
        for inner, name, _ in kept:
            setattr(inner, name, OrderedDict())
        try:
            yield
        finally:
            for inner, name, hooks in kept:
                setattr(inner, name, hooks)
            for module in modules:
                module.set_reshard_after_forward(module is not self._root, recurse=False)
                module.reshard()
            # Which layers have gone forward says what a backward pass gathers ahead. Here one process may have sampled
            # longer than others, or alone: it is forgotten.
            self._root.reset_iter_state()

    @contextmanager
    def loading(self) -> Iterator[None]:
        with self.gathered():
            yield
            # What is gathered is a copy: it is gone with the block.
            whole = {name: x.detach().clone() for name, x in self._whole.named_parameters()}
        with torch.no_grad():
            for name, parameter in self._whole.named_parameters():
                parameter.copy_(_part(whole[name], parameter))

    # Checkpoints

    def write_shards(self, state: dict[str, Any], beside: Path | None) -> tuple[dict[str, Any], Path | None]:
        folder = self.once(lambda: Path(tempfile.mkdtemp(prefix=".shards-", suffix=".part", dir=beside)))
        named = {(number, key): x for number, of in state["state"].items() for key, x in of.items()}
        tensors = {f"{number}.{key}": x for (number, key), x in named.items() if isinstance(x, DTensor)}
        try:
            with self._standing():
                dcp.save(tensors, checkpoint_id=folder)
        except CheckpointException as error:
            if self.writes:
                shutil.rmtree(folder, ignore_errors=True)
            # It holds what went wrong in which process, and is no Exception: the first, such as of a full disk.
            raise next(first for first, _ in error.failures.values()) from error
        whole = {
            number: {key: x for key, x in of.items() if not isinstance(x, DTensor)}
            for number, of in state["state"].items()
        }
        return {**state, "state": whole}, folder

    def read_shards(self, state: dict[str, Any], folder: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        parameters = _parameters(optimizer)
        found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        into = {name: torch.empty_like(parameters[int(name.partition(".")[0])]) for name in found}
        with self._standing():
            return with_tensors(state, read_shards(folder, into))

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        parameters = _parameters(optimizer)
        states = {
            number: {key: _part(x, parameters[number]) for key, x in of.items()}
            for number, of in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": states})


def _layers(module: nn.Module) -> list[nn.Module]:
    """Those of the largest stack in a model."""
    stacks = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    sizes = [sum(p.numel() for p in stack.parameters()) for stack in stacks]
    return list(stacks[sizes.index(max(sizes))]) if stacks else []


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _part(x: Any, parameter: Tensor) -> Any:
    """This process's part of what is whole, where it is of a parameter that is sharded."""
    if not isinstance(parameter, DTensor) or isinstance(x, DTensor) or getattr(x, "shape", None) != parameter.shape:
        return x
    return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements)
