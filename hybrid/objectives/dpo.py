"""Direct preference optimisation and its family, on pairs of answers. No optimizer in here."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hybrid.core import IGNORE, Encoded, Pairs, by_length
from hybrid.functional import PER_TOKEN, REFERENCE_FREE, PreferenceKind, dpo_loss
from hybrid.objectives.accumulate import Loss, Term
from hybrid.objectives.objective import Measures, Objective, Parts, register_objective
from hybrid.objectives.pair_measures import rated_pairs
from hybrid.objectives.preference_config import PreferencesConfig
from hybrid.objectives.reference_logprob import ReferenceLogprob

__all__ = ["DPO"]


@register_objective("dpo")
class DPO(Objective[Pairs]):
    """Chosen answers made likelier than rejected ones, as `functional.dpo_loss` says; without dropout.

    kind, beta, label_smoothing, margin: see there. Kinds of `PER_TOKEN` are given means over the answers' tokens.
    reference: the number of the reference, of the config's `references`.
    Mixed with `sft`, kind sigmoid is RPO, and kind orpo is ORPO as published.
    """

    dropout = False

    def __init__(
        self,
        parts: Parts,
        preferences: PreferencesConfig,
        kind: PreferenceKind = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        margin: float = 0.0,
        reference: int = 0,
    ):
        super().__init__(parts)
        self.config, self.kind = preferences, kind
        self.options: dict[str, Any] = {
            "kind": kind, "beta": beta, "label_smoothing": label_smoothing, "margin": margin,
        }  # fmt: skip
        self.needs_reference = kind not in REFERENCE_FREE
        self.reference = ReferenceLogprob(parts, reference)

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        names = ("kind", "beta", "label_smoothing", "margin")
        none = torch.zeros(0)
        dpo_loss(none, none, none, none, **{name: settings[name] for name in names if name in settings})

    def check(self) -> None:
        super().check()
        if self.needs_reference:
            _ = self.reference.reference

    def rows(self) -> Iterator[Pairs]:
        if self.needs_reference and self.config.cache_reference:
            self.reference.keep(_sides(self.parts.pair_loader.examples))
        return self.parts.pair_loader

    def rows_of(self, given: Any) -> Pairs:
        return self.parts.pairs(given)

    def term(self, rows: Pairs, coef: float = 1.0) -> Term[Pairs]:
        pairs = rows if isinstance(rows, Pairs) else self.rows_of(rows)
        return super().term(self._with_reference(pairs), coef)

    def loss_of(self, whole: Pairs) -> Callable[[Pairs], Loss]:
        def loss(part: Pairs) -> Loss:
            return self._loss_of(part, self._logprob(part), whole.num_pairs)

        return loss

    def evaluate(self, examples: Sequence[Encoded], batch_size: int) -> Measures:
        """loss, accuracy, chosen_reward, rejected_reward and margin_mean over all pairs; a row for each pair."""
        pairs = [e for e in examples if e.is_pair]
        if self.needs_reference:
            self.reference.keep(_sides(pairs))
        return rated_pairs(self.parts, pairs, batch_size, self._rated)

    def _rated(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """See `rated_pairs`: beta times the log-probs, against the reference's where there is one."""
        pairs = self._with_reference(pairs)
        logprob = self._logprob(pairs)
        loss, _ = self._loss_of(pairs, logprob, 1.0)
        if pairs.ref_logprob is not None:
            logprob = logprob - self._per_token(pairs.ref_logprob, pairs)
        return self.options["beta"] * logprob, loss

    def _with_reference(self, rows: Pairs) -> Pairs:
        """The pairs with the reference's log-probs: those that are kept, or computed as the policy's will be."""
        if not self.needs_reference or rows.ref_logprob is not None:
            return rows
        kept = self.reference.kept(_sides(rows.examples))
        if kept is None:
            groups = [rows.both(some) for some in by_length(rows.extents, self.microbatch_size)]
            kept = self.reference.of(rows.sides, groups, temperature=rows.temperature)
        return replace(rows, ref_logprob=kept.to(rows.weight.device))

    def _loss_of(self, part: Pairs, logprob: Tensor, num_pairs: float) -> Loss:
        chosen, rejected = part.split(logprob)
        ref_chosen = ref_rejected = None
        if part.ref_logprob is not None:
            ref_chosen, ref_rejected = part.split(self._per_token(part.ref_logprob, part))
        return dpo_loss(
            chosen, rejected, ref_chosen, ref_rejected, weight=part.weight, num_pairs=num_pairs, **self.options
        )

    def _logprob(self, part: Pairs) -> Tensor:
        logprob, _ = self.parts.policy.batch_logprob(part.sides, temperature=part.temperature)
        return self._per_token(logprob.sum(1), part)

    def _per_token(self, sums: Tensor, part: Pairs) -> Tensor:
        """The sums, or the means over the answers' tokens where the kind takes these."""
        if self.kind not in PER_TOKEN:
            return sums
        return sums / (part.sides.labels[:, 1:] != IGNORE).sum(1).clamp(min=1)


def _sides(examples: Sequence[Encoded]) -> list[Encoded]:
    """The chosen ones, then the rejected ones, as `Pairs.sides` has them."""
    return [*examples, *(e.rejected for e in examples if e.rejected is not None)]
