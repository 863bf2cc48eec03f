"""The kernels on hidden states: against float64, across vocabulary slices, and for what they refuse and leave alone."""

import importlib
import math

import pytest
import torch
from kernel_case import (
    DEVICE,
    IGNORE,
    INF,
    NAMES,
    LinearCase,
    assert_results,
    autocast_to,
    kernel,
    launcher,
    normal,
    run_interpreted,
    weighted,
)

pytest.importorskip("triton", reason="Triton is an extra: pip install 'hybrid-trainer[triton]'")


# The function hides its module of the same name.
MODULE = importlib.import_module("hybrid_kernels.linear_logprob")


@launcher
@pytest.mark.slow
def test_the_interpreted_cases_pass_in_a_process_of_their_own():
    run_interpreted(__file__, at_least=40)


@pytest.fixture
def narrow_slices(monkeypatch):
    """Slices of 256 columns, so that a few hundred tokens are already several."""
    monkeypatch.setattr(MODULE, "FORWARD_BYTES", 1)
    monkeypatch.setattr(MODULE, "BACKWARD_BYTES", 1)


@kernel
@pytest.mark.parametrize(
    ("shape", "vocab", "options"),
    [
        ((5,), 1, {}),
        ((5,), 2, {"bias": True, "dtype": torch.bfloat16}),
        ((289,), 37, {"ref": False}),
        ((2, 3), 256, {"share": True, "temperature": 0.7}),
        ((5,), 257, {"bias": True, "softcap": 3.0}),
        ((5,), 668, {"share": True, "bias": True, "dtype": torch.bfloat16}),
        ((3, 2, 2), 668, {"dtype": torch.float16, "softcap": 30.0, "temperature": 1.5}),
        ((5,), 1128, {"bias": True, "temperature": 0.7}),
        ((1,), 4097, {"softcap": 30.0, "dtype": torch.bfloat16}),
        ((1,), 4097, {"ref": False}),
        ((), 37, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("slices", ["narrow", "shipped"])
def test_results_and_gradients_equal_float64(shape, vocab, options, slices, request):
    if slices == "narrow":
        if vocab <= 256:
            pytest.skip("one slice")
        request.getfixturevalue("narrow_slices")
    LinearCase(shape, vocab, **options).compare()


@kernel
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_rows_give_a_connected_nothing(shape):
    case = LinearCase(shape, 7, bias=True)
    inputs = case.require()
    gradients = torch.autograd.grad(weighted(case.stats()), inputs)
    assert all((g == 0).all() for g in gradients)


@kernel
@pytest.mark.usefixtures("narrow_slices")
@pytest.mark.parametrize("ref_offset", [0.0, 1e4])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_costs_no_digits(offset, ref_offset):
    case = LinearCase(bias=True)
    for inputs in (case.inputs, case.ref):
        # On a grid of 1/8 the products are exact in float32, 1e4 away too.
        inputs.update({name: (x * 8).round() / 8 for name, x in inputs.items()})
    expected, _ = case.exact()
    stats = case.stats(bias=case.inputs["bias"] + offset, ref_bias=case.ref["ref_bias"] + ref_offset)
    assert_results(stats, expected, rtol=0, atol=1e-5)


@kernel
@pytest.mark.usefixtures("narrow_slices")
@pytest.mark.parametrize("mask", [[0, 5, 599], range(256), range(256, 512), range(512, 600), range(1, 600)], ids=str)
@pytest.mark.parametrize("both", [True, False], ids=["both forbid", "the policy forbids"])
def test_a_masked_vocabulary_equals_float64(mask, both):
    case = LinearCase(bias=True)
    allowed = next(c for c in range(600) if c not in set(mask))
    case.labels = torch.full((3,), allowed, device=DEVICE)
    case.inputs["bias"][list(mask)] = -INF
    if both:
        case.ref["ref_bias"][list(mask)] = -INF
    case.compare()


@kernel
@pytest.mark.usefixtures("narrow_slices")
def test_logits_that_rise_or_fall_by_thousands_across_slices_stay_finite():
    for sign in (1.0, -1.0):
        case = LinearCase(ref=False)
        case.inputs["weight"] = sign * 4.0 * torch.arange(600.0, device=DEVICE)[:, None].expand(-1, 8).contiguous() / 8
        case.inputs["hidden"] = torch.ones_like(case.inputs["hidden"])
        expected, _ = case.exact()
        assert_results(case.stats(), expected)


@kernel
@pytest.mark.parametrize("share", [False, True])
def test_kl_to_oneself_and_its_gradient_are_zero(share, narrow_slices):
    case = LinearCase(ref=False)
    (hidden,) = case.require("hidden")
    weight = case.inputs["weight"] if share else case.inputs["weight"].clone()
    kl = case.stats(want=("kl",), ref_hidden=hidden, ref_weight=weight).kl
    # Exactly, where a GEMM treats equal rows alike; a CPU's may round the rows at an edge of its tiles otherwise.
    rounding = 0.0 if DEVICE.type == "cuda" else 1e-6
    assert (kl.abs() <= rounding).all()
    assert (torch.autograd.grad(kl.sum(), hidden)[0].abs() <= rounding).all()


@kernel
@pytest.mark.usefixtures("narrow_slices")
@pytest.mark.parametrize("poison", [math.nan, INF])
def test_what_stands_in_an_ignored_row_reaches_nothing(poison):
    case = LinearCase((4,), bias=True)
    case.labels[[1, 3]] = IGNORE
    case.inputs["hidden"][[1, 3]] = case.ref["ref_hidden"][[1, 3]] = poison
    case.compare()


@kernel
def test_all_rows_ignored_give_connected_zeros():
    case = LinearCase(bias=True)
    case.labels[:] = IGNORE
    inputs, stats = case.require(), case.stats()
    loss = sum(x.sum() for x in stats)
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, inputs))


@kernel
@pytest.mark.parametrize("trained", [["hidden"], ["weight"], ["bias"], ["hidden", "bias"]], ids="+".join)
def test_a_frozen_input_costs_no_gradient_and_changes_no_other(trained, narrow_slices, monkeypatch):
    whole = LinearCase(bias=True)
    inputs = whole.require()
    expected = dict(zip(whole.inputs, torch.autograd.grad(weighted(whole.stats()), inputs), strict=True))
    asked = []
    inner = MODULE._new_gradients
    monkeypatch.setattr(MODULE, "_new_gradients", lambda *a: asked.append(list(a[3])) or inner(*a))
    part = LinearCase(bias=True)
    leaves = part.require(*trained)
    found = torch.autograd.grad(weighted(part.stats()), leaves)
    for name, gradient in zip([n for n in part.inputs if n in trained], found, strict=True):
        assert torch.equal(gradient, expected[name])
    assert asked == [[name in trained for name in ("hidden", "weight", "bias")]]


@kernel
def test_the_reference_gets_no_gradient():
    case = LinearCase(bias=True)
    case.require()
    case.ref = {name: x.requires_grad_() for name, x in case.ref.items()}
    case.stats().kl.sum().backward()
    assert all(x.grad is None for x in case.ref.values())


@kernel
def test_a_shared_head_is_one_product(monkeypatch, narrow_slices):
    rows = []
    inner = MODULE.product
    monkeypatch.setattr(MODULE, "product", lambda a, b, out: rows.append(len(a)) or inner(a, b, out))
    LinearCase((5,), vocab=300, share=True).stats()
    assert rows == [10, 10]


@kernel
@pytest.mark.parametrize("name", NAMES)
def test_one_result_alone_gets_its_own_gradient(name, narrow_slices):
    case = LinearCase(bias=True)
    inputs = case.require()
    found = torch.autograd.grad(getattr(case.stats(), name).sum(), inputs)
    expected, leaves = case.exact()
    for a, b in zip(found, torch.autograd.grad(expected[name].sum(), leaves), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=5e-5)


@kernel
@pytest.mark.parametrize("want", [("logprob",), ("entropy",), ("kl",), ("kl", "logprob")])
def test_only_what_is_wanted_is_returned(want):
    stats = LinearCase(vocab=9).stats(want=want)
    assert {name for name, x in stats._asdict().items() if x is not None} == set(want)


@kernel
def test_operands_of_two_dtypes_are_multiplied_in_float32():
    case = LinearCase(ref=False)
    case.inputs["weight"] = case.inputs["weight"].bfloat16()
    case.compare()


@kernel
@pytest.mark.usefixtures("narrow_slices")
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")], ids="-".join
)
@pytest.mark.parametrize("share", [False, True])
def test_under_autocast_the_operands_are_rounded_and_nothing_else(dtypes, share, autocast):
    case = LinearCase(bias=True, share=share, softcap=30.0)
    for inputs in (case.inputs, case.ref):
        for name, x in inputs.items():
            if not name.endswith("bias"):
                inputs[name] = x.to(getattr(torch, dtypes[name.endswith("weight")]))
    case.compare(autocast)


