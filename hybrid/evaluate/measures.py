"""What the policy says to prompts it has not seen, and how well it still knows the language."""

import math
from collections.abc import Callable, Sequence
from itertools import chain
from statistics import fmean, stdev
from typing import Any

import torch

from hybrid.core import Encoded, Rollout
from hybrid.data import collate
from hybrid.distributed import ALONE, World
from hybrid.evaluate.config import EvalConfig
from hybrid.evaluate.text import evaluate_texts
from hybrid.functional import sft_loss
from hybrid.models import Policy, Reference
from hybrid.objectives import SFTConfig, sft_batch_loss
from hybrid.rewards import AllSkipped, Reward, Unjudged
from hybrid.rollout import Decoder, Engine, SamplingConfig, TorchEngine, collect

__all__ = ["distinct_n", "evaluate", "evaluate_responses", "evaluate_sft", "sample_rows"]


def evaluate(
    policy: Policy,
    references: Sequence[Reference],
    reward: Reward | None,
    examples: Sequence[Encoded],
    config: EvalConfig,
    *,
    tokenizer: Any,
    sampling: SamplingConfig,
    engine: Engine | None = None,
    shown: Callable[[Sequence[Encoded]], Sequence[Encoded]] = list,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """All that `config` asks to measure on the held-out examples, and a row for each response that was measured.

    sampling: that of the training, which the config may change. Prompts are answered where there is something to
    measure of the answers: a reward, or text metrics.
    shown: makes of examples what is answered; the losses are of the examples themselves.
    """
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    if examples:
        metrics = evaluate_sft(
            policy, examples[: config.num_examples], batch_size=config.batch_size,
            decoder=config.sampling(sampling).search, world=ALONE if engine is None else engine.world,
        )  # fmt: skip
    if examples and (reward is not None or config.text_metrics):
        of_responses, rows = evaluate_responses(
            policy, references, reward, shown(examples[: config.num_prompts]),
            tokenizer=tokenizer, sampling=config.sampling(sampling), text_metrics=config.text_metrics,
            batch_size=config.batch_size, seed=config.seed, engine=engine,
        )  # fmt: skip
        metrics |= of_responses
    return metrics, rows


@torch.no_grad()
def evaluate_sft(
    policy: Policy,
    examples: Sequence[Encoded],
    *,
    batch_size: int = 32,
    decoder: Decoder | None = None,
    world: World = ALONE,
) -> dict[str, float]:
    """sft_loss: mean negative log-prob of the target tokens, nats.   perplexity: its exponential.

    decoder/sft_loss, decoder/perplexity: the same under what the decoder draws from, where it is one that knows it and
    is not the policy (`Decoder.batch_logprob`).
    """
    policy.eval()
    starts = range(0, len(examples), batch_size)

    def measured(start: int) -> tuple[dict[str, float], int]:
        batch = collate(examples[start : start + batch_size], pad_id=0).to(policy.device)
        loss, _ = sft_batch_loss(policy, batch, SFTConfig(), num_tokens=1)
        losses = {"": float(loss)}
        if decoder is not None and (of_decoder := decoder.batch_logprob(policy, batch)) is not None:
            losses["decoder/"] = float(sft_loss(*of_decoder, num_tokens=1)[0])
        return losses, batch.num_tokens

    totals: dict[str, float] = {}
    num_tokens = 0
    for losses, tokens in chain(*world.each(lambda: [measured(start) for start in starts[world.share(len(starts))]])):
        totals = {name: totals.get(name, 0.0) + loss for name, loss in losses.items()}
        num_tokens += tokens
    metrics: dict[str, float] = {}
    for name, total in totals.items() if num_tokens else ():
        loss_mean = total / num_tokens
        metrics |= {f"{name}sft_loss": loss_mean, f"{name}perplexity": math.exp(min(loss_mean, 700.0))}
    return metrics


def evaluate_responses(
    policy: Policy,
    references: Sequence[Reference],
    reward: Reward | None,
    examples: Sequence[Encoded],
    *,
    tokenizer: Any,
    sampling: SamplingConfig,
    text_metrics: Sequence[str] = (),
    batch_size: int = 32,
    seed: int = 1234,
    engine: Engine | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answer the examples' prompts as `sampling` says, and measure the answers.

    Returns metrics and one row per sample. kl: nats per response (k1); distinct_2: distinct over all word bigrams;
    the text metrics of `evaluate_texts`; decoder/NAME: what the decoder has to say of itself.
    With a reward also reward: mean score; reward_sem: its standard error; positive: share of responses with reward
    > 0; of several parts reward/PART/raw_mean: mean of the scores before any postprocessing. The reward's state
    (running means, history) is left as it was: training goes on from its own. A response that the reward skips is
    left out.
    """
    generator = torch.Generator(policy.device).manual_seed(seed)
    engine = engine or TorchEngine(policy)
    rollouts = _rollouts(
        policy, references, reward or Unjudged(), examples,
        batch_size=batch_size, tokenizer=tokenizer, sampling=sampling, seed=seed, generator=generator, engine=engine,
    )  # fmt: skip
    rows = [row for rollout in rollouts for row in sample_rows(rollout)]
    responses = [row["response"] for row in rows]
    lengths = [n for rollout in rollouts for n in rollout.mask.sum(1).tolist()]
    metrics = {
        "kl": fmean(x for rollout in rollouts for x in rollout.kl.sum(1).tolist()),
        "distinct_2": distinct_n(responses, 2),
        "response_length": fmean(lengths),
        "eos_share": fmean(x for rollout in rollouts for x in rollout.ended.tolist()),
        "num_prompts": float(len(rows)),
    }
    metrics |= _decoder_metrics(rollouts)
    if text_metrics:
        metrics |= evaluate_texts(text_metrics, responses, [row["target"] for row in rows])
    if reward is None:
        return metrics, [{**row, "reward": None, "components": {}} for row in rows]
    return _reward_metrics(rows) | metrics, rows


def _rollouts(
    policy: Policy,
    references: Sequence[Reference],
    reward: Reward,
    examples: Sequence[Encoded],
    *,
    batch_size: int,
    seed: int,
    engine: Engine,
    **options: Any,
) -> list[Rollout]:
    """The examples' rollouts, a batch each, after which the reward's state is what it was."""
    world = engine.world
    state = world.main(reward.state_dict)
    rollouts: list[Rollout] = []
    world.main(lambda: reward.before_evaluation(seed))

    def over() -> None:
        reward.load_state_dict(state or {})
        reward.after_evaluation(rollouts)

    try:
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            try:
                rollouts.append(collect(policy, references, reward, batch, engine=engine, allow_gap=True, **options))
            except AllSkipped:
                # The last batch may be one response; only where none has a score is there nothing to measure.
                if not rollouts and start + batch_size >= len(examples):
                    raise
    finally:
        world.main(over)
    return rollouts


def _decoder_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What the decoder had to log of each rollout, "decoder/NAME", in the mean over the responses."""
    names = [name for name in rollouts[0].reward_metrics if name.startswith("decoder/")]
    total = sum(map(len, rollouts))
    return {name: sum(len(r) * r.reward_metrics[name] for r in rollouts) / total for name in names}


def _reward_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    scores = [row["reward"] for row in rows]
    spread = stdev(scores) if len(scores) > 1 else 0.0
    metrics = {
        "reward": fmean(scores),
        "reward_std": spread,
        "reward_sem": spread / math.sqrt(len(scores)),
        "positive": fmean(score > 0 for score in scores),
    }
    parts = rows[0]["components"]
    for part in parts if len(parts) > 1 else ():  # a single one is the reward itself
        if raw := [score for row in rows if (score := row["components"][part]) is not None]:
            metrics[f"reward/{part}/raw_mean"] = fmean(raw)
    return metrics


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
