"""DPO and its family, against a loop over plain floats."""

import math

import pytest
import torch
from preference_case import BETA, KINDS, TIGHT, log_sigmoid, options, pairs, sigmoid

from hybrid.functional import PER_TOKEN, REFERENCE_FREE, dpo_loss


def pair_loss(kind, chosen, rejected, ref_chosen, ref_rejected, *, beta, label_smoothing=0.0, margin=0.0):
    """The loss of one pair of floats, as its paper writes it."""
    a, b, e = chosen - ref_chosen, rejected - ref_rejected, label_smoothing
    h = a - b
    if kind == "sigmoid":
        return -(1 - e) * log_sigmoid(beta * h - margin) - e * log_sigmoid(-(beta * h - margin))
    if kind == "robust":
        return ((1 - e) * -log_sigmoid(beta * h) - e * -log_sigmoid(-beta * h)) / (1 - 2 * e)
    if kind == "hinge":
        return max(0.0, 1 - beta * h)
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if kind == "apo_zero":
        return 1 - sigmoid(beta * a) + sigmoid(beta * b)
    if kind == "apo_down":
        return sigmoid(beta * a) + 1 - sigmoid(beta * a - beta * b)
    if kind == "sppo":
        # The square of log-ratio minus (P - 1/2) / beta, with P = 1 for the winner and 0 for the loser.
        return (a - (1 - 0.5) / beta) ** 2 + (b - (0 - 0.5) / beta) ** 2
    if kind == "exo":
        weights = math.exp(beta * a), math.exp(beta * b)
        p = [w / sum(weights) for w in weights]
        return sum(x * math.log(x / y) for x, y in zip(p, (1 - e, e), strict=True))
    if kind == "simpo":
        h = beta * chosen - beta * rejected - margin
        return -(1 - e) * log_sigmoid(h) - e * log_sigmoid(-h)
    if kind == "orpo":
        odds = [math.exp(x) / (1 - math.exp(x)) for x in (chosen, rejected)]
        return -beta * log_sigmoid(math.log(odds[0] / odds[1]))
    raise AssertionError(kind)


def reward(kind, logprob, ref_logprob):
    return BETA * (logprob if kind in REFERENCE_FREE else logprob - ref_logprob)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_every_kind_equals_a_loop(kind, seed):
    given = pairs(seed=seed)
    loss, metrics = dpo_loss(*given, **options(kind))
    rows = list(zip(*(x.tolist() for x in given), strict=True))
    kwargs = {name: x for name, x in options(kind).items() if name != "kind"}
    assert loss.item() == pytest.approx(math.fsum(pair_loss(kind, *row, **kwargs) for row in rows) / 7, abs=TIGHT)
    won = [reward(kind, c, rc) for c, _, rc, _ in rows]
    lost = [reward(kind, r, rr) for _, r, _, rr in rows]
    assert metrics["chosen_reward"].item() == pytest.approx(math.fsum(won) / 7, abs=TIGHT)
    assert metrics["rejected_reward"].item() == pytest.approx(math.fsum(lost) / 7, abs=TIGHT)
    assert metrics["margin_mean"].item() == pytest.approx((math.fsum(won) - math.fsum(lost)) / 7, abs=TIGHT)
    assert metrics["accuracy"].item() == pytest.approx(sum(c > r for c, r in zip(won, lost, strict=True)) / 7)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_passes_gradcheck(kind):
    chosen, rejected, *ref = pairs()
    inputs = chosen.requires_grad_(), rejected.requires_grad_()
    assert torch.autograd.gradcheck(lambda c, r: dpo_loss(c, r, *ref, **options(kind))[0], inputs)


