"""Objectives that learn from a rollout by its scores alone: the best against the worst, or the best imitated."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybrid.core import IGNORE, Batch, Encoded, InputError, Pairs, Rollout, by_length
from hybrid.data import collate_pairs
from hybrid.functional import PreferenceKind, sft_loss
from hybrid.models import response_stats
from hybrid.objectives.accumulate import Loss
from hybrid.objectives.dpo import DPO
from hybrid.objectives.objective import Measures, Objective, Parts, register_objective
from hybrid.objectives.ppo_config import PPOConfig
from hybrid.objectives.preference_config import PreferencesConfig
from hybrid.objectives.reference_logprob import answer_logprob
from hybrid.rollout import SamplingConfig

__all__ = ["RAFT", "SPIN", "OnlineDPO", "batch_of", "best_and_worst"]


@register_objective("online_dpo")
class OnlineDPO(DPO):
    """`dpo` on the best and the worst of the responses to each prompt of the step's rollout, by its scores.

    Where all responses to a prompt have one score there is no pair. The log-probs are of the distribution that was
    sampled, temperature included.   Source: Guo et al. 2024 (arXiv:2402.04792), with scores in place of a judge.
    """

    rolls_out = True

    def __init__(
        self,
        parts: Parts,
        preferences: PreferencesConfig,
        ppo: PPOConfig,
        kind: PreferenceKind = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        margin: float = 0.0,
        reference: int = 0,
    ):
        super().__init__(parts, preferences, kind, beta, label_smoothing, margin, reference)
        self.samples_per_prompt = ppo.samples_per_prompt

    def check(self) -> None:
        if self.samples_per_prompt < 2:
            raise InputError(
                f"objective {self.name!r} compares the responses to one prompt: ppo.samples_per_prompt must be at "
                f"least 2, got {self.samples_per_prompt}"
            )
        super().check()

    def rows(self) -> Iterator[Pairs]:
        return Objective.rows(self)

    def learnt(self, rollout: Rollout) -> Pairs:
        best, worst = best_and_worst(rollout)
        both = torch.cat([best, worst])
        ref_logprob = rollout.ref_logprob[self.reference.number, both].sum(1) if self.needs_reference else None
        return Pairs(
            sides=batch_of(rollout, both),
            weight=torch.ones(len(best), device=both.device),
            margin=rollout.score[best] - rollout.score[worst],
            ref_logprob=ref_logprob,
            temperature=rollout.temperature,
        )


@register_objective("spin")
class SPIN(DPO):
    """`dpo` on the data's target, chosen, and the policy's own response to the prompt, rejected.

    The reference is the opponent: the policy as it was when it answered, so that an iteration of SPIN is a step, with
    as many updates as the section `ppo` makes of a rollout. Prompts without a target are left out.
    Source: Chen et al. 2024 (arXiv:2401.01335).
    """

    rolls_out = True
    needs_reward = False

    def __init__(
        self,
        parts: Parts,
        preferences: PreferencesConfig,
        kind: PreferenceKind = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        margin: float = 0.0,
    ):
        super().__init__(parts, preferences, kind, beta, label_smoothing, margin)

    def check(self) -> None:
        Objective.check(self)  # its pairs bring their reference along
        if not any(example.has_target for example in self.parts.loader.examples):
            raise InputError(
                f"objective {self.name!r} sets targets against the policy's responses, and no training example has "
                "one: name their column with data.target"
            )

    def evaluate(self, examples: Sequence[Encoded], batch_size: int) -> Measures:
        """As `dpo`, against the first of the config's references; nothing where there is none."""
        return super().evaluate(examples, batch_size) if self.parts.references else Measures({}, [])

    def rows(self) -> Iterator[Pairs]:
        return Objective.rows(self)

    def learnt(self, rollout: Rollout) -> Pairs:
        if len(rollout.examples) != len(rollout):
            raise InputError(
                f"objective {self.name!r} needs the examples that a rollout answers, which this one has not"
            )
        pairs = []
        for row, example in enumerate(rollout.examples):
            answer = rollout.input_ids[row, rollout.prompt_length :][rollout.mask[row]].tolist()
            untrained = (IGNORE,) * len(example.prompt_ids)
            said = replace(
                example, input_ids=(*example.prompt_ids, *answer), labels=(*untrained, *answer), rejected=None
            )
            # Of plain text the prompt is trained too, which the response has not said.
            target = replace(example, labels=(*untrained, *example.labels[len(untrained) :]), rejected=said, weight=1.0)
            if target.has_target and said.input_ids != example.input_ids:
                pairs.append(target)
        if not pairs:
            return Pairs(batch_of(rollout, rollout.score.new_zeros(0).long()), rollout.score[:0], rollout.score[:0])
        found = self.parts.pairs(collate_pairs(pairs, pad_id=0))
        opponent = self._own_logprob(replace(found, temperature=rollout.temperature))
        return replace(found, temperature=rollout.temperature, ref_logprob=opponent)

    def _own_logprob(self, pairs: Pairs) -> Tensor:
        """(2B,), of both sides under the policy as it is now, through the forwards of the first updates."""
        groups = [pairs.both(some) for some in by_length(pairs.extents, self.microbatch_size)]
        return answer_logprob(self.parts, self.parts.policy, pairs.sides, groups, temperature=pairs.temperature)


