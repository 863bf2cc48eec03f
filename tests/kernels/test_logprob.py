"""The kernels on logits: against float64, on ragged, masked, shifted, strided and poisoned input."""

import math

import pytest
import torch
from kernel_case import (
    ALL,
    DEVICE,
    GRADIENT,
    IGNORE,
    INF,
    NAMES,
    RESULT,
    assert_results,
    kernel,
    launcher,
    normal,
    oracle,
    run_interpreted,
    some_labels,
    weighted,
)

pytest.importorskip("triton", reason="Triton is an extra: pip install 'hybrid-trainer[triton]'")

from hybrid_kernels import token_stats
from hybrid_kernels.configs import config_for


@launcher
@pytest.mark.slow
def test_the_interpreted_cases_pass_in_a_process_of_their_own():
    run_interpreted(__file__, at_least=60)


def compare(logits, labels, ref=None, **options):
    """Results and gradient of the kernel equal the oracle's, with a random factor on each result."""
    logits = logits.detach().requires_grad_()
    names = NAMES if ref is not None else NAMES[:2]
    stats = token_stats(logits, labels, want=names, ref_logits=ref, **options)
    weighted(stats).backward()
    exact = logits.detach().double().requires_grad_()
    expected = oracle(exact, labels, ref, **options)
    weighted(expected).backward()
    assert_results(stats, expected)
    assert logits.grad.dtype == logits.dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, **GRADIENT[logits.dtype])


# Every dtype, both label dtypes, sizes around a tile (256 columns in the interpreter) and around a vector.
@kernel
@pytest.mark.parametrize(
    ("shape", "vocab", "dtype", "label_dtype", "options"),
    [
        ((5,), 1, torch.float32, torch.int64, {}),
        ((5,), 37, torch.bfloat16, torch.int32, {"temperature": 0.7}),
        ((289,), 2, torch.float32, torch.int32, {}),
        ((2, 3), 255, torch.float16, torch.int64, {"temperature": 2.0}),
        ((4,), 256, torch.bfloat16, torch.int64, {}),
        ((5,), 257, torch.float32, torch.int64, {"softcap": 3.0}),
        ((5,), 668, torch.bfloat16, torch.int64, {"softcap": 30.0, "temperature": 0.7}),
        ((3, 2, 2), 668, torch.float16, torch.int32, {}),
        ((9,), 1128, torch.float32, torch.int64, {"temperature": 0.7}),
        ((5,), 1128, torch.bfloat16, torch.int32, {}),
        ((9,), 4097, torch.bfloat16, torch.int64, {}),
        ((2,), 4097, torch.float16, torch.int64, {"softcap": 30.0}),
        ((1,), 4097, torch.float32, torch.int64, {"temperature": 1.5}),
        ((), 37, torch.float32, torch.int64, {}),
    ],
)
@pytest.mark.parametrize("with_ref", [False, True], ids=["", "kl"])
def test_results_and_gradient_equal_float64(shape, vocab, dtype, label_dtype, options, with_ref):
    if shape == (289,) and with_ref and DEVICE.type == "cpu":
        pytest.skip("the interpreter takes 20 ms a row; more rows than a block of anything are tested without")
    logits, labels = normal(*shape, vocab, dtype=dtype, scale=3.0), some_labels(shape, vocab, label_dtype)
    compare(logits, labels, normal(*shape, vocab, dtype=dtype, seed=5) if with_ref else None, **options)


@kernel
def test_a_row_by_hand():
    # log(e / (e + e^3)) = -log(1 + e^2).
    stats = token_stats(torch.tensor([[1.0, 3.0]], device=DEVICE), torch.tensor([0], device=DEVICE), want=NAMES[:2])
    p = 1 / (1 + math.exp(2))
    assert stats.logprob.item() == pytest.approx(math.log(p), abs=1e-6)
    assert stats.entropy.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-6)


