"""Objectives: each says where its rows come from and what their loss is; and the one update that adds them up."""

from hybrid.objectives.accumulate import Loss, Term, accumulate
from hybrid.objectives.advantages import (
    check_groups,
    minibatches,
    rollout_metrics,
    shares,
    varied_rows,
    with_advantages,
)
from hybrid.objectives.decoders import check_decoder
from hybrid.objectives.distill import Distill, DistillData
from hybrid.objectives.dpo import DPO
from hybrid.objectives.earlier import beside
from hybrid.objectives.gram import policy_gram
from hybrid.objectives.hpt import HPT
from hybrid.objectives.kto import KTO
from hybrid.objectives.luffy import LUFFY
from hybrid.objectives.objective import (
    Measures,
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
from hybrid.objectives.online import RAFT, SPIN, OnlineDPO
from hybrid.objectives.pair_measures import expected_calibration_error, pair_measures
from hybrid.objectives.ppo import PPO, Divisors, ppo_batch_loss
from hybrid.objectives.ppo_config import Advantage, PPOConfig
from hybrid.objectives.precision import Precision, autocast, grad_scaler
from hybrid.objectives.preference_config import PreferencesConfig
from hybrid.objectives.prefix_rft import PrefixRFT
from hybrid.objectives.ptx import PTX
from hybrid.objectives.replay import Replay
from hybrid.objectives.reward_model import RewardModelObjective
from hybrid.objectives.sft import SFT, SFTConfig, sft_batch_loss
from hybrid.objectives.srft import SRFT
from hybrid.objectives.tbptt import TBPTT, Windows
from hybrid.objectives.texts import texts_of
from hybrid.objectives.update import GradientConfig, over_updates, scaled_lr, update
from hybrid.objectives.updater import Updater

__all__ = [
    "DPO",
    "HPT",
    "KTO",
    "LUFFY",
    "PPO",
    "PTX",
    "RAFT",
    "SFT",
    "SPIN",
    "SRFT",
    "TBPTT",
    "Advantage",
    "Distill",
    "DistillData",
    "Divisors",
    "GradientConfig",
    "Loss",
    "Measures",
    "Objective",
    "Objectives",
    "OnlineDPO",
    "PPOConfig",
    "Parts",
    "Precision",
    "PreferencesConfig",
    "PrefixRFT",
    "Replay",
    "RewardModelObjective",
    "SFTConfig",
    "Term",
    "Updater",
    "Windows",
    "accumulate",
    "autocast",
    "beside",
    "check_decoder",
    "check_groups",
    "check_objectives",
    "expected_calibration_error",
    "grad_scaler",
    "log_names",
    "make_objective",
    "minibatches",
    "objective_class",
    "objective_names",
    "over_updates",
    "pair_measures",
    "policy_gram",
    "ppo_batch_loss",
    "register_objective",
    "rollout_metrics",
    "scaled_lr",
    "sft_batch_loss",
    "shares",
    "texts_of",
    "update",
    "varied_rows",
    "with_advantages",
]
