"""Drawing a token: the distribution, to the last of its tokens, and the edges of the cumulative sum."""

import math

import pytest
import torch

from hybrid.rollout.draw import draw


def uniforms(num_rows, seed=0):
    return torch.rand(num_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loop(logits, uniform, temperature):
    """The first token whose cumulative probability passes the uniform number, in Python's float64."""
    weights = [math.exp((z - max(logits)) / temperature) for z in logits]
    total, seen = math.fsum(weights), 0.0
    for token, weight in enumerate(weights):
        seen += weight / total
        if seen > uniform:
            return token, math.log(weight / total)
    raise AssertionError("the shares end below 1")


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_token_is_the_first_whose_cumulative_probability_passes_the_number(vocab, temperature):
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    uniform = uniforms(64)
    token, logprob = draw(logits, uniform, temperature=temperature)
    expected = [by_loop(z, u, temperature) for z, u in zip(logits.double().tolist(), uniform.tolist(), strict=True)]
    assert token.tolist() == [t for t, _ in expected]
    torch.testing.assert_close(logprob.tolist(), [x for _, x in expected], rtol=0, atol=1e-5)


def test_shares_of_a_large_vocabulary_are_the_probabilities_to_1e_7():
    # The edges between tokens, where a float32 running sum of 50,257 terms is off by 1e-5, stand where they should.
    logits = torch.randn(1, 50_257, generator=torch.Generator().manual_seed(0)) * 2
    edges = logits.double().softmax(-1).cumsum(-1)[0]
    tokens = torch.arange(1, 50_257, 501)
    rows = logits.expand(len(tokens), -1)
    assert (draw(rows, edges[tokens] - 1e-7)[0] <= tokens).all()
    assert (draw(rows, (edges[tokens - 1] + 1e-7).clamp(max=1 - 1e-16))[0] >= tokens).all()


def test_drawn_shares_are_the_probabilities():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    token, _ = draw(probs.log().expand(40_000, 4), uniforms(40_000))
    seen = torch.bincount(token, minlength=4) / 40_000
    # Five standard errors.
    assert ((seen - probs).abs() <= 5 * (probs * (1 - probs) / 40_000).sqrt()).all()


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_no_token_of_probability_zero_is_drawn(uniform):
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [300, 301, 700]] = 0.0
    token, logprob = draw(logits, torch.tensor([uniform], dtype=torch.float64))
    assert token.item() in (300, 301, 700)
    assert logprob.item() == pytest.approx(-math.log(3), abs=1e-6)


def test_numbers_of_float32_draw_from_the_same_distribution():
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)).expand(20_000, -1)
    numbers = uniforms(20_000)
    short, exact = draw(logits, numbers.float())[0], draw(logits, numbers)[0]
    assert (short == exact).float().mean() > 0.999  # the edges between 1000 tokens are moved by 1e-7


def test_the_largest_number_draws_the_last_token_that_has_a_share():
    logits = torch.zeros(1, 600)
    logits[0, 520:] = -torch.inf
    assert draw(logits, torch.tensor([1 - 2**-53], dtype=torch.float64))[0].item() == 519


def test_top_k_and_top_p_cut_before_the_draw():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, 4)
    assert set(draw(logits, uniforms(2000), top_k=2)[0].tolist()) == {0, 1}
    token, logprob = draw(logits, uniforms(2000), top_p=0.9)
    assert set(token.tolist()) == {0, 1, 2}
    torch.testing.assert_close(logprob[token == 1][0].item(), math.log(0.3 / 0.95), rtol=0, atol=1e-6)


def test_a_greedy_token_is_certain():
    token, logprob = draw(torch.tensor([[0.0, 2.0, 1.0]]), uniforms(1), temperature=0.0)
    assert (token.item(), logprob.item()) == (1, 0.0)


def test_logits_that_are_not_finite_draw_a_legal_id():
    for value in (torch.nan, torch.inf):
        assert 0 <= draw(torch.full((1, 300), value), uniforms(1))[0].item() < 300
