"""Each rule by itself, against numbers worked out by hand."""

import math
import sys

import pytest
import torch

from hybrid.core import InputError
from hybrid.rewards.controllers import (
    balance,
    cosines_to_last,
    covariance_gain,
    exp3,
    floored,
    hedge,
    min_norm,
    upgrad,
)
from hybrid.rewards.moments import Moments


def test_weights_above_the_floor_are_only_scaled():
    assert floored([1, 3], 0.1) == [0.25, 0.75]
    assert floored([0.2, 0.3, 0.5], 0.0) == pytest.approx([0.2, 0.3, 0.5])


def test_what_is_below_the_floor_stands_at_it_and_the_others_keep_their_ratio():
    assert floored([0.0, 1.0, 3.0], 0.2) == pytest.approx([0.2, 0.2, 0.6])
    # 0.25 of 0.8 are 0.2: raising the first pushed no other below.
    assert floored([0.01, 0.33, 0.66], 0.1) == pytest.approx([0.1, 0.3, 0.6])
    # Raising the first pushes the second below: 0.9 * 0.105 < 0.1.
    assert floored([0.001, 0.105, 0.894], 0.1) == pytest.approx([0.1, 0.1, 0.8])
    assert floored([0.0, 0.0, 1.0], 0.1) == pytest.approx([0.1, 0.1, 0.8])


def test_the_floored_weights_are_the_nearest_in_kl():
    """No other point of the simplex above the floor, on a fine grid, has a smaller KL from the weights."""
    weights, floor = [0.02, 0.28, 0.7], 0.1

    def kl(q):
        return sum(a * math.log(a / b) for a, b in zip(q, weights, strict=True))

    steps = range(10, 81)
    grid = [(i / 100, j / 100, (100 - i - j) / 100) for i in steps for j in steps if 100 - i - j >= 10]
    assert kl(floored(weights, floor)) <= min(map(kl, grid)) + 1e-12


def test_hedge_multiplies_by_the_exponential_of_the_gain():
    expected = [0.5 * math.exp(0.3), 0.5 * math.exp(-0.1)]
    assert hedge([0.5, 0.5], [3, -1], eta=0.1, floor=0.0) == pytest.approx([w / sum(expected) for w in expected])
    assert hedge([0.3, 0.7], [5, 5], eta=2, floor=0.1) == pytest.approx([0.3, 0.7]), "only differences count"
    assert hedge([0.5, 0.5], [1e9, 0], eta=1, floor=0.1) == pytest.approx([0.9, 0.1]), "no overflow"


def test_the_gain_is_the_first_order_growth_of_the_metric_under_a_tilt():
    metric, score = [1.0, 2.0, 4.0, 9.0], [0.3, -1.0, 0.5, 2.0]

    def mean_under(eta):
        odds = [math.exp(eta * r) for r in score]
        return sum(p * m for p, m in zip(odds, metric, strict=True)) / sum(odds)

    slope = (mean_under(1e-5) - mean_under(-1e-5)) / 2e-5
    deviation = math.sqrt(sum((m - 4) ** 2 for m in metric) / 4)
    assert covariance_gain(metric, score) == pytest.approx(slope / deviation, rel=1e-8)
    assert covariance_gain([2.0, 2.0], [1.0, 3.0]) == 0.0
    assert covariance_gain([1.0], [1.0]) == 0.0


def test_exp3_moves_only_what_was_tried_by_its_probability():
    # 0.25 exp(0.4 * 0.5 / (2 * 0.25)) = 0.25 exp(0.4)
    tried = 0.25 * math.exp(0.4)
    found = exp3([0.25, 0.75], 0, 0.5, eta=0.4, floor=0.1)
    assert found == pytest.approx([tried / (tried + 0.75), 0.75 / (tried + 0.75)])
    assert exp3([0.25, 0.75], 0, 0.0, eta=0.4, floor=0.1) == pytest.approx([0.25, 0.75])
    assert exp3([0.25, 0.75], 0, -1.0, eta=0.4, floor=0.2) == pytest.approx([0.2, 0.8])


