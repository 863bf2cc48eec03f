"""What the losses of pairs have in common: counts, weights, no pair at all, precision."""

import pytest
import torch
from preference_case import KINDS, TIGHT, options, pairs

from hybrid.functional import bradley_terry_loss, dpo_loss


def of_dpo(kind):
    return lambda c, r, m, w, n: dpo_loss(c, r, m, 0 * m, **options(kind), weight=w, num_pairs=n)


def of_bradley_terry(c, r, m, w, n):
    return bradley_terry_loss(c, r, margin=m, center_coef=0.1, weight=w, num_pairs=n)


LOSSES = {"bradley_terry": of_bradley_terry} | {kind: of_dpo(kind) for kind in KINDS}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", [[3, 4], [6, 1], [1] * 7])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_of_parts_with_the_global_count_add_up_to_the_whole(name, sizes, weighted):
    chosen, rejected, other, _ = pairs()
    weight = torch.linspace(0.1, 2.0, 7, dtype=torch.float64) if weighted else None
    count = 7 if weight is None else weight.sum().item()
    whole = chosen.clone().requires_grad_()
    loss, _ = LOSSES[name](whole, rejected, other, weight, None)
    loss.backward()
    parts, total = chosen.clone().requires_grad_(), 0.0
    split = [parts.split(sizes), rejected.split(sizes), other.split(sizes)]
    weights = [None] * len(sizes) if weight is None else weight.split(sizes)
    for c, r, m, w in zip(*split, weights, strict=True):
        part, _ = LOSSES[name](c, r, m, w, count)
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), abs=TIGHT)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=TIGHT)


@pytest.mark.parametrize("name", LOSSES)
def test_a_count_below_one_divides_as_well(name):
    # Weights are no counts: those of a step may add up to less than 1.
    chosen, rejected, other, _ = pairs()
    whole, half = (LOSSES[name](chosen, rejected, other, None, n)[0].item() for n in (1, 0.5))
    assert half == pytest.approx(2 * whole, abs=TIGHT)


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_of_weight_two_is_the_pair_twice(name):
    chosen, rejected, other, _ = pairs()
    weight = torch.ones(7, dtype=torch.float64).index_fill(0, torch.tensor([2]), 2.0)
    twice = [torch.cat([x, x[2:3]]) for x in (chosen, rejected, other)]
    weighted, of_weighted = LOSSES[name](chosen, rejected, other, weight, None)
    doubled, of_doubled = LOSSES[name](*twice, None, None)
    assert weighted.item() == pytest.approx(doubled.item(), abs=TIGHT)
    for metric, x in of_weighted.items():
        assert x.item() == pytest.approx(of_doubled[metric].item(), abs=TIGHT), metric


@pytest.mark.parametrize("num_pairs", [None, 0, 5])
@pytest.mark.parametrize("name", LOSSES)
def test_no_pair_gives_a_connected_zero(name, num_pairs):
    empty = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    loss, metrics = LOSSES[name](empty, empty, empty.detach(), None, num_pairs)
    loss.backward()
    assert [x.item() for x in (loss, *metrics.values())] == [0.0] * (1 + len(metrics))


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_zero_alone_give_a_zero(name):
    chosen, rejected, other, _ = pairs()
    loss, metrics = LOSSES[name](chosen, rejected, other, torch.zeros(7), None)
    assert [x.item() for x in (loss, *metrics.values())] == [0.0] * (1 + len(metrics))


@pytest.mark.parametrize("name", LOSSES)
def test_weights_get_no_gradient_and_metrics_are_detached(name):
    chosen, rejected, other, _ = (x.requires_grad_() for x in pairs())
    weight = torch.ones(7, requires_grad=True)
    loss, metrics = LOSSES[name](chosen, rejected, other, weight, None)
    loss.backward()
    assert weight.grad is None
    assert not any(x.requires_grad for x in metrics.values())


@pytest.mark.parametrize(
    ("given", "returned"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_float64_stays_float64_and_the_rest_becomes_float32(name, given, returned, autocast):
    chosen, rejected, other, _ = pairs(dtype=given)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, metrics = LOSSES[name](chosen, rejected, other, None, None)
    assert {x.dtype for x in (loss, *metrics.values())} == {returned}
    exact, _ = LOSSES[name](chosen.double(), rejected.double(), other.double(), None, None)
    # float32 losses of at most a few hundred, a few roundings of 6e-8 each; bfloat16 would be off by 4e-3.
    assert loss.item() == pytest.approx(exact.item(), rel=2e-5)
