"""The loss whose gradient is taken in the forward pass: the same numbers as `linear_logprob` and the same loss."""

import importlib
import math

import pytest
import torch
from kernel_case import (
    DEVICE,
    IGNORE,
    NAMES,
    LinearCase,
    assert_gradients,
    assert_results,
    autocast_to,
    kernel,
    launcher,
    normal,
    run_interpreted,
)

pytest.importorskip("triton", reason="Triton is an extra: pip install 'hybrid-trainer[triton]'")

from hybrid_kernels import linear_logprob_loss

HEAD = importlib.import_module("hybrid_kernels.head")
MODULE = importlib.import_module("hybrid_kernels.linear_loss")


@launcher
@pytest.mark.slow
def test_the_interpreted_cases_pass_in_a_process_of_their_own():
    run_interpreted(__file__, at_least=20)


@pytest.fixture(params=["shipped", "two rows", "two rows, groups of four"])
def sizes(request, monkeypatch):
    """Workspaces so small that a few rows are several chunks, and several groups of chunks."""
    if request.param != "shipped":
        monkeypatch.setattr(MODULE, "LOGITS_BYTES", 2 * 2 * 4 * 512)
        monkeypatch.setattr(MODULE, "GRADIENT_BYTES", 1 if request.param == "two rows" else 4 * 4 * 512)
        for module in (HEAD, MODULE):
            monkeypatch.setattr(module, "WEIGHT_COLUMNS", 128)


FACTORS = normal(3, 16, seed=9)


def token_loss(stats, rows):
    """Any function of a token's own statistics and of what is known before: here a curved one, with fixed factors."""
    a, b, c = (factor[rows] for factor in FACTORS.to(DEVICE))
    loss = a * stats.logprob.sin() + b * stats.logprob
    loss = loss if stats.entropy is None else loss + c * stats.entropy**2
    return loss if stats.kl is None else loss + b * stats.kl


def run(case, **changes):
    want = NAMES if case.ref else NAMES[:2]
    arguments = {"want": want} | case.inputs | case.ref | case.options | changes
    return linear_logprob_loss(labels=case.labels, token_loss=arguments.pop("token_loss", token_loss), **arguments)


def expected_loss(case, autocast):
    results, leaves = case.exact(autocast)
    flat = type("Stats", (), {name: results[name].flatten() if name in results else None for name in NAMES})
    return token_loss(flat, slice(0, case.labels.numel())).sum(), leaves, results


def compare(case, autocast=None):
    inputs = case.require()
    with autocast_to(autocast):
        loss, stats = run(case)
    found = torch.autograd.grad(0.5 * loss, inputs)
    expected, leaves, results = expected_loss(case, autocast)
    assert_results(stats, results)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert_gradients(found, torch.autograd.grad(0.5 * expected, leaves), inputs, autocast)


@kernel
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((9,), {"vocab": 300}),
        ((3, 3), {"vocab": 301, "ref": False, "bias": True, "softcap": 3.0, "temperature": 0.7}),
        ((7,), {"vocab": 37, "bias": True, "share": True, "dtype": torch.bfloat16}),
        ((1,), {"vocab": 1128, "dtype": torch.float16}),
    ],
    ids=str,
)
def test_loss_statistics_and_gradients_equal_float64(shape, options, sizes):
    compare(LinearCase(shape, **options))


@kernel
@pytest.mark.parametrize("share", [False, True])
def test_under_autocast_the_operands_are_rounded_and_nothing_else(share, sizes):
    compare(LinearCase((9,), 301, bias=True, share=share), torch.bfloat16)


@kernel
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_every_product_of_an_odd_vocabulary_has_aligned_sides(autocast, products):
    case = LinearCase((16,), 301, bias=True, share=True)
    inputs = case.require()
    with autocast_to(autocast):
        torch.autograd.grad(run(case)[0], inputs)
    assert products and all(length % 8 == 0 for lengths in products for length in lengths)


@kernel
@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_padding_of_an_odd_vocabulary_reaches_nothing(autocast, sizes):
    compare(LinearCase((9,), 301, bias=True, share=True), autocast)


