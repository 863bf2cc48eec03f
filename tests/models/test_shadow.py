"""The short copy of a policy's matrices: what it computes, what it shares, and when it is out of date."""

import pytest
import torch
from tiny import tiny_model
from transformers.pytorch_utils import Conv1D

from hybrid.models import LoraConfig, Policy, Shadow, add_lora

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def logits(backbone):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return backbone.next_logits(IDS, torch.ones_like(IDS))[0]


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def backbone(request):
    return Policy(tiny_model(request.param)).backbone.eval()


def test_under_autocast_it_is_the_original_bit_for_bit(backbone):
    assert torch.equal(logits(Shadow(backbone, torch.bfloat16).backbone), logits(backbone))


def test_it_is_what_the_original_was_at_the_last_refresh(backbone):
    shadow, before = Shadow(backbone, torch.bfloat16), logits(backbone)
    with torch.no_grad():
        for layer in backbone.trunk.modules():
            if isinstance(layer, (torch.nn.Linear, Conv1D)):
                layer.weight.mul_(1.25)
    assert torch.equal(logits(shadow.backbone), before)
    shadow.refresh()
    assert torch.equal(logits(shadow.backbone), logits(backbone))
    assert not torch.equal(logits(backbone), before)


def test_only_linear_layers_are_copied(backbone):
    shadow = Shadow(backbone, torch.bfloat16)
    own = {id(x) for x in backbone.parameters()}
    copied = [x for x in shadow.backbone.parameters() if id(x) not in own]
    assert copied and all(x.dtype == torch.bfloat16 and not x.requires_grad for x in copied)
    assert all(x.dtype == torch.float32 for x in backbone.parameters())


def test_an_adapter_stays_an_adapter(needs_peft):
    policy = Policy(tiny_model("llama"))
    add_lora(policy.backbone.model, LoraConfig(rank=2))
    for name, parameter in policy.backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    shadow = Shadow(policy.backbone.eval(), torch.bfloat16)
    assert torch.equal(logits(shadow.backbone), logits(policy.backbone))


def test_new_layers_or_another_dtype_make_it_another_ones(needs_peft, backbone):
    shadow = Shadow(backbone, torch.bfloat16)
    assert shadow.is_of(backbone, torch.bfloat16)
    assert not shadow.is_of(backbone, torch.float16)
    add_lora(backbone.model, LoraConfig(rank=2))
    assert not shadow.is_of(backbone, torch.bfloat16)
