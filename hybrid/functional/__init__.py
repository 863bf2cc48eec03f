"""The maths of the training core: pure functions of tensors. torch only; no model, no tokenizer, no I/O.

float64 in gives float64 out, everything else float32 out. `B` sequences, `T` tokens, `V` vocabulary, `D` hidden.
"""

from hybrid.functional.advantage import gae, group_advantage, leave_one_out_advantage
from hybrid.functional.divergence import DivergenceKind, linear_divergence
from hybrid.functional.kl import AdaptiveKL, FixedKL, kl_estimate
from hybrid.functional.linear_logprob import linear_logprob
from hybrid.functional.logprob import TokenStats, entropy, full_kl, soft_capped, token_logprob, token_stats
from hybrid.functional.masked import masked_mean, masked_sum, masked_var, masked_whiten
from hybrid.functional.neighbours import knn_label_prob, knn_prob, mixed_logprob, nearest, squared_distance
from hybrid.functional.ppo import (
    Aggregation,
    ImportanceLevel,
    ImportanceMode,
    Surrogate,
    aggregate,
    importance_weight,
    loss_divisor,
    policy_loss,
    token_reward,
    value_loss,
)
from hybrid.functional.precision import autocast_dtype, rounded_operands
from hybrid.functional.preference import (
    PER_TOKEN,
    REFERENCE_FREE,
    PreferenceKind,
    bradley_terry_loss,
    dpo_loss,
    kto_loss,
    wins,
)
from hybrid.functional.sft import TokenWeight, sft_loss

__all__ = [
    "PER_TOKEN",
    "REFERENCE_FREE",
    "AdaptiveKL",
    "Aggregation",
    "DivergenceKind",
    "FixedKL",
    "ImportanceLevel",
    "ImportanceMode",
    "PreferenceKind",
    "Surrogate",
    "TokenStats",
    "TokenWeight",
    "aggregate",
    "autocast_dtype",
    "bradley_terry_loss",
    "dpo_loss",
    "entropy",
    "full_kl",
    "gae",
    "group_advantage",
    "importance_weight",
    "kl_estimate",
    "knn_label_prob",
    "knn_prob",
    "kto_loss",
    "leave_one_out_advantage",
    "linear_divergence",
    "linear_logprob",
    "loss_divisor",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "mixed_logprob",
    "nearest",
    "policy_loss",
    "rounded_operands",
    "sft_loss",
    "soft_capped",
    "squared_distance",
    "token_logprob",
    "token_reward",
    "token_stats",
    "value_loss",
    "wins",
]
