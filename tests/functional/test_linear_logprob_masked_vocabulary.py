"""Logits of -inf: a masked vocabulary, forward and backward, on either side of the KL."""

import pytest
import torch
from linear_case import INF, NAMES, TIGHT, Case

from hybrid.functional import linear_logprob


def forbid(case, tokens, *, policy=True, reference=True):
    """Take tokens out of the vocabulary by a bias of -inf, and make the labels avoid them."""
    forbidden = torch.zeros(len(case.weight), dtype=torch.bool).index_fill(0, torch.tensor(tokens), True)
    if policy:
        case.bias = case.bias.masked_fill(forbidden, -INF)
    if reference:
        case.ref_bias = case.ref_bias.masked_fill(forbidden, -INF)
    allowed = (~forbidden).nonzero().squeeze(1)
    case.labels = allowed[case.labels % len(allowed)]
    return forbidden


@pytest.mark.parametrize("tokens", [[0, 1, 2], [3, 4, 5], [6], [0, 4, 6], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("reference", [True, False], ids=["both forbid", "the policy forbids"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("small_tiles")
def test_a_masked_vocabulary_equals_the_definition(name, tokens, reference):
    case = Case()
    forbid(case, tokens, reference=reference)
    torch.testing.assert_close(getattr(case.stats(), name), case.by_definition()[name], rtol=0, atol=TIGHT)


@pytest.mark.parametrize("tokens", [[0, 1, 2], [3, 4, 5], [6], [0, 4, 6]])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("small_tiles")
def test_a_masked_vocabulary_has_the_gradient_of_the_smaller_one(name, tokens):
    case, small = Case(), Case()
    kept = ~forbid(case, tokens)
    for tensor in ("weight", "bias", "ref_weight", "ref_bias"):
        setattr(small, tensor, getattr(small, tensor)[kept])
    small.labels = (kept.cumsum(0) - 1)[case.labels]
    inputs, small_inputs = case.trainable(), small.trainable()
    found = torch.autograd.grad(getattr(case.stats(), name).sum(), inputs)
    hidden, weight, bias = torch.autograd.grad(small.by_definition()[name].sum(), small_inputs)
    expected = [hidden, torch.zeros_like(case.weight), torch.zeros(7, dtype=torch.float64)]
    expected[1][kept], expected[2][kept] = weight, bias
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TIGHT)


@pytest.mark.usefixtures("small_tiles")
def test_kl_is_infinite_where_the_reference_forbids_what_the_policy_does():
    case = Case()
    forbid(case, [4], policy=False)
    assert (case.stats(("kl",)).kl == INF).all()


@pytest.mark.usefixtures("small_tiles")
def test_an_infinite_kl_that_enters_no_loss_leaves_the_gradient_of_the_logprob_alone():
    case = Case()
    forbid(case, [4], policy=False)
    inputs = case.trainable()
    found = torch.autograd.grad(case.stats(("logprob", "kl")).logprob.sum(), inputs)
    expected = torch.autograd.grad(case.stats(("logprob",)).logprob.sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TIGHT)


@pytest.mark.usefixtures("small_tiles")
def test_kl_is_a_number_where_the_policy_underflows_on_a_token_the_reference_forbids():
    # Token 0 of the first slice is forbidden; the maximum rises by 200, where exp(-200) is 0 in float32.
    weight, bias = torch.zeros(4, 1), torch.tensor([0.0, 0.0, 0.0, 200.0])
    ref_bias = torch.tensor([-INF, 0.0, 0.0, 0.0])
    reference = {"ref_hidden": torch.ones(1, 1), "ref_weight": weight, "ref_bias": ref_bias}
    kl = linear_logprob(torch.ones(1, 1), weight, torch.tensor([3]), bias=bias, want=("kl",), **reference).kl
    assert not kl.isnan().any()