@kernel
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_every_product_of_an_odd_vocabulary_has_aligned_sides(autocast, narrow_slices, products):
    case = LinearCase((16,), 301, bias=True, share=True)
    inputs = case.require()
    with autocast_to(autocast):
        torch.autograd.grad(weighted(case.stats()), inputs)
    assert products and all(length % 8 == 0 for lengths in products for length in lengths)


@kernel
@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_padding_of_an_odd_vocabulary_reaches_nothing(autocast, narrow_slices):
    LinearCase((9,), 301, bias=True, share=True).compare(autocast)


@kernel
@pytest.mark.usefixtures("narrow_slices")
@pytest.mark.parametrize("names", [NAMES, ("logprob",)], ids="+".join)
@pytest.mark.parametrize("share", [False, True])
def test_logits_that_are_kept_save_their_product_and_change_nothing(names, share, products):
    case = LinearCase((5,), 700, bias=True, share=share)
    inputs = case.require()
    gradients = []
    for num_kept in range(4):
        # Of three slices, the last 188 columns wide; one byte less than the next would take.
        stats = case.stats(keep_bytes=4 * 10 * (256, 512, 704, 768)[num_kept] - 1)
        num_forward = len(products)
        gradients.append(torch.autograd.grad(sum(weighted({name: getattr(stats, name)}) for name in names), inputs))
        models = 2 if "kl" in names and not share else 1
        assert len(products) - num_forward == 3 * 2 + (3 - num_kept) * models
        products.clear()
    for found in gradients[1:]:
        for a, b in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@kernel
