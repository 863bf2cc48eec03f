"""A preference model as a reward, or several: any sequence classification checkpoint with a scalar answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hybrid.core import InputError
from hybrid.rewards.base import register_reward
from hybrid.rewards.models import ModelReward, existing_model
from hybrid.rewards.samples import Samples
from hybrid.rewards.scalar_model import Form, RewardModel

__all__ = ["RewardModelScore"]

Member = tuple[RewardModel, float, float]  # a model, and the mean and standard deviation that its scores are put by


@register_reward("reward_model")
@dataclass
class RewardModelScore(ModelReward[list[Member]]):
    """The raw score of a preference model for prompt and response, or of several together; any number.

    path: a checkpoint for sequence classification, a folder or of the hub. Of one output the score is that; of
    several it is the logit of `label`. What the model reads is, by `input`,

        chat   the prompt as the user's turn and the response as the assistant's, in the tokenizer's chat template
        pair   the two texts of a pair; of an empty prompt the response alone
        text   prompt + response, one text
        auto   chat where the tokenizer has a template, else pair where it has a separator token, else text

    What is too long for the model loses the prompt's beginning, and is counted as `truncated`.
    Of a list of paths each model reads with its own tokenizer and template, and the score is, by `aggregate`,

        mean             of the M models' scores
        min              the lowest of them: the worst case
        mean_minus_std   mean - std_coef * standard deviation, sqrt(sum of squared distances / M)

    which keeps a policy from the texts that one model is wrong about. Their standard deviation, averaged over a batch,
    is logged as `member_std`. normalized: of each model's score its `reward_mean` is subtracted, and the rest divided
    by its `reward_std`, both of its config.json; scores of models that were trained apart have no common zero.
    Source: Coste et al. 2023 (arXiv:2310.02743): worst-case and uncertainty-weighted optimization; there the variance
    is subtracted.
    """

    reads = ("response", "prompt")

    path: str | list[str]
    label: str | None = None
    input: Form = "auto"
    device: str | None = None
    aggregate: Literal["mean", "min", "mean_minus_std"] = "mean"
    std_coef: float = 1.0
    normalized: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.path, str):
            self._names = [existing_model(self.path, "path")]
        else:
            self._names = [existing_model(name, f"path[{i}]") for i, name in enumerate(self.path)]
        if not self._names:
            raise InputError("path must name a model, or several; got an empty list")
        if not (math.isfinite(self.std_coef) and self.std_coef >= 0):
            raise InputError(f"std_coef must be at least 0 and finite, got {self.std_coef}")
        if self.aggregate != "mean_minus_std" and self.std_coef != 1.0:
            raise InputError(
                f"std_coef is for aggregate 'mean_minus_std', got {self.std_coef} for {self.aggregate!r}; leave it out"
            )
        self.model = ", ".join(self._names)
        self._spreads: list[float] = []

    def _load(self, device: torch.device) -> list[Member]:
        members = [
            RewardModel.from_pretrained(name, device, label=self.label, form=self.input, share=True)
            for name in self._names
        ]
        return [(member, *(member.statistics if self.normalized else (0.0, 1.0))) for member in members]

    def _model_scores(self, loaded: list[Member], samples: Samples) -> Sequence[float]:
        prompts, responses = samples.prompts, samples.responses
        # (M, B) float64: one model's scores are handed on bit for bit.
        scores = torch.stack([(member.score(responses, prompts).double() - mean) / std for member, mean, std in loaded])
        spread = scores.std(0, correction=0)
        if len(loaded) > 1:
            self._spreads += spread.tolist()
        together = {"mean": scores.mean(0), "min": scores.amin(0)}
        together["mean_minus_std"] = together["mean"] - self.std_coef * spread
        return together[self.aggregate].tolist()

    def drain_counters(self) -> dict[str, float]:
        spreads, self._spreads = self._spreads, []
        return {"member_std": sum(spreads) / len(spreads)} if spreads else {}
