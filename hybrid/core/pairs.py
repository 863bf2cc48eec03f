"""What preferences are learnt from: pairs of answers, and answers that were called good or bad."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hybrid.core.rows import handed_on, moved
from hybrid.core.types import Batch, Encoded

__all__ = ["Labelled", "Pairs"]


@dataclass(frozen=True)
class Pairs:
    """B pairs of answers, of which the first was preferred, in one batch: one forward for both sides.

    sides: 2B rows, the B chosen ones, then the B rejected ones in the same order.
    weight, margin: (B,) float32, what each pair counts, and by how much the chosen answer is better (0: not known).
    ref_logprob: (2B,) float32, of the answers of `sides` under the reference, summed over their tokens; None until
        an objective has put it there.
    temperature: what the logits are divided by: that of the sampling, where the answers were sampled.
    examples: the pairs as they were encoded, where they come from data.
    """

    sides: Batch
    weight: Tensor
    margin: Tensor
    ref_logprob: Tensor | None = None
    temperature: float = 1.0
    examples: tuple[Encoded, ...] = ()

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, rows: Tensor | slice) -> "Pairs":
        """Some pairs, for accumulation. `examples` are left out: they belong to the whole."""
        rows = torch.arange(len(self), device=self.weight.device)[rows]
        both = self.both(rows)
        ref_logprob = None if self.ref_logprob is None else self.ref_logprob[both]
        part = Pairs(self.sides[both], self.weight[rows], self.margin[rows], ref_logprob, self.temperature)
        return handed_on(self, part, rows)

    def both(self, rows: Tensor) -> Tensor:
        """The rows of `sides` of some pairs, (n,) -> (2n,): the chosen ones, then the rejected ones."""
        return torch.cat([rows, rows + len(self)])

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(of the chosen answers, of the rejected ones), (B,) each, of a number for each row of `sides`."""
        chosen, rejected = values.split(len(self))
        return chosen, rejected

    @property
    def attention_mask(self) -> Tensor:
        return self.sides.attention_mask

    @cached_property
    def extents(self) -> Tensor:
        """See `hybrid.core.rows.extents`: of the longer side, and the trained tokens of both."""
        start, end, valid = self.sides.extents.view(3, 2, len(self))
        return torch.stack([start.amin(0), end.amax(0), valid.sum(0)])

    @property
    def num_tokens(self) -> int:
        """Trained tokens of both sides."""
        return self.sides.num_tokens

    @cached_property
    def num_pairs(self) -> float:
        """The sum of their weights, which the loss is divided by."""
        return float(self.weight.sum())

    @property
    def mean_over(self) -> float:
        return self.num_pairs

    def trimmed(self) -> "Pairs":
        """Without the padding behind the longest row."""
        return replace(self, sides=self.sides.trimmed())

    def to(self, device: torch.device | str) -> "Pairs":
        """The same pairs with every tensor on `device`."""
        return moved(self, device)


@dataclass(frozen=True)
class Labelled:
    """B answers, each of which was called good or bad.

    answers: a row each.   label: (B,) bool, true where it is good.
    mismatched: each row's prompt with another row's answer, from which KTO estimates its KL.
    ref_logprob, ref_mismatched: (B,) float32, their log-probs under the reference, summed over the answers' tokens;
        None until an objective has put them there.
    examples: the answers and the mismatched ones as they were encoded, where they come from data.
    """

    answers: Batch
    label: Tensor
    mismatched: Batch
    ref_logprob: Tensor | None = None
    ref_mismatched: Tensor | None = None
    examples: tuple[tuple[Encoded, Encoded], ...] = ()

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, rows: Tensor | slice) -> "Labelled":
        """Some rows, for accumulation. `examples` are left out: they belong to the whole."""
        ref_logprob, ref_mismatched = (None if x is None else x[rows] for x in (self.ref_logprob, self.ref_mismatched))
        part = Labelled(self.answers[rows], self.label[rows], self.mismatched[rows], ref_logprob, ref_mismatched)
        return handed_on(self, part, rows)

    @property
    def attention_mask(self) -> Tensor:
        return self.answers.attention_mask

    @property
    def extents(self) -> Tensor:
        """See `hybrid.core.rows.extents`: of the answers."""
        return self.answers.extents

    @property
    def num_tokens(self) -> int:
        """Trained tokens of the answers."""
        return self.answers.num_tokens

    @property
    def mean_over(self) -> float:
        return len(self)

    def trimmed(self) -> "Labelled":
        """Without the padding behind the longest row."""
        return replace(self, answers=self.answers.trimmed(), mismatched=self.mismatched.trimmed())

    def to(self, device: torch.device | str) -> "Labelled":
        """The same rows with every tensor on `device`."""
        return moved(self, device)
