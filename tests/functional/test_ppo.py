"""The per-token reward and the clipped losses, against hand-computed values and loops of python floats."""

import math

import pytest
import torch

from hybrid.functional import aggregate, loss_divisor, policy_loss, value_loss

# float64 sums over a dozen tokens: rounding stays far below this.
TIGHT = 1e-10
MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
AGGREGATIONS = [
    {"aggregation": "token_mean"},
    {"aggregation": "sequence_mean"},
    {"aggregation": "fixed_length", "fixed_length": 8},
]
by_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda a: a["aggregation"])
DTYPES = [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)]


def tensors(count, seed=0, dtype=torch.float64):
    """`count` tensors (3, 5) of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(3, 5, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(count)]


def policy_case(seed=0, dtype=torch.float64):
    """logprob, old_logprob, advantage: about half of the ratios lie outside [0.8, 1.2]."""
    noise, old_logprob, advantage = tensors(3, seed)
    old_logprob = -old_logprob.abs()
    return [x.to(dtype) for x in (old_logprob + 0.4 * noise, old_logprob, advantage)]


def value_case(seed=0, dtype=torch.float64):
    """value, old_value, return_: about half of the values lie outside old ± 0.2."""
    noise, old_value, return_ = tensors(3, seed)
    return [x.to(dtype) for x in (old_value + 0.4 * noise, old_value, return_)]


LOSSES = {
    "policy": (lambda *x, **kw: policy_loss(*x, **kw), policy_case),
    "policy with dual clip": (lambda *x, **kw: policy_loss(*x, dual_clip=1.3, clip_high=0.4, **kw), policy_case),
    "policy without clip": (lambda *x, **kw: policy_loss(*x, clip=None, **kw), policy_case),
    "cispo": (lambda *x, **kw: policy_loss(*x, surrogate="cispo", **kw), policy_case),
    "value": (lambda *x, **kw: value_loss(*x, **kw), value_case),
    "value without clip": (lambda *x, **kw: value_loss(*x, clip=None, **kw), value_case),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def valid_rows(mask):
    return [[t for t in range(mask.shape[1]) if mask[b, t]] for b in range(mask.shape[0])]


def aggregated(token_losses, aggregation, fixed_length=None):
    """token_losses: one list of python floats a row."""
    if aggregation == "token_mean":
        return math.fsum(x for row in token_losses for x in row) / sum(map(len, token_losses))
    rows = [math.fsum(row) / (fixed_length or len(row)) for row in token_losses]
    return math.fsum(rows) / len(rows)


def policy_loss_by_loop(logprob, old_logprob, advantage, mask, low, high, dual_clip, aggregation):
    token_losses = []
    for b, tokens in enumerate(valid_rows(mask)):
        row = []
        for t in tokens:
            a = advantage[b, t].item()
            ratio = math.exp(logprob[b, t].item() - old_logprob[b, t].item())
            # As published: the objective is a minimum, and dual clip a maximum of it with c A.
            objective = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
            row.append(-(max(objective, dual_clip * a) if dual_clip and a < 0 else objective))
        token_losses.append(row)
    return aggregated(token_losses, **aggregation)


@each_loss
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_what_stands_outside_the_mask_reaches_neither_loss_nor_gradient(name, poison):
    loss_of, case = LOSSES[name]
    results = []
    for value in (0.0, poison):
        inputs = [x.masked_fill(~MASK, value) for x in case()]
        inputs[0].requires_grad_()
        loss, _ = loss_of(*inputs, MASK)
        loss.backward()
        results.append(torch.cat([loss.detach().view(1), inputs[0].grad.flatten()]))
    assert torch.equal(*results)


@each_loss
@pytest.mark.parametrize("poison", [math.nan, 1e30])
def test_what_stands_outside_the_mask_reaches_no_metric(name, poison):
    # Regression for TRL 1.12: statistics averaged over padding.
    loss_of, case = LOSSES[name]
    _, clean = loss_of(*case(), MASK)
    _, metrics = loss_of(*(x.masked_fill(~MASK, poison) for x in case()), MASK)
    assert metrics == clean


@each_loss
@pytest.mark.parametrize("num_tokens", [None, 0, 7])
def test_an_empty_mask_gives_a_connected_zero(name, num_tokens):
    # Regression for TRL #7077: a fully masked batch detached the graph and hung DDP.
    loss_of, case = LOSSES[name]
    inputs = case()
    loss, _ = loss_of(inputs[0].requires_grad_(), *inputs[1:], MASK & False, num_tokens=num_tokens)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(inputs[0].grad, torch.zeros_like(MASK).double())


@each_loss
def test_metrics_of_an_empty_mask_are_zero(name):
    loss_of, case = LOSSES[name]
    assert {metric.item() for metric in loss_of(*case(), MASK & False)[1].values()} == {0.0}


@each_loss
@pytest.mark.parametrize("sizes", [[1, 2], [2, 1], [1, 1, 1]])
def test_microbatches_with_num_tokens_add_up_to_the_whole_gradient(name, sizes):
    # Regression for SkyRL #1504, DeepSpeed #7967 and others: a mean of the microbatches' means.
    loss_of, case = LOSSES[name]
    first, *rest = case()
    whole, parts = first.clone().requires_grad_(), first.clone().requires_grad_()
    loss_of(whole, *rest, MASK)[0].backward()
    for rows in zip(parts.split(sizes), *(x.split(sizes) for x in [*rest, MASK]), strict=True):
        loss_of(*rows, num_tokens=int(MASK.sum()))[0].backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=TIGHT)


@each_loss
@pytest.mark.parametrize(("left", "right"), [(2, 0), (0, 3)])
def test_padding_on_either_side_changes_nothing(name, left, right):
    loss_of, case = LOSSES[name]
    padded = [torch.nn.functional.pad(x, (left, right), value=5.0) for x in case()]
    loss, _ = loss_of(*padded, torch.nn.functional.pad(MASK, (left, right), value=False))
    assert loss.item() == pytest.approx(loss_of(*case(), MASK)[0].item(), abs=TIGHT)


# Of cispo the numerical gradient sees the ratio move, which its gradient holds constant by design.
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cispo"])
def test_gradients_pass_gradcheck(name):
    loss_of, case = LOSSES[name]
    first, *rest = case()
    assert torch.autograd.gradcheck(lambda x: loss_of(x, *rest, MASK)[0], first.requires_grad_())


@each_loss
def test_only_the_first_argument_gets_a_gradient(name):
    loss_of, case = LOSSES[name]
    inputs = [x.requires_grad_() for x in case()]
    loss_of(*inputs, MASK)[0].backward()
    assert [x.grad is not None for x in inputs] == [True, False, False]


@each_loss
def test_metrics_are_detached(name):
    loss_of, case = LOSSES[name]
    _, metrics = loss_of(*(x.requires_grad_() for x in case()), MASK)
    assert not any(metric.requires_grad for metric in metrics.values())


@each_loss
@pytest.mark.parametrize(("given", "returned"), DTYPES)
def test_loss_is_float64_for_float64_and_float32_for_the_rest(name, given, returned):
    loss_of, case = LOSSES[name]
    assert loss_of(*case(dtype=given), MASK)[0].dtype == returned


@each_loss
@pytest.mark.parametrize(("given", "returned"), DTYPES)
def test_metrics_are_float64_for_float64_and_float32_for_the_rest(name, given, returned):
    loss_of, case = LOSSES[name]
    assert {metric.dtype for metric in loss_of(*case(dtype=given), MASK)[1].values()} == {returned}


@each_loss
def test_loss_under_autocast_is_the_float32_one(name):
    loss_of, case = LOSSES[name]
    inputs = case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under = loss_of(*inputs, MASK)[0]
    assert torch.equal(under, loss_of(*inputs, MASK)[0])


@each_loss
@pytest.mark.parametrize("wrong", range(4))
def test_different_shapes_are_refused(name, wrong):
    inputs = [torch.zeros(2, 4 if i == wrong else 3) for i in range(4)]
    with pytest.raises(ValueError, match="shape"):
        LOSSES[name][0](*inputs)


@by_aggregation
@pytest.mark.parametrize("dual_clip", [None, 1.3])
@pytest.mark.parametrize("clip_high", [None, 0.4])
@pytest.mark.parametrize("seed", range(2))
def test_policy_loss_equals_a_loop(aggregation, dual_clip, clip_high, seed):
    inputs = policy_case(seed)
    loss, _ = policy_loss(*inputs, MASK, clip=0.2, clip_high=clip_high, dual_clip=dual_clip, **aggregation)
    expected = policy_loss_by_loop(*inputs, MASK, 0.2, clip_high or 0.2, dual_clip, aggregation)
    assert loss.item() == pytest.approx(expected, abs=TIGHT)


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "expected"),
    [
        (1.5, 1.0, {}, -1.2),
        (1.5, -1.0, {}, 1.5),
        (0.5, 1.0, {}, -0.5),
        (0.5, -1.0, {}, 0.8),
        (1.1, 2.0, {}, -2.2),
        (1.5, 1.0, {"clip_high": 0.3}, -1.3),
        (0.5, -1.0, {"clip_high": 0.3}, 0.8),
        (5.0, -1.0, {"dual_clip": 3.0}, 3.0),
        (2.0, -1.0, {"dual_clip": 3.0}, 2.0),
        (0.5, -1.0, {"dual_clip": 3.0}, 0.8),
        (5.0, 1.0, {"dual_clip": 3.0}, -1.2),
    ],
)
def test_policy_loss_of_one_token_by_hand(ratio, advantage, options, expected):
    logprob = torch.tensor([[math.log(ratio)]], dtype=torch.float64)
    a = torch.tensor([[advantage]], dtype=torch.float64)
    loss, _ = policy_loss(logprob, torch.zeros(1, 1), a, torch.ones(1, 1), **options)
    assert loss.item() == pytest.approx(expected, abs=TIGHT)


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "expected"),
    [
        (1.5, 1.0, {}, 0.0),  # already too probable
        (0.5, -1.0, {}, 0.0),  # already too improbable
        (1.5, -1.0, {}, 1.5),  # -A ratio
        (0.5, 1.0, {}, -0.5),
        (1.0, 2.0, {}, -2.0),  # the policy gradient at the start
        (5.0, -1.0, {"dual_clip": 3.0}, 0.0),
    ],
)
def test_policy_gradient_of_one_token_by_hand(ratio, advantage, options, expected):
    logprob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([[advantage]], dtype=torch.float64)
    policy_loss(logprob, torch.zeros(1, 1), a, torch.ones(1, 1), **options)[0].backward()
    assert logprob.grad.item() == pytest.approx(expected, abs=TIGHT)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    # Rows of 2 and 1 valid tokens, ratio 1, advantages -1, -2 and -6: token losses 1, 2 and 6.
    list(zip(AGGREGATIONS, [9 / 3, (3 / 2 + 6) / 2, (3 / 8 + 6 / 8) / 2], strict=True)),
    ids=lambda a: a["aggregation"] if isinstance(a, dict) else "",
)
def test_aggregation_by_hand(aggregation, expected):
    advantage = torch.tensor([[-1.0, -2.0], [-6.0, 50.0]], dtype=torch.float64)
    loss, _ = policy_loss(
        torch.zeros(2, 2), torch.zeros(2, 2), advantage, torch.tensor([[1, 1], [1, 0]]), **aggregation
    )
    assert loss.item() == pytest.approx(expected, abs=TIGHT)


@by_aggregation
@pytest.mark.parametrize("sizes", [[1, 2], [1, 1, 1]])
def test_microbatches_add_up_whatever_the_aggregation(aggregation, sizes):
    first, *rest = policy_case()
    whole, parts = first.clone().requires_grad_(), first.clone().requires_grad_()
    policy_loss(whole, *rest, MASK, **aggregation)[0].backward()
    divisor = sum(loss_divisor(mask, **aggregation) for mask in MASK.split(sizes))
    for rows in zip(parts.split(sizes), *(x.split(sizes) for x in [*rest, MASK]), strict=True):
        policy_loss(*rows, num_tokens=divisor, **aggregation)[0].backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=TIGHT)


@by_aggregation
def test_gradients_pass_gradcheck_whatever_the_aggregation(aggregation):
    first, *rest = policy_case()
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, *rest, MASK, **aggregation)[0], first.requires_grad_())


@pytest.mark.parametrize(("aggregation", "expected"), list(zip(AGGREGATIONS, [9, 3, 24], strict=True)), ids=str)
def test_loss_divisor_counts_what_its_aggregation_divides_by(aggregation, expected):
    assert loss_divisor(MASK, **aggregation) == expected


def test_clip_high_none_is_clip():
    assert (
        policy_loss(*policy_case(), MASK, clip=0.3)[0] == policy_loss(*policy_case(), MASK, clip=0.3, clip_high=0.3)[0]
    )


def test_before_the_first_update_every_ratio_is_exactly_one():
    logprob, _, advantage = policy_case(dtype=torch.float32)
    _, metrics = policy_loss(logprob, logprob.clone(), advantage, MASK)
    assert {name: x.item() for name, x in metrics.items()} == {
        "approx_kl": 0.0,
        "clip_fraction": 0.0,
        "ratio_mean": 1.0,
        "ratio_max": 1.0,
    }


@pytest.mark.parametrize(
    ("metric", "expected"),
    # Ratios 2, 1/2, 1/2 and 1: clipped are A > 0 above the range and A < 0 below it, 2 of 4.
    [("approx_kl", 3 * 0.5 * math.log(2) ** 2 / 4), ("clip_fraction", 0.5), ("ratio_mean", 1.0), ("ratio_max", 2.0)],
)
def test_policy_metric_by_hand(metric, expected):
    logprob = torch.tensor([[2.0, 0.5, 0.5, 1.0, 9.0]], dtype=torch.float64).log()
    advantage = torch.tensor([[1.0, -1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    _, metrics = policy_loss(logprob, torch.zeros(1, 5), advantage, torch.tensor([[1, 1, 1, 1, 0]]))
    assert metrics[metric].item() == pytest.approx(expected, abs=TIGHT)


def test_ratio_max_may_lie_below_one():
    _, metrics = policy_loss(torch.full((1, 2), -1.0), torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[1, 0]]))
    assert metrics["ratio_max"].item() == pytest.approx(math.exp(-1), rel=1e-6)  # float32


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, -3.0])
def test_a_dual_clip_of_at_most_one_is_refused(dual_clip):
    with pytest.raises(ValueError, match="dual_clip"):
        policy_loss(*policy_case(), MASK, dual_clip=dual_clip)


def test_an_unknown_aggregation_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"token_mean, sequence_mean or fixed_length.*'mean'"):
        policy_loss(*policy_case(), MASK, aggregation="mean")


def test_an_unknown_aggregation_is_refused_also_with_num_tokens():
    with pytest.raises(ValueError, match="aggregation"):
        policy_loss(*policy_case(), MASK, aggregation="mean", num_tokens=9)


def test_fixed_length_without_a_length_is_refused():
    with pytest.raises(ValueError, match="fixed_length"):
        policy_loss(*policy_case(), MASK, aggregation="fixed_length")


@pytest.mark.parametrize("clip", [0.2, 0.05, None])
@pytest.mark.parametrize("seed", range(2))
def test_value_loss_equals_a_loop(clip, seed):
    value, old_value, return_ = value_case(seed)
    terms = []
    for b, tokens in enumerate(valid_rows(MASK)):
        for t in tokens:
            v, old, r = value[b, t].item(), old_value[b, t].item(), return_[b, t].item()
            near = v if clip is None else min(max(v, old - clip), old + clip)
            terms.append(max((v - r) ** 2, (near - r) ** 2))
    loss, _ = value_loss(value, old_value, return_, MASK, clip=clip)
    assert loss.item() == pytest.approx(0.5 * math.fsum(terms) / len(terms), abs=TIGHT)


@pytest.mark.parametrize(
    ("value", "return_", "clip", "loss", "gradient"),
    [
        (0.1, 1.0, 0.2, 0.405, -0.9),  # inside the range
        (0.5, 1.0, 0.2, 0.32, 0.0),  # moved towards the return beyond it: no further pull
        (-0.5, 1.0, 0.2, 1.125, -1.5),  # moved away: pulled back
        (0.5, 1.0, None, 0.125, -0.5),  # no clip
    ],
)
def test_value_loss_and_gradient_of_one_token_by_hand(value, return_, clip, loss, gradient):
    v = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    found, _ = value_loss(v, torch.zeros(1, 1), torch.tensor([[return_]], dtype=v.dtype), torch.ones(1, 1), clip=clip)
    found.backward()
    assert (found.item(), v.grad.item()) == pytest.approx((loss, gradient), abs=TIGHT)


@pytest.mark.parametrize(("clip", "expected"), [(0.2, 0.25), (None, 0.0)])
def test_value_clip_fraction_by_hand(clip, expected):
    # Of four values, one moved beyond the range towards its return, one away from it, two not at all.
    value = torch.tensor([[0.5, -0.5, 0.0, 0.0, 0.5]], dtype=torch.float64)
    _, metrics = value_loss(value, torch.zeros(1, 5), torch.ones(1, 5), torch.tensor([[1, 1, 1, 1, 0]]), clip=clip)
    assert metrics["clip_fraction"].item() == pytest.approx(expected, abs=TIGHT)


@pytest.mark.parametrize(
    ("value", "expected"),
    # Returns 0, 2, 4 (variance 4).
    [([0.0, 2.0, 4.0], 1.0), ([7.0, 9.0, 11.0], 1.0), ([3.0, 3.0, 3.0], 0.0), ([4.0, 2.0, 0.0], -3.0)],
    ids=["exact", "off by a constant", "constant", "reversed"],
)
def test_explained_variance_by_hand(value, expected):
    tensor = torch.tensor([[*value, 50.0]], dtype=torch.float64)
    return_ = torch.tensor([[0.0, 2.0, 4.0, -7.0]], dtype=torch.float64)
    _, metrics = value_loss(tensor, tensor, return_, torch.tensor([[1, 1, 1, 0]]))
    assert metrics["explained_variance"].item() == pytest.approx(expected, abs=TIGHT)


@pytest.mark.parametrize("return_", [0.0, 0.1, 1 / 3])
@pytest.mark.parametrize("length", [2, 7, 100])
def test_explained_variance_is_zero_where_the_return_does_not_vary(return_, length):
    value = torch.randn(1, length, generator=torch.Generator().manual_seed(0))
    _, metrics = value_loss(value, value, torch.full((1, length), return_), torch.ones(1, length))
    assert metrics["explained_variance"].item() == 0.0


@pytest.mark.parametrize(
    ("aggregation", "fixed_length", "expected"),
    # Rows of two and of one token: (1 + 2 + 3) / 3, ((1 + 2) / 2 + 3) / 2, and 6 over two rows of 4.
    [("token_mean", None, 2.0), ("sequence_mean", None, 2.25), ("fixed_length", 4, 0.75)],
)
def test_aggregate_by_hand(aggregation, fixed_length, expected):
    x = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert aggregate(x, mask, aggregation, fixed_length=fixed_length).item() == expected
