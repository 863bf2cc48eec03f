"""The masked cross-entropy and its token weights, against hand-computed values and a loop."""

import math

import pytest
import torch

from hybrid.functional import sft_loss

# float64 sums over a dozen tokens: rounding stays far below this.
TIGHT = 1e-10
WEIGHTS = ["one", "p", "p(1-p)", "markov"]


def case(seed=0, dtype=torch.float64):
    """Log-probs (4, 6) and a mask whose rows hold different numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    logprob = -3 * torch.rand(4, 6, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()
    return logprob.to(dtype), mask


def weights_of_row(logprobs, kind, decay):
    """The weights of one row's trained tokens, given as a list of their log-probs."""
    p = [math.exp(x) for x in logprobs]
    if kind == "markov":
        raw = [decay ** (len(p) - 1 - k) for k in range(len(p))]
        return [w * len(raw) / math.fsum(raw) for w in raw]
    return [{"one": 1.0, "p": x, "p(1-p)": x * (1 - x)}[kind] for x in p]


def loss_and_gradient_by_loop(logprob, mask, kind, decay=0.95):
    """The loss, and its gradient -w / n with the weights held constant."""
    count = int(mask.sum())
    terms, gradient = [], torch.zeros_like(logprob)
    for b in range(logprob.shape[0]):
        tokens = [t for t in range(logprob.shape[1]) if mask[b, t]]
        weights = weights_of_row([logprob[b, t].item() for t in tokens], kind, decay)
        for t, w in zip(tokens, weights, strict=True):
            terms.append(-w * logprob[b, t].item())
            gradient[b, t] = -w / count
    return math.fsum(terms) / count, gradient


@pytest.mark.parametrize(
    ("kind", "expected"),
    # Two tokens of probability 1/2 and 1/4; markov's raw weights 1/2 and 1 become 2/3 and 4/3.
    [
        ("one", 1.5 * math.log(2)),
        ("p", 0.5 * math.log(2)),
        ("p(1-p)", (0.25 + 2 * 3 / 16) / 2 * math.log(2)),
        ("markov", (2 / 3 + 2 * 4 / 3) / 2 * math.log(2)),
    ],
)
def test_loss_of_two_tokens_by_hand(kind, expected):
    logprob = torch.tensor([[0.5, 0.25, 0.125]], dtype=torch.float64).log()
    loss, _ = sft_loss(logprob, torch.tensor([[1, 1, 0]]), token_weight=kind, markov_decay=0.5)
    assert loss.item() == pytest.approx(expected, abs=TIGHT)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("seed", range(2))
def test_loss_equals_a_loop(kind, seed):
    logprob, mask = case(seed)
    loss, _ = sft_loss(logprob, mask, token_weight=kind)
    assert loss.item() == pytest.approx(loss_and_gradient_by_loop(logprob, mask, kind)[0], abs=TIGHT)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_gradient_is_that_of_constant_weights(kind):
    # Regression for ms-swift #6952: the weights let a gradient through.
    logprob, mask = case()
    sft_loss(logprob.requires_grad_(), mask, token_weight=kind)[0].backward()
    expected = loss_and_gradient_by_loop(logprob.detach(), mask, kind)[1]
    torch.testing.assert_close(logprob.grad, expected, rtol=0, atol=TIGHT)


@pytest.mark.parametrize("kind", ["one", "markov"])
def test_gradients_pass_gradcheck(kind):
    # The weights p and p(1-p) are stopped, so a finite difference would not see what autograd does.
    logprob, mask = case()
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, mask, token_weight=kind)[0], logprob.requires_grad_())


def test_one_is_the_default_weight():
    assert torch.equal(sft_loss(*case())[0], sft_loss(*case(), token_weight="one")[0])


def test_loss_with_weight_one_is_torch_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(9, (3, 5), generator=generator)
    labels[:, :2] = -100
    logprob = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(sft_loss(logprob, labels != -100)[0], expected, rtol=0, atol=TIGHT)


def test_markov_weights_differ_only_within_the_window():
    logprob = torch.full((1, 6), -1.0, dtype=torch.float64, requires_grad=True)
    loss, _ = sft_loss(logprob, torch.ones(1, 6), token_weight="markov", markov_decay=0.5, markov_window=2)
    loss.backward()
    # 2^-2 four times, then 2^-1 and 1: their sum is 2.5, and a mean of 1 makes it 6; the loss divides by 6.
    expected = -torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.5, 1.0]], dtype=torch.float64) / 2.5
    assert torch.allclose(logprob.grad, expected, atol=TIGHT)


def test_markov_weights_grow_towards_the_most_recent_token():
    logprob = torch.full((1, 5), -1.0, dtype=torch.float64).requires_grad_()
    sft_loss(logprob, torch.ones(1, 5), token_weight="markov", markov_decay=0.5)[0].backward()
    assert (logprob.grad.abs().diff() > 0).all()