@kernel
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_rows_give_a_connected_nothing(shape):
    logits = normal(*shape, 7).requires_grad_()
    stats = token_stats(logits, some_labels(shape, 7), ref_logits=logits.detach(), **ALL)
    sum(x.sum() for x in stats).backward()
    assert logits.grad.shape == logits.shape and stats.kl.shape == shape


@kernel
@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("ref_offset", [0.0, 1e4])
def test_a_common_offset_costs_no_digits(offset, ref_offset):
    # On a grid of 1/8 the sums are exact in float32: only the algorithm can lose digits.
    logits, ref = ((normal(5, 668, seed=s) * 8).round() / 8 for s in (0, 1))
    labels = some_labels((5,), 668)
    exact = oracle(logits, labels, ref)
    stats = token_stats(logits + offset, labels, ref_logits=ref + ref_offset, **ALL)
    assert_results(stats, exact, rtol=0, atol=3e-6)


@kernel
@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
def test_logits_that_span_thousands_of_units_stay_finite(order):
    logits = order * 4.0 * torch.arange(1128.0, device=DEVICE)[None].repeat(2, 1)
    compare(logits, torch.tensor([3, 1127], device=DEVICE), logits.flip(-1) / 1000)


MASKS = {
    "single columns": [0, 5, 667],
    "the first tile": range(256),
    "an inner tile": range(256, 512),
    "the last tile": range(512, 668),
    "all but one": [c for c in range(668) if c != 600],
}


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_masked_vocabulary_equals_float64(mask, dtype):
    logits, ref = normal(3, 668, dtype=dtype), normal(3, 668, seed=5, dtype=dtype)
    logits[:, list(mask)] = -INF
    allowed = next(c for c in range(668) if c not in set(mask))
    labels = torch.full((3,), allowed, device=DEVICE)
    for reference in (ref, ref.masked_fill(logits == -INF, -INF)):
        compare(logits, labels, reference)


@kernel
@pytest.mark.parametrize("lowest", [-INF, torch.finfo(torch.float32).min], ids=["-inf", "finfo.min"])
def test_a_forbidden_label_has_the_lowest_logprob_and_no_nan_in_its_gradient(lowest):
    logits = normal(2, 300)
    logits[:, 7] = lowest
    logits.requires_grad_()
    stats = token_stats(logits, torch.tensor([7, 8], device=DEVICE), want=NAMES[:2])
    assert stats.logprob[0] < -1e37 and stats.logprob[1] > -20
    stats.entropy.sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad[:, 7] == 0).all()


@kernel
def test_kl_is_infinite_where_the_reference_forbids_what_the_policy_does_and_the_rest_is_not():
    logits, ref, labels = normal(3, 300).requires_grad_(), normal(3, 300, seed=5), some_labels((3,), 300)
    ref[:, 4] = -INF
    stats = token_stats(logits, labels, ref_logits=ref, **ALL)
    assert (stats.kl == INF).all()
    (stats.logprob.sum() + 0.0 * stats.kl.detach().clamp(max=1.0).sum()).backward()
    expected = normal(3, 300).double().requires_grad_()
    oracle(expected, labels)["logprob"].sum().backward()
    torch.testing.assert_close(logits.grad.double(), expected.grad, **GRADIENT[torch.float32])


@kernel
def test_a_zero_weight_on_an_infinite_kl_leaves_the_other_rows_and_results_alone():
    logits, ref, labels = normal(2, 300).requires_grad_(), normal(2, 300, seed=5), some_labels((2,), 300)
    ref[0, 4] = -INF
    stats = token_stats(logits, labels, ref_logits=ref, **ALL)
    (gradient,) = torch.autograd.grad([stats.kl, stats.logprob], logits, [torch.tensor([0.0, 1.0], device=DEVICE)] * 2)
    assert gradient.isfinite().all() and (gradient[0] == 0).all() and (gradient[1] != 0).any()


