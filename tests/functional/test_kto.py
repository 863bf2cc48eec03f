"""KTO, against a loop over plain floats."""

import math

import pytest
import torch
from preference_case import BETA, LABEL, TIGHT, pairs, sigmoid

from hybrid.functional import kto_loss


def kto_by_loop(logprob, ref_logprob, label, kl, beta, of_good, of_bad):
    terms, z = [], max(kl, 0.0)
    for r, good in zip((logprob - ref_logprob).tolist(), label.tolist(), strict=True):
        # The paper's lambda_y - v, with v = lambda_y sigmoid(...).
        terms.append(of_good - of_good * sigmoid(beta * (r - z)) if good else of_bad - of_bad * sigmoid(beta * (z - r)))
    return math.fsum(terms) / len(terms)


@pytest.mark.parametrize("kl", [0.0, 0.8, -2.0])
@pytest.mark.parametrize("seed", range(2))
def test_kto_equals_a_loop(seed, kl):
    logprob, ref_logprob, *_ = pairs(seed=seed)
    loss, metrics = kto_loss(logprob, ref_logprob, LABEL, kl, beta=BETA, desirable_weight=1.1, undesirable_weight=0.7)
    assert loss.item() == pytest.approx(kto_by_loop(logprob, ref_logprob, LABEL, kl, BETA, 1.1, 0.7), abs=TIGHT)
    rewards = BETA * (logprob - ref_logprob)
    assert metrics["desirable_reward"].item() == pytest.approx(rewards[LABEL].mean().item(), abs=TIGHT)
    assert metrics["undesirable_reward"].item() == pytest.approx(rewards[~LABEL].mean().item(), abs=TIGHT)
    right = [
        (r > max(kl, 0.0)) == good for r, good in zip((logprob - ref_logprob).tolist(), LABEL.tolist(), strict=True)
    ]
    assert metrics["accuracy"].item() == pytest.approx(sum(right) / 7)
    assert metrics["kl"].item() == max(kl, 0.0)


def test_kto_passes_gradcheck():
    logprob, ref_logprob, *_ = pairs()
    assert torch.autograd.gradcheck(
        lambda x: kto_loss(x, ref_logprob, LABEL, 0.4, undesirable_weight=2.0)[0], logprob.requires_grad_()
    )


def test_kto_at_the_reference_is_half_the_weight_and_right_half_the_time():
    logprob, *_ = pairs()
    loss, metrics = kto_loss(logprob, logprob, LABEL, 0.0)
    assert loss.item() == pytest.approx(0.5, abs=TIGHT)
    assert metrics["accuracy"].item() == 0.5


def test_kto_gives_no_gradient_to_its_kl_nor_to_the_reference():
    logprob, ref_logprob, *_ = (x.requires_grad_() for x in pairs())
    kl = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    kto_loss(logprob, ref_logprob, LABEL, kl)[0].backward()
    assert kl.grad is None
    assert ref_logprob.grad is None
    assert (logprob.grad != 0).all()


def test_kto_s_gradient_raises_the_desirable_and_lowers_the_rest():
    logprob, ref_logprob, *_ = pairs()
    kto_loss(logprob.requires_grad_(), ref_logprob, LABEL, 0.5)[0].backward()
    assert torch.equal(logprob.grad < 0, LABEL)


@pytest.mark.parametrize("label", [True, False])
def test_a_label_that_no_row_has_gives_a_reward_of_0_under_the_same_keys(label):
    logprob, ref_logprob, *_ = pairs()
    _, metrics = kto_loss(logprob, ref_logprob, torch.full((7,), label), 0.0)
    _, both = kto_loss(logprob, ref_logprob, LABEL, 0.0)
    assert metrics.keys() == both.keys()
    assert metrics["undesirable_reward" if label else "desirable_reward"].item() == 0.0


@pytest.mark.parametrize("sizes", [[3, 4], [1, 1, 5], [2, 3, 2]])
def test_kto_s_metrics_of_parts_average_by_rows_to_those_of_the_whole(sizes):
    # [1, 1, 5]: the first part has no undesirable row, the second no desirable one.
    logprob, ref_logprob, *_ = pairs()
    _, whole = kto_loss(logprob, ref_logprob, LABEL, 0.3)
    parts = [
        kto_loss(x, y, label, 0.3, num_examples=7, desirable_share=4 / 7)[1]
        for x, y, label in zip(logprob.split(sizes), ref_logprob.split(sizes), LABEL.split(sizes), strict=True)
    ]
    for name, expected in whole.items():
        merged = sum(n * part[name].item() for n, part in zip(sizes, parts, strict=True)) / 7
        assert merged == pytest.approx(expected.item(), abs=TIGHT), name


@pytest.mark.parametrize("difference", [1e4, -1e4])
def test_kto_of_extreme_differences_is_finite(difference):
    logprob = torch.full((7,), difference, requires_grad=True)
    loss, _ = kto_loss(logprob, torch.zeros(7), LABEL, 1e4)
    loss.backward()
    assert loss.isfinite()
    assert logprob.grad.isfinite().all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": 0.0}, "beta must be > 0, got 0.0"),
        ({"desirable_weight": -1.0}, "desirable_weight must be >= 0, got -1.0"),
        ({"undesirable_weight": math.nan}, "undesirable_weight must be >= 0, got nan"),
        ({"desirable_share": 1.5}, r"desirable_share must lie in \[0, 1\], got 1.5"),
        ({"kl": torch.zeros(7)}, r"kl must be a scalar.*\(7,\)"),
        ({"label": LABEL[:-1]}, "shapes must be equal"),
    ],
)
def test_kto_refuses_by_name(given, message):
    logprob, ref_logprob, *_ = pairs()
    with pytest.raises(ValueError, match=message):
        kto_loss(logprob, ref_logprob, **({"label": LABEL, "kl": 0.0} | given))


def test_kto_s_losses_of_parts_with_the_global_count_add_up_to_the_whole():
    logprob, ref_logprob, *_ = pairs()
    whole = kto_loss(logprob, ref_logprob, LABEL, 0.3)[0].item()
    parts = zip(logprob.split(3), ref_logprob.split(3), LABEL.split(3), strict=True)
    assert sum(kto_loss(*part, 0.3, num_examples=7)[0].item() for part in parts) == pytest.approx(whole, abs=TIGHT)


def test_kto_of_no_row_gives_a_connected_zero():
    empty = torch.zeros(0, requires_grad=True)
    loss, metrics = kto_loss(empty, empty.detach(), torch.zeros(0, dtype=torch.bool), 0.0)
    loss.backward()
    assert [x.item() for x in (loss, *metrics.values())] == [0.0] * (1 + len(metrics))


@pytest.mark.parametrize("given", [torch.float64, torch.float32])
def test_kto_is_float64_for_float64_and_float32_for_the_rest(given):
    logprob, ref_logprob, *_ = pairs(dtype=given)
    loss, metrics = kto_loss(logprob, ref_logprob, LABEL, 0.1)
    assert {x.dtype for x in (loss, *metrics.values())} == {given}
