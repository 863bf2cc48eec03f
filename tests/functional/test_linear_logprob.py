"""The statistics from hidden states: against loops, against the definitions on logits, and for what they hold."""

import math

import pytest
import torch
from largest import Largest
from linear_case import IGNORE, INF, MODULE, NAMES, SINGLE, TIGHT, WANTS, Case

from hybrid.functional import entropy, linear_logprob, token_logprob
from hybrid.functional.precision import rounded_operands


def log_softmax_loop(hidden, weight, bias, temperature):
    """log softmax of one token's logits, one product at a time."""
    z = [
        (math.fsum(h * w for h, w in zip(hidden, row, strict=True)) + (0.0 if bias is None else bias[v])) / temperature
        for v, row in enumerate(weight)
    ]
    top = max(z)
    log_partition = top + math.log(math.fsum(math.exp(x - top) for x in z))
    return [x - log_partition for x in z]


def by_loop(case, temperature):
    expected = {name: torch.zeros(case.labels.shape, dtype=torch.float64) for name in NAMES}
    head = case.weight.tolist(), None if case.bias is None else case.bias.tolist()
    ref_head = case.ref_weight.tolist(), None if case.ref_bias is None else case.ref_bias.tolist()
    for b in range(case.labels.shape[0]):
        for t in range(case.labels.shape[1]):
            p = log_softmax_loop(case.hidden[b, t].tolist(), *head, temperature)
            q = log_softmax_loop(case.ref_hidden[b, t].tolist(), *ref_head, temperature)
            expected["logprob"][b, t] = p[case.labels[b, t]]
            expected["entropy"][b, t] = -math.fsum(math.exp(x) * x for x in p)
            expected["kl"][b, t] = math.fsum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True))
    return expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 7])
@pytest.mark.usefixtures("small_tiles")
def test_statistic_equals_a_loop(name, temperature, bias, vocab):
    case = Case(vocab=vocab, bias=bias)
    found = getattr(case.stats(temperature=temperature), name)
    torch.testing.assert_close(found, by_loop(case, temperature)[name], rtol=0, atol=TIGHT)


def test_logprob_of_one_token_by_hand():
    # Logits 1 and 3: log(e / (e + e³)) = -log(1 + e²).
    hidden, weight = torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    logprob = linear_logprob(hidden, weight, torch.tensor([0])).logprob
    assert logprob.item() == pytest.approx(-math.log(1 + math.e**2), abs=TIGHT)


@pytest.mark.parametrize(("rows", "vocab"), [(2047, 3), (2048, 2048), (2049, 2049), (2, 6145)])
def test_real_tiles_equal_the_definition_on_logits(rows, vocab):
    case = Case((rows,), vocab)
    stats = case.stats(temperature=0.7)
    for name, expected in case.by_definition(0.7).items():
        torch.testing.assert_close(getattr(stats, name), expected, rtol=0, atol=TIGHT)


def test_real_tiles_have_the_gradient_of_the_definition():
    rows, vocab = MODULE._ROW_CHUNK + 1, MODULE._VOCAB_SLICE + 1
    case = Case((rows,), vocab)
    inputs = case.trainable()
    stats = case.stats(temperature=0.7)
    factor = dict(zip(NAMES, torch.randn(3, rows, generator=torch.Generator().manual_seed(1)), strict=True))
    found = torch.autograd.grad(sum((factor[n] * getattr(stats, n)).sum() for n in NAMES), inputs)
    expected = torch.autograd.grad(sum((factor[n] * x).sum() for n, x in case.by_definition(0.7).items()), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("want", WANTS, ids="+".join)
@pytest.mark.usefixtures("small_tiles")
def test_gradients_pass_gradcheck(want, bias, temperature):
    case = Case((3,), vocab=4, bias=bias)
    case.labels[1] = IGNORE

    def outputs(hidden, weight, *bias):
        case.hidden, case.weight, case.bias = hidden, weight, bias[0] if bias else None
        stats = case.stats(want, temperature=temperature)
        return tuple(getattr(stats, name) for name in want)

    assert torch.autograd.gradcheck(outputs, tuple(case.trainable()))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@pytest.mark.usefixtures("small_tiles")
def test_freezing_one_input_changes_no_other_gradient(frozen):
    case = Case()
    names = [name for name in ("hidden", "weight", "bias") if name != frozen]
    case.trainable()
    whole = torch.autograd.grad(case.stats().entropy.sum(), [getattr(case, name) for name in names])
    setattr(case, frozen, getattr(case, frozen).detach())
    part = torch.autograd.grad(case.stats().entropy.sum(), [getattr(case, name) for name in names])
    assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True))


