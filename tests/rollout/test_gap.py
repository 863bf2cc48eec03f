"""A policy that samples from one distribution and trains on another is stopped, or corrected, never overlooked."""

import sys

import pytest
import torch
from tiny import tiny_model

from hybrid import HybridConfig, HybridTrainer
from hybrid.core import RunStopped
from hybrid.models import Backbone

ROWS = [{"prompt": "the movie was", "target": "good"}, {"prompt": "it is", "target": "fine"}]
BASE = {"sampling": {"max_new_tokens": 6}, "ppo": {"batch_size": 2, "minibatch_size": 2}, "data": {"template": "none"}}


def trainer(tokenizer, **sections):
    config = HybridConfig.from_dict({key: {**BASE.get(key, {}), **sections.get(key, {})} for key in {*BASE, *sections}})
    return HybridTrainer(tiny_model("llama"), tokenizer, ROWS, lambda response: float(len(response)), config)


@pytest.fixture
def forgetful(monkeypatch):
    """A sampler that loses what was said two tokens ago: as Mamba's did, without an error. Not while it is built."""

    def lose():
        right = Backbone.next_logits
        monkeypatch.setattr(
            Backbone, "next_logits", lambda self, ids, mask, *seen: right(self, ids, mask[:, -ids.shape[1] :])
        )

    return lose


def test_the_gap_is_measured_in_every_rollout(tokenizer):
    hybrid = trainer(tokenizer)
    metrics = hybrid.ppo_step(hybrid.rollout(ROWS))
    assert 0 <= metrics["sampling_gap"] <= metrics["sampling_gap_max"] < 1e-4


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9}, {"temperature": 0.5}])
def test_a_sampler_that_forgets_stops_the_run(tokenizer, forgetful, sampling):
    hybrid = trainer(tokenizer, sampling=sampling)
    forgetful()
    with pytest.raises(RunStopped, match=r"LlamaForCausalLM computes something else with its cache.*ppo\.importance"):
        hybrid.rollout(ROWS)


def test_an_importance_correction_covers_the_gap(tokenizer, forgetful):
    hybrid = trainer(tokenizer, ppo={"importance": "token"})
    forgetful()
    metrics = hybrid.ppo_step(hybrid.rollout(ROWS))
    assert metrics["sampling_gap"] > 0.1


@pytest.mark.parametrize("sampling", [{"top_k": 3}, {"top_p": 0.5}, {"min_new_tokens": 4}])
def test_drawing_from_less_than_all_is_no_gap_to_stop_for(tokenizer, sampling):
    hybrid = trainer(tokenizer, sampling=sampling)
    assert hybrid.ppo_step(hybrid.rollout(ROWS))["sampling_gap"] >= 0


def test_weights_that_diverged_are_said_to_have(tokenizer):
    hybrid = trainer(tokenizer)
    with torch.no_grad():
        hybrid.policy.backbone.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RunStopped, match=r"not finite at token 1 .*Lower optimizer\.lr"):
        hybrid.rollout(ROWS)


@pytest.mark.parametrize(("where", "message"), [("respond", "while sampling"), ("assemble", "while scoring a rollout")])
def test_memory_that_runs_out_in_a_rollout_is_said_in_a_line(tokenizer, monkeypatch, where, message):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    hybrid = trainer(tokenizer)
    monkeypatch.setattr(sys.modules["hybrid.rollout.collect"], where, full)
    with pytest.raises(RunStopped, match=rf"out of memory {message} \(CUDA out of memory.*Lower ppo"):
        hybrid.rollout(ROWS)


def test_a_frozen_model_is_refused(tokenizer):
    model = tiny_model("llama").requires_grad_(False)
    with pytest.raises(ValueError, match="every weight of the model is frozen"):
        HybridTrainer(model, tokenizer, ROWS)


def test_float16_weights_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"float16 weights cannot be trained.*model\.precision=float16"):
        HybridTrainer(tiny_model("llama").half(), tokenizer, ROWS)


@pytest.mark.parametrize("token", [600, -1])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, token):
    with pytest.raises(ValueError, match=rf"holds the id {token}, and LlamaForCausalLM has embeddings for ids"):
        trainer(tokenizer).step([[5, 6]], [[7, token]], [1.0])


@pytest.mark.parametrize("score", [None, "high", [None]])
def test_a_score_that_is_no_number_is_refused(tokenizer, score):
    with pytest.raises(ValueError, match=r"scores\[0\] must be a number"):
        trainer(tokenizer).step([[5, 6]], [[7, 8]], [score])
