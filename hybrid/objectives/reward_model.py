"""The reward head taught which of two answers was preferred. No optimizer in here."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybrid.core import Encoded, InputError, Pairs
from hybrid.functional import bradley_terry_loss
from hybrid.objectives.accumulate import Loss, Term
from hybrid.objectives.objective import Measures, Objective, Parts, register_objective
from hybrid.objectives.pair_measures import expected_calibration_error, rated_pairs
from hybrid.objectives.preference_config import PreferencesConfig

__all__ = ["RewardModelObjective"]


@register_objective("reward_model")
class RewardModelObjective(Objective[Pairs]):
    """The reward head's score of chosen answers above that of rejected ones, by `functional.bradley_terry_loss`.

    The score is read at each answer's last token. The head stands on the policy's trunk, which is trained with it: a
    run of this objective alone makes a reward model of the trunk, one beside `ppo` a policy and its judge in one.
    center_coef: draws the scores to mean 0.   use_margin: ask for a difference of the data's `margin` at least.
    """

    dropout = False
    needs_reward_head = True

    def __init__(
        self, parts: Parts, preferences: PreferencesConfig, center_coef: float = 0.0, use_margin: bool = False
    ):
        super().__init__(parts)
        self.center_coef, self.use_margin = center_coef, use_margin

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        bradley_terry_loss(torch.zeros(0), torch.zeros(0), center_coef=settings.get("center_coef", 0.0))

    def rows(self) -> Iterator[Pairs]:
        return self.parts.pair_loader

    def rows_of(self, given: Any) -> Pairs:
        return self.parts.pairs(given)

    def term(self, rows: Pairs, coef: float = 1.0) -> Term[Pairs]:
        if self.parts.policy.reward_head is None:
            raise InputError(
                f"objective {self.name!r} trains a reward head, and the policy has none: name it in the config's "
                f"mixing or objectives (objectives.{self.name}={{}}), so that the optimizer has it too"
            )
        return super().term(rows if isinstance(rows, Pairs) else self.rows_of(rows), coef)

    def loss_of(self, whole: Pairs) -> Callable[[Pairs], Loss]:
        return partial(self._loss, num_pairs=whole.num_pairs)

    def evaluate(self, examples: Sequence[Encoded], batch_size: int) -> Measures:
        """loss, accuracy, chosen_reward, rejected_reward, margin_mean and ece; score_mean and score_std of all answers.

        ece: the expected calibration error of P(chosen better) = sigmoid(difference), see `expected_calibration_error`.
        """
        metrics, rows = rated_pairs(self.parts, [e for e in examples if e.is_pair], batch_size, self._rated)
        if not rows:
            return Measures(metrics, rows)
        every = torch.tensor([[row["chosen_reward"], row["rejected_reward"]] for row in rows], dtype=torch.float64)
        metrics |= {
            "ece": expected_calibration_error(every[:, 0] - every[:, 1]),
            "score_mean": float(every.mean()),
            "score_std": float(every.std()),
        }
        return Measures(metrics, rows)

    def _rated(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """See `rated_pairs`."""
        scores = self._scores(pairs)
        loss, _ = self._loss_of_scores(pairs, scores, 1.0)
        return scores, loss

    def _loss(self, part: Pairs, num_pairs: float) -> Loss:
        return self._loss_of_scores(part, self._scores(part), num_pairs)

    def _scores(self, pairs: Pairs) -> Tensor:
        return self.parts.policy.scores(pairs.sides.input_ids, pairs.sides.attention_mask)

    def _loss_of_scores(self, pairs: Pairs, scores: Tensor, num_pairs: float) -> Loss:
        chosen, rejected = pairs.split(scores)
        loss, metrics = bradley_terry_loss(
            chosen, rejected, margin=pairs.margin if self.use_margin else None, center_coef=self.center_coef,
            weight=pairs.weight, num_pairs=num_pairs,
        )  # fmt: skip
        share = pairs.weight / max(pairs.num_pairs, 1e-12)
        means = {"chosen_reward": (share * chosen).sum(), "rejected_reward": (share * rejected).sum()}
        return loss, metrics | {name: x.detach() for name, x in means.items()}
