import sys

import pytest
import torch
from rewards.checkpoints import NASTY, bert, detoxify

from hybrid.core import InputError
from hybrid.rewards import make_reward

CLASSES = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
# float32 sums in another order where rows are padded.
ROUNDING = 1e-5


def toxicity(**settings):
    return make_reward({"type": "toxicity", **settings})


@pytest.fixture
def checkpoint(tmp_path):
    return detoxify(tmp_path / "toxic.ckpt", classes=CLASSES)


def test_scores_are_one_minus_what_detoxify_says_of_each_text_alone(checkpoint):
    library = pytest.importorskip("detoxify").Detoxify(checkpoint=checkpoint)
    # Of longer texts detoxify cuts nothing where the tokenizer does not say how much a model reads.
    library.tokenizer.model_max_length = 64
    expected = [1 - library.predict(text)["toxicity"] for text in NASTY]
    reward = toxicity(model=checkpoint)
    assert reward.score(NASTY) == pytest.approx(expected, abs=ROUNDING)
    assert [reward(text) for text in NASTY] == pytest.approx(expected, abs=ROUNDING)
    assert max(expected) - min(expected) > 0.1


def test_not_inverted_the_score_is_the_toxicity(checkpoint):
    plain, inverted = toxicity(model=checkpoint, invert=False), toxicity(model=checkpoint)
    assert plain("good cat") == pytest.approx(1 - inverted("good cat"))


@pytest.mark.parametrize("classes", [["toxicity", "obscene"], ["obscene", "toxic"]])
def test_toxicity_is_found_by_name_in_either_spelling(tmp_path, classes):
    reward = toxicity(model=detoxify(tmp_path / "model.ckpt", classes=classes), invert=False)
    reward.setup("cpu")
    classifier, index = reward._loaded
    assert (classifier.labels[index], index) == ("toxicity", classes.index(next(c for c in classes if "tox" in c)))


def test_more_outputs_than_classes_are_allowed_as_in_the_unbiased_release(tmp_path):
    file = detoxify(tmp_path / "model.ckpt", classes=CLASSES)
    saved = torch.load(file, weights_only=True)
    saved["config"]["dataset"]["args"]["classes"] = CLASSES[:3]
    torch.save(saved, tmp_path / "fewer.ckpt")
    assert toxicity(model=str(tmp_path / "fewer.ckpt"))("good") == pytest.approx(toxicity(model=file)("good"))


def test_the_released_models_are_known_by_name_and_load_nothing_yet():
    pytest.importorskip("detoxify")
    assert toxicity().model == "original"
    assert make_reward({"type": "detoxify", "model": "multilingual"}).invert


def test_detoxify_missing_is_told_where_its_models_are_asked_for(monkeypatch, checkpoint):
    monkeypatch.setitem(sys.modules, "detoxify", None)
    with pytest.raises(InputError, match="reward 'toxicity' needs detoxify: pip install"):
        toxicity()
    assert 0 <= toxicity(model=checkpoint)("good") <= 1


def test_an_unknown_model_is_refused_with_those_there_are():
    with pytest.raises(InputError, match=r"REWARD.model must be a checkpoint file or one of original, unbiased"):
        toxicity(model="orginal")


class Planted:
    """What a file would run that is loaded the way detoxify loads it."""

    def __reduce__(self):
        return (print, ("planted",))


def test_a_checkpoint_that_holds_code_is_refused_and_does_not_run_it(tmp_path, capsys):
    file = detoxify(tmp_path / "model.ckpt", classes=CLASSES, extra=Planted())
    capsys.readouterr()
    with pytest.raises(InputError, match="holds more than tensors and plain values"):
        toxicity(model=file).setup("cpu")
    assert "planted" not in capsys.readouterr().out


def test_a_file_of_another_kind_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="is no checkpoint of detoxify: it needs state_dict"):
        toxicity(model=str(tmp_path / "other.ckpt")).setup("cpu")


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    file = detoxify(tmp_path / "model.ckpt", classes=CLASSES)
    saved = torch.load(file, weights_only=True)
    del saved["state_dict"]["classifier.weight"]
    torch.save(saved, tmp_path / "lacking.ckpt")
    with pytest.raises(InputError, match=r"lacks the weights classifier.weight"):
        toxicity(model=str(tmp_path / "lacking.ckpt")).setup("cpu")


def test_a_base_model_that_is_not_there_is_refused(tmp_path):
    file = detoxify(tmp_path / "model.ckpt", classes=CLASSES)
    saved = torch.load(file, weights_only=True)
    saved["config"]["arch"]["args"]["model_type"] = str(tmp_path / "nowhere")
    torch.save(saved, tmp_path / "moved.ckpt")
    with pytest.raises(InputError, match="cannot be loaded"):
        toxicity(model=str(tmp_path / "moved.ckpt")).setup("cpu")


def test_a_model_without_toxicity_is_refused(tmp_path):
    with pytest.raises(InputError, match="model must be a label of the model"):
        toxicity(model=detoxify(tmp_path / "model.ckpt", classes=["obscene", "insult"])).setup("cpu")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="must be a checkpoint file"):
        toxicity(model=bert(tmp_path, CLASSES))
