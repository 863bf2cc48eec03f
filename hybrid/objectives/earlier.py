"""Responses of earlier rollouts as rows to learn from: scored anew by the policy as it is now."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from hybrid.core import InputError, Rollout
from hybrid.data import filler_id, left_pad
from hybrid.memory import Kept, Memory
from hybrid.models import Reference
from hybrid.objectives.advantages import with_advantages
from hybrid.objectives.objective import Parts
from hybrid.objectives.ppo_config import PPOConfig
from hybrid.rollout import CollectOptions, KLConfig, Responses, ScoreConfig, assemble

__all__ = ["assembled_as", "beside", "check_staleness", "rescored", "with_stale"]


def check_staleness(memory: Memory | None, ppo: PPOConfig, score: ScoreConfig) -> None:
    """Refuse (InputError) stale rows whose distribution nothing corrects for, that are scored in a company they never
    had, or that are of the step itself."""
    staleness = getattr(memory, "staleness", 0)
    if staleness and ppo.importance is None:
        raise InputError(
            f"memory.staleness = {staleness} lets PPO learn from responses of an earlier policy, which needs "
            "ppo.importance: set it to token or sequence, or memory.staleness=0"
        )
    if staleness and ppo.resample:
        raise InputError(
            f"ppo.resample = {ppo.resample} makes several rollouts of a step, and memory.staleness = {staleness} would "
            "take the first of them for earlier ones: set one of them to 0"
        )
    if staleness and score.whiten:
        raise InputError(
            f"score.whiten takes a rollout's scores against each other, and memory.staleness = {staleness} brings in "
            "others: set one of them to false or 0, or ppo.whiten_reward=true instead"
        )


def with_stale(rollout: Rollout, parts: Parts, ppo: PPOConfig, kl: KLConfig, score: ScoreConfig) -> Rollout:
    """The rollout, and behind it the earlier responses that the memory holds fresh enough; none: the rollout itself.

        weight of token t = min(cap, old_t / mu_t)          (`ppo.importance`)
        ratio of token t  = pi_t / old_t                    (clipped as ever)

    mu: the distribution that it was drawn from, then; old: the policy's as it is now, before the step's updates; pi:
    during them. So the clip keeps the policy close to the newest one, and the weight makes good what has changed since.
    Old log-probs, values, the KL and so the rewards are computed anew; the advantages of all rows together.
    Source: the decoupled objective of Hilton et al. 2021 (arXiv:2110.00641), with weights that are cut off.
    """
    visits = [] if parts.memory is None else parts.memory.stale(len(rollout))
    if not visits:
        return rollout
    check_staleness(parts.memory, ppo, score)
    rows = [row for visit in visits for row in visit.rows]
    group = torch.tensor([number for number, visit in enumerate(visits) for _ in visit.rows])
    stale = rescored(rows, parts, parts.references, rollout, group, assembled_as(parts, ppo, kl, score))
    return with_advantages(beside(rollout, stale), ppo)


def assembled_as(parts: Parts, ppo: PPOConfig, kl: KLConfig, score: ScoreConfig) -> CollectOptions:
    """What becomes of rows as it does of a rollout's."""
    return {
        "score": score, "kl_coef": 0.0 if kl.in_loss else parts.kl.coef, "kl_kind": kl.kind,
        "minibatch_size": ppo.minibatch_size, "microbatch_size": ppo.microbatch_size,
    }  # fmt: skip


def rescored(
    rows: Sequence[Kept],
    parts: Parts,
    references: Sequence[Reference],
    fresh: Rollout,
    group: Tensor | None,
    options: CollectOptions,
) -> Rollout:
    """The rows under the policy as it is now: its log-probs, values and entropy, and what came with them then.

    fresh: the rollout that they go with, at whose temperature and in whose window they are scored.
    group: (B,) int64, see `Rollout`; None: by prompt.   options: see `CollectOptions`.
    """
    pad_id, device = filler_id(parts.tokenizer), parts.policy.device
    prompt_ids, prompt_mask = left_pad([row.prompt for row in rows], pad_id=pad_id)
    length = max(len(row.response) for row in rows)
    ids, logprob = torch.full((len(rows), length), pad_id), torch.zeros(len(rows), length)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        here = slice(0, len(row.response))
        ids[number, here], mask[number, here] = torch.tensor(row.response), True
        if row.logprob is not None:
            logprob[number, here] = torch.tensor(row.logprob)
    known = all(row.logprob is not None for row in rows)
    ended, scores = torch.tensor([row.ended for row in rows]), torch.tensor([row.score for row in rows])
    drawn = logprob.to(device) if known else None
    responses = Responses(ids.to(device), mask.to(device), ended.to(device), drawn)
    with parts.world.gathered(), parts.autocast():
        return assemble(
            parts.policy, references, prompt_ids.to(device), prompt_mask.to(device), responses, scores,
            temperature=fresh.temperature, decoder=fresh.decoder, window=fresh.window,
            group=None if group is None else group.to(device), world=parts.world, **options,
        )  # fmt: skip


def beside(first: Rollout, second: Rollout, *, num_groups: int | None = None) -> Rollout:
    """The rows of both in one rollout. Texts and examples are left out where not both have them.

    num_groups: the number of the second's first group; None: the first that is free, so that none is shared.
    What the reward logs is the mean over the rows, and seconds are added up.
    """
    prompt = max(first.prompt_length, second.prompt_length)
    response = max(first.mask.shape[1], second.mask.shape[1])

    def padded(rollout: Rollout, name: str) -> Tensor:
        x: Tensor = getattr(rollout, name)
        if x.dim() == 1:
            return x
        left = prompt - rollout.prompt_length if name in ("input_ids", "attention_mask") else 0
        # What stands on padding is masked, in the ids too.
        return nn.functional.pad(x, (left, response - rollout.mask.shape[1]))

    if first.group is not None and second.group is not None and len(first):
        free = int(first.group.max()) + 1 if num_groups is None else num_groups
        second = replace(second, group=second.group + free)
    joined: dict[str, Any] = {}
    for f in fields(Rollout):
        one, other = getattr(first, f.name), getattr(second, f.name)
        if isinstance(one, Tensor):
            axis = 1 if f.name == "ref_logprob" else 0
            joined[f.name] = None if other is None else torch.cat([padded(first, f.name), padded(second, f.name)], axis)
        elif f.name in ("prompts", "responses", "targets", "examples") and len(one) == len(first):
            joined[f.name] = (*one, *other) if len(other) == len(second) else ()
    both = first.components.keys() & second.components.keys()
    return replace(
        first[:0],
        **joined,
        components={name: (*first.components[name], *second.components[name]) for name in sorted(both)},
        reward_metrics=_means(first.reward_metrics, second.reward_metrics, len(first) / (len(first) + len(second))),
        seconds={part: first.seconds[part] + second.seconds.get(part, 0.0) for part in first.seconds},
    )


def _means(first: Mapping[str, float], second: Mapping[str, float], share: float) -> dict[str, float]:
    """The first's numbers, each with the second's of that name where it has one; share: the weight of the first."""
    return {name: share * x + (1 - share) * second.get(name, x) for name, x in first.items()}
