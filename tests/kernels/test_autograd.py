"""The kernels as operators of torch: autograd, its modes, autocast, checkpointing, opcheck, torch.compile."""

import pytest
import torch
from kernel_case import (
    DEVICE,
    NAMES,
    LinearCase,
    assert_results,
    kernel,
    launcher,
    normal,
    oracle,
    run_interpreted,
    some_labels,
    weighted,
)
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="Triton is an extra: pip install 'hybrid-trainer[triton]'")

from hybrid_kernels import token_stats


@launcher
@pytest.mark.slow
def test_the_interpreted_cases_pass_in_a_process_of_their_own():
    run_interpreted(__file__, at_least=15)


@kernel
def test_a_retained_graph_gives_the_same_gradient_twice_from_logits():
    logits = normal(3, 300).requires_grad_()
    loss = weighted(token_stats(logits, some_labels((3,), 300), want=NAMES[:2]))
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@kernel
def test_a_double_backward_raises_from_logits():
    logits = normal(3, 30).requires_grad_()
    loss = (token_stats(logits, some_labels((3,), 30)).logprob ** 2).sum()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, logits, create_graph=True)


@kernel
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_without_gradients_from_logits(mode):
    logits, labels = normal(3, 300).requires_grad_(), some_labels((3,), 300)
    with mode():
        stats = token_stats(logits, labels, want=NAMES[:2])
    assert not stats.logprob.requires_grad
    assert_results(stats, oracle(logits, labels))


@kernel
def test_it_runs_under_autocast_and_checkpointing_from_logits():
    logits, labels = normal(3, 300).requires_grad_(), some_labels((3,), 300)
    (expected,) = torch.autograd.grad(token_stats(logits, labels).logprob.sum(), logits)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        again = checkpoint(lambda x: token_stats(x, labels).logprob.sum(), logits, use_reentrant=False)
    (found,) = torch.autograd.grad(again, logits)
    assert torch.equal(found, expected)


@kernel
def test_the_operators_pass_opcheck_from_logits():
    logits, ref, labels = normal(2, 3, 30).requires_grad_(), normal(2, 3, 30, seed=5), some_labels((2, 3), 30)
    operator = torch.ops.hybrid_kernels.token_stats.default
    for reference, entropy in ((ref, True), (None, False)):
        torch.library.opcheck(operator, (logits, labels, reference, 0.7, 30.0, entropy))


@kernel
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_without_a_graph_break_from_logits(backend):
    def loss(logits, labels, ref):
        stats = token_stats(logits * 1.0, labels, ref_logits=ref, want=NAMES, temperature=0.7)
        return (stats.logprob + 0.1 * stats.entropy - stats.kl).mean()

    logits, ref, labels = normal(3, 30).requires_grad_(), normal(3, 30, seed=5), some_labels((3,), 30)
    (expected,) = torch.autograd.grad(loss(logits, labels, ref), logits)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    (found,) = torch.autograd.grad(compiled(logits, labels, ref), logits)
    torch.testing.assert_close(found, expected)


@kernel
def test_a_dtensor_is_refused_from_logits():
    DTensor = type("DTensor", (torch.Tensor,), {})
    with pytest.raises(TypeError, match="full_tensor"):
        token_stats(normal(3, 30).as_subclass(DTensor), some_labels((3,), 30))


@kernel
@pytest.mark.parametrize("keep_bytes", [0, 2**20])
def test_a_retained_graph_gives_the_same_gradients_twice_from_hidden_states(keep_bytes):
    case = LinearCase(bias=True)
    inputs = case.require()
    loss = weighted(case.stats(keep_bytes=keep_bytes))
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@kernel
def test_a_double_backward_raises_from_hidden_states():
    case = LinearCase()
    inputs = case.require()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad((case.stats().logprob ** 2).sum(), inputs, create_graph=True)


@kernel
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_without_gradients_from_hidden_states(mode):
    case = LinearCase()
    case.require()
    with mode():
        stats = case.stats()
    assert not stats.logprob.requires_grad
    assert_results(stats, case.exact()[0])


@kernel
def test_checkpointing_under_autocast_changes_nothing_from_hidden_states():
    case = LinearCase()
    inputs = case.require()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        plain = case.stats().logprob.sum()
        again = checkpoint(lambda h: case.stats(hidden=h).logprob.sum(), case.inputs["hidden"], use_reentrant=False)
    expected, found = (torch.autograd.grad(loss, inputs) for loss in (plain, again))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@kernel
@pytest.mark.parametrize("share", [False, True])
def test_the_operators_pass_opcheck_from_hidden_states(share):
    case = LinearCase((2, 3), 30, bias=True, share=share)
    case.require()
    inputs, ref = case.inputs, case.ref
    arguments = (inputs["hidden"], inputs["weight"], inputs["bias"], case.labels)
    reference = (ref["ref_hidden"], ref["ref_weight"].detach(), ref["ref_bias"])
    operator, autocast = torch.ops.hybrid_kernels.linear_logprob.default, torch.bfloat16 if share else None
    options = (0.7, 30.0, True, autocast, 2**20 if share else 0)
    torch.library.opcheck(operator, (*arguments, *(reference if share else (None,) * 3), *options))


@kernel
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_it_compiles_without_a_graph_break_from_hidden_states(backend, autocast):
    case = LinearCase(bias=True)
    inputs = case.require()

    def loss(hidden):
        with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
            stats = case.stats(hidden=hidden * 1.0, keep_bytes=2**20 if autocast else 0)
        return (stats.logprob + 0.1 * stats.entropy - stats.kl).mean()

    expected = torch.autograd.grad(loss(case.inputs["hidden"]), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for a, b in zip(torch.autograd.grad(compiled(case.inputs["hidden"]), inputs), expected, strict=True):
        torch.testing.assert_close(a, b)
