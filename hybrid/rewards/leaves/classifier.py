"""Rewards that ask a text classifier how likely a label is: one adapter, of different defaults."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybrid.core import InputError
from hybrid.rewards.base import register_reward
from hybrid.rewards.classify import Classifier, label_index, load_classifier, logits, probability
from hybrid.rewards.models import ModelReward, shared
from hybrid.rewards.samples import Samples

__all__ = ["HarmClassifier", "TextClassifier"]


@register_reward("sentiment")
@dataclass
class TextClassifier(ModelReward[tuple[Classifier, int]]):
    """The probability of a sentiment, as a classifier sees it; 0 to 1.

        scale = true    the probability of `target`, over all labels of the model
        scale = false   1 where `target` is the likeliest label, else 0

    The model may be any sequence classifier of transformers; of one whose labels may hold together, or that
    has a single one, the probability is a sigmoid (and 0.5 the bound of a single one). `target` is a name from
    its `config.id2label`, in either case. An empty text is a text: it gets what the model says of nothing.
    """

    reads = ("response",)

    model: str = "distilbert-base-uncased-finetuned-sst-2-english"  # NEGATIVE, POSITIVE
    target: str = "positive"
    scale: bool = True
    device: str | None = None

    def _load(self, device: torch.device) -> tuple[Classifier, int]:
        classifier = shared(load_classifier, self.model, device)
        return classifier, _one_label(classifier, self.target, "target")

    def _model_scores(self, loaded: tuple[Classifier, int], samples: Samples) -> Sequence[float]:
        classifier, index = loaded
        if self.scale:
            return probability(classifier, samples.responses, index).tolist()
        answers = logits(classifier, samples.responses)
        if answers.shape[1] == 1:
            return (answers[:, 0] >= 0).float().tolist()
        return (answers.argmax(-1) == index).float().tolist()


@register_reward("emotion")
@dataclass
class Emotion(TextClassifier):
    """The probability of an emotion, as a classifier sees it; 0 to 1.

    Parameters and formula are those of `sentiment`.
    """

    model: str = "j-hartmann/emotion-english-distilroberta-base"  # anger, disgust, fear, joy, neutral, sadness, ...
    target: str = "joy"


@register_reward("sarcasm")
@dataclass
class Sarcasm(TextClassifier):
    """The probability that a text is ironic, as a classifier sees it; 0 to 1. Target "non_irony" asks for none.

    Parameters and formula are those of `sentiment`.
    """

    model: str = "cardiffnlp/twitter-roberta-base-irony"  # non_irony, irony
    target: str = "irony"


@register_reward("formality")
@dataclass
class Formality(TextClassifier):
    """The probability that a text is formal (or, by `target`, informal), as a classifier sees it; 0 to 1.

    Parameters and formula are those of `sentiment`.
    """

    model: str = "s-nlp/roberta-base-formality-ranker"  # informal, formal
    target: str = "formal"


@register_reward("grammar")
@dataclass
class Grammar(TextClassifier):
    """The probability that a sentence is acceptable English, as a classifier trained on CoLA sees it; 0 to 1.

    Parameters and formula are those of `sentiment`. Source of the data: Warstadt et al. 2019, arXiv:1805.12471.
    """

    model: str = "textattack/roberta-base-CoLA"  # LABEL_0 unacceptable, LABEL_1 acceptable
    target: str = "LABEL_1"


@register_reward("hate")
@dataclass
class HarmClassifier(ModelReward[tuple[Classifier, int]]):
    """How free a text is of hate, as a classifier sees it; 0 to 1.

        invert = true    1 - the probability of `label`, over all labels of the model
        invert = false   the probability of `label`

    The model may be any sequence classifier of transformers; of one whose labels may hold together, or that
    has a single one, the probability is a sigmoid. `label` is a name from its `config.id2label`, in either case.
    """

    reads = ("response",)

    model: str = "facebook/roberta-hate-speech-dynabench-r4-target"  # nothate, hate
    label: str = "hate"
    invert: bool = True
    device: str | None = None

    def _load(self, device: torch.device) -> tuple[Classifier, int]:
        classifier = shared(load_classifier, self.model, device)
        return classifier, _one_label(classifier, self.label, "label")

    def _model_scores(self, loaded: tuple[Classifier, int], samples: Samples) -> Sequence[float]:
        harm = probability(loaded[0], samples.responses, loaded[1])
        return (1 - harm if self.invert else harm).tolist()


@register_reward("offensive")
@dataclass
class Offensive(HarmClassifier):
    """How free a text is of offensive language, as a classifier sees it; 0 to 1.

    Parameters and formula are those of `hate`.
    """

    model: str = "cardiffnlp/twitter-roberta-base-offensive"  # non-offensive, offensive
    label: str = "offensive"


def _one_label(classifier: Classifier, wanted: str, parameter: str) -> int:
    """Where the label `wanted` stands. A model of one output that has no name for it, LABEL_0, has any label."""
    if classifier.labels == ["LABEL_0"]:
        return 0
    try:
        return label_index(classifier.labels, wanted, parameter)
    except InputError as error:
        raise InputError(f"{error} (model {classifier.model.name_or_path!r})") from None
