"""Divergence from a teacher over the whole vocabulary, against loops over plain floats and what it tends to."""

import importlib
import math

import pytest
import torch
from linear_case import INF, SINGLE, TIGHT, Case

from hybrid.functional import linear_divergence

MODULE = importlib.import_module("hybrid.functional.divergence")
KINDS = ["reverse", "forward", "jsd"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Two rows of 7 tokens a chunk, so that 6 rows take three."""
    monkeypatch.setattr(MODULE, "_CHUNK", 15)


def divergence(case, **changes):
    arguments = {"bias": case.bias, "ref_bias": case.ref_bias} | changes
    return linear_divergence(case.hidden, case.weight, case.ref_hidden, case.ref_weight, **arguments)


def probabilities(hidden, weight, bias, temperature, softcap):
    """Softmax of one row's logits, by plain floats."""
    z = []
    for v in range(len(weight)):
        x = math.fsum(h * w for h, w in zip(hidden.tolist(), weight[v].tolist(), strict=True))
        x += 0.0 if bias is None else bias[v].item()
        z.append((x if softcap is None else softcap * math.tanh(x / softcap)) / temperature)
    top = max(z)
    total = math.fsum(math.exp(x - top) for x in z)
    return [math.exp(x - top) / total for x in z]


def kl(p, q):
    return math.fsum(x * (math.log(x / y) if y else INF) for x, y in zip(p, q, strict=True) if x)


def by_loop(case, kind, mix=0.5, temperature=1.0, softcap=None, ref_softcap=None):
    result = []
    for row, ref_row in zip(case.hidden.reshape(-1, 4), case.ref_hidden.reshape(-1, 5), strict=True):
        p = probabilities(row, case.weight, case.bias, temperature, softcap)
        q = probabilities(ref_row, case.ref_weight, case.ref_bias, temperature, ref_softcap)
        m = [mix * y + (1 - mix) * x for x, y in zip(p, q, strict=True)]
        of = {"reverse": kl(p, q), "forward": kl(q, p), "jsd": mix * kl(q, m) + (1 - mix) * kl(p, m)}
        result.append(of[kind])
    return torch.tensor(result, dtype=torch.float64).view(case.hidden.shape[:-1])


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 2.0, "softcap": 1.5, "ref_softcap": 3.0},
    {"ref_softcap": 0.8},
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("kind", "mix"), [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]
)
def test_every_kind_equals_a_loop(kind, mix, settings, bias):
    case = Case(bias=bias)
    found = divergence(case, kind=kind, mix=mix, **settings)
    torch.testing.assert_close(found, by_loop(case, kind, mix, **settings), rtol=0, atol=TIGHT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", [*SETTINGS[:2], {"softcap": 1.5, "temperature": 2.0}], ids=str)
def test_reverse_is_the_kl_of_linear_logprob_with_its_gradient(settings, bias):
    results = []
    for case in (Case(bias=bias), Case(bias=bias)):
        inputs = case.trainable()
        if not results:
            both = settings | {"ref_softcap": settings.get("softcap")}
            value = divergence(case, kind="reverse", **both)
        else:
            value = case.stats(("kl",), **settings).kl
        results.append([value, *torch.autograd.grad((value * torch.arange(6.0).view(2, 3)).sum(), inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TIGHT)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_gradcheck(kind, settings):
    case = Case()
    inputs = case.trainable()

    def value(hidden, weight, bias):
        case.hidden, case.weight, case.bias = hidden, weight, bias
        return divergence(case, kind=kind, mix=0.3, **settings)

    assert torch.autograd.gradcheck(value, inputs)


@pytest.mark.parametrize(("mix", "kind"), [(1e-7, "forward"), (1 - 1e-7, "reverse")])
def test_jsd_over_the_smaller_weight_tends_to_a_kl(mix, kind):
    # What is left out is of the order of mix itself.
    case = Case()
    found = divergence(case, kind="jsd", mix=mix) / min(mix, 1 - mix)
    torch.testing.assert_close(found, divergence(case, kind=kind), rtol=1e-5, atol=0)
    other = divergence(case, kind={"forward": "reverse", "reverse": "forward"}[kind])
    assert not torch.allclose(found, other, rtol=1e-2)


def test_jsd_of_one_half_is_symmetric_and_below_log_2():
    case, mirrored = Case(), Case()
    mirrored.hidden, mirrored.ref_hidden = case.ref_hidden, case.hidden
    mirrored.weight, mirrored.ref_weight = case.ref_weight, case.weight
    mirrored.bias, mirrored.ref_bias = case.ref_bias, case.bias
    one, other = divergence(case, kind="jsd"), divergence(mirrored, kind="jsd")
    torch.testing.assert_close(one, other, rtol=0, atol=TIGHT)
    assert (one < math.log(2)).all()
    assert not torch.allclose(divergence(case, kind="jsd", mix=0.2), divergence(mirrored, kind="jsd", mix=0.2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_is_its_teacher_is_at_zero_without_gradient(kind):
    case = Case()
    case.ref_hidden, case.ref_weight, case.ref_bias = case.hidden, case.weight, case.bias
    inputs = case.trainable()
    found = divergence(case, kind=kind)
    torch.testing.assert_close(found, torch.zeros(2, 3, dtype=torch.float64), rtol=0, atol=TIGHT)
    for grad in torch.autograd.grad(found.sum(), inputs):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_gets_no_gradient(kind):
    case = Case()
    inputs = case.trainable()
    teacher = [case.ref_hidden.requires_grad_(), case.ref_weight.requires_grad_(), case.ref_bias.requires_grad_()]
    divergence(case, kind=kind).sum().backward()
    assert all(x.grad is None for x in teacher)
    assert all(x.grad.any() for x in inputs)
    frozen = Case()
    frozen.ref_weight.requires_grad_()
    assert not divergence(frozen, kind=kind).requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_frozen_gets_no_gradient_and_the_others_theirs(kind, frozen):
    expected, case = Case(), Case()
    for of in (expected, case):
        of.trainable()
    getattr(case, frozen).requires_grad_(False)
    for of in (expected, case):
        divergence(of, kind=kind).sum().backward()
    for name in ("hidden", "weight", "bias"):
        grad = getattr(case, name).grad
        assert grad is None if name == frozen else torch.equal(grad, getattr(expected, name).grad)


@pytest.mark.parametrize("chunk", [1, 7, 14, 21, 10_000])
@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_chunk_changes_nothing(kind, chunk, monkeypatch):
    results = []
    for size in (15, chunk):
        monkeypatch.setattr(MODULE, "_CHUNK", size)
        case = Case()
        inputs = case.trainable()
        found = divergence(case, kind=kind)
        results.append([found, *torch.autograd.grad(found.sum(), inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TIGHT)


# The mask


@pytest.mark.parametrize("poison", [math.nan, INF])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_outside_the_mask_give_zero_and_may_hold_anything(kind, poison):
    mask = torch.tensor([[True, False, True], [False, True, True]])
    results = []
    for value in (0.0, poison):
        case = Case()
        case.hidden, case.ref_hidden = (
            x.masked_fill(~mask.unsqueeze(-1), value) for x in (case.hidden, case.ref_hidden)
        )
        inputs = case.trainable()
        found = divergence(case, kind=kind, mask=mask)
        results.append([found, *torch.autograd.grad(found.sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    found, dhidden, *_ = results[1]
    assert not found[~mask].any()
    assert not dhidden[~mask].any()
    torch.testing.assert_close(found[mask], by_loop(Case(), kind)[mask], rtol=0, atol=TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_nothing_gives_a_connected_zero(kind):
    case = Case()
    inputs = case.trainable()
    found = divergence(case, kind=kind, mask=torch.zeros(2, 3))
    assert torch.equal(found, torch.zeros(2, 3, dtype=torch.float64))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(found.sum(), inputs))


# Ids outside the vocabulary


@pytest.mark.parametrize("tokens", [[6], [0, 3], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_both_sides_forbid_leave_the_divergence_and_gradient_of_the_smaller_vocabulary(kind, tokens):
    case, small = Case(), Case()
    kept = torch.ones(7, dtype=torch.bool).index_fill(0, torch.tensor(tokens), False)
    case.bias, case.ref_bias = (x.masked_fill(~kept, -INF) for x in (case.bias, case.ref_bias))
    for name in ("weight", "bias", "ref_weight", "ref_bias"):
        setattr(small, name, getattr(small, name)[kept])
    found, expected = (
        [value, *torch.autograd.grad(value.sum(), inputs)]
        for inputs, value in ((of.trainable(), divergence(of, kind=kind)) for of in (case, small))
    )
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TIGHT)
    for a, b in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(a[kept], b, rtol=0, atol=TIGHT)
        assert not a[~kept].any()  # neither NaN


@pytest.mark.parametrize(("kind", "side"), [("reverse", "ref_bias"), ("forward", "bias")])
def test_a_kl_is_infinite_where_one_side_alone_forbids(kind, side):
    case = Case()
    setattr(case, side, getattr(case, side).index_fill(0, torch.tensor([4]), -INF))
    assert (divergence(case, kind=kind) == INF).all()


@pytest.mark.parametrize("side", ["ref_bias", "bias"])
def test_the_jsd_is_finite_where_one_side_alone_forbids_with_its_gradient(side):
    case = Case()
    setattr(case, side, getattr(case, side).index_fill(0, torch.tensor([4]), -INF))
    expected = by_loop(case, "jsd", 0.3)
    inputs = case.trainable()
    found = divergence(case, kind="jsd", mix=0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=TIGHT)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_far_apart_give_a_finite_divergence_and_gradient(kind):
    # exp(-1000) is 0 in float32; the divergence is the difference of the logits, or its bound.
    weight, ref_weight = torch.tensor([[1000.0], [0.0]], requires_grad=True), torch.tensor([[0.0], [1000.0]])
    hidden = torch.ones(3, 1, requires_grad=True)
    found = linear_divergence(hidden, weight, torch.ones(3, 1), ref_weight, kind=kind)
    torch.testing.assert_close(found, torch.full((3,), math.log(2) if kind == "jsd" else 1000.0))
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), (hidden, weight)))


@pytest.mark.parametrize("kind", KINDS)
def test_large_logits_cost_no_digits(kind):
    # Whole numbers, exact in float32 with 2^14 on top, which no softmax sees.
    generator = torch.Generator().manual_seed(0)
    z, ref_z = (torch.randint(-3, 4, (5, 7), generator=generator).float() for _ in range(2))
    eye = torch.eye(7)
    small, large = (
        linear_divergence(z, eye, ref_z, eye, kind=kind, bias=shift, ref_bias=shift)
        for shift in (torch.zeros(7), torch.full((7,), 2.0**14))
    )
    torch.testing.assert_close(large, small, **SINGLE)


# Precision


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_shorter_inputs_give_the_float32_result_and_gradients_of_their_own_dtype(given, kind):
    case = Case(dtype=given)
    exact = divergence(case.double(), kind=kind)
    inputs = case.trainable()
    found = divergence(case, kind=kind)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, **SINGLE)
    assert [g.dtype for g in torch.autograd.grad(found.sum(), inputs)] == [given] * 3


@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias"])
def test_one_float64_input_makes_the_result_float64(name):
    case = Case(dtype=torch.float32)
    setattr(case, name, getattr(case, name).double())
    assert divergence(case).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_only_the_operands_of_the_products_may_be_shorter(kind, monkeypatch):
    # Forward and backward ask for the rounding that linear_logprob asks for; statistics stay float32.
    asked = []

    def rounded(dtype):
        asked.append(dtype)
        return original(dtype)

    original = MODULE.rounded_operands
    monkeypatch.setattr(MODULE, "rounded_operands", rounded)
    case = Case(dtype=torch.float32)
    exact = divergence(case.double(), kind=kind)
    asked.clear()
    case.trainable()
    with torch.autocast("cpu", torch.bfloat16):
        found = divergence(case, kind=kind)
        assert found.dtype == torch.float32
    found.sum().backward()
    assert asked == [torch.bfloat16, torch.bfloat16]
    # 8 bits of operands of size up to 3, in a sum of 5.
    torch.testing.assert_close(found.double(), exact, rtol=0.1, atol=0.1)


def test_a_second_derivative_is_refused_rather_than_zero():
    case = Case()
    inputs = case.trainable()
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(divergence(case).sum(), inputs, create_graph=True)


# What is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "js"}, "kind must be reverse, forward or jsd, got 'js'"),
        ({"kind": "jsd", "mix": 0.0}, r"mix must lie in \(0, 1\), got 0.0; .*'forward'"),
        ({"kind": "jsd", "mix": 1.0}, r"mix must lie in \(0, 1\), got 1.0; .*'reverse'"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"softcap": -1.0}, "softcap must be > 0 or None, got -1.0"),
        ({"ref_softcap": 0.0}, "softcap must be > 0 or None, got 0.0"),
        ({"bias": torch.zeros(6)}, r"bias \(6,\) does not fit weight \(7, 4\)"),
        ({"ref_bias": torch.zeros(1)}, r"ref_bias \(1,\) does not fit ref_weight \(7, 5\)"),
        ({"mask": torch.ones(2)}, "shapes must be equal.*mask"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        divergence(Case(), **given)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 5)}, r"hidden \(2, 3, 5\) does not fit weight \(7, 4\)"),
        ({"ref_hidden": torch.zeros(2, 3, 4)}, r"ref_hidden \(2, 3, 4\) does not fit ref_weight \(7, 5\)"),
        ({"ref_hidden": torch.zeros(2, 2, 5)}, "shapes must be equal.*ref_hidden"),
        ({"ref_weight": torch.zeros(8, 5), "ref_bias": None}, "the vocabularies differ, 7 and 8"),
    ],
)
def test_sides_that_do_not_fit_each_other_are_refused(changed, message):
    case = Case()
    for name, value in changed.items():
        setattr(case, name, value)
    with pytest.raises(ValueError, match=message):
        divergence(case)
