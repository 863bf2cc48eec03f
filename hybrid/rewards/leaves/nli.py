"""Truth by natural language inference: does the target entail the response?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hybrid.core import InputError
from hybrid.rewards.base import register_reward
from hybrid.rewards.classify import Classifier, load_classifier, nli_probabilities, nli_rows
from hybrid.rewards.models import ModelReward, shared
from hybrid.rewards.samples import Samples, rows_with_text

__all__ = ["TruthNLI"]

Aggregation = Literal["p_e_minus_p_c", "p_e", "p_e_plus_half_neutral"]
# With either text empty there is nothing to judge by.
UNDECIDED = 0.5


@register_reward("truth_nli", "truthfulness")
@dataclass
class TruthNLI(ModelReward[Classifier]):
    """Whether the target (premise) entails the response (hypothesis), by a model of inference.

        p_e_minus_p_c           p(entailment) - p(contradiction)     -1 to 1
        p_e                     p(entailment)                         0 to 1
        p_e_plus_half_neutral   p(entailment) + p(neutral) / 2        0 to 1

    0.5 where either is empty or white space, whatever the aggregation.
    The probabilities are over all labels. Which is which the model's `config.id2label` says, or `labels`; a model of
    entailment and not_entailment answers to p_e alone.
    """

    reads = ("response", "target")
    needs_target = True

    model: str = "roberta-large-mnli"  # CONTRADICTION, NEUTRAL, ENTAILMENT
    aggregation: Aggregation = "p_e_minus_p_c"
    labels: list[str] | None = None  # the model's outputs in their order, where it calls them LABEL_0 and so on
    device: str | None = None

    def _load(self, device: torch.device) -> Classifier:
        classifier = shared(load_classifier, self.model, device)
        _, neutral, contradiction = nli_rows(classifier.labels, self.labels)
        needed = {"p_e_minus_p_c": contradiction, "p_e_plus_half_neutral": neutral, "p_e": 0}
        if needed[self.aggregation] is None:
            raise InputError(
                f"aggregation {self.aggregation!r} needs a model that tells neutral from contradiction, "
                f"{self.model!r} has the labels {', '.join(self.labels or classifier.labels)}; 'p_e' works with it"
            )
        return classifier

    def _model_scores(self, loaded: Classifier, samples: Samples) -> Sequence[float]:
        pairs = list(zip(samples.targets, samples.responses, strict=True))
        judged = rows_with_text(pairs)
        answers = nli_probabilities(loaded, [pairs[i] for i in judged], self.labels)
        entailment, neutral, contradiction = answers.unbind(-1)
        if self.aggregation == "p_e_minus_p_c":
            values = entailment - contradiction
        elif self.aggregation == "p_e_plus_half_neutral":
            values = entailment + neutral / 2
        else:
            values = entailment
        scores = [UNDECIDED] * len(pairs)
        for i, value in zip(judged, values.tolist(), strict=True):
            scores[i] = value
        return scores
