"""The policy beside what a datastore remembers."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from hybrid.core import Batch, InputError
from hybrid.functional import knn_label_prob, knn_prob, mixed_logprob
from hybrid.memory import Datastore, Search
from hybrid.models import Backbone, Policy, label_logprob
from hybrid.rollout.asked import Asked
from hybrid.rollout.decoder import Decoder, register_decoder
from hybrid.rollout.responses import Responses
from hybrid.rollout.sampling import SamplingConfig

__all__ = ["KNN"]


@register_decoder("knn")
@dataclass(frozen=True, kw_only=True)
class KNN(Decoder):
    """Every token is drawn from the policy mixed with a datastore (kNN-LM), as `sampling` says of the mixture.

        p = (1 - lam) p_policy + lam p_kNN
        p_kNN(v) ~ sum of exp(-d²/temperature) over those of the k nearest keys that have value v

    d²: between the hidden state that the LM head reads and a key.   p_policy: at temperature 1; what `sampling` has to
    say (temperature, top_k, ...) is done to p.
    temperature: None: how far apart the datastore's keys are, squared, which is another number for every model.
    search: exact, over all keys; faiss, by the datastore's index.
    The keys are hidden states of one policy, as it was: another one is refused, and so is a run that would train it.
    Source: Khandelwal et al. 2020 (arXiv:1911.00172), who take the state before the last layer's feed-forward block for
    the key; this is the one that a model of any family has.
    """

    datastore: str
    k: int = 32
    lam: float = 0.25
    temperature: float | None = None
    search: Search = "exact"

    of_one_policy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise InputError(f"lam must lie in [0, 1], got {self.lam}")
        self._positive("temperature")
        object.__setattr__(self, "_store", Datastore(self.datastore))
        self.store.check_search(self.k, self.search)
        if not (self.temperature or self.store.info.distance):
            raise InputError(f"temperature is missing: all keys of the datastore {self.datastore!r} are the same")

    @property
    def store(self) -> Datastore:
        return vars(self)["_store"]

    @property
    def scale(self) -> float:
        """The temperature that is used."""
        return self.store.info.distance if self.temperature is None else self.temperature

    def check_sampling(self, sampling: SamplingConfig) -> None:
        if self.lam == 1 and sampling.min_new_tokens:
            raise InputError(
                "decoder 'knn' with lam 1 does not go with sampling.min_new_tokens: the neighbours may all say EOS"
            )

    def check_tokenizer(self, tokenizer: Any) -> None:
        self.store.check_tokenizer(tokenizer)

    def check_policy(self, policy: Policy) -> None:
        self.store.check_trunk(policy.backbone.trunk)

    def answers(self, asked: Asked) -> Responses:
        return asked.drawn(asked.repeats, through=partial(_Mixture, self))

    def batch_logprob(self, policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden = policy.backbone(batch.input_ids, batch.attention_mask, batch.position_ids)
        logprob, trained = label_logprob(policy.backbone, hidden, batch)
        squared, values = self.store.nearest(hidden[:, :-1][trained], self.k, self.search)
        prob = knn_label_prob(squared, values, batch.labels[:, 1:][trained], temperature=self.scale)
        return logprob.masked_scatter(trained, mixed_logprob(logprob[trained], prob, self.lam)), trained


class _Mixture:
    """Says the log-probs of the mixture where a backbone says its logits."""

    def __init__(self, decoder: KNN, backbone: Backbone):
        self.decoder, self.backbone = decoder, backbone

    def next_logits(
        self, input_ids: Tensor, attention_mask: Tensor, cache: Any = None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        hidden, cache = self.backbone.next_hidden(input_ids, attention_mask, cache, position_ids)
        logits, knn = self.backbone.logits(hidden), self.decoder
        if not knn.lam:
            return logits, cache
        squared, values = knn.store.nearest(hidden, knn.k, knn.search)
        prob = knn_prob(squared, values, logits.shape[1], temperature=knn.scale)
        return mixed_logprob(torch.log_softmax(logits, 1), prob, knn.lam), cache