def test_nothing_is_kept_where_no_gradient_will_be_asked_for(monkeypatch):
    given, inner = [], MODULE._new_kept
    monkeypatch.setattr(MODULE, "_new_kept", lambda *a: given.append(a[-1]) or inner(*a))
    case = LinearCase()
    case.stats(keep_bytes=1000)
    case.require()
    with torch.no_grad():
        case.stats(keep_bytes=1000)
    assert given == [0, 0]
    case.stats(keep_bytes=1000)
    assert given[-1] == 1000


@kernel
def test_strided_inputs_change_nothing():
    case = LinearCase((4,), bias=True)
    expected = case.stats()
    case.inputs["hidden"] = torch.stack([case.inputs["hidden"]] * 2, 1)[:, 0]
    case.inputs["weight"] = case.inputs["weight"].T.contiguous().T
    case.inputs["bias"] = torch.stack([case.inputs["bias"]] * 2, 1)[:, 0]
    case.labels = torch.stack([case.labels] * 2, 1)[:, 0]
    for a, b in zip(case.stats(), expected, strict=True):
        torch.testing.assert_close(a, b)
    case.compare()


@kernel
@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU the check would synchronise: TRITON_DEBUG=1 turns it on")
@pytest.mark.parametrize("label", [600, -1, -101])
def test_a_label_outside_the_vocabulary_is_refused(label):
    case = LinearCase()
    case.labels[1] = label
    with pytest.raises(ValueError, match="labels"):
        case.stats()


@kernel
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": (2, 8)}, "fit"),
        ({"hidden": (3, 7)}, "fit"),
        ({"bias": (601,)}, "fit"),
        ({"bias": (1,)}, "fit"),
        ({"ref_hidden": (2, 12)}, "fit"),
        ({"ref_hidden": (3, 13)}, "fit"),
        ({"ref_weight": (599, 12)}, "vocabular"),
        ({"ref_bias": (1,)}, "fit"),
        ({"ref_weight": None}, "ref_weight"),
        ({"want": ("logits",)}, "want"),
        ({"temperature": -1.0}, "temperature"),
        ({"softcap": 0.0}, "softcap"),
        ({"keep_bytes": -1}, "keep_bytes"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes, message):
    changes = {k: normal(*v) if k.endswith(("hidden", "weight", "bias")) and v else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        LinearCase(bias=True).stats(**changes)


@kernel
def test_float64_is_refused():
    case = LinearCase(vocab=9)
    with pytest.raises(ValueError, match="float64"):
        case.stats(weight=case.inputs["weight"].double())


@kernel
@pytest.mark.usefixtures("narrow_slices")
def test_nothing_larger_than_a_slice_of_the_logits_is_allocated():
    case = LinearCase((12,), 1024, share=True)
    inputs = case.require()
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(weighted(case.stats()), inputs)
    operations = [event for event in profile.events() if event.name.startswith("aten::")]
    largest = max(max(event.self_cpu_memory_usage, event.self_device_memory_usage) for event in operations)
    # In float32: both models' rows by 256 columns, and the weight's gradient; the logits are 12 x 1024 twice.
    assert 0 < largest <= 4 * max(2 * 12 * 256, case.inputs["weight"].numel())