AT_REFERENCE = {
    "sigmoid": math.log(2),
    "robust": math.log(2),
    "hinge": 1.0,
    "ipo": 1 / (4 * BETA**2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "sppo": 1 / (2 * BETA**2),
    # KL((1/2, 1/2) || (1 - e, e))
    "exo": math.log(0.5) - 0.5 * math.log(1e-3) - 0.5 * math.log(1 - 1e-3),
}


@pytest.mark.parametrize("kind", sorted(AT_REFERENCE))
def test_at_the_reference_the_loss_is_known_and_the_accuracy_one_half(kind):
    chosen, rejected, *_ = pairs()
    given = options(kind, margin=0.0) if kind == "sigmoid" else options(kind)
    loss, metrics = dpo_loss(chosen, rejected, chosen, rejected, **given)
    assert loss.item() == pytest.approx(AT_REFERENCE[kind], abs=TIGHT)
    assert metrics["accuracy"].item() == 0.5


@pytest.mark.parametrize("kind", sorted(AT_REFERENCE))
def test_the_first_step_prefers_the_chosen_side(kind):
    chosen, rejected, *_ = pairs()
    start = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    dpo_loss(*start, chosen, rejected, **options(kind))[0].backward()
    # apo_down lowers both; the rejected one more.
    assert (start[0].grad < start[1].grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_swapping_the_sides_negates_margin_and_mirrors_accuracy(kind):
    chosen, rejected, ref_chosen, ref_rejected = pairs()
    _, one = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, **options(kind))
    _, other = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, **options(kind))
    assert one["margin_mean"].item() == pytest.approx(-other["margin_mean"].item(), abs=TIGHT)
    assert one["accuracy"].item() == pytest.approx(1 - other["accuracy"].item())
    assert one["chosen_reward"].item() == pytest.approx(other["rejected_reward"].item(), abs=TIGHT)


def test_label_smoothing_is_the_flipped_pair_s_loss_as_often_as_it_says():
    # cDPO with e is (1-e) times DPO and e times DPO of the swapped pair.
    chosen, rejected, ref_chosen, ref_rejected = pairs()
    smooth, _ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, label_smoothing=0.3)
    plain, _ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)
    swapped, _ = dpo_loss(rejected, chosen, ref_rejected, ref_chosen)
    assert smooth.item() == pytest.approx(0.7 * plain.item() + 0.3 * swapped.item(), abs=TIGHT)


def test_robust_is_the_clean_loss_in_the_mean_over_flips():
    # Its defining property: labels flipped with chance e give DPO's loss on the true ones in expectation.
    chosen, rejected, ref_chosen, ref_rejected = pairs()
    given = {"kind": "robust", "label_smoothing": 0.2}
    kept, _ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, **given)
    flipped, _ = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, **given)
    clean, _ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)
    assert 0.8 * kept.item() + 0.2 * flipped.item() == pytest.approx(clean.item(), abs=TIGHT)


def test_exo_is_zero_where_the_policy_has_the_label_s_odds():
    e, zero = 0.1, torch.zeros(1, dtype=torch.float64)
    chosen = torch.tensor([math.log((1 - e) / e) / BETA], dtype=torch.float64).requires_grad_()
    loss, _ = dpo_loss(chosen, zero, zero, zero, kind="exo", beta=BETA, label_smoothing=e)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=TIGHT)
    assert chosen.grad.item() == pytest.approx(0.0, abs=TIGHT)


def test_simpo_is_dpo_with_a_reference_of_zero():
    chosen, rejected, *_ = pairs()
    simpo, _ = dpo_loss(chosen, rejected, None, None, kind="simpo", beta=2.0, margin=0.5)
    zero = torch.zeros_like(chosen)
    assert torch.equal(simpo, dpo_loss(chosen, rejected, zero, zero, beta=2.0, margin=0.5)[0])


@pytest.mark.parametrize("kind", ["sigmoid", "simpo"])
def test_a_margin_of_its_own_for_each_pair(kind):
    given, margin = pairs(), torch.arange(7) * 0.25
    loss, _ = dpo_loss(*given, kind=kind, margin=margin)
    each = [dpo_loss(*(x[i : i + 1] for x in given), kind=kind, margin=0.25 * i)[0].item() for i in range(7)]
    assert loss.item() == pytest.approx(math.fsum(each) / 7, abs=TIGHT)


