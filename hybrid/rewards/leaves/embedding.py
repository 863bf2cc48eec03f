"""Rewards that compare texts by their sentence embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hybrid.core import InputError
from hybrid.rewards.base import register_reward
from hybrid.rewards.classify import label_index, load_classifier, probability
from hybrid.rewards.embed import LONGEST, embeddings, load_embedder, nearness, texts_of
from hybrid.rewards.extras import require
from hybrid.rewards.models import ModelReward, existing_model, shared
from hybrid.rewards.samples import Samples

__all__ = ["CosineSTS", "Memory", "Style"]


@register_reward("cosine_sts", "sts")
@dataclass
class CosineSTS(ModelReward[Any]):
    """Nearness in meaning of response and target by sentence embeddings, (1 + cosine) / 2; 0 to 1.

    0 where either is blank; see `nearness` for texts that the embedder cannot read. Like every score of an
    embedder it sees only the beginning of a long text: 256 tokens with the default model.
    """

    reads = ("response", "target")
    needs_target = True

    model: str = "all-MiniLM-L6-v2"  # a name for sentence-transformers, or a folder
    device: str | None = None

    def __post_init__(self) -> None:
        require("sentence_transformers", reward="cosine_sts")
        super().__post_init__()

    def _load(self, device: torch.device) -> Any:
        return shared(load_embedder, self.model, device)

    def _model_scores(self, loaded: Any, samples: Samples) -> Sequence[float]:
        return nearness(loaded, samples.responses, samples.targets)


@register_reward("memory")
@dataclass
class Memory(ModelReward[Any]):
    """Nearness in meaning of the ends of response and target: the last `window` tokens of each; 0 to 1.

    Tokens are the embedder's own, special ones not counted. Otherwise as `cosine_sts`.
    """

    reads = ("response", "target")
    needs_target = True

    window: int = 50
    embedder: str = "all-MiniLM-L6-v2"
    device: str | None = None

    def __post_init__(self) -> None:
        require("sentence_transformers", reward="memory")
        if self.window < 1:
            raise InputError(f"window must be at least 1, got {self.window}")
        self.embedder = existing_model(self.embedder, "embedder")

    def _load(self, device: torch.device) -> Any:
        loaded = shared(load_embedder, self.embedder, device)
        if not getattr(loaded.tokenizer, "is_fast", False):
            raise InputError(f"embedder {self.embedder!r} has no fast tokenizer, which finds a text's last tokens")
        # The embedder reads a text's beginning, so more tokens than it takes would not be the last ones.
        longest = loaded.max_seq_length or loaded.tokenizer.model_max_length
        longest -= loaded.tokenizer.num_special_tokens_to_add()
        if self.window > longest:
            raise InputError(f"window must be at most {longest}, what {self.embedder!r} reads, got {self.window}")
        return loaded

    def _model_scores(self, loaded: Any, samples: Samples) -> Sequence[float]:
        responses, targets = (self._ends(loaded.tokenizer, texts) for texts in (samples.responses, samples.targets))
        return nearness(loaded, responses, targets)

    def _ends(self, tokenizer: Any, texts: list[str]) -> list[str]:
        """The part of each text from its `window`-th last token on."""
        texts = [text[-LONGEST:] for text in texts]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            text[offsets[-self.window][0] :] if len(offsets) > self.window else text
            for text, offsets in zip(texts, encoded.offset_mapping, strict=True)
        ]


@register_reward("style")
@dataclass
class Style(ModelReward[tuple[Any, torch.Tensor | int]]):
    """Closeness of the response to examples of the wanted style, or a style classifier's probability; 0 to 1.

        exemplars    mean or max over them of (1 + cosine) / 2 of the embeddings of response and exemplar
        classifier   the probability of `label`

    The best response is one like all of the exemplars by "mean", like any of them by "max". Blank: 0.
    """

    reads = ("response",)

    exemplars: list[str] | str | None = None  # texts; or a file: .jsonl with `text`, or one a line or paragraph
    classifier: str | None = None  # a sequence classifier: a hub name or a folder
    label: str | None = None  # of the classifier
    agg: Literal["mean", "max"] = "mean"
    embedder: str = "all-MiniLM-L6-v2"
    device: str | None = None

    def __post_init__(self) -> None:
        if (self.exemplars is None) == (self.classifier is None):
            raise InputError("exemplars or classifier must be given, and not both")
        if (self.label is None) != (self.classifier is None):
            raise InputError(f"label must be given with a classifier and only then, got {self.label!r}")
        if self.classifier is not None:
            self.classifier = existing_model(self.classifier, "classifier")
            return
        require("sentence_transformers", reward="style")
        self.embedder = existing_model(self.embedder, "embedder")
        self._texts = texts_of(self.exemplars or [], "exemplars")
        if not self._texts:
            raise InputError(f"exemplars must hold at least one text, got {self.exemplars!r}")

    def _load(self, device: torch.device) -> tuple[Any, torch.Tensor | int]:
        if self.classifier is None:
            loaded = shared(load_embedder, self.embedder, device)
            return loaded, embeddings(loaded, self._texts)
        classifier = shared(load_classifier, self.classifier, device)
        return classifier, label_index(classifier.labels, self.label or "", "label")

    def _model_scores(self, loaded: tuple[Any, torch.Tensor | int], samples: Samples) -> Sequence[float]:
        model, wanted = loaded
        if isinstance(wanted, int):
            scores = probability(model, samples.responses, wanted)
        else:
            near = (1 + embeddings(model, samples.responses) @ wanted.T) / 2  # (B, exemplars)
            scores = near.amax(1) if self.agg == "max" else near.mean(1)
        # Rounding may leave [0, 1] by the last digit.
        visible = torch.tensor([bool(text.strip()) for text in samples.responses])
        return (scores.clamp(0.0, 1.0) * visible).tolist()
