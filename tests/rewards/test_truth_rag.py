import json
import sys

import pytest
import torch
from rewards.checkpoints import NASTY, NLI, bert, plain_logits

from hybrid.core import InputError
from hybrid.rewards import make_reward
from hybrid.rewards.leaves import truth_rag

VECTORS = {"the cat": [1.0, 0.0], "a cat": [1.0, 0.1], "the law": [0.0, 1.0], "a man": [-1.0, 0.0]}
CORPUS = ["the law", "a cat", "a man", "the cat", "the cat", " "]
# float32 sums in another order where rows are padded.
ROUNDING = 1e-5


class Vectors:
    """An embedder of known texts. calls: what it was asked to encode."""

    def __init__(self):
        self.calls = []

    def encode(self, texts, **options):
        self.calls.append(texts)
        return torch.tensor([VECTORS.get(text, [0.5, 0.5]) for text in texts])


@pytest.fixture
def vectors(monkeypatch):
    embedder = Vectors()
    monkeypatch.setattr(truth_rag, "load_embedder", lambda name, device: embedder)
    return embedder


@pytest.fixture
def nli(tmp_path):
    return bert(tmp_path, NLI)


def truth(nli, premise, hypothesis):
    """p(entailment) - p(contradiction), as transformers says of the one pair."""
    contradiction, _, entailment = plain_logits(nli, premise, hypothesis).softmax(-1).tolist()
    return entailment - contradiction


def reward_of(nli, **settings):
    return make_reward({"type": "truth_rag", "corpus": CORPUS, "nli_model": nli, "device": "cpu", **settings})


@pytest.mark.parametrize("agg", ["max", "mean"])
def test_truth_is_judged_by_the_nearest_passages(vectors, nli, agg):
    truths = [truth(nli, premise, "the cat") for premise in ("the cat", "a cat")]
    expected = max(truths) if agg == "max" else sum(truths) / 2
    assert reward_of(nli, top_k=2, agg=agg)("the cat") == pytest.approx(expected, abs=ROUNDING)


def test_the_target_joins_the_evidence_once(vectors, nli):
    reward = reward_of(nli, top_k=1, agg="mean")
    nearest, target = truth(nli, "the cat", "the cat"), truth(nli, "the dog is bad", "the cat")
    assert reward("the cat", "the dog is bad") == pytest.approx((nearest + target) / 2, abs=ROUNDING)
    assert reward("the cat", "the cat") == pytest.approx(nearest, abs=ROUNDING)


def test_the_corpus_is_embedded_once(vectors, nli):
    reward = reward_of(nli)
    reward.score(["the cat", "the law"])
    reward("a man")
    assert [sorted(call) for call in vectors.calls] == [sorted(VECTORS), ["the cat", "the law"], ["a man"]]


def test_without_evidence_or_response_it_is_undecided(vectors, nli):
    assert reward_of(nli, corpus=[])("the cat") == 0.5
    assert reward_of(nli).score(["", " \n"], ["a cat", ""]) == [0.5, 0.5]


def test_the_target_alone_is_truth_nli(vectors, nli):
    alone = make_reward({"type": "truth_nli", "model": nli, "device": "cpu"})
    for agg in ("max", "mean"):
        reward = reward_of(nli, corpus=[], agg=agg)
        assert reward("the cat", "a man") == pytest.approx(alone("the cat", "a man"), abs=ROUNDING)
    assert vectors.calls == []


def test_aggregation_is_that_of_truth_nli(vectors, nli):
    for aggregation in ("p_e", "p_e_plus_half_neutral"):
        alone = make_reward({"type": "truth_nli", "model": nli, "aggregation": aggregation, "device": "cpu"})
        reward = reward_of(nli, corpus=[], aggregation=aggregation)
        assert reward("the cat", "a man") == pytest.approx(alone("the cat", "a man"), abs=ROUNDING)


def test_a_corpus_may_be_a_file(vectors, nli, tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in CORPUS))
    assert reward_of(nli, corpus=str(file), top_k=2)("the cat") == reward_of(nli, top_k=2)("the cat")


def test_nasty_texts_score_in_a_batch_as_alone(nli, minilm):
    reward = reward_of(nli, embedder=minilm, corpus=[text for text in NASTY if len(text) < 100], top_k=3)
    targets = NASTY[::-1]
    alone = [reward(response, target) for response, target in zip(NASTY, targets, strict=True)]
    assert reward.score(NASTY, targets) == pytest.approx(alone, abs=ROUNDING)
    assert all(-1 <= score <= 1 for score in alone)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "REWARD.top_k must be at least 1, got 0"),
        ({"agg": "min"}, "REWARD.agg must be one of 'max', 'mean', got 'min'"),
        ({"corpus": "/not/there.txt"}, "REWARD.corpus '/not/there.txt' cannot be read"),
        ({"corpus": ["a", 1]}, "REWARD.corpus must "),
        ({"embedder": "/not/there"}, "REWARD.embedder '/not/there' does not exist"),
        ({"nli_model": "/not/there"}, "REWARD.nli_model '/not/there' does not exist"),
    ],
)
def test_bad_parameters_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make_reward({"type": "truth_rag", "corpus": ["a"], **settings})


def test_a_missing_corpus_or_library_is_named(monkeypatch):
    with pytest.raises(InputError, match=r"REWARD\.corpus is missing"):
        make_reward({"type": "truth_rag"})
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match="reward 'truth_rag' needs sentence_transformers: pip install"):
        make_reward({"type": "truth_rag", "corpus": ["a"]})