@kernel
def test_kl_is_a_number_where_the_policy_underflows_on_a_token_the_reference_forbids():
    logits, ref = torch.zeros(1, 600, device=DEVICE), torch.zeros(1, 600, device=DEVICE)
    logits[0, 599], ref[0, 0] = 200.0, -INF
    assert token_stats(logits, torch.tensor([3], device=DEVICE), ref_logits=ref, **ALL).kl.isfinite().all()


@kernel
def test_kl_to_oneself_and_its_gradient_are_exactly_zero():
    logits = normal(3, 668).requires_grad_()
    kl = token_stats(logits, some_labels((3,), 668), ref_logits=logits, want=("kl",), temperature=0.7).kl
    kl.sum().backward()
    assert (kl == 0).all() and (logits.grad == 0).all()


@kernel
@pytest.mark.parametrize("poison", [math.nan, INF])
def test_what_stands_in_an_ignored_row_reaches_nothing(poison):
    logits, ref, labels = normal(4, 300), normal(4, 300, seed=5), some_labels((4,), 300)
    logits[[1, 3]] = ref[[1, 3]] = poison
    labels[[1, 3]] = IGNORE
    compare(logits, labels, ref)


@kernel
def test_all_rows_ignored_give_a_connected_zero():
    logits = torch.full((2, 3, 300), math.nan, device=DEVICE, requires_grad=True)
    labels = torch.full((2, 3), IGNORE, device=DEVICE)
    stats = token_stats(logits, labels, ref_logits=logits.detach(), **ALL)
    loss = sum(x.sum() for x in stats)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def shifted_rows(x):
    """The same rows one element into a wider buffer: neither the base nor the stride is aligned."""
    wide = x.new_full((x.shape[0], x.shape[1] + 3), math.nan)
    wide[:, 1:-2] = x
    return wide[:, 1:-2]


LAYOUTS = {
    "a padded vocabulary": lambda x: torch.cat([x, x.new_full((len(x), 11), math.nan)], 1)[:, : x.shape[1]],
    "misaligned": shifted_rows,
    "transposed": lambda x: x.T.contiguous().T,
    "without its last position": lambda x: torch.stack([x, x], 1)[:, :-1],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "reversed batch": lambda x: torch.stack([x, x]).transpose(0, 1),
    "expanded": lambda x: x[:1].expand(4, 3, -1),
    "four dimensions": lambda x: torch.stack([x, x], 1)[None].transpose(1, 2),
}


@kernel
@pytest.mark.parametrize("vocab", [296, 301])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_change_nothing(layout, vocab):
    logits = layout(normal(4, vocab, dtype=torch.bfloat16))
    labels = some_labels(tuple(logits.shape[:-1]), vocab)
    dense = logits.contiguous()
    for ref in (None, normal(*logits.shape, seed=5, dtype=torch.bfloat16)):
        found = token_stats(logits, labels, ref_logits=ref, want=NAMES if ref is not None else NAMES[:2])
        expected = token_stats(dense, labels, ref_logits=ref, want=NAMES if ref is not None else NAMES[:2])
        for a, b in zip(found, expected, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, **RESULT)
    compare(logits, labels, layout(normal(4, vocab, seed=5, dtype=torch.bfloat16)))


@kernel
def test_the_logits_are_not_written():
    logits, ref, labels = normal(3, 300).requires_grad_(), normal(3, 300, seed=5), some_labels((3,), 300)
    kept = logits.detach().clone(), ref.clone(), labels.clone()
    weighted(token_stats(logits, labels, ref_logits=ref, **ALL)).backward()
    assert all(torch.equal(a, b) for a, b in zip((logits, ref, labels), kept, strict=True))


