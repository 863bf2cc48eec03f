"""The prompts' targets as responses of a rollout: scored, and under the policy as it is now."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hybrid.core import IGNORE, Encoded, InputError, Rollout
from hybrid.data import filler_id
from hybrid.memory import Kept
from hybrid.objectives.earlier import assembled_as, beside, rescored
from hybrid.objectives.objective import Parts
from hybrid.objectives.ppo_config import PPOConfig
from hybrid.rollout import Judge, KLConfig, Responses, SamplingConfig, ScoreConfig

__all__ = ["answer_labels", "by_group", "check_groups_of", "demonstrations", "examples_of"]


def check_groups_of(name: str, sections: Mapping[str, Any]) -> None:
    """Refuse (InputError) settings with which a demonstration cannot stand in a group of responses."""
    ppo, score, memory = sections["ppo"], sections["score"], sections["memory"]
    if ppo.samples_per_prompt < 2:
        raise InputError(
            f"config: objective {name!r} sets the responses to a prompt against each other: ppo.samples_per_prompt "
            f"must be at least 2, got {ppo.samples_per_prompt}"
        )
    if ppo.resample:
        raise InputError(
            f"config: objective {name!r} has demonstrations for prompts whose responses all fail, and ppo.resample = "
            f"{ppo.resample} leaves those out: set it to 0"
        )
    if memory.get("staleness"):
        raise InputError(
            f"config: objective {name!r} learns from the step's own responses and from demonstrations, and "
            f"memory.staleness = {memory['staleness']} is for objective 'ppo': set it to 0"
        )
    if score.whiten:
        raise InputError(
            f"config: score.whiten takes a rollout's scores against each other, and objective {name!r} brings in the "
            "demonstrations': set it to false"
        )


def examples_of(rollout: Rollout, name: str) -> dict[int, Encoded]:
    """The example of each group. Raises InputError where the rollout does not say what it answers."""
    if rollout.group is None or len(rollout.examples) != len(rollout):
        raise InputError(f"objective {name!r} needs the examples that a rollout answers, which this one has not")
    return dict(zip(rollout.group.tolist(), rollout.examples, strict=True))


def answer_labels(example: Encoded) -> tuple[int, ...]:
    """The labels of what stands behind its prompt, up to the last that is trained; empty where none is.

    Of a dialogue in which the user has the last word that is so, although earlier turns are trained.
    """
    labels = example.labels[len(example.prompt_ids) :]
    return labels[: max((t + 1 for t, label in enumerate(labels) if label != IGNORE), default=0)]


def demonstrations(
    rollout: Rollout,
    chosen: Mapping[int, Encoded],
    parts: Parts,
    ppo: PPOConfig,
    kl: KLConfig,
    score: ScoreConfig,
    sampling: SamplingConfig,
) -> Rollout:
    """The targets of these examples as rows beside the rollout's, their tokens `given`; in the order of groups.

    chosen: by group. Those without a target have no row, and those whose target the reward skips. Of a target's tokens
    those that are not trained (what a user says in the midst of it) are seen, and stand outside of the mask.
    The reward scores a target as it does a response. It has been drawn by someone who was certain of it: its
    sampling_logprob is 0.
    """
    labels = {group: answer_labels(e) for group, e in chosen.items()}
    targets = {group: e for group, e in chosen.items() if labels[group]}
    answers = {g: e.input_ids[len(e.prompt_ids) : len(e.prompt_ids) + len(labels[g])] for g, e in targets.items()}
    scores = _scores(list(targets.values()), list(answers.values()), parts, sampling) if targets else []
    scored = {group: x for group, x in zip(targets, scores, strict=True) if x > -torch.inf}
    rollout = replace(rollout, given=torch.zeros_like(rollout.mask))
    if not scored:
        return rollout
    eos_ids = parts.policy.backbone.eos_ids(parts.tokenizer)
    rows = [
        Kept(
            prompt=targets[group].prompt_ids, response=answers[group], logprob=(0.0,) * len(answers[group]), score=x,
            entropy=0.0, step=0, ended=answers[group][-1] in eos_ids,
        )
        for group, x in scored.items()
    ]  # fmt: skip
    options = assembled_as(parts, ppo, kl, score)
    found = rescored(rows, parts, parts.references, rollout, torch.tensor(list(scored)), options)
    nothing = torch.zeros_like(found.reward)
    said = pad_sequence([torch.tensor(labels[group]) for group in scored], batch_first=True, padding_value=IGNORE)
    trained = (said != IGNORE).to(found.mask.device)
    found = replace(found, mask=trained, given=trained, advantage=nothing, return_=nothing)
    return by_group(beside(rollout, found, num_groups=0))


def by_group(rollout: Rollout) -> Rollout:
    """The rows of each group together: an update's share of them then has whole groups."""
    assert rollout.group is not None
    return rollout[rollout.group.argsort(stable=True)]


def _scores(examples: list[Encoded], answers: list[tuple[int, ...]], parts: Parts, sampling: SamplingConfig) -> Any:
    """What the reward says of each target, and -inf where it skips it; its state stays as it is."""
    if parts.reward is None:
        raise InputError("demonstrations are scored as responses are, and there is no reward: give one")
    length, device = max(map(len, answers)), torch.device("cpu")
    texts = Responses.of_lists(answers, length, pad_id=filler_id(parts.tokenizer), device=device)
    scores: Tensor = Judge(parts.reward, parts.tokenizer, sampling, parts.world)(examples, texts)
    return scores.tolist()
