"""Steps: (rows, policy) -> (loss, metrics), and the one update that both phases share."""

from hybrid.steps.accumulate import Loss, Term, accumulate, split
from hybrid.steps.ppo import Divisors, check_groups, minibatches, ppo_batch_loss, rollout_metrics, with_advantages
from hybrid.steps.ppo_config import Advantage, PPOConfig
from hybrid.steps.precision import Precision, autocast, grad_scaler
from hybrid.steps.sft import SFTConfig, sft_batch_loss
from hybrid.steps.terms import ppo_term, sft_term
from hybrid.steps.texts import texts_of
from hybrid.steps.update import GradientConfig, over_updates, scaled_lr, update
from hybrid.steps.updater import Updater

__all__ = [
    "Advantage",
    "Divisors",
    "GradientConfig",
    "Loss",
    "PPOConfig",
    "Precision",
    "SFTConfig",
    "Term",
    "Updater",
    "accumulate",
    "autocast",
    "check_groups",
    "grad_scaler",
    "minibatches",
    "over_updates",
    "ppo_batch_loss",
    "ppo_term",
    "rollout_metrics",
    "scaled_lr",
    "sft_batch_loss",
    "sft_term",
    "split",
    "texts_of",
    "update",
    "with_advantages",
]
