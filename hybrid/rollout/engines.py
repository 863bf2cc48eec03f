"""From a config to the engine that it names."""

from typing import Any

from hybrid.models import Policy
from hybrid.rollout.engine import Engine, RolloutConfig
from hybrid.rollout.torch_engine import TorchEngine
from hybrid.rollout.vllm_engine import VLLMEngine, check_model

__all__ = ["check_engine", "make_engine"]


def make_engine(policy: Policy, config: RolloutConfig | None = None) -> Engine:
    """The engine that answers for the policy. Loads nothing before its first call."""
    config = config or RolloutConfig()
    return VLLMEngine(policy, config) if config.engine == "vllm" else TorchEngine(policy, config)


def check_engine(config: RolloutConfig, model_config: Any) -> None:
    """Refuse (InputError) a model, by its transformers config, that the engine cannot run."""
    if config.engine == "vllm":
        check_model(model_config)
