"""Objectives: each says where its rows come from and what their loss is; and the one update that adds them up."""

from hybrid.objectives.accumulate import Loss, Term, accumulate
from hybrid.objectives.advantages import check_groups, minibatches, rollout_metrics, with_advantages
from hybrid.objectives.gram import policy_gram
from hybrid.objectives.objective import (
    Objective,
    Objectives,
    Parts,
    check_objectives,
    log_names,
    make_objective,
    objective_class,
    objective_names,
    register_objective,
)
from hybrid.objectives.ppo import PPO, Divisors, ppo_batch_loss
from hybrid.objectives.ppo_config import Advantage, PPOConfig
from hybrid.objectives.precision import Precision, autocast, grad_scaler
from hybrid.objectives.ptx import PTX
from hybrid.objectives.sft import SFT, SFTConfig, sft_batch_loss
from hybrid.objectives.texts import texts_of
from hybrid.objectives.update import GradientConfig, over_updates, scaled_lr, update
from hybrid.objectives.updater import Updater

__all__ = [
    "PPO",
    "PTX",
    "SFT",
    "Advantage",
    "Divisors",
    "GradientConfig",
    "Loss",
    "Objective",
    "Objectives",
    "PPOConfig",
    "Parts",
    "Precision",
    "SFTConfig",
    "Term",
    "Updater",
    "accumulate",
    "autocast",
    "check_groups",
    "check_objectives",
    "grad_scaler",
    "log_names",
    "make_objective",
    "minibatches",
    "objective_class",
    "objective_names",
    "over_updates",
    "policy_gram",
    "ppo_batch_loss",
    "register_objective",
    "rollout_metrics",
    "scaled_lr",
    "sft_batch_loss",
    "texts_of",
    "update",
    "with_advantages",
]
