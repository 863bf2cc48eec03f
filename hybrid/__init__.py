"""HybridTrainer: supervised fine-tuning and PPO on one language model, with one optimizer, in one loop.

from hybrid import HybridTrainer

trainer = HybridTrainer("gpt2", train_data="reviews.jsonl", reward=lambda response: len(response) / 100)
trainer.train()
"""

from hybrid.config import HybridConfig, ModelConfig, ReferenceConfig, RunConfig
from hybrid.core import Batch, Encoded, Example, InputError, Pairs, Rollout, RunStopped
from hybrid.data import DataConfig, Loader, PairLoader, read_pairs
from hybrid.evaluate import EvalConfig
from hybrid.learner import Learner
from hybrid.memory import MarkovMemory, Memory, make_memory, register_memory
from hybrid.mixing import Plan, make_strategy, register_strategy
from hybrid.models import LoraConfig, Policy, Reference
from hybrid.objectives import (
    GradientConfig,
    Objective,
    PPOConfig,
    PreferencesConfig,
    SFTConfig,
    Term,
    minibatches,
    ppo_batch_loss,
    register_objective,
    sft_batch_loss,
    with_advantages,
)
from hybrid.optim import make_optimizer, make_scheduler, register_optimizer, register_scheduler
from hybrid.rewards import Reward, RewardError, RewardModel, make_reward, register_reward
from hybrid.rollout import Decoder, KLConfig, SamplingConfig, ScoreConfig, collect, register_decoder
from hybrid.trainer import HybridTrainer

__all__ = [
    "Batch",
    "DataConfig",
    "Decoder",
    "Encoded",
    "EvalConfig",
    "Example",
    "GradientConfig",
    "HybridConfig",
    "HybridTrainer",
    "InputError",
    "KLConfig",
    "Learner",
    "Loader",
    "LoraConfig",
    "MarkovMemory",
    "Memory",
    "ModelConfig",
    "Objective",
    "PPOConfig",
    "PairLoader",
    "Pairs",
    "Plan",
    "Policy",
    "PreferencesConfig",
    "Reference",
    "ReferenceConfig",
    "Reward",
    "RewardError",
    "RewardModel",
    "Rollout",
    "RunConfig",
    "RunStopped",
    "SFTConfig",
    "SamplingConfig",
    "ScoreConfig",
    "Term",
    "collect",
    "make_memory",
    "make_optimizer",
    "make_reward",
    "make_scheduler",
    "make_strategy",
    "minibatches",
    "ppo_batch_loss",
    "read_pairs",
    "register_decoder",
    "register_memory",
    "register_objective",
    "register_optimizer",
    "register_reward",
    "register_scheduler",
    "register_strategy",
    "sft_batch_loss",
    "with_advantages",
]
