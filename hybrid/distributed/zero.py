"""Optimizer states, gradients and weights in parts: DeepSpeed's ZeRO, through its own `initialize`."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hybrid.core import RunStopped
from hybrid.distributed.config import DistributedConfig
from hybrid.distributed.launch import Place
from hybrid.distributed.processes import LossModule, Processes
from hybrid.distributed.world import LossOf

__all__ = ["DeepSpeed"]


class DeepSpeed(Processes):
    """ZeRO's stages 1, 2 and 3 (`distributed.zero_stage`); the optimizer steps on flat parts of its groups.

    A group that an update does not use (the value head in a supervised one) is left as it is. One of which it uses a
    part cannot be: ZeRO would step the rest with a gradient of 0, so that ends the run.

    Source: Rajbhandari et al. 2020 (arXiv:1910.02054), section 5. Checked with DeepSpeed 0.19.8, some of whose inner
    names stand here: it has no public way to ask for the norm before a step, or to forget a gradient.
    """

    engine = "deepspeed"
    cuts = True
    retries = False  # out of memory, a process has left the others in the middle of their sums
    _module: LossModule
    _engine: Any  # deepspeed's
    _groups: list[list[nn.Parameter]]
    _used: set[int]

    def __init__(self, place: Place, config: DistributedConfig):
        super().__init__(place, config)
        self.whole = config.zero_stage < 3

    def wrap(self, policy: nn.Module) -> None:
        self._module = LossModule(policy)

    def adopt(self, optimizer: torch.optim.Optimizer, *, max_norm: float) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        import deepspeed

        # Of the names by which DeepSpeed calls torch.
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*is deprecated", category=FutureWarning)
        # Compiled by each first process on a CPU, behind a lock that one which was killed leaves for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._used = set()
        numbers = {id(group): number for number, group in enumerate(optimizer.param_groups)}
        for parameter in self._module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self._used.add(id(p)))
        self._engine, *_ = deepspeed.initialize(
            model=self._module,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": max_norm,
                "zero_optimization": {"stage": self.config.zero_stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**31,
            },
        )
        optimizer.register_step_pre_hook(lambda inner, *_: self._leave_unused(inner.param_groups, numbers))
        if self.config.zero_stage == 3:
            backbone: Any = self._module.policy.backbone
            # Multiplied outside of its module: what the whole forward is given.
            for direct in (backbone.head_weight, backbone.model.get_output_embeddings().bias):
                if isinstance(direct, nn.Parameter):
                    deepspeed.zero.register_external_parameter(self._module, direct)

    def _leave_unused(self, groups: list[dict[str, Any]], numbers: dict[int, int]) -> None:
        for group in groups:
            used = [id(p) in self._used for p in self._groups[numbers[id(group)]]]
            if any(used) and not all(used):
                raise RunStopped(
                    f"{used.count(False)} of {len(used)} weights that are stepped together have no gradient in this "
                    "update, and ZeRO would step them with 0: take distributed.engine ddp or fsdp2"
                )
            if not any(used):
                for flat in group["params"]:
                    flat.grad = None

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    def loss(self, loss_of: LossOf, rows: Any, *, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        self._engine.set_gradient_accumulation_boundary(last)
        loss, metrics = self._engine(loss_of, rows)
        return loss, metrics

    def backward(self, loss: Tensor) -> None:
        # The mean over processes, as in `Processes.backward`.
        self._engine.backward(loss * self.size)

    def grad_norm(self, module: nn.Module) -> Tensor:
        if self.config.zero_stage < 3:
            norm: Tensor = self._zero.scaled_global_norm()
            # What is not finite is -1 to DeepSpeed.
            return torch.where(norm < 0, torch.nan, norm)
        norms = torch.stack(self._zero._get_norm_groups())
        return torch.where((norms < 0).any(), torch.nan, norms.norm())

    def step(self, module: nn.Module, optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float) -> None:
        self._engine.step()

    def drop(self, optimizer: torch.optim.Optimizer) -> None:
        self._used.clear()
        self._zero.zero_grad(set_to_none=True)
        if self.config.zero_stage == 3:
            # What an update does not use would still count in its norm, with the gradient of an earlier one.
            self._zero.grad_partitions_flat_buffer.zero_()
        for number in list(self._zero.averaged_gradients):
            if self.config.zero_stage == 3:
                del self._zero.averaged_gradients[number]
            else:
                self._zero.averaged_gradients[number] = self._zero.all_grad_tensors[number] = None

    @contextmanager
    def _gathering(self) -> Iterator[None]:
        if self.whole:
            yield
            return
        from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

        with unwrap_model_for_generation(self._engine):
            yield

    @contextmanager
    def loading(self) -> Iterator[None]:
        import deepspeed

        zero3 = self.config.zero_stage == 3
        with deepspeed.zero.GatheredParameters(list(self._module.parameters()), modifier_rank=0, enabled=zero3):
            yield
        self._zero.refresh_fp32_params()

    # Checkpoints: in torch's own form, gathered weight by weight

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        states: dict[int, dict[str, Any]] = {}
        parameters = [p for group in self._groups for p in group]
        for number, parameter in enumerate(parameters):
            flat = self._flat(parameter)
            of = {}
            for key, x in optimizer.state.get(flat, {}).items():
                of[key] = x
                if isinstance(x, Tensor) and x.shape == flat.shape:
                    of[key] = safe_get_full_optimizer_state(parameter, key).cpu()
            if of:
                states[number] = of
        return {"state": states, "param_groups": self._param_groups(optimizer)}

    def _param_groups(self, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        counts, start = [], 0
        for group in self._groups:
            counts.append(list(range(start, start + len(group))))
            start += len(group)
        return [
            {**{key: x for key, x in group.items() if key != "params"}, "params": numbers}
            for group, numbers in zip(optimizer.param_groups, counts, strict=True)
        ]

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        parameters = [p for group in self._groups for p in group]
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            group.update({key: x for key, x in saved.items() if key != "params"})
        optimizer.state.clear()
        for number, of in state["state"].items():
            flat, shape = self._flat(parameters[number]), _shape(parameters[number])
            for key, x in of.items():
                whole = isinstance(x, Tensor) and x.shape == shape
                optimizer.state[flat].setdefault(key, torch.zeros_like(flat) if whole else x)
        self._link()
        for number, of in state["state"].items():
            for key, x in of.items():
                if isinstance(x, Tensor) and x.shape == _shape(parameters[number]):
                    self._set_state(parameters[number], key, x)

    def _set_state(self, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        zero = self._zero
        whole = whole.to(zero.device)
        if self.config.zero_stage < 3:
            safe_set_full_optimizer_state(parameter, whole, key)
            return
        # DeepSpeed's own cut of the whole fails where a part is padding, as of a bias of one number.
        *_, size = zero.grad_position[zero.get_param_id(parameter)]
        padded = nn.functional.pad(whole.flatten(), (0, size * self.size - whole.numel()))
        safe_set_local_optimizer_state(parameter, padded[self.rank * size : (self.rank + 1) * size], key)

    def _link(self) -> None:
        """Have DeepSpeed find a weight's part of the states that there are by now."""
        if self.config.zero_stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _flat(self, parameter: nn.Parameter) -> Tensor:
        """What the optimizer steps in place of a weight's group."""
        zero = self._zero
        if self.config.zero_stage == 3:
            number, *_ = zero.grad_position[zero.get_param_id(parameter)]
            return zero.fp32_partitioned_groups_flat[number]
        number = next(n for n, group in enumerate(self._groups) if any(p is parameter for p in group))
        return zero.single_partition_of_fp32_groups[number]


def _shape(parameter: Any) -> torch.Size:
    """The whole weight's, of which ZeRO-3 may have left nothing here."""
    return getattr(parameter, "ds_shape", parameter.shape)
