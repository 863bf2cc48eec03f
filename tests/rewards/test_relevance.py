import sys

import pytest
from rewards.checkpoints import NASTY, NLI, SENTIMENT, bert, plain_logits

from hybrid.core import InputError
from hybrid.rewards import make_reward

# float32 sums in another order where rows are padded.
ROUNDING = 1e-5
PROMPT = "is the cat good?"


@pytest.fixture
def cross_encoder(tmp_path):
    """The type of cross-encoder/ms-marco-MiniLM: BERT with one output."""
    return bert(tmp_path, ["LABEL_0"])


def test_relevance_is_the_sigmoid_of_the_cross_encoders_logit(cross_encoder):
    reward = make_reward({"type": "qa_relevance", "model": cross_encoder, "device": "cpu"})
    texts = [text for text in NASTY if text.strip()]
    expected = [plain_logits(cross_encoder, PROMPT, text).sigmoid().item() for text in texts]
    assert reward.score(texts, prompts=[PROMPT] * len(texts)) == pytest.approx(expected, abs=ROUNDING)
    assert len({round(score, 4) for score in expected}) > 3


def test_relevance_by_two_outputs_is_the_seconds_probability(tmp_path):
    folder = bert(tmp_path, SENTIMENT)
    reward = make_reward({"type": "qa_relevance", "model": folder, "device": "cpu"})
    expected = plain_logits(folder, PROMPT, "the cat is good").softmax(-1)[1].item()
    assert reward("the cat is good", prompt=PROMPT) == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("kind", ["qa_relevance", "topic_consistency"])
def test_relevance_by_an_embedder_is_nearness_to_the_prompt(minilm, kind):
    reward = make_reward({"type": kind, "model": minilm, "device": "cpu"})
    sts = make_reward({"type": "sts", "model": minilm, "device": "cpu"})
    assert reward("A kitten.", "ignored", prompt="Which pet?") == pytest.approx(sts("A kitten.", "Which pet?"))
    on, off = reward.score(["Cats purr when content."] * 2, prompts=["Tell me about cats.", "Explain tax law."])
    assert on > off + 0.1


def test_topic_consistency_takes_a_cross_encoder_too(cross_encoder):
    both = [
        make_reward({"type": kind, "model": cross_encoder, "device": "cpu"})("the cat", prompt=PROMPT)
        for kind in ("qa_relevance", "topic_consistency")
    ]
    assert both[0] == both[1]


def test_a_blank_prompt_or_response_scores_zero(cross_encoder, minilm):
    for model in (cross_encoder, minilm):
        reward = make_reward({"type": "qa_relevance", "model": model, "device": "cpu"})
        assert reward.score(["", "cat", " ", ""], prompts=["cat", "", "\n", ""]) == [0.0] * 4


def test_one_sample_scores_as_in_a_batch(cross_encoder):
    reward = make_reward({"type": "qa_relevance", "model": cross_encoder, "device": "cpu"})
    single = [reward(text, prompt=PROMPT) for text in NASTY]
    assert reward.score(NASTY, prompts=[PROMPT] * len(NASTY)) == pytest.approx(single, abs=ROUNDING)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path, minilm):
    reward = make_reward({"type": "qa_relevance", "model": bert(tmp_path, NLI)})
    with pytest.raises(InputError, match=r"it has 3 outputs, CONTRADICTION, NEUTRAL, ENTAILMENT, not one or two"):
        reward("a", prompt="b")
    reward = make_reward({"type": "qa_relevance", "model": minilm, "method": "cross_encoder"})
    with pytest.raises(InputError, match="is not a cross-encoder: it has no classification head"):
        reward("a", prompt="b")


@pytest.mark.parametrize("kind", ["qa_relevance", "topic_consistency"])
def test_without_the_library_only_a_cross_encoder_can_be_asked(monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    make_reward({"type": kind, "method": "cross_encoder"})
    with pytest.raises(InputError, match=f"reward '{kind}' needs sentence_transformers: pip install"):
        make_reward({"type": kind})


def test_an_unknown_method_is_refused():
    with pytest.raises(InputError, match=r"REWARD.method must be one of 'auto', 'cross_encoder', 'embedding', got"):
        make_reward({"type": "qa_relevance", "method": "guess"})


def test_a_prompt_too_long_for_the_cross_encoder_loses_its_beginning(cross_encoder):
    reward = make_reward({"type": "qa_relevance", "model": cross_encoder, "device": "cpu"})
    output = reward.score(["the cat is good"] * 2, prompts=["dog " * 100 + "is he happy", "dog " * 54 + "is he happy"])
    assert output[0] == pytest.approx(output[1], abs=ROUNDING)
    assert output.parts["qa_relevance"].counts["truncated"] == 1
