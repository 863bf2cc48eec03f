import math
import sys

import pytest
import torch
from rewards.checkpoints import MAX_TOKENS, NASTY, SENTIMENT, bert, decoder

from hybrid.core import InputError
from hybrid.rewards import make_reward

# float32 sums in another order where rows are padded.
ROUNDING = 1e-5
TARGET = "the cat is a happy cat"
FULL = [text for text in NASTY if text.strip()]


@pytest.fixture(autouse=True)
def library():
    return pytest.importorskip("bert_score")


def bertscore(**settings):
    return make_reward({"type": "bertscore", **settings})


def plain_f1(library, folder, pairs, **settings):
    """What bert_score says of each pair alone."""
    scorer = library.BERTScorer(model_type=folder, device="cpu", **settings)
    scorer._tokenizer.model_max_length = MAX_TOKENS
    return [float(scorer.score([response], [target])[2]) for response, target in pairs]


def test_identical_texts_score_one(tmp_path):
    texts = [text for text in FULL if text != "\x00"]
    assert bertscore(model_type=bert(tmp_path, SENTIMENT)).score(texts, texts) == pytest.approx([1.0] * len(texts))


def test_scores_are_bert_scores_f1_of_each_pair_alone(tmp_path, library):
    folder = bert(tmp_path, SENTIMENT)
    pairs = [(text, TARGET) for text in FULL] + [(TARGET, text) for text in FULL]
    expected = plain_f1(library, folder, pairs, num_layers=2)
    reward = bertscore(model_type=folder)
    responses, targets = map(list, zip(*pairs, strict=True))
    assert reward.score(responses, targets) == pytest.approx(expected, abs=ROUNDING)
    assert [reward(*pair) for pair in pairs[:6]] == pytest.approx(expected[:6], abs=ROUNDING)
    assert max(expected) - min(expected) > 0.1


def test_num_layers_says_which_layer_is_compared(tmp_path, library):
    folder = bert(tmp_path, SENTIMENT)
    first = bertscore(model_type=folder, num_layers=1)("the dog", TARGET)
    assert first == pytest.approx(plain_f1(library, folder, [("the dog", TARGET)], num_layers=1)[0], abs=ROUNDING)
    assert first != pytest.approx(bertscore(model_type=folder)("the dog", TARGET), abs=1e-3)


@pytest.mark.parametrize(
    "pair", [("", TARGET), (TARGET, ""), ("", ""), (" \n", TARGET), (None, TARGET), ("\x00", TARGET)]
)
def test_an_empty_text_scores_zero(tmp_path, pair):
    assert bertscore(model_type=bert(tmp_path, SENTIMENT)).score([pair[0], "cat"], [pair[1], "cat"]) == pytest.approx(
        [0.0, 1.0]
    )


def test_a_path_with_t5_in_it_is_not_taken_for_a_t5_model(tmp_path):
    plain, marked = tmp_path / "plain", tmp_path / "best5-t5"
    assert bertscore(model_type=bert(marked, SENTIMENT))("the dog", TARGET) == pytest.approx(
        bertscore(model_type=bert(plain, SENTIMENT))("the dog", TARGET), abs=ROUNDING
    )


def test_a_model_without_pad_token_is_scored_in_batches(tmp_path):
    import transformers

    folder = decoder(tmp_path, SENTIMENT)
    assert transformers.AutoTokenizer.from_pretrained(folder).pad_token is None
    scores = bertscore(model_type=folder).score(["the cat", "word " * 20_000, "a"], ["the cat", TARGET, "dog"])
    assert scores[0] == pytest.approx(1.0)
    assert all(map(math.isfinite, scores))


def test_rescaling_takes_the_baseline_of_the_layer(tmp_path, library):
    folder = bert(tmp_path / "model", SENTIMENT)
    (tmp_path / "base.tsv").write_text("LAYER,P,R,F\n0,0.1,0.1,0.1\n1,0.2,0.2,0.2\n2,0.3,0.4,0.5\n")
    reward = bertscore(model_type=folder, rescale_with_baseline=True, baseline_path=str(tmp_path / "base.tsv"))
    raw = bertscore(model_type=folder)
    assert reward("the dog", TARGET) == pytest.approx((raw("the dog", TARGET) - 0.5) / 0.5, abs=ROUNDING)
    # An empty text's raw score is 0: it must not beat a poor one.
    assert reward("", TARGET) == pytest.approx(-1.0)


def test_rescaling_without_a_baseline_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"REWARD.baseline_path must be given: bert_score has no baseline of"):
        bertscore(model_type=bert(tmp_path, SENTIMENT), rescale_with_baseline=True)


def test_rescaling_of_a_known_model_finds_the_librarys_baseline():
    assert bertscore(rescale_with_baseline=True).baseline_path.endswith("en/microsoft/deberta-xlarge-mnli.tsv")
    with pytest.raises(InputError, match="for the language 'xx'"):
        bertscore(rescale_with_baseline=True, lang="xx")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "/no/such/model"}, "REWARD.model_type '/no/such/model' does not exist"),
        ({"num_layers": 0}, "REWARD.num_layers must be at least 1, got 0"),
        ({"baseline_path": "/no/such.tsv", "rescale_with_baseline": True}, "REWARD.baseline_path must be a file"),
        ({"baseline_path": "/no/such.tsv"}, "REWARD.baseline_path is of use with rescale_with_baseline only"),
    ],
)
def test_bad_parameters_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        bertscore(**settings)


def test_more_layers_than_the_model_has_are_refused(tmp_path):
    with pytest.raises(InputError, match="num_layers is not one that"):
        bertscore(model_type=bert(tmp_path, SENTIMENT), num_layers=3).setup("cpu")


def test_a_baseline_that_lacks_the_layer_is_refused(tmp_path):
    (tmp_path / "base.tsv").write_text("LAYER,P,R,F\n0,0.1,0.1,0.1\n")
    with pytest.raises(InputError, match="cannot be loaded"):
        bertscore(
            model_type=bert(tmp_path / "model", SENTIMENT),
            rescale_with_baseline=True,
            baseline_path=str(tmp_path / "base.tsv"),
        ).setup("cpu")


def test_defaults_are_those_of_the_spec_and_load_nothing():
    reward = bertscore()
    assert (reward.model_type, reward.rescale_with_baseline) == ("microsoft/deberta-xlarge-mnli", False)


def test_bert_score_missing_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(InputError, match="reward 'bertscore' needs bert_score: pip install"):
        bertscore()


def test_the_model_is_shared_and_never_trained(tmp_path):
    folder = bert(tmp_path, SENTIMENT)
    first, second = bertscore(model_type=folder), bertscore(model_type=folder)
    first.setup("cpu")
    second.setup("cpu")
    assert first._loaded is second._loaded
    assert isinstance(first._loaded._model, torch.nn.Module)
    assert not first._loaded._model.training
    assert not any(p.requires_grad for p in first._loaded._model.parameters())
