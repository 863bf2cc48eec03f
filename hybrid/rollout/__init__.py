"""Rollouts: sample responses, score them, assemble what PPO learns from."""

from hybrid.rollout.actor import Actor, Answered, Sampler
from hybrid.rollout.asked import Asked
from hybrid.rollout.collect import CollectOptions, ScoreConfig, assemble, collect
from hybrid.rollout.decoder import Decoder, decoder_class, decoder_names, make_decoder, register_decoder
from hybrid.rollout.engine import Engine, RolloutConfig
from hybrid.rollout.engines import check_engine, make_engine
from hybrid.rollout.judge import Judge, response_texts
from hybrid.rollout.kl import KLConfig, KLKind, kl_controller
from hybrid.rollout.lists import Ids, from_lists
from hybrid.rollout.opponent import NamedModel, PastPolicy
from hybrid.rollout.respond import respond
from hybrid.rollout.responses import Responses
from hybrid.rollout.sample import sample
from hybrid.rollout.sampling import SamplingConfig
from hybrid.rollout.torch_engine import TorchEngine
from hybrid.rollout.vllm_engine import VLLMEngine

__all__ = [
    "Actor",
    "Answered",
    "Asked",
    "CollectOptions",
    "Decoder",
    "Engine",
    "Ids",
    "Judge",
    "KLConfig",
    "KLKind",
    "NamedModel",
    "PastPolicy",
    "Responses",
    "RolloutConfig",
    "Sampler",
    "SamplingConfig",
    "ScoreConfig",
    "TorchEngine",
    "VLLMEngine",
    "assemble",
    "check_engine",
    "collect",
    "decoder_class",
    "decoder_names",
    "from_lists",
    "kl_controller",
    "make_decoder",
    "make_engine",
    "register_decoder",
    "respond",
    "response_texts",
    "sample",
]
