"""Models: the policy (trunk, LM head, value head) and the frozen references."""

from hybrid.models.adapt import LoraConfig, add_lora, check_base, is_adapted, merged, require, under_adapter
from hybrid.models.backbone import Backbone, context_length
from hybrid.models.contract import check_packing, takes_fixed_cache
from hybrid.models.heads import RewardHead, ValueHead
from hybrid.models.policy import (
    REWARD_HEAD_FILE,
    VALUE_HEAD_FILE,
    Policy,
    PolicyOutput,
    before_response,
    label_logprob,
    last_token,
    response_stats,
)
from hybrid.models.recompute import recompute_activations
from hybrid.models.recurrent import new as new_recurrent
from hybrid.models.reference import Reference
from hybrid.models.reward_model import save_reward_model
from hybrid.models.reward_template import template_of
from hybrid.models.shadow import Shadow

__all__ = [
    "REWARD_HEAD_FILE",
    "VALUE_HEAD_FILE",
    "Backbone",
    "LoraConfig",
    "Policy",
    "PolicyOutput",
    "Reference",
    "RewardHead",
    "Shadow",
    "ValueHead",
    "add_lora",
    "before_response",
    "check_base",
    "check_packing",
    "context_length",
    "is_adapted",
    "label_logprob",
    "last_token",
    "merged",
    "new_recurrent",
    "recompute_activations",
    "require",
    "response_stats",
    "save_reward_model",
    "takes_fixed_cache",
    "template_of",
    "under_adapter",
]
