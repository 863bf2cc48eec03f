"""Steps: (rows, policy) -> (loss, metrics), and the one update that both phases share."""

from hybrid.steps.ppo import Divisors, PPOConfig, minibatches, ppo_batch_loss, rollout_metrics, with_advantages
from hybrid.steps.sft import SFTConfig, sft_batch_loss
from hybrid.steps.terms import ppo_term, sft_term
from hybrid.steps.update import GradientConfig, Loss, Term, over_updates, scaled_lr, split, update
from hybrid.steps.updater import Updater

__all__ = [
    "Divisors",
    "GradientConfig",
    "Loss",
    "PPOConfig",
    "SFTConfig",
    "Term",
    "Updater",
    "minibatches",
    "over_updates",
    "ppo_batch_loss",
    "ppo_term",
    "rollout_metrics",
    "scaled_lr",
    "sft_batch_loss",
    "sft_term",
    "split",
    "update",
    "with_advantages",
]
