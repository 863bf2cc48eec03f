"""Held-out measures: what the policy says to prompts it has not seen, and how well it still knows the language."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch

from hybrid.core import Encoded, Rollout
from hybrid.data import collate
from hybrid.models import Policy, Reference
from hybrid.rewards import Reward
from hybrid.rollout import SamplingConfig, collect
from hybrid.steps import SFTConfig, sft_batch_loss

__all__ = ["EvalConfig", "distinct_n", "evaluate_rewards", "evaluate_sft"]


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out examples: before the first step, after the last, and in between."""

    every: int = 0  # steps between evaluations; 0: only before and after
    num_prompts: int = 64  # held-out prompts that are answered and scored
    num_examples: int = 256  # held-out examples of the validation loss
    batch_size: int = 32
    seed: int = 1234  # of the sampling: the same draws before and after
    metric: str = "sft_loss"  # what the scheduler reduce_on_plateau watches

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("num_prompts", 1), ("num_examples", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"EvalConfig.{name} must be >= {least}, got {getattr(self, name)}")


@torch.no_grad()
def evaluate_sft(policy: Policy, examples: Sequence[Encoded], *, batch_size: int = 32) -> dict[str, float]:
    """sft_loss: mean negative log-prob of the target tokens, nats.   perplexity: its exponential."""
    policy.eval()
    total, num_tokens = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], pad_id=0).to(policy.device)
        loss, _ = sft_batch_loss(policy, batch, SFTConfig(), num_tokens=1)
        total, num_tokens = total + float(loss), num_tokens + batch.num_tokens
    if not num_tokens:
        return {}
    loss_mean = total / num_tokens
    return {"sft_loss": loss_mean, "perplexity": math.exp(min(loss_mean, 700.0))}


def evaluate_rewards(
    policy: Policy,
    references: Sequence[Reference],
    reward: Reward,
    examples: Sequence[Encoded],
    *,
    tokenizer: Any,
    sampling: SamplingConfig,
    batch_size: int = 32,
    seed: int = 1234,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answer the examples' prompts, by sampling as in training, and measure the answers.

    Returns metrics and one row per sample. reward: mean score; reward_sem: its standard error; positive: share of
    responses with reward > 0; kl: nats per response (k1); distinct_2: distinct over all word bigrams.
    The reward's state (running means, history) is left as it was: training goes on from its own.
    """
    state = reward.state_dict()
    generator = torch.Generator(policy.device).manual_seed(seed)
    rollouts = [
        collect(
            policy, references, reward, examples[start : start + batch_size],
            tokenizer=tokenizer, sampling=sampling, generator=generator,
        )
        for start in range(0, len(examples), batch_size)
    ]  # fmt: skip
    reward.load_state_dict(state)
    rows = [row for rollout in rollouts for row in sample_rows(rollout)]
    scores = [row["reward"] for row in rows]
    spread = stdev(scores) if len(scores) > 1 else 0.0
    lengths = [n for rollout in rollouts for n in rollout.mask.sum(1).tolist()]
    metrics = {
        "reward": fmean(scores),
        "reward_std": spread,
        "reward_sem": spread / math.sqrt(len(scores)),
        "positive": fmean(score > 0 for score in scores),
        "kl": fmean(x for rollout in rollouts for x in rollout.kl.sum(1).tolist()),
        "distinct_2": distinct_n([row["response"] for row in rows], 2),
        "response_length": fmean(lengths),
        "eos_share": fmean(x for rollout in rollouts for x in rollout.ended.tolist()),
        "num_prompts": float(len(scores)),
    }
    return metrics, rows


def sample_rows(rollout: Rollout) -> list[dict[str, Any]]:
    """One row per response, for `samples.jsonl`."""
    return [
        {
            "prompt": rollout.prompts[i],
            "response": rollout.responses[i],
            "target": rollout.targets[i],
            "reward": float(rollout.score[i]),
            "components": {name: values[i] for name, values in rollout.components.items()},
        }
        for i in range(len(rollout))
    ]


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct word n-grams over all word n-grams of the texts together; 0 where there are none.

    Source: Li et al. 2016, section 5 (arXiv:1510.03055), over words instead of tokens.
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
