import math

import pytest
import torch
from rewards.checkpoints import NASTY, SENTIMENT, bert, decoder, plain_logits

from hybrid.core import InputError
from hybrid.rewards import make_reward

EMOTIONS = ["anger", "joy", "sadness", "surprise"]
# float32 sums in another order where rows are padded.
ROUNDING = 1e-5
HUB = {
    "sentiment": ("distilbert-base-uncased-finetuned-sst-2-english", "positive"),
    "emotion": ("j-hartmann/emotion-english-distilroberta-base", "joy"),
    "sarcasm": ("cardiffnlp/twitter-roberta-base-irony", "irony"),
    "formality": ("s-nlp/roberta-base-formality-ranker", "formal"),
    "grammar": ("textattack/roberta-base-CoLA", "LABEL_1"),
    "hate": ("facebook/roberta-hate-speech-dynabench-r4-target", "hate"),
    "offensive": ("cardiffnlp/twitter-roberta-base-offensive", "offensive"),
}


def reward(kind="sentiment", **settings):
    return make_reward({"type": kind, **settings})


def test_the_score_is_the_targets_probability_over_all_labels(tmp_path):
    # Softmax of log(1), log(2), log(4), log(1).
    folder = bert(tmp_path, EMOTIONS, logits=[0.0, math.log(2), math.log(4), 0.0])
    scores = [reward("emotion", model=folder, target=emotion)("anything") for emotion in EMOTIONS]
    assert scores == pytest.approx([1 / 8, 2 / 8, 4 / 8, 1 / 8])


def test_without_scale_the_score_is_whether_the_target_is_likeliest(tmp_path):
    folder = bert(tmp_path, EMOTIONS, logits=[0.0, 1.0, 3.0, 2.0])
    scores = [reward("emotion", model=folder, target=emotion, scale=False)("anything") for emotion in EMOTIONS]
    assert scores == [0.0, 0.0, 1.0, 0.0]


def test_labels_that_hold_together_have_a_sigmoid_each(tmp_path):
    folder = bert(tmp_path, EMOTIONS, logits=[0.0, math.log(3), 0.0, 0.0], problem_type="multi_label_classification")
    assert reward("emotion", model=folder)("anything") == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("logit", "scale", "score"), [(math.log(3), True, 0.75), (0.1, False, 1.0), (-0.1, False, 0.0)]
)
def test_a_model_of_one_label_has_a_sigmoid(tmp_path, logit, scale, score):
    folder = bert(tmp_path, ["LABEL_0"], logits=[logit])
    assert reward(model=folder, scale=scale)("anything") == pytest.approx(score)


@pytest.mark.parametrize(("invert", "score"), [(True, 1 / 4), (False, 3 / 4)])
def test_harm_is_inverted_unless_told_otherwise(tmp_path, invert, score):
    folder = bert(tmp_path, ["nothate", "hate"], logits=[0.0, math.log(3)])
    assert reward("hate", model=folder, invert=invert)("anything") == pytest.approx(score)
    assert reward("hate", model=folder)("anything") == pytest.approx(1 / 4)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Llama", "GPT2"])
def test_scores_are_those_of_transformers_for_each_text_alone(tmp_path, kind):
    build = bert if kind.endswith("ert") or kind == "Roberta" else decoder
    folder = build(tmp_path, SENTIMENT, kind=kind)
    texts = [text for text in NASTY if text.strip()]
    expected = [float(plain_logits(folder, text).softmax(-1)[1]) for text in texts]
    assert reward(model=folder).score(texts) == pytest.approx(expected, abs=ROUNDING)
    assert [reward(model=folder)(text) for text in texts] == pytest.approx(expected, abs=ROUNDING)


def test_nothing_and_none_are_scored_alike_and_within_bounds(tmp_path):
    sentiment = reward(model=bert(tmp_path, SENTIMENT))
    expected = float(plain_logits(str(tmp_path), "").softmax(-1)[1])
    assert sentiment.score([None, "", "  "]) == pytest.approx([expected] * 3, abs=ROUNDING)


@pytest.mark.parametrize("kind", HUB)
def test_defaults_name_a_model_of_the_hub_and_its_label_and_load_nothing(kind):
    made = reward(kind)
    wanted = made.target if hasattr(made, "target") else made.label
    assert (made.model, wanted) == HUB[kind]


def test_rewards_that_name_one_model_share_it(tmp_path):
    folder = bert(tmp_path, SENTIMENT)
    first, second = reward(model=folder), reward("hate", model=folder, label="negative")
    first.setup("cpu")
    second.setup("cpu")
    assert first._loaded[0].model is second._loaded[0].model
    assert not first._loaded[0].model.training
    assert not any(p.requires_grad for p in first._loaded[0].model.parameters())
    assert second("good") == pytest.approx(first("good"), abs=ROUNDING)


def test_a_label_that_the_model_has_not_is_refused_when_it_loads(tmp_path):
    folder = bert(tmp_path, SENTIMENT)
    with pytest.raises(InputError, match=r"target must be a label of the model \(NEGATIVE, POSITIVE\), got 'joy'"):
        reward(model=folder, target="joy").setup()
    with pytest.raises(InputError, match="label must be"):
        reward("hate", model=folder)("text")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "/no/such/folder"}, "REWARD.model '/no/such/folder' does not exist"),
        ({"scale": "yes"}, "REWARD.scale must be bool, got 'yes'"),
        ({"targett": "joy"}, "did you mean 'target'"),
    ],
)
def test_bad_parameters_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        reward(**settings)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        reward(model=str(tmp_path))("text")


def test_a_batch_is_one_pass_of_the_model(tmp_path):
    sentiment = reward(model=bert(tmp_path, SENTIMENT))
    sentiment.setup("cpu")
    passes = []
    sentiment._loaded[0].model.register_forward_hook(lambda *_: passes.append(1))
    sentiment.score([f"good {'cat ' * i}" for i in range(60)])
    assert len(passes) == 1


def test_scores_need_no_gradient(tmp_path):
    with torch.enable_grad():
        assert isinstance(reward(model=bert(tmp_path, SENTIMENT))("good"), float)
