"""How much a response has to do with its prompt: by a cross-encoder, or by sentence embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hybrid.core import InputError
from hybrid.rewards.base import register_reward
from hybrid.rewards.classify import Classifier, fitted_to, load_classifier, logits
from hybrid.rewards.embed import load_embedder, nearness, packaged
from hybrid.rewards.extras import require
from hybrid.rewards.models import ModelReward, shared
from hybrid.rewards.samples import Samples, rows_with_text

__all__ = ["QARelevance", "TopicConsistency"]


@register_reward("qa_relevance")
@dataclass
class QARelevance(ModelReward[Any]):
    """Relevance of the response to the prompt, from a cross-encoder or from embeddings; 0 to 1.

        cross_encoder   sigmoid of the logit of (prompt, response); of two outputs, the second's probability
        embedding       (1 + cosine) / 2 of their sentence embeddings, as `cosine_sts`

    "auto" takes the checkpoint for a cross-encoder if its config names a ...ForSequenceClassification.
    A blank prompt or response scores 0. A pair too long for the cross-encoder loses the prompt's beginning.
    """

    reads = ("response", "prompt")

    model: str = "cross-encoder/ms-marco-MiniLM-L-6-v2"
    method: Literal["auto", "cross_encoder", "embedding"] = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        # With "auto" either may be needed, which only the checkpoint knows.
        if self.method != "cross_encoder":
            require("sentence_transformers", reward=self.component_name)
        super().__post_init__()

    def _load(self, device: torch.device) -> Any:
        if self.method == "embedding" or (self.method == "auto" and not _is_classifier(self.model)):
            return shared(load_embedder, self.model, device)
        if self.method == "cross_encoder" and not _is_classifier(self.model):
            raise InputError(f"model {self.model!r} is not a cross-encoder: it has no classification head")
        loaded = shared(load_classifier, self.model, device)
        if len(loaded.labels) > 2:
            raise InputError(
                f"model {self.model!r} is not a cross-encoder for relevance: it has {len(loaded.labels)} outputs, "
                f"{', '.join(loaded.labels)}, not one or two"
            )
        return loaded

    def _model_scores(self, loaded: Any, samples: Samples) -> Sequence[float]:
        if not isinstance(loaded, Classifier):
            return nearness(loaded, samples.prompts, samples.responses)
        pairs = fitted_to(loaded, list(zip(samples.prompts, samples.responses, strict=True)), lambda *pair: pair)
        rows = rows_with_text(pairs)
        answers = logits(loaded, [pairs[i] for i in rows]).double()  # (rows, 1 or 2)
        relevant = answers.sigmoid()[:, 0] if len(loaded.labels) == 1 else answers.softmax(-1)[:, 1]
        found = dict(zip(rows, relevant.tolist(), strict=True))
        return [found.get(i, 0.0) for i in range(len(pairs))]


@register_reward("topic_consistency")
@dataclass
class TopicConsistency(QARelevance):
    """Whether the response stays on the prompt's topic: `qa_relevance` by embeddings, unless told otherwise; 0 to 1."""

    model: str = "all-MiniLM-L6-v2"


def _is_classifier(name: str) -> bool:
    """Whether the checkpoint's config names a model with a classification head."""
    from transformers import AutoConfig

    try:
        architectures = AutoConfig.from_pretrained(packaged(name) or name).architectures or []
    # What there is no config of may be an embedder of another kind; its loading says what is wrong.
    except (OSError, ValueError, KeyError):
        return False
    return any(architecture.endswith("ForSequenceClassification") for architecture in architectures)
