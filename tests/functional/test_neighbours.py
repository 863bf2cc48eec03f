"""The nearest keys and what they say, against loops over single numbers."""

import math

import pytest
import torch

from hybrid.functional import knn_label_prob, knn_prob, mixed_logprob, nearest, squared_distance


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(queries, keys, k):
    """(distance, index) of each query, in plain Python."""
    rows = []
    for query in queries.double().tolist():
        squared = [sum((a - b) ** 2 for a, b in zip(query, key, strict=True)) for key in keys.double().tolist()]
        order = sorted(range(len(squared)), key=squared.__getitem__)[:k]
        rows.append(([squared[i] for i in order], order))
    return [row[0] for row in rows], [row[1] for row in rows]


@pytest.mark.parametrize("block", [1, 3, 7, 40, 100])
def test_the_nearest_are_those_of_a_loop_in_blocks_of_any_size(block):
    queries, keys = random(6, 5), random(40, 5, seed=1)
    squared, index = nearest(queries, keys, 4, block=block)
    expected, places = by_hand(queries, keys, 4)
    assert index.tolist() == places
    torch.testing.assert_close(squared, torch.tensor(expected, dtype=torch.float64))


def test_short_keys_far_from_the_origin_have_exact_distances():
    """|key|² is 1e4 times d² here: taken from it, d² would be off by a per cent."""
    keys = (random(60, 8, seed=1) * 0.1 + 20).half()
    queries = keys[:5].float() + random(5, 8, dtype=torch.float32) * 0.01
    squared, index = nearest(queries, keys, 60, block=16)
    assert torch.equal(index.sort(1).values, torch.arange(60).expand(5, -1))
    exact = (keys[index].double() - queries.double().unsqueeze(1)).square().sum(-1)
    torch.testing.assert_close(squared.double(), exact, rtol=1e-5, atol=1e-7)  # float32
    assert (squared.diff(dim=1) >= 0).all()
    assert squared.dtype == torch.float32


def test_a_key_is_at_distance_zero_from_itself():
    keys = random(9, 4, dtype=torch.float32) + 50
    squared, index = nearest(keys, keys, 1)
    assert index.squeeze(1).tolist() == list(range(9))
    assert (squared == 0).all()


def test_more_neighbours_than_keys_are_refused():
    for k in (0, 4):
        with pytest.raises(ValueError, match=r"k must lie in \[1, 3\]"):
            nearest(random(2, 2), random(3, 2), k)


def test_the_neighbours_distribution_is_that_of_a_loop():
    queries, keys, values = random(5, 3), random(30, 3, seed=1), torch.arange(30) % 7
    squared, index = nearest(queries, keys, 12)
    found = knn_prob(squared, values[index], 9, temperature=0.7)
    for row, places, p in zip(*by_hand(queries, keys, 12), found.tolist(), strict=True):
        mass = [0.0] * 9
        for d, i in zip(row, places, strict=True):
            mass[int(values[i])] += math.exp(-d / 0.7)
        assert p == pytest.approx([m / sum(mass) for m in mass], abs=1e-12)
    labels = torch.tensor([0, 3, 6, 8, 2])
    at_labels = knn_label_prob(squared, values[index], labels, temperature=0.7)
    torch.testing.assert_close(at_labels, found.gather(1, labels.unsqueeze(1)).squeeze(1))


def test_the_neighbours_distribution_by_hand():
    squared = torch.tensor([[0.0, math.log(2.0), math.log(4.0)]], dtype=torch.float64)
    found = knn_prob(squared, torch.tensor([[2, 0, 2]]), 4, temperature=1.0)
    torch.testing.assert_close(found, torch.tensor([[2 / 7, 0.0, 5 / 7, 0.0]], dtype=torch.float64))


def test_far_neighbours_still_have_all_the_mass():
    """exp(-d²) is 0 in float32 for each of them."""
    found = knn_prob(torch.tensor([[5000.0, 5000.0, 9000.0]]), torch.tensor([[1, 2, 0]]), 3, temperature=1.0)
    assert found.tolist() == [[0.0, 0.5, 0.5]]


@pytest.mark.parametrize("lam", [1e-9, 0.3, 0.999])
def test_the_mixture_is_that_of_the_probabilities(lam):
    logprob = random(4, 6).log_softmax(1)
    prob = random(4, 6, seed=1).softmax(1).masked_fill(torch.eye(4, 6, dtype=torch.bool), 0.0)
    expected = ((1 - lam) * logprob.exp() + lam * prob).log()
    torch.testing.assert_close(mixed_logprob(logprob, prob, lam), expected)


def test_the_ends_of_the_mixture_are_its_sides():
    logprob, prob = torch.tensor([-torch.inf, -0.1, -2.0]), torch.tensor([0.5, 0.0, 0.5])
    assert torch.equal(mixed_logprob(logprob, prob, 0.0), logprob)
    assert torch.equal(mixed_logprob(logprob, prob, 1.0), prob.log())
    assert not mixed_logprob(logprob, prob, 0.5).isnan().any()


def test_numbers_without_a_meaning_are_refused():
    squared, values = torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        knn_prob(squared, values, 3, temperature=0.0)
    for lam in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"lam must lie in \[0, 1\]"):
            mixed_logprob(torch.zeros(2), torch.ones(2), lam)


def test_the_distance_is_to_the_keys_that_were_named():
    keys = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    found = squared_distance(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), keys, torch.tensor([[1, 2], [2, 0]]))
    assert found.tolist() == [[25.0, 1.0], [0.0, 1.0]]