def test_the_reference_gets_no_gradient():
    case = Case()
    case.trainable()
    case.ref_hidden.requires_grad_()
    case.ref_weight.requires_grad_()
    case.ref_bias.requires_grad_()
    case.stats().kl.sum().backward()
    assert (case.ref_hidden.grad, case.ref_weight.grad, case.ref_bias.grad) == (None, None, None)


@pytest.mark.parametrize(
    "penalty",
    [
        lambda logprob, hidden: torch.autograd.grad(logprob.sum(), hidden, create_graph=True)[0].sum(),
        lambda logprob, hidden: torch.autograd.grad((logprob**2).sum(), hidden, create_graph=True)[0].sum(),
        # Another term that has a gradient must not hide that the first one's is missing.
        lambda logprob, hidden: (torch.autograd.grad(logprob.sum(), hidden, create_graph=True)[0] * hidden).sum(),
    ],
    ids=["of a sum", "of a square", "beside another term"],
)
def test_a_double_backward_raises(penalty):
    case = Case()
    hidden = case.trainable()[0]
    with pytest.raises(RuntimeError, match="create_graph"):
        penalty(case.stats(("logprob",)).logprob, hidden).backward()


@pytest.mark.parametrize("want", WANTS, ids="+".join)
def test_only_what_is_wanted_is_returned(want):
    stats = Case().stats(want)
    assert {name for name in NAMES if getattr(stats, name) is not None} == set(want)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 2, 2)])
def test_results_have_the_shape_of_the_labels(shape):
    assert Case(shape).stats(("entropy",)).entropy.shape == shape


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.usefixtures("small_tiles")
def test_kl_is_exactly_zero_for_the_same_tensors(bias):
    case = Case(bias=bias, dtype=torch.float32)
    same = {"ref_hidden": case.hidden, "ref_weight": case.weight, "ref_bias": case.bias}
    assert (case.stats(("kl",), **same).kl == 0).all()


@pytest.mark.usefixtures("small_tiles")
def test_the_gradient_of_the_kl_is_exactly_zero_for_the_same_tensors():
    case = Case(dtype=torch.float32)
    hidden = case.trainable()[0]
    same = {"ref_hidden": case.hidden, "ref_weight": case.weight, "ref_bias": case.bias}
    case.stats(("kl",), **same).kl.sum().backward()
    # One rounding of sum p (log p - log q - KL) is 0 only because every difference is.
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shift", "ref_shift"), [(1e4, 1e4), (-1e4, -1e4), (1e4, -1e4), (0.0, 1e4)])
@pytest.mark.usefixtures("small_tiles")
def test_a_constant_added_to_every_logit_keeps_float32_accuracy(name, shift, ref_shift):
    # On a grid of 1/8 the products, also 1e4 away, are exact in float32: only the algorithm can lose digits.
    case = Case(vocab=8)
    for tensor in ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias"):
        setattr(case, tensor, (getattr(case, tensor) * 8).round() / 8)
    exact = case.by_definition()[name]
    case.bias, case.ref_bias = case.bias + shift, case.ref_bias + ref_shift
    for tensor in ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias"):
        setattr(case, tensor, getattr(case, tensor).float())
    torch.testing.assert_close(getattr(case.stats(), name).double(), exact, **SINGLE)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