def test_balanced_components_deviate_alike():
    found = balance([0.5, 0.5], [2.0, 8.0], floor=0.0)
    assert found == pytest.approx([0.8, 0.2])
    assert found[0] * 2.0 == pytest.approx(found[1] * 8.0)
    assert balance([0.75, 0.25], [1.0, 1.0], floor=0.0) == pytest.approx([0.75, 0.25])
    assert balance([0.5, 0.5], [0.0, 3.0], floor=0.1) == pytest.approx([0.1, 0.9])
    assert balance([0.3, 0.7], [0.0, 0.0], floor=0.1) == pytest.approx([0.3, 0.7])


def test_min_norm_of_two_gradients_is_the_foot_of_the_perpendicular():
    jacobian = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    # w1 = |g2|^2 / (|g1|^2 + |g2|^2)
    assert min_norm(jacobian @ jacobian.T) == pytest.approx([0.2, 0.8])
    longer = torch.tensor([[1.0, 0.0], [3.0, 0.5]])
    assert min_norm(longer @ longer.T) == pytest.approx([1.0, 0.0]), "the shortest point is an end"


@pytest.mark.parametrize("seed", range(5))
def test_min_norm_meets_its_optimality_condition(seed):
    jacobian = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = torch.tensor(min_norm(jacobian @ jacobian.T), dtype=torch.float64)
    point = weights @ jacobian
    assert float(weights.min()) >= 0 and float(weights.sum()) == pytest.approx(1.0)
    # <g_i, d> >= |d|^2 for every i: no gradient is against the shortest point.
    assert ((jacobian @ point) >= point @ point - 1e-8 * jacobian.square().sum(1).max()).all()


@pytest.mark.slow
def test_min_norm_is_no_longer_than_torchjds():
    aggregation = pytest.importorskip("torchjd.aggregation")
    for seed in range(5):
        jacobian = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        gram = jacobian @ jacobian.T
        own, other = torch.tensor(min_norm(gram), dtype=torch.float64), aggregation.MGDAWeighting(1e-9, 20_000)(gram)
        assert float(own @ gram @ own) <= float(other @ gram @ other) + 1e-9
        assert own == pytest.approx(other, abs=1e-3)  # Frank-Wolfe's error falls as 1 / step


def test_upgrad_is_torchjds_and_conflicts_with_no_gradient():
    aggregation = pytest.importorskip("torchjd.aggregation")
    pytest.importorskip("quadprog")
    jacobian = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
    found = upgrad(jacobian @ jacobian.T)
    expected = aggregation.UPGradWeighting()(jacobian @ jacobian.T)
    assert found == pytest.approx((expected / expected.sum()).tolist())
    assert found == pytest.approx([1.1109 / 1.9003, 0.7894 / 1.9003], abs=1e-4)
    direction = torch.tensor(found, dtype=torch.float64) @ jacobian
    assert (jacobian @ direction >= -1e-3).all()
    assert not (jacobian @ jacobian.mean(0) >= -1e-3).all(), "the plain mean does conflict"


def test_upgrad_without_torchjd_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(InputError, match=r"needs torchjd: pip install 'hybrid-trainer\[gradients\]'"):
        upgrad(torch.eye(2))


def test_cosines_are_to_the_last_gradient():
    jacobian = torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.0, 0.0], [3.0, 4.0]])
    assert cosines_to_last(jacobian @ jacobian.T) == pytest.approx([0.6, -0.8, 0.0])
    assert cosines_to_last(torch.zeros(2, 2)) == [0.0]


def test_moments_are_those_of_the_scores_weighted_by_age():
    moments = Moments(0.75)
    assert moments.state() == [] and moments.standardised(3.0) == 0.0
    moments.take([1.0, 3.0])
    assert (moments.mean, moments.variance) == (2.0, 1.0)
    moments.take([10.0])
    moments.take([])
    # The old two with 3/8 each, the new one with 1/4.
    mean = (3 * 1 + 3 * 3 + 2 * 10) / 8
    assert moments.mean == pytest.approx(mean)
    assert moments.variance == pytest.approx((3 * (1 - mean) ** 2 + 3 * (3 - mean) ** 2 + 2 * (10 - mean) ** 2) / 8)
    assert moments.standardised(mean + moments.deviation) == pytest.approx(1.0)
    other = Moments(0.75)
    other.load(moments.state())
    assert other.standardised(7.0) == moments.standardised(7.0)


def test_scores_that_differ_by_rounding_have_no_deviation():
    moments = Moments(0.9)
    moments.take([0.1 + 0.2, 0.3])
    assert moments.deviation == 0.0 and moments.standardised(0.3) == 0.0
