"""From a config to the engine that it names."""

from typing import Any

from hybrid.core import InputError
from hybrid.distributed import ALONE, World
from hybrid.models import Policy
from hybrid.rollout.engine import Engine, RolloutConfig
from hybrid.rollout.torch_engine import TorchEngine
from hybrid.rollout.vllm_engine import VLLMEngine, check_model

__all__ = ["check_engine", "make_engine"]


def make_engine(policy: Policy, config: RolloutConfig | None = None, world: World = ALONE) -> Engine:
    """The engine that answers for the policy. Loads nothing before its first call.

    Raises InputError for several processes with what draws in one.
    """
    config = config or RolloutConfig()
    if world.size > 1 and config.needs_correction:
        raise InputError(
            f"rollout.engine {config.engine!r} with rollout.staleness {config.staleness} goes with one process, and "
            f"the run has {world.size}: take torch and 0"
        )
    return VLLMEngine(policy, config) if config.engine == "vllm" else TorchEngine(policy, config, world)


def check_engine(config: RolloutConfig, model_config: Any) -> None:
    """Refuse (InputError) a model, by its transformers config, that the engine cannot run."""
    if config.engine == "vllm":
        check_model(model_config)
