"""A beam that looks ahead by the value head."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hybrid.core import InputError
from hybrid.rollout.asked import Asked
from hybrid.rollout.decoder import Decoder, register_decoder
from hybrid.rollout.judging import By
from hybrid.rollout.responses import Responses

__all__ = ["ValueGuided"]

# Candidates of one prompt at a time: beyond this a forward of them fits into no memory.
MOST = 4096


@register_decoder("value_guided")
@dataclass(frozen=True, kw_only=True)
class ValueGuided(Decoder):
    """A beam search whose heuristic is the value head, as in A*: nothing is drawn.

        score = log p(y_1:t) + beta * V(y_1:t)

    width: the beginnings that are kept.   branch: the likeliest tokens by which each of them grows.   depth: tokens by
    which they grow before the best are kept, all branches together: width * branch^depth candidates.
    ends_by: what a whole response counts in place of V, which knows beginnings only: `value`, that before its last
    token; `reward`, the reward's word.   reward: of that, the spec of its own; None: the run's.
    Several responses to a prompt are the best of the beam. A token costs a forward over all that is before it.
    Source: the idea is that of Liu et al. 2023, PPO-MCTS (arXiv:2309.15028), with a beam for the tree.
    """

    beta: float = 1.0
    width: int = 4
    branch: int = 8
    depth: int = 1
    ends_by: By = "value"
    reward: Any = None

    def __post_init__(self) -> None:
        self._positive("beta")
        self._at_least(1, "width", "branch", "depth")
        if (number := self.width * self.branch**self.depth) > MOST:
            raise InputError(
                f"width * branch^depth must be at most {MOST} candidates for a prompt, got {self.width} * "
                f"{self.branch}^{self.depth} = {number}"
            )
        self._reward_is_asked("ends_by", "leave one of them out")

    @property
    def needs_reward(self) -> bool:
        return self.ends_by == "reward"

    def answers(self, asked: Asked) -> Responses:
        if asked.repeats > self.width:
            raise InputError(
                f"decoder {self.name!r} has a beam of width {self.width}, which cannot give {asked.repeats} responses "
                "to one prompt; widen it"
            )
        beam = _Beam.start(asked)
        while not beam.is_whole.all():
            for _ in range(self.depth):
                beam = beam.grown(asked, self.branch).looked_at(asked)
            if self.ends_by == "reward":
                beam = beam.rewarded(asked)
            beam = beam.best(self.width, self.beta)
        return beam.first(asked.repeats, len(asked.prompt_ids)).trimmed()


@dataclass(frozen=True)
class _Beam:
    """Beginnings of all prompts, those of one prompt together, the best first.

    prompts: (R,) the prompt's number.   log_p: (R,) float64.   logits: (R, V) of the next token.   value: (R,) float64,
    of the beginning; of a whole response that before its last token, or its reward.   scored: (R,) whether that is so.
    """

    prompts: Tensor
    rows: Responses
    log_p: Tensor
    logits: Tensor
    value: Tensor
    scored: Tensor

    @classmethod
    def start(cls, asked: Asked) -> "_Beam":
        """One beginning without a token for each prompt."""
        prompts = asked.numbers(1)
        rows = Responses.empty(len(prompts), asked.width, pad_id=asked.pad_id, device=asked.device)
        logits, value = (x.double() for x in asked.states(prompts, rows))
        asked.warn_of_zero(value)
        return cls(prompts, rows, torch.zeros_like(value), logits, value, torch.zeros_like(rows.ended))

    @property
    def is_whole(self) -> Tensor:
        return self.rows.ended | (self.rows.lengths == self.rows.ids.shape[1])

    def looked_at(self, asked: Asked) -> "_Beam":
        """With the logits and the value behind each beginning."""
        going = (~self.is_whole).nonzero().squeeze(1)
        if not len(going):
            return self
        logits, value = asked.states(self.prompts[going], self.rows.of(going))
        return replace(
            self,
            logits=self.logits.index_copy(0, going, logits.double()),
            value=self.value.index_copy(0, going, value.double()),
        )

    def grown(self, asked: Asked, branch: int) -> "_Beam":
        """Each beginning with each of its likeliest tokens; a whole response as it is."""
        whole, lengths = self.is_whole, self.rows.lengths
        log_p = asked.next_logprob(self.logits, lengths)
        top, tokens = log_p.topk(min(branch, log_p.shape[1]), 1)
        total = self.log_p.unsqueeze(1) + top
        # A whole response stands once among its own.
        total[whole] = -torch.inf
        total[whole, 0] = self.log_p[whole]
        row, place = (total > -torch.inf).nonzero(as_tuple=True)
        rows, goes_on = self.rows.of(row), ~whole[row]
        new, at = tokens[row, place][goes_on], lengths[row][goes_on]
        where = goes_on.nonzero().squeeze(1)
        rows.ids[where, at], rows.mask[where, at] = new, True
        over = torch.isin(new, torch.tensor(asked.eos_ids, device=new.device))
        if asked.is_over is not None:
            lists = rows.of(where).lists()
            over |= torch.tensor([asked.is_over(ids) for ids in lists], dtype=torch.bool, device=new.device)
        rows.ended[where] = over
        # The value stays that before the new token, until `looked_at` takes a new one.
        return _Beam(self.prompts[row], rows, total[row, place], self.logits[row], self.value[row], self.scored[row])

    def rewarded(self, asked: Asked) -> "_Beam":
        """With the reward for the value of each whole response."""
        new = (self.is_whole & ~self.scored).nonzero().squeeze(1)
        if not len(new):
            return self
        score = asked.score(self.prompts[new], self.rows.of(new))
        scored = self.scored.clone()
        scored[new] = True
        return replace(self, value=self.value.index_copy(0, new, score), scored=scored)

    def best(self, width: int, beta: float) -> "_Beam":
        """The `width` best of each prompt, the best first."""
        score = self.log_p + beta * self.value
        order = score.argsort(descending=True, stable=True)
        order = order[self.prompts[order].argsort(stable=True)]
        prompts = self.prompts[order]
        start = torch.searchsorted(prompts, prompts)
        kept = order[torch.arange(len(order), device=order.device) - start < width]
        return _Beam(
            self.prompts[kept], self.rows.of(kept), self.log_p[kept], self.logits[kept], self.value[kept],
            self.scored[kept],
        )  # fmt: skip

    def first(self, times: int, num_prompts: int) -> Responses:
        """The first `times` of each prompt; where it has fewer, its last one again."""
        numbers = torch.arange(num_prompts, device=self.prompts.device)
        start = torch.searchsorted(self.prompts, numbers)
        count = torch.searchsorted(self.prompts, numbers, right=True) - start
        place = torch.arange(times, device=start.device).minimum(count.unsqueeze(1) - 1)
        return self.rows.of((start.unsqueeze(1) + place).flatten())
