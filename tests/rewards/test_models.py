"""Loading models for rewards: once, whole, and what cannot be loaded is no sample's fault."""

import pytest
import torch
from rewards.checkpoints import bert

from hybrid.core import InputError
from hybrid.rewards import make_reward


@pytest.fixture
def folder(tmp_path):
    return str(bert(tmp_path, labels=["negative", "positive"]))


SKIPPING = {"on_error": "value", "error_value": 0.0}


def test_a_model_is_loaded_once_for_all_that_name_it(folder):
    one, two = (make_reward({"type": "sentiment", "model": folder, "target": t}) for t in ("positive", "negative"))
    one.setup("cpu")
    two.setup("cpu")
    assert one._loaded[0] is two._loaded[0]
    assert not one._loaded[0].model.training
    assert not any(p.requires_grad for p in one._loaded[0].model.parameters())


def test_cut_weights_are_an_input_error_whatever_on_error_says(folder, tmp_path):
    file = next(tmp_path.glob("**/model.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        make_reward({"type": "sentiment", "model": folder, **SKIPPING}).score(["a", "b"])


def test_a_device_that_is_not_there_is_refused_when_the_model_is_loaded(folder):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(InputError, match="'sentiment' cannot be loaded"):
        make_reward({"type": "sentiment", "model": folder, "device": "cuda", **SKIPPING}).score(["a"])


def test_a_device_that_is_none_is_refused_with_its_path(folder):
    with pytest.raises(InputError, match=r"^REWARD.device must be like cpu, cuda or cuda:0, got 'banana'$"):
        make_reward({"type": "sentiment", "model": folder, "device": "banana"})


@pytest.mark.parametrize("spec", [{"type": "reward_model", "label": "LABEL_0"}, {"type": "sentiment"}])
def test_a_checkpoint_without_the_head_is_refused(stories, spec):
    key = "path" if spec["type"] == "reward_model" else "model"
    with pytest.raises(InputError, match=r"has no score\.weight: it is not of the kind AutoModelForSequenceClassif"):
        make_reward({**spec, key: stories})("a")


@pytest.mark.parametrize(
    "spec", [{"type": "perplexity"}, {"type": "judge", "base_url": "http://localhost/v1"}, {"type": "sentiment"}]
)
def test_a_blank_model_is_refused(spec):
    with pytest.raises(InputError, match=r"^REWARD.model must be a .*name.*, got ' '"):
        make_reward({**spec, "model": " "})
