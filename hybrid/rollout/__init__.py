"""Rollouts: sample responses, score them, assemble what PPO learns from."""

from hybrid.rollout.collect import CollectOptions, ScoreConfig, assemble, collect, respond, response_texts
from hybrid.rollout.engine import Engine, RolloutConfig
from hybrid.rollout.kl import KLConfig, KLKind, kl_controller
from hybrid.rollout.lists import Ids, from_lists
from hybrid.rollout.opponent import NamedModel, PastPolicy
from hybrid.rollout.sample import Responses, sample
from hybrid.rollout.sampling import SamplingConfig

__all__ = [
    "CollectOptions",
    "Engine",
    "Ids",
    "KLConfig",
    "KLKind",
    "NamedModel",
    "PastPolicy",
    "Responses",
    "RolloutConfig",
    "SamplingConfig",
    "ScoreConfig",
    "assemble",
    "collect",
    "from_lists",
    "kl_controller",
    "respond",
    "response_texts",
    "sample",
]
