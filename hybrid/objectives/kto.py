"""KTO: answers that were called good made likelier, bad ones less likely. No optimizer in here."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hybrid.core import Encoded, Labelled, by_length
from hybrid.functional import kto_loss
from hybrid.objectives.accumulate import Loss, Term
from hybrid.objectives.dpo import DPO
from hybrid.objectives.objective import Measures, Objective, Parts, register_objective
from hybrid.objectives.preference_config import PreferencesConfig
from hybrid.objectives.reference_logprob import ReferenceLogprob, answer_logprob

__all__ = ["KTO"]


@register_objective("kto")
class KTO(Objective[Labelled]):
    """Single answers, good or bad, as `functional.kto_loss` says; without dropout.

    The KL that they are held against is estimated from every prompt of the update with another one's answer:

        kl = max(0, mean over rows of log pi(y' | x) - log pi_ref(y' | x)),    without gradient

    Pairs are taken apart: the chosen side is good, the rejected one bad.
    reference: the number of the reference, of the config's `references`.
    Source: Ethayarajh et al. 2024 (arXiv:2402.01306).
    """

    dropout = False

    def __init__(
        self,
        parts: Parts,
        preferences: PreferencesConfig,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reference: int = 0,
    ):
        super().__init__(parts)
        self.config = preferences
        self.options = {
            "beta": beta, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight,
        }  # fmt: skip
        self.reference = ReferenceLogprob(parts, reference)
        self._pairs = DPO(parts, preferences, beta=beta, reference=reference)  # what it measures held-out pairs with

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        none = torch.zeros(0)
        kto_loss(none, none, none.bool(), 0.0, **{name: x for name, x in settings.items() if name != "reference"})

    def check(self) -> None:
        super().check()
        _ = self.reference.reference

    def rows(self) -> Iterator[Labelled]:
        loader = self.parts.answer_loader
        if self.config.cache_reference:
            self.reference.keep([e for a in loader.examples for e in (a.encoded, a.mismatched)])
        return loader

    def rows_of(self, given: Any) -> Labelled:
        return self.parts.answers(given)

    def term(self, rows: Labelled, coef: float = 1.0) -> Term[Labelled]:
        answers = rows if isinstance(rows, Labelled) else self.rows_of(rows)
        return super().term(self._with_reference(answers), coef)

    def evaluate(self, examples: Sequence[Encoded], batch_size: int) -> Measures:
        """Of held-out pairs, what `dpo` says but for its loss: both have the reward beta log(pi / ref)."""
        metrics, rows = self._pairs.evaluate(examples, batch_size)
        return Measures({name: value for name, value in metrics.items() if name != "loss"}, rows)

    def loss_of(self, whole: Labelled) -> Callable[[Labelled], Loss]:
        kl, share = self._kl(whole), float(whole.label.float().mean())

        def loss(part: Labelled) -> Loss:
            assert part.ref_logprob is not None
            logprob, _ = self.parts.policy.batch_logprob(part.answers)
            return kto_loss(
                logprob.sum(1), part.ref_logprob, part.label, kl,
                num_examples=len(whole), desirable_share=share, **self.options,
            )  # fmt: skip

        return loss

    def _kl(self, whole: Labelled) -> Tensor:
        """The mean log-ratio of the mismatched answers of the whole update, at least 0."""
        assert whole.ref_mismatched is not None
        groups = by_length(whole.mismatched.extents, self.microbatch_size)
        logprob = answer_logprob(self.parts, self.parts.policy, whole.mismatched, groups)
        return (logprob - whole.ref_mismatched).mean().clamp(min=0)

    def _with_reference(self, rows: Labelled) -> Labelled:
        if rows.ref_logprob is not None:
            return rows
        answers, mismatched = self._reference_of(rows, 0), self._reference_of(rows, 1)
        return replace(rows, ref_logprob=answers, ref_mismatched=mismatched)

    def _reference_of(self, rows: Labelled, which: int) -> Tensor:
        """Of the answers (0) or the mismatched ones (1): what is kept, or computed as the policy's will be."""
        kept = self.reference.kept([both[which] for both in rows.examples])
        if kept is None:
            batch = (rows.answers, rows.mismatched)[which]
            kept = self.reference.of(batch, by_length(batch.extents, self.microbatch_size))
        return kept.to(rows.label.device)