@kernel
def test_what_stands_in_an_ignored_row_reaches_nothing(sizes):
    case = LinearCase((9,), 300, bias=True)
    case.labels[[1, 3, 8]] = IGNORE
    case.inputs["hidden"][[1, 3, 8]] = case.ref["ref_hidden"][[1, 3, 8]] = math.nan
    compare(case)


@kernel
@pytest.mark.parametrize("trained", [["hidden"], ["weight"], ["bias"]], ids="+".join)
def test_a_frozen_input_changes_no_other_gradient(trained, sizes):
    whole, part = (LinearCase((5,), 300, bias=True) for _ in range(2))
    inputs = whole.require()
    expected = dict(zip(whole.inputs, torch.autograd.grad(run(whole)[0], inputs), strict=True))
    leaves = part.require(*trained)
    (found,) = torch.autograd.grad(run(part)[0], leaves)
    torch.testing.assert_close(found, expected[trained[0]])


@kernel
def test_no_rows_and_ignored_rows_give_a_connected_zero():
    for shape in ((0,), (3,)):
        case = LinearCase(shape, 30, bias=True)
        case.labels[:] = IGNORE
        inputs = case.require()
        loss, _ = run(case)
        assert loss.item() == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, inputs))


@kernel
def test_a_loss_that_uses_one_result_or_none_is_legal():
    case = LinearCase((3,), 30)
    inputs = case.require()
    loss, _ = run(case, token_loss=lambda stats, rows: torch.ones_like(stats.kl))
    assert loss.item() == 3
    assert all((g == 0).all() for g in torch.autograd.grad(loss, inputs))
    loss, stats = run(case, token_loss=lambda stats, rows: stats.kl)
    torch.testing.assert_close(loss, stats.kl.sum())


@kernel
def test_the_statistics_and_the_reference_carry_no_gradient_and_no_grad_works():
    case = LinearCase((3,), 30)
    case.require()
    loss, stats = run(case)
    assert loss.requires_grad and not any(x.requires_grad for x in stats)
    with torch.no_grad():
        assert not run(case)[0].requires_grad


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize(("vocab", "width"), [(128_256, 4096), (152_064, 3584)], ids=["llama 3 8b", "qwen 2.5 7b"])
def test_8192_rows_of_a_large_head_are_one_group_within_three_gibibytes(vocab, width, models):
    chunk, group = MODULE.row_counts(8192, 4 * models * vocab, 2 * vocab)
    assert group == 8192
    # The logits, the dlogits, and the copy of the hidden states without what stands in ignored rows.
    assert 4 * models * chunk * vocab + 2 * group * vocab + 2 * group * width <= 3.2 * 2**30


@pytest.mark.parametrize("num_rows", [1, 127, 128, 129, 8191, 100_000])
@pytest.mark.parametrize("row", [1, 2**20, 2**24, 2**30])
def test_rows_are_taken_in_even_parts_within_the_workspaces(num_rows, row):
    chunk, group = MODULE.row_counts(num_rows, row, row)
    assert 1 <= chunk <= group <= num_rows
    for part, whole, size in ((chunk, group, MODULE.LOGITS_BYTES), (group, num_rows, MODULE.GRADIENT_BYTES)):
        assert part == 1 or part * row <= size
        most = max(size // row, 1)
        # No more parts than their size asks for, but for what whole tiles of 128 rows cost.
        assert -(-whole // part) <= -(-whole // (most // 128 * 128 or most))
    assert MODULE.row_counts(num_rows, row, None) == (MODULE.row_counts(num_rows, row, 1)[0],) * 2


@kernel
def test_a_second_backward_and_a_second_derivative_raise():
    case = LinearCase((3,), 30)
    inputs = case.require()
    loss, _ = run(case)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, inputs, create_graph=True)
    torch.autograd.grad(loss, inputs, retain_graph=True)
    with pytest.raises(RuntimeError, match="already"):
        torch.autograd.grad(loss, inputs)


@kernel
def test_a_loss_that_is_not_one_for_each_token_is_refused():
    with pytest.raises(ValueError, match="one loss for each of 3 tokens"):
        run(LinearCase((3,), 30), token_loss=lambda stats, rows: stats.logprob.sum())
