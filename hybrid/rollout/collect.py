"""From prompts to a `Rollout`: generate, score, and put together what PPO needs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from hybrid.core import Batch, Encoded, InputError, Rollout, by_length, enough_memory, extents, used_columns
from hybrid.distributed import ALONE, World
from hybrid.functional import kl_estimate, masked_sum, masked_whiten, token_reward
from hybrid.models import Backbone, Policy, Reference, before_response, response_stats
from hybrid.rewards import AllSkipped, Reward, RewardOutput
from hybrid.rollout.actor import Answered
from hybrid.rollout.engine import Engine
from hybrid.rollout.gap import check_sampling_gap
from hybrid.rollout.judge import judged
from hybrid.rollout.kl import KLKind
from hybrid.rollout.respond import respond
from hybrid.rollout.responses import Responses
from hybrid.rollout.sampling import SamplingConfig
from hybrid.rollout.torch_engine import TorchEngine

__all__ = ["CollectOptions", "ScoreConfig", "assemble", "collect", "shaped_score"]


@dataclass(frozen=True)
class ScoreConfig:
    """What happens to the reward function's scores before PPO sees them, in this order.

    `Rollout.score` and the logs keep the scores as they were given.
    """

    whiten: bool = False  # mean 0 and variance 1 over the rollout
    scale: float = 1.0
    clip: float | None = None  # to [-clip, clip]
    missing_eos_penalty: float = 0.0  # subtracted from a response that was cut off: neither EOS nor a stop text came

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"ScoreConfig.clip must be > 0, got {self.clip}")
        if not self.missing_eos_penalty >= 0:
            raise ValueError(f"ScoreConfig.missing_eos_penalty must be >= 0, got {self.missing_eos_penalty}")


class CollectOptions(TypedDict, total=False):
    """What becomes of responses, however they came: `collect` and `assemble` take these.

    score: what happens to the scores.   kl_coef: the weight of the per-token KL in the reward; 0 where the KL belongs
        into the loss.   kl_kind: its estimate.
    minibatch_size, microbatch_size: rows of one update, and of one forward in it; None: all. Where PPO's are the same,
        its first ratios are exactly 1: in its first epoch the same rows go through the same products.
    """

    score: ScoreConfig | None
    kl_coef: float
    kl_kind: KLKind
    minibatch_size: int | None
    microbatch_size: int | None


def collect(
    policy: Policy,
    references: Sequence[Reference],
    reward: Reward,
    batch: Batch | Sequence[Encoded],
    *,
    tokenizer: Any,
    sampling: SamplingConfig | None = None,
    samples_per_prompt: int = 1,
    repeated: bool = False,
    generator: torch.Generator | None = None,
    engine: Engine | None = None,
    answered: Answered | None = None,
    allow_gap: bool = False,
    **options: Unpack[CollectOptions],
) -> Rollout:
    """Answer the batch's prompts, score the answers, and assemble the rollout.

    samples_per_prompt: responses to each prompt; they stand together and are one `group`, of the prompt's number.
    repeated: the batch has each prompt so many times already, as where they have hints of their own.
    engine: the policy's, which keeps from rollout to rollout what makes it fast; None: one for this rollout alone.
    answered: the prompts with responses that were drawn before; None: they are drawn now.
    options: see `CollectOptions`.
    allow_gap: whether the responses may have been drawn from another distribution than the training forward's, as
        where `PPOConfig.importance` corrects for it; else that is a RunStopped (see `check_sampling_gap`).
    A response that the reward skips (`on_error: skip`) is left out of the rollout, and of its group.
    The policy is left in eval mode: PPO compares log-probs, so dropout stays off until the next SFT step.
    """
    sampling = sampling or SamplingConfig()
    asked = batch.examples if isinstance(batch, Batch) else tuple(batch)
    each = 1 if repeated else samples_per_prompt
    examples = [example for example in asked for _ in range(each)]
    engine = engine or TorchEngine(policy)
    start = time.perf_counter()
    for backbone in _backbones(policy, references):
        backbone.fit_vocabulary(tokenizer)
    with enough_memory("sampling", "Lower ppo.batch_size or sampling.max_new_tokens, or set model.precision=bfloat16"):
        prompt_ids, prompt_mask, responses, *_ = answered or respond(
            engine, asked, tokenizer=tokenizer, sampling=sampling, generator=generator,
            samples_per_prompt=each, reward=reward,
        )  # fmt: skip
    generated = time.perf_counter()
    texts, scores = engine.world.once(lambda: judged(reward, examples, responses, tokenizer, sampling))
    kept = _rows_with_a_score(scores, reward)
    scored = time.perf_counter()
    with enough_memory("scoring a rollout", "Lower ppo.microbatch_size, or ppo.minibatch_size where that is not set"):
        rollout = assemble(
            policy, references, prompt_ids[kept], prompt_mask[kept], responses.of(kept), scores.values[kept],
            # Of a greedy response there is no distribution: its log-probs are the model's own.
            temperature=sampling.temperature or 1.0,
            group=torch.tensor([i // samples_per_prompt for i in kept], device=prompt_ids.device),
            decoder=sampling.search.name,
            window=sampling.search.policy_window,
            world=engine.world,
            **options,
        )  # fmt: skip
    if not allow_gap:
        check_sampling_gap(rollout, policy, sampling)
    return replace(
        rollout,
        prompts=tuple(examples[i].prompt for i in kept),
        responses=tuple(texts[i] for i in kept),
        targets=tuple(examples[i].target for i in kept),
        examples=tuple(examples[i] for i in kept),
        components={name: tuple(values[i] for i in kept) for name, values in scores.components.items()},
        reward_metrics=scores.metrics() | {f"decoder/{name}": x for name, x in responses.metrics.items()},
        seconds={
            "generate": generated - start,
            "reward": scored - generated,
            "score": time.perf_counter() - scored,
        },
    )


def _rows_with_a_score(scores: RewardOutput, reward: Reward) -> list[int]:
    kept = [i for i, valid in enumerate(scores.valid.tolist()) if valid]
    if not kept:
        raise AllSkipped(f"reward {reward.component_name!r} skipped all {len(scores)} responses of a rollout")
    return kept


@torch.no_grad()
def assemble(
    policy: Policy,
    references: Sequence[Reference],
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    responses: Responses,
    scores: Tensor,
    *,
    score: ScoreConfig | None = None,
    temperature: float = 1.0,
    kl_coef: float = 0.0,
    kl_kind: KLKind = "k1",
    minibatch_size: int | None = None,
    microbatch_size: int | None = None,
    group: Tensor | None = None,
    decoder: str = "sample",
    window: int | None = None,
    world: World = ALONE,
) -> Rollout:
    """The rollout of responses that are already there: old log-probs, values, reference log-probs, KL, rewards.

    prompt_ids, prompt_mask: (B, P), left-padded.   scores: (B,), or (B, T) for a score per token.
    group: (B,) int64, equal where the rows answer the same prompt; None: where their prompts have the same tokens.
    decoder: what found the responses.   window: the tokens that it lets the policy see, in all log-probs; None: all.
    world: whose processes share the rows; all of them have the whole rollout.
    """
    policy.eval()
    input_ids = torch.cat([prompt_ids, responses.ids], 1)
    attention_mask = torch.cat([prompt_mask.bool(), responses.mask], 1)
    for backbone in _backbones(policy, references):
        _check_ids(input_ids, backbone)
    longest, context = int(attention_mask.sum(1).max()), policy.backbone.context_length
    if context is not None and longest > context:
        raise InputError(f"a prompt with its response has {longest} tokens, the model's context is {context}")
    used, (prompt, total) = extents(attention_mask, responses.mask), (prompt_ids.shape[1], input_ids.shape[1])

    def scored(rows: Tensor) -> dict[str, Tensor]:
        # What only padding is in goes through no forward.
        start, end = used_columns(used[:, rows], prompt)
        columns = input_ids[rows, start:end], attention_mask[rows, start:end], responses.mask[rows, : end - prompt]
        found = _scored(policy, references, *columns, temperature, kl_kind, window)
        return {name: nn.functional.pad(x, (0, total - end)) for name, x in found.items()}

    forwards = _forwards(used, minibatch_size, microbatch_size, world)
    parts = list(chain(*world.each(lambda: [(rows, scored(rows)) for rows in forwards])))
    back = torch.cat([rows for rows, _ in parts]).argsort().to(input_ids.device)
    # Each part's tensors end in (rows, T); references, where there are any, stand in front.
    stats: dict[str, Any] = {
        name: torch.cat([part[name] for _, part in parts], -2).to(input_ids.device).index_select(-2, back)
        for name in parts[0][1]
    }
    scores = scores.to(input_ids.device)
    reward = token_reward(
        shaped_score(scores, responses.mask, responses.ended, score or ScoreConfig()),
        stats["kl"],
        responses.mask,
        kl_coef=kl_coef,
    )
    return Rollout(
        input_ids=input_ids,
        attention_mask=attention_mask,
        mask=responses.mask,
        reward=reward,
        score=scores if scores.dim() == 1 else masked_sum(scores, responses.mask, 1),
        ended=responses.ended,
        ref_weight=tuple(reference.weight for reference in references),
        temperature=temperature,
        group=prompt_groups(prompt_ids, prompt_mask) if group is None else group,
        sampling_logprob=responses.logprob,
        decoder=decoder,
        window=window,
        **stats,
    )


def _forwards(extents: Tensor, minibatch_size: int | None, microbatch_size: int | None, world: World) -> list[Tensor]:
    """The rows of each forward of this process, as the first epoch's updates group them."""
    chunks = torch.arange(extents.shape[1]).split(minibatch_size or microbatch_size or extents.shape[1])
    own = [share for chunk in chunks if len(share := chunk[world.share(len(chunk))])]
    return [rows[group] for rows in own for group in by_length(extents[:, rows], microbatch_size)]