@pytest.mark.parametrize("kind", sorted(REFERENCE_FREE))
def test_a_reference_free_kind_does_not_read_the_reference(kind):
    chosen, rejected, ref_chosen, ref_rejected = pairs()
    without = dpo_loss(chosen, rejected, None, None, **options(kind))
    assert torch.equal(without[0], dpo_loss(chosen, rejected, ref_chosen * math.nan, ref_rejected, **options(kind))[0])


@pytest.mark.parametrize("kind", sorted(set(KINDS) - REFERENCE_FREE))
@pytest.mark.parametrize("missing", [2, 3])
def test_the_other_kinds_refuse_to_do_without_a_reference(kind, missing):
    given = pairs()
    given[missing] = None
    with pytest.raises(ValueError, match=f"kind '{kind}' needs ref_chosen_logprob.*orpo, simpo"):
        dpo_loss(*given, **options(kind))


def test_the_reference_gets_no_gradient():
    given = [x.requires_grad_() for x in pairs()]
    dpo_loss(*given)[0].backward()
    assert [x.grad is None for x in given] == [False, False, True, True]


def test_the_kinds_that_take_means_are_kinds():
    assert set(KINDS) > PER_TOKEN | REFERENCE_FREE


@pytest.mark.parametrize("difference", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_differences_give_a_finite_loss_and_gradient(kind, difference, dtype):
    # Log-probs are at most 0, which orpo needs: of 0 itself the odds are infinite.
    chosen, rejected = (
        torch.tensor([min(difference, 0.0)], dtype=dtype),
        torch.tensor([min(-difference, 0.0)], dtype=dtype),
    )
    inputs = chosen.requires_grad_(), rejected.requires_grad_()
    loss, metrics = dpo_loss(*inputs, torch.zeros(1, dtype=dtype), torch.zeros(1, dtype=dtype), **options(kind))
    loss.backward()
    assert all(x.isfinite().all() for x in (loss, *metrics.values(), *(x.grad for x in inputs)))


REFUSED = [
    ({"beta": 0.0}, "beta must be > 0, got 0.0"),
    ({"beta": math.nan}, "beta must be > 0, got nan"),
    ({"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\), got 0.5"),
    ({"label_smoothing": -0.1}, r"label_smoothing must lie in \[0, 0.5\), got -0.1"),
    (
        {"kind": "hinge", "label_smoothing": 0.1},
        "'hinge' has no label_smoothing, got 0.1; .*exo, robust, sigmoid, simpo",
    ),
    ({"kind": "ipo", "margin": 0.1}, "'ipo' has no margin, got 0.1; .*sigmoid, simpo"),
    ({"kind": "sppo", "margin": torch.ones(7)}, "'sppo' has no margin"),
    ({"kind": "exo"}, "'exo' needs a label_smoothing > 0"),
    ({"kind": "sigmod"}, "kind must be one of sigmoid, .*, got 'sigmod' .did you mean 'sigmoid'"),
    ({"kind": "qqq"}, "orpo, got 'qqq'$"),
    ({"margin": torch.ones(3)}, "shapes must be equal.*margin"),
    ({"weight": torch.ones(7, 1)}, "shapes must be equal.*weight"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_what_a_kind_cannot_use_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(*pairs(), **given)


def test_a_margin_of_zeros_is_no_margin():
    assert torch.equal(dpo_loss(*pairs(), kind="ipo", margin=torch.zeros(7))[0], dpo_loss(*pairs(), kind="ipo")[0])


@pytest.mark.parametrize("odd", range(4))
def test_different_shapes_are_refused(odd):
    given = pairs()
    given[odd] = given[odd][:-1]
    with pytest.raises(ValueError, match="shapes must be equal"):
        dpo_loss(*given)
