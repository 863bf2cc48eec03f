"""The sequence-level ratio of GSPO, against a loop over the objective that its authors give.

    s_i = (pi(y_i) / pi_old(y_i))^(1 / |y_i|)
    J   = mean over responses i of min(s_i A_i, clip(s_i, 1 - left, 1 + right) A_i)

As in arXiv:2507.18071; its text was not at hand, and the formulas were read in two reviews of it, which agree, and in
the name that TRL has for it (`importance_sampling_level="sequence"`).
"""

import math

import pytest
import torch

from hybrid.functional import policy_loss

TIGHT = 1e-12  # float64 sums over a dozen tokens
MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()


def case(seed=0):
    """logprob, old_logprob (3, 5), and an advantage for each row: some ratios lie outside of the clip."""
    generator = torch.Generator().manual_seed(seed)
    noise, old_logprob = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    old_logprob = -old_logprob.abs()
    return old_logprob + 0.4 * noise, old_logprob, torch.randn(3, generator=generator, dtype=torch.float64)


def loss_of(logprob, old_logprob, advantage, mask=MASK, **options):
    options = {"clip": 0.05, "clip_high": 0.1, "aggregation": "sequence_mean", "ratio": "sequence", **options}
    return policy_loss(logprob, old_logprob, advantage.unsqueeze(1).expand_as(mask), mask, **options)


@pytest.mark.parametrize("seed", range(4))
def test_gspo_equals_a_loop(seed):
    logprob, old_logprob, advantage = case(seed)
    objective = []
    for row in range(3):
        tokens = [t for t in range(5) if MASK[row, t]]
        likelihood = math.prod(math.exp(logprob[row, t]) for t in tokens)
        old_likelihood = math.prod(math.exp(old_logprob[row, t]) for t in tokens)
        s, a = (likelihood / old_likelihood) ** (1 / len(tokens)), advantage[row].item()
        objective.append(min(s * a, min(max(s, 0.95), 1.1) * a))
    loss, _ = loss_of(logprob, old_logprob, advantage)
    assert loss.item() == pytest.approx(-math.fsum(objective) / 3, abs=TIGHT)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("seed", range(4))
def test_its_gradient_passes_gradcheck(seed, aggregation):
    logprob, old_logprob, advantage = case(seed)
    assert torch.autograd.gradcheck(
        lambda x: loss_of(x, old_logprob, advantage, aggregation=aggregation)[0], (logprob.requires_grad_(),)
    )


def test_tokens_with_advantages_of_their_own_keep_their_own_gradients():
    # GSPO-token: the row's ratio is the weight, and token t is pushed by its own advantage alone.
    logprob, old_logprob, _ = case()
    advantage = torch.arange(15, dtype=torch.float64).view(3, 5) - 7
    logprob.requires_grad_()
    policy_loss(logprob, old_logprob, advantage, MASK, clip=None, ratio="sequence")[0].backward()
    for row in range(3):
        tokens = [t for t in range(5) if MASK[row, t]]
        s = math.exp(math.fsum((logprob - old_logprob)[row, t].item() for t in tokens) / len(tokens))
        for t in tokens:
            expected = -s * advantage[row, t].item() / int(MASK.sum())
            assert logprob.grad[row, t].item() == pytest.approx(expected, abs=TIGHT)


def test_a_response_of_one_token_has_the_ratio_of_its_token():
    logprob, old_logprob, advantage = (x[1:2] for x in case())
    options = {"mask": MASK[1:2]}
    assert torch.equal(
        loss_of(logprob, old_logprob, advantage, **options)[0],
        loss_of(logprob, old_logprob, advantage, ratio="token", **options)[0],
    )


def test_a_response_is_clipped_as_a_whole():
    logprob = torch.tensor([[2.0, 0.25, 8.0], [1.0, 1.0, 1.0]], dtype=torch.float64).log()
    _, metrics = loss_of(logprob, torch.zeros(2, 3), torch.ones(2), torch.ones(2, 3).bool(), clip=0.2)
    # The geometric mean of 2, 1/4 and 8 is 4^(1/3) = 1.59: all three tokens are clipped, 1/4 among them.
    assert metrics["clip_fraction"].item() == 0.5
    assert metrics["ratio_max"].item() == pytest.approx(4 ** (1 / 3))


def test_equal_log_probs_have_the_ratio_one_exactly_and_what_is_masked_reaches_nothing():
    logprob, _, advantage = (x.float() for x in case())
    loss, metrics = loss_of(logprob, logprob.clone(), advantage)
    assert metrics["ratio_max"] == metrics["ratio_mean"] == 1.0
    poisoned = logprob.masked_fill(~MASK, math.nan)
    assert torch.equal(loss_of(poisoned, poisoned.clone(), advantage)[0], loss)


def test_an_unknown_ratio_is_refused():
    with pytest.raises(ValueError, match="ratio must be token or sequence, got 'row'"):
        loss_of(*case(), ratio="row")