def test_markov_weights_have_mean_one_in_every_row():
    logprob, mask = case()
    loss, _ = sft_loss(torch.full_like(logprob, -1.0), mask, token_weight="markov", markov_decay=0.3)
    assert loss.item() == pytest.approx(1.0, abs=TIGHT)


def test_markov_with_decay_one_is_plain_cross_entropy():
    loss, _ = sft_loss(*case(), token_weight="markov", markov_decay=1.0)
    assert loss.item() == pytest.approx(sft_loss(*case())[0].item(), abs=TIGHT)


def test_markov_weights_stay_finite_over_a_long_row():
    # 0.5^4999 is 0 in float32: the oldest tokens then weigh nothing, and nothing is NaN.
    loss, _ = sft_loss(torch.full((1, 5000), -1.0), torch.ones(1, 5000), token_weight="markov", markov_decay=0.5)
    assert loss.item() == pytest.approx(1.0, rel=1e-5)  # float32 sum of 5000 terms


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_what_stands_outside_the_mask_reaches_neither_loss_nor_gradient(kind, poison):
    results = []
    for value in (0.0, poison):
        logprob, mask = case()
        logprob = logprob.masked_fill(~mask, value).requires_grad_()
        loss, _ = sft_loss(logprob, mask, token_weight=kind)
        loss.backward()
        results.append(torch.cat([loss.detach().view(1), logprob.grad.flatten()]))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("left", "right"), [(2, 0), (0, 3)])
def test_padding_on_either_side_changes_nothing(kind, left, right):
    logprob, mask = case()
    padded = torch.nn.functional.pad(logprob, (left, right), value=-9.0)
    padded_mask = torch.nn.functional.pad(mask, (left, right), value=False)
    loss, _ = sft_loss(padded, padded_mask, token_weight=kind)
    assert loss.item() == pytest.approx(sft_loss(logprob, mask, token_weight=kind)[0].item(), abs=TIGHT)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("sizes", [[1, 3], [3, 1], [1, 1, 1, 1]])
def test_microbatches_with_num_tokens_add_up_to_the_whole_gradient(kind, sizes):
    # Regression for SkyRL #1504, prime-rl #1957 and others: a mean of the microbatches' means.
    logprob, mask = case()
    whole, parts = logprob.clone().requires_grad_(), logprob.clone().requires_grad_()
    sft_loss(whole, mask, token_weight=kind)[0].backward()
    for rows, valid in zip(parts.split(sizes), mask.split(sizes), strict=True):
        sft_loss(rows, valid, token_weight=kind, num_tokens=int(mask.sum()))[0].backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=TIGHT)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("num_tokens", [None, 0, 7])
def test_an_empty_mask_gives_a_connected_zero(kind, num_tokens):
    # Regression for TRL #7077: a fully masked batch detached the graph and hung DDP.
    logprob, mask = case()
    loss, _ = sft_loss(logprob.requires_grad_(), mask & False, token_weight=kind, num_tokens=num_tokens)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logprob.grad, torch.zeros_like(logprob))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_an_empty_row_adds_nothing(kind):
    logprob, mask = case()
    longer = torch.cat([logprob, logprob[:1]]), torch.cat([mask, mask[:1] & False])
    loss = sft_loss(*longer, token_weight=kind)[0].item()
    assert loss == pytest.approx(sft_loss(logprob, mask, token_weight=kind)[0].item(), abs=TIGHT)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_nll_is_the_unweighted_mean_over_the_mask(kind):
    logprob, mask = case()
    _, metrics = sft_loss(logprob, mask, token_weight=kind, num_tokens=999)
    assert metrics["nll"].item() == pytest.approx(loss_and_gradient_by_loop(logprob, mask, "one")[0], abs=TIGHT)


def test_metrics_are_detached():
    logprob, mask = case()
    _, metrics = sft_loss(logprob.requires_grad_(), mask)
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize(
    ("given", "returned"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_loss_is_float64_for_float64_and_float32_for_the_rest(kind, given, returned):
    assert sft_loss(*case(dtype=given), token_weight=kind)[0].dtype == returned


@pytest.mark.parametrize("kind", WEIGHTS)
def test_loss_under_autocast_is_the_float32_one(kind):
    logprob, mask = case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under = sft_loss(logprob, mask, token_weight=kind)[0]
    assert torch.equal(under, sft_loss(logprob, mask, token_weight=kind)[0])


def test_an_unknown_weight_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"one, p, p\(1-p\), markov.*'focal'"):
        sft_loss(*case(), token_weight="focal")


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5])
def test_a_markov_decay_outside_zero_to_one_is_refused(decay):
    with pytest.raises(ValueError, match="markov_decay"):
        sft_loss(*case(), token_weight="markov", markov_decay=decay)


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        sft_loss(torch.zeros(2, 3), torch.ones(3))
