"""The reward head on the policy: what it reads, how it starts, and that it comes back bit for bit."""

import pytest
import torch
from tiny import tiny_model

from hybrid.core import InputError
from hybrid.models import REWARD_HEAD_FILE, LoraConfig, Policy, RewardHead, last_token


@pytest.fixture
def policy():
    policy = Policy(tiny_model("gpt2")).eval()
    policy.add_reward_head()
    return policy


def test_a_score_is_the_heads_number_at_the_last_token(policy, tokens):
    last, before = (policy(*tokens).hidden[:, i] @ policy.reward_head.linear.weight[0] for i in (-1, -2))
    torch.testing.assert_close(policy.scores(*tokens), last)
    assert (last - before).abs().min() > 0.01


@pytest.mark.parametrize("left", [False, True])
def test_padding_on_either_side_leaves_the_scores(policy, tokens, left):
    ids, mask = tokens
    nothing = torch.zeros(2, 3, dtype=torch.long)
    rows = torch.cat([nothing, ids] if left else [ids, nothing], 1)
    real = torch.cat([nothing.bool(), mask] if left else [mask, nothing.bool()], 1)
    torch.testing.assert_close(policy.scores(rows, real), policy.scores(ids, mask), atol=1e-4, rtol=1e-4)


def test_the_last_token_of_a_row_that_has_only_one_is_that():
    mask = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 0], [2, 3, 3]])
    assert last_token(mask).tolist() == [0, 2, 1, 1, 2]


def test_the_weights_start_as_draws_of_variance_one_over_d_plus_one():
    torch.manual_seed(0)
    weight = RewardHead(40_000).linear.weight
    assert weight.var().item() * 40_001 == pytest.approx(1.0, rel=0.05)
    assert RewardHead(3).linear.bias is None


def test_a_bfloat16_trunk_is_scored_in_float32():
    policy = Policy(tiny_model("llama").bfloat16())
    policy.add_reward_head()
    ids = torch.tensor([[5, 6]])
    assert policy.scores(ids, ids > 0).dtype == torch.float32


def test_a_policy_without_reward_head_draws_no_number_and_has_no_key(tokens):
    model = tiny_model("gpt2")
    torch.manual_seed(0)
    policy = Policy(model)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    policy.value_head.linear.reset_parameters()  # the value head's draws, as ever
    assert torch.equal(drawn, torch.rand(1))
    assert not any("reward" in name for name in policy.state_dict())
    with pytest.raises(InputError, match="no reward head"):
        policy.scores(*tokens)


def test_adding_a_head_to_a_policy_that_has_one_changes_nothing(policy):
    head = policy.reward_head
    policy.add_reward_head()
    assert policy.reward_head is head


def test_the_reward_head_comes_back_bit_for_bit(policy, tokens, tmp_path):
    policy.save_pretrained(tmp_path / "out")
    loaded = Policy.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(loaded.scores(*tokens), policy.scores(*tokens))
    bare = Policy(tiny_model("gpt2", seed=1)).eval()
    bare.load_weights(tmp_path / "out")
    assert torch.equal(bare.scores(*tokens), policy.scores(*tokens))


def test_loading_weights_with_a_reward_head_draws_what_loading_without_does(policy, tmp_path):
    policy.save_pretrained(tmp_path / "with")
    policy.reward_head = None
    policy.save_pretrained(tmp_path / "without")
    drawn = []
    for name in ("with", "without"):
        torch.manual_seed(0)
        Policy.from_pretrained(tmp_path / name)
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1]


def test_beside_an_adapter_the_reward_head_comes_back(needs_peft, tokens, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    policy = Policy.from_pretrained(tmp_path / "base", lora=LoraConfig(rank=2)).eval()
    policy.add_reward_head()
    policy.save_pretrained(tmp_path / "adapter", merge=False)
    other = Policy.from_pretrained(tmp_path / "base", lora=LoraConfig(rank=2)).eval()
    other.load_weights(tmp_path / "adapter")
    assert torch.equal(other.scores(*tokens), policy.scores(*tokens))


def test_saving_without_a_head_removes_the_older_one(policy, tmp_path):
    policy.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / REWARD_HEAD_FILE).is_file()
    policy.reward_head = None
    policy.save_pretrained(tmp_path / "out")
    assert Policy.from_pretrained(tmp_path / "out").reward_head is None


def test_another_models_reward_head_is_refused(policy, tmp_path):
    policy.save_pretrained(tmp_path / "out")
    wider = Policy(tiny_model("gpt2", n_embd=64))
    wider.add_reward_head()
    wider.save_pretrained(tmp_path / "wide")
    (tmp_path / "wide" / REWARD_HEAD_FILE).replace(tmp_path / "out" / REWARD_HEAD_FILE)
    with pytest.raises(InputError, match=r"the reward head .* is another model's"):
        Policy.from_pretrained(tmp_path / "out")