@pytest.mark.parametrize("name", ["logprob", "entropy"])
def test_logits_that_span_hundreds_of_units_stay_finite(name, order):
    # Each slice's maximum is 120 from the next: exp of the difference is 0 in float32.
    weight = 40.0 * torch.arange(9.0)[:, None]
    weight = weight if order > 0 else weight.flip(0)
    stats = linear_logprob(torch.ones(1, 1), weight, torch.tensor([3]), want=("logprob", "entropy"))
    definition = {"logprob": token_logprob(weight.T, torch.tensor([3])), "entropy": entropy(weight.T)}
    torch.testing.assert_close(getattr(stats, name), definition[name], **SINGLE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("small_tiles")
def test_an_ignored_row_gives_zero(name):
    case = Case()
    case.labels[0, 1] = IGNORE
    assert getattr(case.stats(), name)[0, 1].item() == 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("poison", [math.nan, INF])
@pytest.mark.usefixtures("small_tiles")
def test_what_stands_in_an_ignored_row_reaches_no_value(name, poison):
    case = Case()
    clean = getattr(case.stats(), name)
    case.labels[0, 1] = IGNORE
    case.hidden[0, 1] = case.ref_hidden[0, 1] = poison
    clean[0, 1] = 0
    torch.testing.assert_close(getattr(case.stats(), name), clean, rtol=0, atol=TIGHT)


@pytest.mark.parametrize("poison", [math.nan, INF])
@pytest.mark.parametrize("input_", [0, 1, 2], ids=["hidden", "weight", "bias"])
@pytest.mark.usefixtures("small_tiles")
def test_what_stands_in_an_ignored_row_reaches_no_gradient(poison, input_):
    case = Case()
    case.labels[0, 1] = IGNORE
    gradients = []
    for value in (0.0, poison):
        case.hidden = case.hidden.detach()
        case.hidden[0, 1] = case.ref_hidden[0, 1] = value
        inputs, stats = case.trainable(), case.stats()
        gradients.append(torch.autograd.grad(sum(getattr(stats, n).sum() for n in NAMES), inputs)[input_])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", NAMES)
def test_all_rows_ignored_give_a_connected_zero(name):
    case = Case()
    case.labels[:] = IGNORE
    inputs = case.trainable()
    gradients = torch.autograd.grad(getattr(case.stats(), name).sum(), inputs)
    assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(gradients, inputs, strict=True))


