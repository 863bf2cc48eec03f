"""The policy drawn to a teacher's whole distribution, on its own responses or on the data's. No optimizer in here."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor

from hybrid.core import IGNORE, Batch, InputError, Record, Rollout
from hybrid.data import Loader
from hybrid.functional import linear_divergence
from hybrid.models import before_response, response_stats
from hybrid.objectives.accumulate import Loss
from hybrid.objectives.objective import Objective, Parts, register_objective
from hybrid.objectives.reference_logprob import numbered_reference

__all__ = ["Distill", "DistillData"]

Divergence = Literal["reverse", "forward", "jsd"]


class _Distilling(Objective[Record]):
    """The divergence from one of the references, the teacher, per token.

    kind: "reverse" KL(policy || teacher), "forward" KL(teacher || policy), or "jsd" with the mixture weight `mix`; see
        `functional.linear_divergence`.
    reference: the number of the teacher, of the config's `references`; its vocabulary is the policy's.
    """

    def __init__(self, parts: Parts, kind: Divergence = "reverse", mix: float = 0.5, reference: int = 0):
        super().__init__(parts)
        self.kind, self.mix, self.number = kind, mix, reference

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        if not 0 < (mix := settings.get("mix", 0.5)) < 1:
            raise InputError(f"mix must lie in (0, 1), got {mix}")

    def check(self) -> None:
        teacher = numbered_reference(self.parts, self.number)
        with self.parts.world.gathered():
            rows = [len(backbone.head_weight) for backbone in (self.parts.policy.backbone, teacher.backbone)]
        if rows[0] != rows[1]:
            raise InputError(
                f"a teacher needs the policy's vocabulary of {rows[0]}, and references[{self.number}] has {rows[1]}"
            )
        super().check()

    def _total(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        mask: Tensor,
        position_ids: Tensor | None = None,
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """The sum over the tokens of `mask`, (B, T), the last T of (B, P+T)."""
        policy, teacher = self.parts.policy.backbone, self.parts.references[self.number]
        hidden = policy(input_ids, attention_mask, position_ids)
        ref_hidden = teacher.hidden(input_ids, attention_mask, position_ids)
        if self.kind == "reverse":
            stats = response_stats(
                policy, hidden, input_ids, mask, temperature=temperature, want=("kl",),
                reference=teacher.backbone, ref_hidden=ref_hidden,
            )  # fmt: skip
            assert stats.kl is not None
            return stats.kl.sum()
        length, device = mask.shape[1], hidden.device
        bias, other = teacher.backbone.head_bias, teacher.backbone
        divergence: Tensor = linear_divergence(
            before_response(hidden, length),
            policy.head_weight,
            before_response(ref_hidden, length).to(device),
            other.head_weight.to(device),
            kind=self.kind, mix=self.mix, temperature=temperature, mask=mask,
            bias=policy.head_bias, ref_bias=None if bias is None else bias.to(device),
            softcap=policy.softcap, ref_softcap=other.softcap,
        )  # fmt: skip
        return divergence.sum()


@register_objective("distill")
class Distill(_Distilling[Rollout]):
    """On-policy distillation: the divergence from a teacher over the policy's own responses, without dropout.

        loss = sum over response tokens of D(policy, teacher) / their count

    kind, mix, reference: the divergence, the mixture's weight in "jsd", and the number of the teacher among the
    config's `references`. The responses need no reward.
    Source: Agarwal et al. 2024, GKD (arXiv:2306.13649); Gu et al. 2024, MiniLLM (arXiv:2306.08543) for the reverse KL.
    """

    rolls_out = True
    needs_reward = False
    dropout = False

    def loss_of(self, whole: Rollout) -> Callable[[Rollout], Loss]:
        return partial(self._loss, num_tokens=whole.num_tokens)

    def _loss(self, part: Rollout, num_tokens: int) -> Loss:
        ids, seen, mask = part.input_ids, part.attention_mask, part.mask
        return self._total(ids, seen, mask, temperature=part.temperature) / num_tokens, {}


@register_objective("distill_data")
class DistillData(_Distilling[Batch]):
    """`distill` over the targets of the training data: supervised distillation, with dropout.

    Kind "forward" is that of Hinton et al. 2015 (arXiv:1503.02531) at temperature 1. A plan of both, `distill` with
    lambda and this with 1 - lambda, is GKD (arXiv:2306.13649).
    """

    def __init__(self, parts: Parts, kind: Divergence = "forward", mix: float = 0.5, reference: int = 0):
        super().__init__(parts, kind, mix, reference)

    def rows(self) -> Loader:
        return self.parts.loader

    def loss_of(self, whole: Batch) -> Callable[[Batch], Loss]:
        return partial(self._loss, num_tokens=whole.num_tokens)

    def _loss(self, part: Batch, num_tokens: int) -> Loss:
        mask = part.labels[:, 1:] != IGNORE
        total = self._total(part.input_ids, part.attention_mask, mask, part.position_ids)
        return total / num_tokens, {}
