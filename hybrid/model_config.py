"""What a config says of the policy's model, and of those that it is held close to."""

from dataclasses import dataclass
from typing import Literal

import torch

from hybrid.models import LoraConfig, require
from hybrid.objectives import Precision

__all__ = ["ModelConfig", "ReferenceConfig"]


def _check_device(device: str, name: str) -> None:
    if device == "auto":
        return
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"{name} must be auto, cpu, cuda or cuda:N, got {device!r}") from None
    known = ["cpu", "cuda", *(["mps"] if torch.backends.mps.is_available() else [])]
    if kind not in known:
        raise ValueError(f"{name} must be auto or one of {', '.join(known)}, got {device!r}")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{name} is {device!r}, and this machine has {torch.cuda.device_count()} CUDA devices")


@dataclass(frozen=True)
class ModelConfig:
    """The policy's model."""

    name: str | None = None  # a folder or a hub name
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; PPO's small updates round away in bfloat16
    precision: Precision = "float32"  # of the computation, by autocast: bfloat16, or float16 with scaled losses
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time
    compile: bool = False  # the trunk's forward and backward by torch.compile: minutes at first, then less time
    # MiB of logits that are kept for the backward pass, which computes the others again; of one microbatch at a time.
    head_memory: int = 512
    device: str = "auto"  # auto: the GPU where there is one
    lora: LoraConfig | None = None  # train adapters on the frozen model ({}: with their defaults); None: all weights
    load_in_4bit: bool = False  # the frozen linear layers as nf4, by bitsandbytes; needs lora

    def __post_init__(self) -> None:
        _check_device(self.device, "ModelConfig.device")
        if self.compile and self.gradient_checkpointing:
            raise ValueError(
                "ModelConfig.compile does not go with ModelConfig.gradient_checkpointing: set one to false"
            )
        if self.head_memory < 0:
            raise ValueError(f"ModelConfig.head_memory must be >= 0, got {self.head_memory}")
        if self.load_in_4bit:
            if self.lora is None:
                raise ValueError(
                    "ModelConfig.load_in_4bit needs model.lora: 4-bit weights cannot be trained, adapters on them can"
                )
            require("bitsandbytes", "model.load_in_4bit", "bnb")


@dataclass(frozen=True)
class ReferenceConfig:
    """A frozen model that the policy is held close to."""

    # A folder or a hub name. None: a copy of the policy as it starts; with model.lora the policy, its adapter off.
    model: str | None = None
    weight: float = 1.0  # the factor of its KL in the sum
    device: str | None = None  # None: the policy's
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: float32
    load_in_4bit: bool = False  # the linear layers as nf4, by bitsandbytes; for one that is named

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"ReferenceConfig.weight must be >= 0, got {self.weight}")
        if self.load_in_4bit:
            if self.model is None:
                raise ValueError("ReferenceConfig.load_in_4bit needs ReferenceConfig.model: a copy is as the policy is")
            require("bitsandbytes", "ReferenceConfig.load_in_4bit", "bnb")
        _check_device(self.device or "auto", "ReferenceConfig.device")
