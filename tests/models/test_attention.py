"""Attention over short rows under CPU autocast: computed in float32, told from the outside by its rounding alone."""

import pytest
import torch
from tiny import tiny_policy
from torch.nn.functional import scaled_dot_product_attention

from hybrid.models import recompute_activations
from hybrid.models.attention import SHORT, short_attention

CPU = torch.device("cpu")


def heads(length):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, length, 8, generator=generator).bfloat16() for _ in range(3)]


def attended(length, dtype=torch.bfloat16):
    with torch.autocast("cpu", torch.bfloat16), short_attention(CPU):
        query, key, value = heads(length)
        return scaled_dot_product_attention(query.to(dtype), key.to(dtype), value, is_causal=True)


# A rotary embedding leaves queries and keys in float32.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_short_rows_are_attended_in_float32_and_rounded_once(dtype):
    wanted = scaled_dot_product_attention(*(x.float() for x in heads(9)), is_causal=True)
    assert torch.equal(attended(9, dtype), wanted.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(attended(9, dtype), scaled_dot_product_attention(*heads(9), is_causal=True))


def test_long_rows_are_left_to_torch():
    assert torch.equal(attended(SHORT), scaled_dot_product_attention(*heads(SHORT), is_causal=True))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, None])
def test_only_bfloat16_on_a_cpu_takes_part(precision):
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        assert (type(short_attention(CPU)).__name__ == "_InFloat32") == (precision == torch.bfloat16)


def gradients(policy):
    ids = torch.arange(3, 27).view(2, 12)
    policy.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        policy(ids, torch.ones_like(ids)).hidden.float().square().sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def test_activations_that_are_computed_again_are_the_same():
    policy = tiny_policy()
    plain = gradients(policy)
    recompute_activations(policy.backbone.trunk)
    again = gradients(policy)
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())
