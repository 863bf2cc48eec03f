"""A new model in a folder."""

import pytest
import torch

from hybrid.core import InputError
from hybrid.models import Policy, new_recurrent


def test_a_new_folder_is_a_policy_with_the_tokenizers_ids(tokenizer, tmp_path):
    folder = new_recurrent(tmp_path / "gru", tokenizer, cell="gru", hidden_size=16, num_hidden_layers=2)
    policy = Policy.from_pretrained(folder)
    config = policy.backbone.model.config
    assert (config.cell, config.vocab_size, config.eos_token_id) == ("gru", 97, tokenizer.eos_token_id)
    assert policy.backbone.hidden_size == 16
    again = new_recurrent(tmp_path / "again", str(folder), hidden_size=16, memory_slots=4)
    assert Policy.from_pretrained(again).backbone.model.config.memory_slots == 4


def test_the_seed_alone_says_what_the_weights_are(tokenizer, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    seeds = {"a": 1, "b": 1, "c": 2}
    folders = [new_recurrent(tmp_path / name, tokenizer, hidden_size=8, seed=seed) for name, seed in seeds.items()]
    assert torch.equal(torch.get_rng_state(), before)
    weights = [Policy.from_pretrained(folder).backbone.head_weight for folder in folders]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_what_cannot_be_made_is_refused(tokenizer, tmp_path):
    with pytest.raises(InputError, match="is there already"):
        new_recurrent(tmp_path, tokenizer)
    for settings, said in (
        ({"memory_slot": 4}, "unknown parameter of a recurrent model: 'memory_slot'; did you mean 'memory_slots'"),
        ({"hidden_size": 2.5}, "hidden_size must be int, got 2.5"),
        ({"initializer_range": -1.0}, "initializer_range must be > 0, got -1.0"),
    ):
        with pytest.raises(InputError, match=said):
            new_recurrent(tmp_path / "new", tokenizer, **settings)
    with pytest.raises(InputError, match="one of lstm, gru, got 'rnn'"):
        new_recurrent(tmp_path / "new", tokenizer, cell="rnn")
    assert not (tmp_path / "new").exists()
