"""The reward of RL4LMs' IMDB task."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybrid import register_reward
from hybrid.rewards.classify import Classifier
from hybrid.rewards.leaves.classifier import TextClassifier
from hybrid.rewards.samples import Samples

__all__ = ["ReviewSentiment"]


@register_reward("review_sentiment")
@dataclass
class ReviewSentiment(TextClassifier):
    """The probability of a sentiment of the whole review: the item's `start` (else the prompt) and the response.

    Parameters and formula are those of `sentiment`. Of a text that is too long the classifier reads the end.
    Source: LearnedRewardMetric of rl4lms/envs/text_generation/metric.py.
    """

    reads = ("response", "prompt", "item")  # type: ignore[assignment]

    def _load(self, device: torch.device) -> tuple[Classifier, int]:
        classifier, index = super()._load(device)
        classifier.tokenizer.truncation_side = "left"
        return classifier, index

    def _model_scores(self, loaded: tuple[Classifier, int], samples: Samples) -> Sequence[float]:
        starts = [
            (item or {}).get("start", prompt) for item, prompt in zip(samples.items, samples.prompts, strict=True)
        ]
        reviews = [start + response for start, response in zip(starts, samples.responses, strict=True)]
        return super()._model_scores(loaded, samples._replace(responses=reviews))
