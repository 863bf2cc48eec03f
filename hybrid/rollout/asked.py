"""What a decoder is given: prompts, and all that it may use to answer them."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hybrid.core import Encoded
from hybrid.models import Backbone, response_stats
from hybrid.rollout.draw import truncated
from hybrid.rollout.engine import Engine
from hybrid.rollout.judge import Judge
from hybrid.rollout.responses import Responses
from hybrid.rollout.sampling import SamplingConfig
from hybrid.rollout.steps import Speaker

__all__ = ["Asked"]

# Rows of one forward that looks at candidates.
ROWS = 256


@dataclass(frozen=True)
class Asked:
    """B prompts that want `repeats` responses each. Owned by the call that answers them; nothing has a gradient.

    prompt_ids: (B, P) int64.   prompt_mask: (B, P) bool; left-padded.   examples: B, the prompts' own.
    eos_ids, pad_id, is_over, generator: see `sample`.   judge: what scores candidates, where there is a reward.

    Methods that look at candidates take `prompts`, (R,) int64, the number of the prompt that each row answers, and
    the rows, R responses or beginnings of such. `width` is their room, wherever they are handed from one to another.
    """

    engine: Engine
    prompt_ids: Tensor
    prompt_mask: Tensor
    examples: tuple[Encoded, ...]
    sampling: SamplingConfig
    eos_ids: tuple[int, ...]
    pad_id: int = 0
    repeats: int = 1
    generator: torch.Generator | None = None
    is_over: Callable[[Sequence[int]], bool] | None = None
    judge: Judge | None = None
    _spent: list[int] = field(default_factory=list, repr=False)

    @property
    def width(self) -> int:
        """The most tokens of a response."""
        return self.sampling.max_new_tokens

    @property
    def device(self) -> torch.device:
        return self.prompt_ids.device

    @property
    def num_tokens(self) -> int:
        """Tokens that were drawn or looked at so far."""
        return sum(self._spent)

    def numbers(self, times: int) -> Tensor:
        """(B * times,) the prompts' numbers, each so often, which stand together."""
        return torch.arange(len(self.prompt_ids), device=self.device).repeat_interleave(times)

    def uniform(self, *shape: int) -> Tensor:
        """Random numbers in [0, 1), float64 where the device has it."""
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.rand(shape, generator=self.generator, dtype=exact, device=self.device)

    def drawn(
        self,
        times: int,
        sampling: SamplingConfig | None = None,
        *,
        through: Callable[[Backbone], Speaker] | None = None,
    ) -> Responses:
        """`times` responses to each prompt, as `sample` draws them; (B * times, at most width).

        through: makes of the policy's backbone what speaks in its place; None: it speaks itself.
        """
        found = self.engine.generate(
            self.prompt_ids, self.prompt_mask, (sampling or self.sampling).drawing(), eos_ids=self.eos_ids,
            pad_id=self.pad_id, repeats=times, generator=self.generator, is_over=self.is_over, through=through,
        )  # fmt: skip
        self._spent.append(int(found.mask.sum()))
        return found

    def continued(
        self,
        prompts: Tensor,
        rows: Responses,
        keep: Tensor,
        *,
        limit: int | None = None,
        sampling: SamplingConfig | None = None,
    ) -> Responses:
        """The first `keep` tokens of each row, (R,), and what is drawn behind them, up to `limit` tokens or the end.

        rows: (R, N), with log-probs, of which none has to have ended in what is kept; N tokens at most there will be.
        Returns (R, N); the log-probs are those of what each token was drawn from.
        """
        kept = _cut(rows, keep, self.pad_id)
        ids, mask = self._read(prompts, kept)
        room = int(rows.ids.shape[1] - keep.min())
        new = self.engine.generate(
            ids, mask, (sampling or self.sampling).drawing(), eos_ids=self.eos_ids, pad_id=self.pad_id,
            generator=self.generator, is_over=self.is_over, begun=kept, limit=min(limit or room, room),
        )  # fmt: skip
        whole = _joined(kept, new, keep)
        self._spent.append(int(whole.mask.sum() - keep.sum()))
        return whole

    def states(self, prompts: Tensor, rows: Responses) -> tuple[Tensor, Tensor]:
        """(logits (R, V), value (R,)) of the policy behind each row. Every row is read anew, and counts as a token."""
        policy, found = self.engine.policy, []
        for part in self._parts(len(rows)):
            ids, mask = self._read(prompts[part], rows.of(part))
            hidden = policy.backbone(ids, mask)[:, -1]
            found.append((policy.backbone.logits(hidden), policy.value_head(hidden.unsqueeze(1)).squeeze(1)))
        self._spent.append(len(rows))
        logits, value = (torch.cat(x) for x in zip(*found, strict=True))
        return logits, value

    def next_logprob(self, logits: Tensor, lengths: Tensor) -> Tensor:
        """(R, V) float64, of the token behind the first `lengths`, as it would be drawn; temperature 0 counts as 1."""
        how, z = self.sampling, logits.double() / (self.sampling.temperature or 1.0)
        early = (lengths < how.min_new_tokens).unsqueeze(1)
        eos = list(self.eos_ids)
        z[:, eos] = z[:, eos].masked_fill(early, -torch.inf)
        return truncated(z, how.top_k, how.top_p).log_softmax(1)

    def value(self, prompts: Tensor, rows: Responses) -> Tensor:
        """What the value head expects, (R,): of a beginning behind its last token, of a whole response before it.

        Those are the states that PPO trains the head in. Warns where all values are 0.
        """
        whole = rows.ended | (rows.lengths == self.width)
        before = _cut(rows, rows.lengths - whole.long(), self.pad_id)
        policy, found = self.engine.policy, []
        for part in self._parts(len(rows)):
            ids, mask = self._read(prompts[part], before.of(part))
            found.append(policy.value_head(policy.backbone(ids, mask)[:, -1:]).squeeze(1))
        value = torch.cat(found)
        self.warn_of_zero(value)
        return value

    def logprob(self, prompts: Tensor, rows: Responses) -> Tensor:
        """Of each token under the policy at `sampling.temperature`, over all tokens: (R, width) float32, 0 outside."""
        backbone, found = self.engine.policy.backbone, []
        for part in self._parts(len(rows)):
            some = rows.of(part)
            ids = torch.cat([self.prompt_ids[prompts[part]], some.ids], 1)
            hidden = backbone(ids, torch.cat([self.prompt_mask[prompts[part]], some.mask], 1))
            stats = response_stats(backbone, hidden, ids, some.mask, temperature=self.sampling.temperature)
            assert stats.logprob is not None
            found.append(stats.logprob)
        return torch.cat(found)

    def score(self, prompts: Tensor, rows: Responses) -> Tensor:
        """The reward's word on each row, (R,) float64; -inf where it skips one. Its state stays as it was."""
        assert self.judge is not None
        return self.judge([self.examples[i] for i in prompts.tolist()], rows).to(self.device)

    @staticmethod
    def warn_of_zero(value: Tensor) -> None:
        """Say so where the value head says nothing."""
        if len(value) and not value.any():
            warnings.warn(
                "the value head gives 0 for every state, as one that was never trained does: it steers nothing. Train "
                "it with PPO (ppo.advantage=gae), or let the decoder go by a reward",
                stacklevel=3,
            )

    def _parts(self, num_rows: int) -> Iterator[Tensor]:
        yield from torch.arange(num_rows, device=self.device).split(ROWS)

    def _read(self, prompts: Tensor, rows: Responses) -> tuple[Tensor, Tensor]:
        """Prompts with what is there of their responses, left-padded: ids and mask, (R, P + longest)."""
        longest = int(rows.lengths.max())
        ids = torch.cat([self.prompt_ids[prompts], rows.ids[:, :longest]], 1)
        mask = torch.cat([self.prompt_mask[prompts], rows.mask[:, :longest]], 1)
        # Each row moves to the right by what it lacks to the longest.
        index = torch.arange(ids.shape[1], device=self.device) - (longest - rows.lengths).unsqueeze(1)
        there = index >= 0
        index = index.clamp(min=0)
        return ids.gather(1, index).masked_fill(~there, self.pad_id), mask.gather(1, index) & there