def groups_of(rollout: Rollout) -> list[Tensor]:
    """The rows of the responses to each prompt. Raises InputError where the rollout does not say which these are."""
    if rollout.group is None:
        raise InputError(
            "the responses to one prompt are compared, and this rollout does not say which belong together"
        )
    return [(rollout.group == number).nonzero().squeeze(1) for number in rollout.group.unique()]


def best_and_worst(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """The rows of the highest and of the lowest score of each group in which these differ, (n,) int64 each."""
    best, worst = [], []
    for rows in groups_of(rollout):
        scores = rollout.score[rows]
        if scores.max() > scores.min():
            best.append(int(rows[scores.argmax()]))
            worst.append(int(rows[scores.argmin()]))
    device = rollout.score.device
    return torch.tensor(best, dtype=torch.int64, device=device), torch.tensor(worst, dtype=torch.int64, device=device)


def batch_of(rollout: Rollout, rows: Tensor) -> Batch:
    """Rows of a rollout as a batch whose labels are the responses, without the padding that is before all of them."""
    ids, mask = rollout.input_ids[rows], rollout.attention_mask[rows]
    start = int(mask.int().argmax(1).min()) if len(rows) else 0
    labels = ids.masked_fill(~nn.functional.pad(rollout.mask[rows], (rollout.prompt_length, 0)), IGNORE)
    return Batch(ids[:, start:], mask[:, start:], labels[:, start:])


@register_objective("raft")
class RAFT(Objective[Rollout]):
    """The best of the responses to each prompt of the step's rollout, by its scores, imitated as a target is.

        loss = -sum of log pi(y) over the tokens of the chosen responses / their count

    best: so many responses of each prompt.   above: only those with at least this score; None: any.
    The responses may be any decoder's: of `best_of_n` and `mcmc` it is expert iteration.
    Source: RAFT (Dong et al. 2023, arXiv:2304.06767); with `above` also ReST (Gulcehre et al. 2023, arXiv:2308.08998).
    """

    rolls_out = True
    imitates = True
    windowed = True

    def __init__(
        self, parts: Parts, ppo: PPOConfig, sampling: SamplingConfig, best: int = 1, above: float | None = None
    ):
        super().__init__(parts)
        self.searches = not sampling.search.is_policy
        self.best, self.above, self.samples_per_prompt = best, above, ppo.samples_per_prompt

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        if settings.get("best", 1) < 1:
            raise InputError(f"best must be at least 1, got {settings['best']}")

    def check(self) -> None:
        if self.above is None and self.best >= self.samples_per_prompt and not self.searches:
            raise InputError(
                f"objective {self.name!r} imitates the best {self.best} of ppo.samples_per_prompt = "
                f"{self.samples_per_prompt} responses, which are all of them: raise ppo.samples_per_prompt, or set "
                f"objectives.{self.name}.above"
            )
        super().check()

    def learnt(self, rollout: Rollout) -> Rollout:
        chosen = []
        for rows in groups_of(rollout):
            rows = rows[rollout.score[rows].argsort(descending=True, stable=True)[: self.best]]
            chosen += rows[rollout.score[rows] >= (-math.inf if self.above is None else self.above)].tolist()
        return rollout[torch.tensor(chosen, dtype=torch.int64, device=rollout.score.device)]

    def loss_of(self, whole: Rollout) -> Callable[[Rollout], Loss]:
        return partial(self._loss, num_tokens=whole.num_tokens)

    def _loss(self, part: Rollout, num_tokens: int) -> Loss:
        policy = self.parts.policy
        out = policy(part.input_ids, part.attention_mask, window=part.window, length=part.mask.shape[1])
        stats = response_stats(policy.backbone, out.hidden, part.input_ids, part.mask, temperature=part.temperature)
        assert stats.logprob is not None
        return sft_loss(stats.logprob, part.mask, num_tokens=num_tokens)
