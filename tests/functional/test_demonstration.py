"""The losses of demonstrations, and what entropy says of rows and tokens, against loops of python floats."""

import math

import pytest
import torch

from hybrid.functional import entropy_threshold, entropy_weight, reinforce_loss, shaped_loss

TIGHT = 1e-12  # float64 sums over a dozen tokens
MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
VALID = MASK.nonzero().tolist()


def case(seed=0):
    """logprob, which is at most 0, and another number for each token, (3, 5)."""
    logprob, other = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return -2 * logprob.abs(), other


@pytest.mark.parametrize("gamma", [0.1, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_the_shaped_loss_and_its_gradient_equal_a_loop(seed, gamma):
    logprob, advantage = case(seed)
    terms, gradient = [], torch.zeros_like(logprob)
    for b, t in VALID:
        p, a = math.exp(logprob[b, t]), advantage[b, t].item()
        terms.append(-a * p / (p + gamma))
        gradient[b, t] = -a * gamma * p / (p + gamma) ** 2 / 20
    logprob.requires_grad_()
    loss = shaped_loss(logprob, advantage, MASK, gamma=gamma, num_tokens=20)
    loss.backward()
    assert loss.item() == pytest.approx(math.fsum(terms) / 20, abs=TIGHT)
    torch.testing.assert_close(logprob.grad, gradient, rtol=0, atol=TIGHT)


def test_losses_of_demonstrations_pass_gradcheck():
    logprob, other = case()
    for loss in (shaped_loss, reinforce_loss):
        assert torch.autograd.gradcheck(
            lambda x, loss=loss: loss(x, other, MASK), (logprob.clone().requires_grad_(),)
        ), loss  # fmt: skip


def test_a_token_is_pushed_most_where_its_probability_is_gamma():
    logprob = torch.linspace(-6, 0, 601, dtype=torch.float64).unsqueeze(0).requires_grad_()
    shaped_loss(logprob, torch.ones_like(logprob), torch.ones_like(logprob)).backward()
    assert logprob[0, logprob.grad[0].argmin()].exp().item() == pytest.approx(0.1, rel=0.01)


def test_a_probability_too_small_for_a_float_has_no_loss_and_no_nan():
    logprob = torch.tensor([[-math.inf, -1e4, 0.0]], requires_grad=True)
    shaped_loss(logprob, torch.ones(1, 3), torch.ones(1, 3)).backward()
    assert logprob.grad[0, :2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "fixed_length"])
@pytest.mark.parametrize("loss", [shaped_loss, reinforce_loss])
def test_both_are_averaged_as_the_policy_loss_is(loss, aggregation):
    logprob, other = case()
    each = [loss(logprob[b : b + 1, t : t + 1], other[b : b + 1, t : t + 1], torch.ones(1, 1)) for b, t in VALID]
    rows = [[x.item() for x, (row, _) in zip(each, VALID, strict=True) if row == b] for b in range(3)]
    expected = {
        "token_mean": sum(map(sum, rows)) / len(VALID),
        "sequence_mean": sum(sum(row) / len(row) for row in rows) / 3,
        "fixed_length": sum(map(sum, rows)) / (3 * 7),
    }[aggregation]
    length = 7 if aggregation == "fixed_length" else None
    found = loss(logprob, other, MASK, aggregation=aggregation, fixed_length=length)
    assert found.item() == pytest.approx(expected, abs=TIGHT)


@pytest.mark.parametrize("seed", range(3))
def test_the_reinforced_log_probs_equal_a_loop(seed):
    logprob, weight = case(seed)
    expected = math.fsum(-weight[b, t].item() * logprob[b, t].item() for b, t in VALID) / len(VALID)
    assert reinforce_loss(logprob, weight, MASK).item() == pytest.approx(expected, abs=TIGHT)


@pytest.mark.parametrize("loss", [shaped_loss, reinforce_loss])
def test_what_stands_outside_of_the_mask_reaches_nothing_and_the_weights_have_no_gradient(loss):
    logprob, other = case()
    whole = loss(logprob, other, MASK)
    poisoned = [x.masked_fill(~MASK, math.nan).requires_grad_() for x in (logprob, other)]
    again = loss(*poisoned, MASK)
    again.backward()
    assert torch.equal(again.detach(), whole)
    assert poisoned[0].grad.isfinite().all() and poisoned[1].grad is None


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_rows_weight_is_by_the_mean_entropy_of_its_tokens(sign):
    entropy = case()[1].abs()
    found = entropy_weight(entropy.masked_fill(~MASK, math.nan), MASK, 0.5, sign)
    for b in range(3):
        row = [entropy[b, t].item() for t in range(5) if MASK[b, t]]
        assert found[b].item() == pytest.approx(0.5 * math.exp(sign * sum(row) / len(row)), abs=TIGHT)


@pytest.mark.parametrize(("share", "count"), [(0.2, 2), (0.5, 5), (1.0, 9), (0.01, 1)])
def test_the_threshold_leaves_the_share_of_tokens_with_the_most_entropy(share, count):
    entropy = case()[1]
    least = entropy_threshold(entropy.masked_fill(~MASK, math.nan), MASK, share)
    highest = sorted((entropy[b, t].item() for b, t in VALID), reverse=True)[:count]
    assert sorted((x for x in entropy[MASK].tolist() if x >= least.item()), reverse=True) == highest


def test_of_no_token_none_is_above_the_threshold():
    assert entropy_threshold(torch.ones(2, 3), torch.zeros(2, 3), 0.2) == math.inf


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="gamma must be > 0, got 0"):
        shaped_loss(*case(), MASK, gamma=0)
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\], got 0"):
        entropy_threshold(case()[0], MASK, 0)
