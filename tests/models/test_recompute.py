"""Gradient checkpointing: the same gradient with less memory, in both modes, with adapters, in copies."""

import copy

import pytest
import torch
from tiny import CELLS, FAMILIES, tiny_model

from hybrid.core import InputError
from hybrid.models import LoraConfig, Policy, add_lora, recompute_activations

IDS = torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)


def gradients(policy, train):
    """By name, and how many numbers the graph kept for the backward pass."""
    torch.manual_seed(0)  # of the dropout
    policy.train(train)
    policy.zero_grad()
    kept = 0

    def pack(x):
        nonlocal kept
        kept += x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = policy(IDS, MASK)
        loss = out.hidden.square().mean() + out.value.mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("family", [*FAMILIES, *CELLS])
def test_the_gradient_is_the_same_bit_for_bit_and_far_less_is_kept(family, train):
    policy = Policy(tiny_model(family))
    expected, without = gradients(policy, train)
    recompute_activations(policy.backbone.trunk)
    found, kept = gradients(policy, train)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert kept < without / 4


@pytest.mark.usefixtures("needs_peft")
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_adapters_get_the_same_gradient_over_frozen_layers(train):
    model = tiny_model("llama")
    add_lora(model, LoraConfig(rank=2, dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then A would have no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    policy = Policy(model)
    expected, without = gradients(policy, train)
    recompute_activations(policy.backbone.trunk)
    found, kept = gradients(policy, train)
    assert any("lora_A" in name for name in expected)
    assert all(found[name].any() and torch.equal(found[name], expected[name]) for name in expected if "lora" in name)
    assert kept < without / 4


def test_a_copy_recomputes_with_its_own_weights():
    policy = Policy(tiny_model("llama"))
    recompute_activations(policy.backbone.trunk)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    found, _ = gradients(other, False)
    expected, _ = gradients(Policy(tiny_model("llama")), False)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_generation_still_uses_its_cache():
    policy = Policy(tiny_model("llama"))
    with torch.no_grad():
        whole, _ = policy.backbone.next_logits(IDS, MASK)
        recompute_activations(policy.backbone.trunk)
        _, cache = policy.backbone.next_logits(IDS[:, :-1], MASK[:, :-1])
        last, cache = policy.backbone.next_logits(IDS[:, -1:], MASK, cache)
    assert cache.get_seq_length() == IDS.shape[1]
    torch.testing.assert_close(last, whole)


def test_the_names_of_weights_and_layers_stay():
    policy = Policy(tiny_model("llama"))
    before = list(policy.state_dict()), str(policy)
    recompute_activations(policy.backbone.trunk)
    assert (list(policy.state_dict()), str(policy)) == before


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(InputError, match=r"model\.gradient_checkpointing: Linear has no layers"):
        recompute_activations(torch.nn.Linear(2, 2))