def _cut(rows: Responses, keep: Tensor, pad_id: int) -> Responses:
    """The first `keep` tokens of each row, which then goes on."""
    inside = torch.arange(rows.ids.shape[1], device=rows.ids.device) < keep.unsqueeze(1)
    cut = keep < rows.lengths
    return replace(
        rows,
        ids=rows.ids.masked_fill(~inside, pad_id),
        mask=rows.mask & inside,
        ended=rows.ended & ~cut,
        logprob=None if rows.logprob is None else rows.logprob.masked_fill(~inside, 0.0),
    )


def _joined(kept: Responses, new: Responses, keep: Tensor) -> Responses:
    """Beginnings, (R, width), with what was drawn behind them; what would not fit was not drawn for them."""
    width, length = kept.ids.shape[1], new.ids.shape[1]
    place = torch.arange(width, device=keep.device) - keep.unsqueeze(1)
    inside = (place >= 0) & (place < length)
    place = place.clamp(0, length - 1)
    mask = new.mask.gather(1, place) & inside
    assert kept.logprob is not None and new.logprob is not None
    return replace(
        kept,
        ids=torch.where(mask, new.ids.gather(1, place), kept.ids),
        mask=kept.mask | mask,
        # An end that is drawn too late is none.
        ended=new.ended & (mask.sum(1) == new.lengths),
        logprob=torch.where(mask, new.logprob.gather(1, place), kept.logprob),
    )
