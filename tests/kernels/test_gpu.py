"""What only a GPU can show of the kernels: offsets, variants, synchronisation, invariance, accuracy, memory."""

import pytest
import torch
from kernel_case import (
    ALL,
    DEVICE,
    GRADIENT,
    IGNORE,
    NAMES,
    LinearCase,
    assert_results,
    normal,
    on_gpu,
    oracle,
    some_labels,
    weighted,
)

pytest.importorskip("triton", reason="Triton is an extra: pip install 'hybrid-trainer[triton]'")

from hybrid_kernels import linear_logprob, linear_logprob_loss, token_stats


@on_gpu
@pytest.mark.gpu
def test_element_offsets_beyond_int32_are_right_from_logits():
    rows, vocab = 16_500, 131_072  # 2.16e9 elements > 2^31
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device=DEVICE).normal_()
    labels = some_labels((rows,), vocab)
    logits.requires_grad_()
    stats = token_stats(logits, labels, want=NAMES[:2])
    stats.logprob.sum().backward()
    tail = logits.detach()[-8:].double().requires_grad_()
    expected = oracle(tail, labels[-8:])
    expected["logprob"].sum().backward()
    assert_results(type(stats)(stats.logprob[-8:], stats.entropy[-8:]), expected)
    torch.testing.assert_close(logits.grad[-8:].double(), tail.grad, **GRADIENT[torch.bfloat16])


@on_gpu
@pytest.mark.gpu
def test_64_row_counts_compile_at_most_two_variants_from_logits():
    from hybrid_kernels.epilogue import backward_kernel, forward_kernel

    def variants():
        return [sum(len(caches[0]) for caches in k.device_caches.values()) for k in (forward_kernel, backward_kernel)]

    before = variants()
    for n in range(1, 65):
        logits = normal(n, 1001, dtype=torch.float16).requires_grad_()
        token_stats(logits, some_labels((n,), 1001), temperature=1 + n / 64).logprob.sum().backward()
    assert all(b - a <= 2 for a, b in zip(before, variants(), strict=True))


@on_gpu
@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_from_logits():
    logits, ref, labels = normal(8, 1000).requires_grad_(), normal(8, 1000, seed=5), some_labels((8,), 1000)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(x.sum() for x in token_stats(logits, labels, ref_logits=ref, **ALL)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [50_257, 128_256])
def test_a_row_of_a_batch_has_the_bits_of_the_row_alone(vocab):
    logits, labels = normal(40, vocab, dtype=torch.bfloat16), some_labels((40,), vocab)
    whole = token_stats(logits, labels, want=NAMES[:2])
    for rows in (slice(0, 1), slice(3, 4), slice(7, 20)):
        alone = token_stats(logits[rows], labels[rows], want=NAMES[:2])
        assert torch.equal(alone.logprob, whole.logprob[rows]) and torch.equal(alone.entropy, whole.entropy[rows])


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [50_257, 128_256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_at_least_as_accurate_as_eager_torch_from_logits(vocab, dtype):
    logits, labels = normal(64, vocab, dtype=dtype, scale=4.0), some_labels((64,), vocab)
    exact = oracle(logits, labels)["logprob"]
    eager = torch.log_softmax(logits.float(), -1).gather(-1, labels[:, None])[:, 0]
    found = token_stats(logits, labels).logprob
    # 1e-6: one rounding of a log-probability of order 10.
    assert (found - exact).abs().max() <= (eager - exact).abs().max() + 1e-6


@on_gpu
@pytest.mark.gpu
def test_64_row_counts_compile_at_most_two_variants_from_hidden_states():
    from hybrid_kernels.epilogue import backward_kernel, forward_kernel

    def variants():
        return [sum(len(caches[0]) for caches in k.device_caches.values()) for k in (forward_kernel, backward_kernel)]

    before = variants()
    for n in range(1, 65):
        case = LinearCase((n * 37,), 50_257, ref=False)
        inputs = case.require()
        torch.autograd.grad(case.stats(want=("entropy",), temperature=1 + n / 64).entropy.sum(), inputs)
    assert all(b - a <= 2 for a, b in zip(before, variants(), strict=True))


@on_gpu
@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_from_hidden_states():
    case = LinearCase((64,), 3000, bias=True)
    case.labels[3] = IGNORE
    inputs = case.require()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(sum(x.sum() for x in case.stats()), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.gpu
def test_gradients_are_the_same_bits_every_time_from_hidden_states():
    case = LinearCase((512,), 50_257, dtype=torch.bfloat16, share=True)
    inputs = case.require()
    first, second = (torch.autograd.grad(weighted(case.stats()), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("vocab", "width"), [(50_257, 768), (128_256, 4096)])
def test_it_is_at_least_as_accurate_as_eager_torch_from_hidden_states(vocab, width):
    hidden, weight = normal(64, width, dtype=torch.bfloat16), normal(vocab, width, seed=1, dtype=torch.bfloat16) / 16
    labels = some_labels((64,), vocab)
    exact = oracle(hidden.double() @ weight.double().T, labels)["logprob"]
    eager = torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, labels[:, None])[:, 0]
    found = linear_logprob(hidden, weight, labels).logprob
    # Logits of the product in float32 against logits rounded to bfloat16.
    assert (found - exact).abs().max() <= (eager - exact).abs().max()


@on_gpu
@pytest.mark.gpu
def test_extra_memory_stays_below_one_gibibyte_on_the_head_of_llama_3_8b_from_hidden_states():
    rows, vocab, width = 8192, 128_256, 4096
    hidden = torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE).normal_().requires_grad_()
    weight = torch.empty(vocab, width, dtype=torch.bfloat16, device=DEVICE).normal_(std=0.02).requires_grad_()
    ref = hidden.detach().roll(1, 0)
    labels = some_labels((rows,), vocab)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stats = linear_logprob(hidden, weight, labels, ref_hidden=ref, ref_weight=weight.detach(), **ALL)
    weighted(stats).backward()
    gradients = 2 * (hidden.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before - gradients <= 2**30


@on_gpu
@pytest.mark.gpu
def test_extra_memory_stays_below_3_2_gibibytes_on_the_head_of_qwen_2_5_7b_with_the_gradient_in_forward():
    rows, vocab, width = 8192, 151_936, 3584
    hidden = torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE).normal_().requires_grad_()
    weight = torch.empty(vocab, width, dtype=torch.bfloat16, device=DEVICE).normal_(std=0.02).requires_grad_()
    labels = some_labels((rows,), vocab)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_logprob_loss(hidden, weight, labels, lambda stats, rows: -stats.logprob)[0].backward()
    gradients = 2 * (hidden.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before - gradients <= 3.2 * 2**30
