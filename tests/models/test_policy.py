"""Policy and reference: values, saving both ways, freezing."""

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from hybrid.core import IGNORE, Batch, InputError
from hybrid.models import Policy, Reference, response_stats


@pytest.fixture
def policy():
    return Policy(tiny_model("gpt2")).eval()


def test_every_value_is_zero_at_first(policy, tokens):
    assert (policy(*tokens).value == 0).all()


def test_a_batchs_log_probs_are_those_of_plain_transformers(policy, tokens):
    ids, mask = tokens
    labels = ids.masked_fill(torch.arange(6) < 3, IGNORE)
    logprob, trained = policy.batch_logprob(Batch(ids, mask, labels))
    expected = policy.backbone.model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    assert trained.tolist() == [[False, False, True, True, True]] * 2
    torch.testing.assert_close(logprob, expected * trained, atol=1e-5, rtol=1e-5)


def test_a_batch_of_one_token_has_no_log_prob(policy):
    ids = torch.tensor([[5], [6]])
    logprob, trained = policy.batch_logprob(Batch(ids, ids > 0, ids))
    assert logprob.shape == trained.shape == (2, 0)


def test_the_entropy_of_a_batch_is_had_with_the_mask_of_its_log_probs(policy, tokens):
    ids, mask = tokens
    _, trained = policy.batch_logprob(Batch(ids, mask, ids))
    stats = response_stats(policy.backbone, policy.backbone(ids, mask), ids, trained, want=("entropy",))
    expected = torch.distributions.Categorical(logits=policy.backbone.model(ids).logits[:, :-1]).entropy()
    torch.testing.assert_close(stats.entropy, expected, atol=1e-5, rtol=1e-5)


def test_plain_transformers_reads_what_we_save(policy, tokens, tmp_path):
    policy.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(loaded(tokens[0]).logits, policy.backbone.model(tokens[0]).logits, rtol=0, atol=0)


def test_we_read_what_transformers_saves(policy, tokens, tmp_path):
    policy.backbone.model.save_pretrained(tmp_path)
    loaded = Policy.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(*tokens).hidden, policy(*tokens).hidden)


def test_the_value_head_comes_back(policy, tokens, tmp_path):
    torch.nn.init.normal_(policy.value_head.linear.weight)
    policy.save_pretrained(tmp_path / "out")
    assert torch.equal(Policy.from_pretrained(tmp_path / "out").eval()(*tokens).value, policy(*tokens).value)


def test_saving_into_a_folder_keeps_the_other_files_and_drops_older_shards(policy, tokens, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_text("older")
    policy.save_pretrained(tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"thesis.tex", "model.safetensors", "config.json", "value_head.safetensors"} <= names
    assert "model-00001-of-00002.safetensors" not in names
    assert torch.equal(Policy.from_pretrained(tmp_path / "out").eval()(*tokens).hidden, policy(*tokens).hidden)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_save_that_fails_leaves_the_older_one_whole(policy, tmp_path, monkeypatch):
    policy.save_pretrained(tmp_path / "out")
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        policy.save_pretrained(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_weights_are_float32_even_where_the_checkpoint_is_bfloat16(tmp_path):
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in Policy.from_pretrained(tmp_path).parameters()} == {torch.float32}


def test_a_reference_is_a_frozen_copy(policy, tokens):
    reference = Reference.from_policy(policy)
    assert not any(p.requires_grad for p in reference.backbone.parameters())
    before = reference.hidden(*tokens)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    assert torch.equal(reference.hidden(*tokens), before)


def test_a_reference_may_live_in_another_dtype(policy, tokens):
    reference = Reference.from_policy(policy, dtype=torch.bfloat16)
    assert reference.hidden(*tokens).dtype == torch.bfloat16
    assert next(policy.parameters()).dtype == torch.float32


def test_a_negative_reference_weight_is_refused(policy):
    with pytest.raises(InputError, match="weight"):
        Reference.from_policy(policy, weight=-1.0)


def test_a_saved_model_stops_at_the_tokenizers_eos_and_at_its_own(policy, tokenizer, tmp_path):
    from transformers import GenerationConfig

    policy.backbone.model.generation_config.eos_token_id = 50  # ChatML on a base model: two that end a turn
    policy.save_pretrained(tmp_path, tokenizer=tokenizer)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [tokenizer.eos_token_id, 50]
    assert policy.backbone.model.generation_config.eos_token_id == 50