@kernel
@pytest.mark.parametrize("name", NAMES)
def test_one_result_alone_gets_its_own_gradient(name):
    logits, ref, labels = normal(3, 300).requires_grad_(), normal(3, 300, seed=5), some_labels((3,), 300)
    stats = token_stats(logits, labels, ref_logits=ref, **ALL)
    # A sum's upstream gradient is an expanded scalar.
    (found,) = torch.autograd.grad(getattr(stats, name).sum(), logits)
    exact = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(oracle(exact, labels, ref)[name].sum(), exact)
    torch.testing.assert_close(found.double(), expected, **GRADIENT[torch.float32])


@kernel
@pytest.mark.parametrize("want", [("logprob",), ("entropy",), ("kl",), ("kl", "logprob")])
def test_only_what_is_wanted_is_returned(want):
    logits = normal(2, 9)
    stats = token_stats(logits, some_labels((2,), 9), want=want, ref_logits=normal(2, 9, seed=5))
    assert {name for name, x in stats._asdict().items() if x is not None} == set(want)


@kernel
def test_an_upstream_gradient_with_strides_is_read_rightly():
    logits, labels = normal(4, 300).requires_grad_(), some_labels((4,), 300)
    upstream = normal(4, 2)[:, 0]
    logprob = token_stats(logits, labels).logprob
    found = [torch.autograd.grad(logprob, logits, g, retain_graph=True)[0] for g in (upstream, upstream.contiguous())]
    assert torch.equal(*found)


@kernel
def test_the_reference_and_the_frozen_policy_get_no_gradient():
    ref = normal(3, 30, seed=5).requires_grad_()
    assert not token_stats(normal(3, 30), some_labels((3,), 30), ref_logits=ref, **ALL).kl.requires_grad
    logits = normal(3, 30).requires_grad_()
    token_stats(logits, some_labels((3,), 30), ref_logits=ref, **ALL).kl.sum().backward()
    assert ref.grad is None and logits.grad is not None


@kernel
def test_a_row_does_not_depend_on_its_neighbours():
    logits, labels = normal(6, 668, dtype=torch.bfloat16), some_labels((6,), 668)
    whole = token_stats(logits, labels, want=NAMES[:2])
    for i in range(6):
        alone = token_stats(logits[i : i + 1], labels[i : i + 1], want=NAMES[:2])
        assert torch.equal(alone.logprob[0], whole.logprob[i]) and torch.equal(alone.entropy[0], whole.entropy[i])


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU the check would synchronise: TRITON_DEBUG=1 turns it on")
@pytest.mark.parametrize("label", [30, -1, -101])
@kernel
def test_a_label_outside_the_vocabulary_is_refused(label):
    labels = some_labels((3,), 30)
    labels[1] = label
    with pytest.raises(ValueError, match="labels"):
        token_stats(normal(3, 30), labels)


@kernel
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": (4, 30)}, "fit"),
        ({"ref_logits": (3, 31)}, "differ"),
        ({"ref_logits": None}, "ref_logits"),
        ({"want": ()}, "want"),
        ({"want": ("logits",)}, "want"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"softcap": -1.0}, "softcap"),
        ({"dtype": torch.float64}, "float64"),
        ({"label_dtype": torch.float32}, "labels"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(changes, message):
    shape = changes.get("logits", (3, 30))
    ref_shape = changes.get("ref_logits", (3, 30))
    options = {"want": NAMES} | {k: v for k, v in changes.items() if k in ("want", "temperature", "softcap")}
    logits = normal(*shape).to(changes.get("dtype", torch.float32))
    labels = some_labels((3,), 30).to(changes.get("label_dtype", torch.int64))
    with pytest.raises(ValueError, match=message):
        token_stats(logits, labels, ref_logits=None if ref_shape is None else normal(*ref_shape).to(logits), **options)


@kernel
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter's tile is what is claimed")
def test_the_interpreters_tile_is_smaller_than_the_vocabularies_tested():
    assert config_for("forward", 1000, DEVICE).columns == 256


@launcher
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cpu_tensors_without_the_interpreter_are_refused_with_a_way_out():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        token_stats(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
