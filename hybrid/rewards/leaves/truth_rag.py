"""Truth of a response, judged by the passages of a corpus that are nearest to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hybrid.core import InputError
from hybrid.rewards.base import register_reward
from hybrid.rewards.classify import Classifier
from hybrid.rewards.embed import embeddings, load_embedder, texts_of
from hybrid.rewards.extras import require
from hybrid.rewards.leaves.nli import UNDECIDED, Aggregation, TruthNLI
from hybrid.rewards.models import ModelReward, existing_model, shared
from hybrid.rewards.samples import Samples

__all__ = ["TruthRAG"]


@register_reward("truth_rag")
@dataclass
class TruthRAG(ModelReward[tuple[Classifier, Any, torch.Tensor]]):
    """Whether evidence entails the response: a corpus's nearest passages, and the target; -1 to 1.

    The evidence is the `top_k` passages nearest to the response by sentence embeddings, and the target unless
    blank. Each is judged as the target is by `truth_nli`, whose `aggregation` this is; `agg` then takes the
    best, or the mean, over the evidence. 0.5 where the response is blank or there is no evidence.
    """

    reads = ("response", "target")

    corpus: list[str] | str  # passages; or a file: .jsonl with `text`, or one a line or paragraph
    embedder: str = "all-MiniLM-L6-v2"
    nli_model: str = "roberta-large-mnli"
    top_k: int = 5
    agg: Literal["max", "mean"] = "max"
    aggregation: Aggregation = "p_e_minus_p_c"
    labels: list[str] | None = None  # the NLI model's outputs in their order, where it calls them LABEL_0 and so on
    device: str | None = None

    def __post_init__(self) -> None:
        require("sentence_transformers", reward="truth_rag")
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}")
        self.embedder = existing_model(self.embedder, "embedder")
        self.nli_model = existing_model(self.nli_model, "nli_model")
        self._judge = TruthNLI(self.nli_model, self.aggregation, self.labels)
        self._passages = list(dict.fromkeys(texts_of(self.corpus, "corpus")))
        self.needs_target = not self._passages

    def _load(self, device: torch.device) -> tuple[Classifier, Any, torch.Tensor]:
        judge = self._judge._load(device)
        # Nothing is nearest in an empty corpus.
        embedder = shared(load_embedder, self.embedder, device) if self._passages else None
        return judge, embedder, embeddings(embedder, self._passages).float()

    def _model_scores(self, loaded: tuple[Classifier, Any, torch.Tensor], samples: Samples) -> Sequence[float]:
        judge, embedder, vectors = loaded
        nearest = self._nearest(embedder, vectors, samples.responses)
        evidence = [
            list(dict.fromkeys([*passages, *([target] if target.strip() else [])]))
            for passages, target in zip(nearest, samples.targets, strict=True)
        ]
        premises = [passage for passages in evidence for passage in passages]
        claims = [response for response, passages in zip(samples.responses, evidence, strict=True) for _ in passages]
        truths = iter(self._judge._model_scores(judge, Samples(claims, premises)))
        found = [[next(truths) for _ in passages] for passages in evidence]
        if self.agg == "max":
            return [max(scores, default=UNDECIDED) for scores in found]
        return [sum(scores) / len(scores) if scores else UNDECIDED for scores in found]

    def _nearest(self, embedder: Any, vectors: torch.Tensor, responses: list[str]) -> list[list[str]]:
        """The passages nearest to each response, at most top_k, the nearest first."""
        if not self._passages:
            return [[] for _ in responses]
        near = embeddings(embedder, responses).float() @ vectors.T  # (B, passages)
        rows = near.topk(min(self.top_k, len(self._passages))).indices.tolist()
        return [[self._passages[i] for i in row] for row in rows]