@pytest.mark.parametrize("label", [7, -1, -101])
def test_a_label_outside_the_vocabulary_is_refused(label):
    case = Case()
    case.labels[1, 2] = label
    with pytest.raises(ValueError, match="labels"):
        case.stats(("entropy",))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("hidden", (2, 2, 4)),
        ("hidden", (2, 3, 5)),
        ("bias", (8,)),
        ("bias", (6,)),
        ("bias", (1,)),
        ("ref_hidden", (2, 2, 5)),
        ("ref_hidden", (2, 3, 4)),
        ("ref_weight", (8, 5)),
        ("ref_bias", (8,)),
        ("ref_bias", (1,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, shape):
    case = Case()
    setattr(case, name, torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"fit|shape|vocabular"):
        case.stats()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"want": ()}, "want"),
        ({"want": ("logits",)}, "want"),
        ({"want": ("kl",), "ref_weight": None}, "ref_weight"),
        ({"want": ("kl",), "ref_hidden": None}, "ref_hidden"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_arguments_without_a_meaning_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Case().stats(**changes)


@pytest.mark.parametrize("wide", ["hidden", "weight", "bias", "ref_hidden", "ref_weight"])
def test_result_is_float64_where_any_input_is(wide):
    case = Case(dtype=torch.float32)
    setattr(case, wide, getattr(case, wide).double())
    assert case.stats(("kl",)).kl.dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_inputs_are_computed_in_float32(name):
    case, single = Case(dtype=torch.bfloat16), Case(dtype=torch.bfloat16)
    for tensor in ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias"):
        setattr(single, tensor, getattr(single, tensor).float())
    # assert_close also compares the dtype: float32.
    torch.testing.assert_close(getattr(case.stats(), name), getattr(single.stats(), name), rtol=0, atol=0)


def test_gradients_have_the_dtype_of_their_inputs():
    inputs = (case := Case(dtype=torch.bfloat16)).trainable()
    gradients = torch.autograd.grad(case.stats(("logprob",)).logprob.sum(), inputs)
    assert {g.dtype for g in gradients} == {torch.bfloat16}


def wide_head():
    """Operands of products that are large enough for a CPU to round them: (hidden (96, 64), weight (700, 64))."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(96, 64, generator=generator), torch.randn(700, 64, generator=generator)


def test_under_autocast_operands_are_rounded_and_sums_are_float32():
    hidden, weight = wide_head()
    labels = torch.arange(96)
    with torch.autocast("cpu", torch.bfloat16):
        under = linear_logprob(hidden, weight, labels).logprob
    assert under.dtype == torch.float32
    # A CPU that does not multiply bfloat16 leaves the operands alone.
    exact, rounded = (
        linear_logprob(x.double(), y.double(), labels).logprob.float()
        for x, y in ((hidden, weight), (hidden.bfloat16(), weight.bfloat16()))
    )
    assert not torch.allclose(exact, rounded, rtol=0, atol=1e-3)  # 2^-9 of logits of size 8
    assert any(torch.allclose(under, wanted, rtol=0, atol=1e-5) for wanted in (exact, rounded))


def test_gradient_under_autocast_differs_by_bfloat16s_rounding():
    inputs = [x.requires_grad_() for x in wide_head()]

    def gradient():
        stats = linear_logprob(*inputs, torch.arange(96), want=("logprob", "entropy"))
        return stats.logprob.sum() + stats.entropy.sum()

    with torch.autocast("cpu", torch.bfloat16):
        loss = gradient()
    for under, expected in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(gradient(), inputs), strict=True):
        assert under.dtype == torch.float32
        # 8 bits of each operand, in sums where the roundings partly cancel.
        assert (under - expected).norm() < 2**-6 * expected.norm()


def test_the_rounding_of_operands_ends_with_the_block():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(KeyError), rounded_operands(torch.bfloat16):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        raise KeyError
    assert torch.backends.mkldnn.matmul.fp32_precision == before


# 6 rows: the logits are larger than the largest weight, V * 5, and a tile is far smaller.
B, T, V = 2, 3, 50_257


@pytest.mark.parametrize("want", WANTS, ids="+".join)
def test_no_tensor_is_larger_than_the_weight_forward_and_backward(want):
    case = Case((B, T), V, dtype=torch.float32)
    inputs = case.trainable()
    with Largest() as largest:
        stats = case.stats(want, temperature=0.7)
        torch.autograd.grad(sum(getattr(stats, name).sum() for name in want), inputs)
    assert largest.numel <= case.ref_weight.numel() < B * T * V


def test_no_tensor_is_larger_than_a_tile_where_rows_are_many(monkeypatch):
    monkeypatch.setattr(MODULE, "_VOCAB_SLICE", 64)
    monkeypatch.setattr(MODULE, "_ROW_CHUNK", 64)
    case = Case((200,), 200, dtype=torch.float32)
    inputs = case.trainable()
    with Largest() as largest:
        torch.autograd.grad(case.stats().kl.sum(), inputs)
    assert largest.numel <= 64 * 64


def test_the_hook_that_looks_for_large_tensors_sees_the_plain_paths_logits():
    case = Case((B, T), V, dtype=torch.float32)
    with Largest() as largest:
        token_logprob(case.logits(), case.labels)
    assert largest.numel == B * T * V


@pytest.mark.parametrize("keep_bytes", [0, 5 * 3 * 8, 2**20], ids=["none", "some", "all"])
@pytest.mark.usefixtures("small_tiles")
def test_kept_logits_change_no_number(keep_bytes, monkeypatch):
    monkeypatch.setattr(MODULE, "_SPARE", 0)
    case = Case(vocab=7)
    inputs = case.trainable()
    stats = linear_logprob(case.hidden, case.weight, case.labels, bias=case.bias, keep_bytes=keep_bytes)
    expected = token_logprob(case.hidden @ case.weight.T + case.bias, case.labels)
    torch.testing.assert_close(stats.logprob, expected, rtol=0, atol=TIGHT)
    found, wanted = (torch.autograd.grad(x.sum(), inputs) for x in (stats.logprob, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TIGHT)


def test_a_negative_budget_is_refused():
    case = Case()
    with pytest.raises(ValueError, match="keep_bytes must be at least 0, got -1"):
        linear_logprob(case.hidden, case.weight, case.labels, keep_bytes=-1)
