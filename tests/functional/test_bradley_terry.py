"""The loss of a reward model, against a loop over plain floats."""

import math

import pytest
import torch
from preference_case import TIGHT, log_sigmoid

from hybrid.functional import bradley_terry_loss


def scores(size=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    return [*normal, torch.rand(size, generator=generator, dtype=torch.float64).to(dtype)]


def bradley_terry_by_loop(chosen, rejected, margin, center, weight):
    terms = [
        w * (-log_sigmoid(c - r - m) + center * (c + r) ** 2)
        for c, r, m, w in zip(chosen.tolist(), rejected.tolist(), margin.tolist(), weight.tolist(), strict=True)
    ]
    return math.fsum(terms) / math.fsum(weight.tolist())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("center", [0.0, 0.01, 1.0])
def test_bradley_terry_equals_a_loop(seed, center):
    chosen, rejected, margin, weight = scores(seed=seed)
    loss, _ = bradley_terry_loss(chosen, rejected, margin=margin, center_coef=center, weight=weight)
    expected = bradley_terry_by_loop(chosen, rejected, margin, center, weight)
    assert loss.item() == pytest.approx(expected, abs=TIGHT)


def test_without_margin_and_weight_bradley_terry_is_the_mean_with_0_and_1():
    chosen, rejected, margin, weight = scores()
    loss, _ = bradley_terry_loss(chosen, rejected)
    expected = bradley_terry_by_loop(chosen, rejected, 0 * margin, 0.0, 0 * weight + 1)
    assert loss.item() == pytest.approx(expected, abs=TIGHT)


def test_bradley_terry_metrics_by_hand():
    # Differences 1, 0, -2 and 5 with weights 1, 2, 3 and 0: won, tied, lost, and not counted.
    chosen, rejected = torch.tensor([2.0, 1.0, -1.0, 9.0]), torch.tensor([1.0, 1.0, 1.0, 4.0])
    weight = torch.tensor([1.0, 2.0, 3.0, 0.0])
    _, metrics = bradley_terry_loss(chosen, rejected, weight=weight, margin=torch.ones(4), num_pairs=99)
    assert metrics["accuracy"].item() == pytest.approx((1 + 2 * 0.5) / 6)
    assert metrics["margin_mean"].item() == pytest.approx((1 - 6) / 6)


def test_bradley_terry_passes_gradcheck():
    chosen, rejected, margin, weight = scores()

    def loss(c, r):
        return bradley_terry_loss(c, r, margin=margin, center_coef=0.1, weight=weight)[0]

    assert torch.autograd.gradcheck(loss, (chosen.requires_grad_(), rejected.requires_grad_()))


def test_centering_alone_sees_a_shift_of_all_scores():
    chosen, rejected, *_ = scores()
    plain, centred = (
        [bradley_terry_loss(chosen + s, rejected + s, center_coef=k)[0].item() for s in (0.0, 3.0)] for k in (0.0, 0.1)
    )
    assert plain[0] == pytest.approx(plain[1], abs=TIGHT)
    assert centred[1] > centred[0] + 1


def test_a_negative_center_coef_is_refused():
    with pytest.raises(ValueError, match=r"center_coef must be >= 0, got -0\.1"):
        bradley_terry_loss(*scores()[:2], center_coef=-0.1)


def test_bradley_terry_refuses_different_shapes():
    chosen, rejected, margin, weight = scores()
    for given in ({"margin": margin[:-1]}, {"weight": weight.unsqueeze(1)}):
        with pytest.raises(ValueError, match="shapes must be equal"):
            bradley_terry_loss(chosen, rejected, **given)
    with pytest.raises(ValueError, match="shapes must be equal"):
        bradley_terry_loss(chosen, rejected.unsqueeze(1))