def _backbones(policy: Policy, references: Sequence[Reference]) -> list[Backbone]:
    return [policy.backbone, *(reference.backbone for reference in references)]


def _check_ids(input_ids: Tensor, backbone: Backbone) -> None:
    lowest, highest = (int(x) for x in input_ids.aminmax())
    rows = len(backbone.model.get_input_embeddings().weight)
    if lowest < 0 or highest >= rows:
        raise InputError(
            f"a prompt or response holds the id {lowest if lowest < 0 else highest}, and "
            f"{type(backbone.model).__name__} has embeddings for ids from 0 to {rows - 1}"
        )


def prompt_groups(prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
    """A number for each row, equal where the prompts have the same tokens, (B, P) -> (B,) int64."""
    # -1 is no token: what fills the padding may be one.
    _, numbers = prompt_ids.masked_fill(~prompt_mask.bool(), -1).unique(dim=0, return_inverse=True)
    return torch.as_tensor(numbers)


def _scored(
    policy: Policy,
    references: Sequence[Reference],
    input_ids: Tensor,
    attention_mask: Tensor,
    mask: Tensor,
    temperature: float,
    kl_kind: KLKind,
    window: int | None,
) -> dict[str, Tensor]:
    """Some rows under the policy and every reference: each (B, T), ref_logprob (R, B, T)."""
    seen: dict[str, Any] = {"window": window, "length": mask.shape[1]}
    out = policy(input_ids, attention_mask, **seen)
    stats = response_stats(
        policy.backbone, out.hidden, input_ids, mask, temperature=temperature, want=("logprob", "entropy")
    )
    assert stats.logprob is not None and stats.entropy is not None
    kl = torch.zeros_like(stats.logprob)
    ref_logprobs = []
    for reference in references:
        ref_hidden = reference.hidden(input_ids, attention_mask, **seen)
        ref_logprob = reference.response_logprob(ref_hidden, input_ids, mask, temperature=temperature)
        ref_logprobs.append(ref_logprob)
        if kl_kind == "full":
            exact = response_stats(
                policy.backbone, out.hidden, input_ids, mask, temperature=temperature, want=("kl",),
                reference=reference.backbone, ref_hidden=ref_hidden,
            ).kl  # fmt: skip
            assert exact is not None
            kl = kl + reference.weight * exact
        else:
            kl = kl + reference.weight * kl_estimate(stats.logprob, ref_logprob, kl_kind)
    value = before_response(out.value, mask.shape[1]).float()
    empty = stats.logprob.new_zeros(0, *mask.shape)
    return {
        "old_logprob": stats.logprob,
        "old_value": value.masked_fill(~mask, 0.0),
        "entropy": stats.entropy,
        "kl": kl.masked_fill(~mask, 0.0),
        "ref_logprob": torch.stack(ref_logprobs) if ref_logprobs else empty,
    }


def shaped_score(score: Tensor, mask: Tensor, ended: Tensor, config: ScoreConfig) -> Tensor:
    """`score` ((B,) or per token (B, T)) as `config` says. The EOS penalty falls on the last valid token."""
    valid = mask if score.dim() == 2 else torch.ones_like(score, dtype=torch.bool)
    if config.whiten:
        score = masked_whiten(score, valid)
    score = score * config.scale
    if config.clip is not None:
        score = score.clamp(-config.clip, config.clip)
    penalty = config.missing_eos_penalty * (~ended).to(score.dtype)
    if score.dim() == 1:
        return score - penalty
    return score + token_reward(-penalty, torch.zeros_like(score), mask, kl_coef=0.0)
