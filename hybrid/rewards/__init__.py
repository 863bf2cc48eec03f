"""Rewards: from a spec to a checked score for each response."""

from hybrid.rewards.base import AllSkipped, Handling, Reward, RewardError, RewardTimeout, Unjudged, register_reward
from hybrid.rewards.factory import RewardType, json_spec, known_rewards, make_reward
from hybrid.rewards.host import Host, Opponent
from hybrid.rewards.listing import reward_listing, reward_markdown
from hybrid.rewards.output import Part, RewardOutput
from hybrid.rewards.samples import Samples
from hybrid.rewards.scalar_model import RewardModel
from hybrid.rewards.schema import reward_schema

__all__ = [
    "AllSkipped",
    "Handling",
    "Host",
    "Opponent",
    "Part",
    "Reward",
    "RewardError",
    "RewardModel",
    "RewardOutput",
    "RewardTimeout",
    "RewardType",
    "Samples",
    "Unjudged",
    "json_spec",
    "known_rewards",
    "make_reward",
    "register_reward",
    "reward_listing",
    "reward_markdown",
    "reward_schema",
]
