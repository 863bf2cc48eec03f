"""Advantages against a critic and within a group, against their definitions as loops over python floats."""

import math

import pytest
import torch

from hybrid.functional import gae, group_advantage, leave_one_out_advantage, varied_groups

# float64, rewards and values of order 1, at most 257 terms: rounding stays far below this.
TIGHT = 1e-10


def random_case(length, seed=0, rows=3, holes=True):
    generator = torch.Generator().manual_seed(seed)
    reward, value = torch.randn(2, rows, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) < 0.7 if holes else torch.ones(rows, length).bool()
    return reward, value, mask


def definition_of_row(reward, value, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, every term written out: O(T²)."""
    length = len(reward)
    delta = [reward[t] + gamma * (value[t + 1] if t + 1 < length else 0.0) - value[t] for t in range(length)]
    return [math.fsum((gamma * lam) ** k * delta[t + k] for k in range(length - t)) for t in range(length)]


def recursion_of_row(reward, value, gamma, lam):
    """delta and A by the recursion, from the last token back."""
    advantage, next_value, next_advantage = [], 0.0, 0.0
    for r, v in zip(reversed(reward), reversed(value), strict=True):
        next_advantage = r + gamma * next_value - v + gamma * lam * next_advantage
        next_value = v
        advantage.append(next_advantage)
    return advantage[::-1]


def by_loop(row_function, reward, value, mask, gamma, lam):
    """`row_function` of each row with its invalid tokens cut out; 0 where they were."""
    advantage = torch.zeros_like(reward)
    for b in range(reward.shape[0]):
        valid = [t for t in range(reward.shape[1]) if mask[b, t]]
        row = row_function([reward[b, t].item() for t in valid], [value[b, t].item() for t in valid], gamma, lam)
        for t, a in zip(valid, row, strict=True):
            advantage[b, t] = a
    return advantage


def test_gae_of_three_tokens_by_hand():
    reward = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    value = torch.tensor([[0.5, 0.25, 0.5]], dtype=torch.float64)
    # delta = 0.5*0.25 - 0.5, 0.5*0.5 - 0.25, 1 - 0.5 = -0.375, 0, 0.5; gamma*lam = 0.25.
    advantage, _ = gae(reward, value, torch.ones(1, 3), gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantage, torch.tensor([[-0.34375, 0.125, 0.5]], dtype=torch.float64))


def test_the_defaults_are_gamma_one_and_lambda_095():
    advantage, _ = gae(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), torch.ones(1, 2))
    torch.testing.assert_close(advantage, torch.tensor([[0.95, 1.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.5, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13, 64, 65])
def test_gae_equals_the_sum_of_discounted_deltas(length, gamma, lam):
    reward, value, mask = random_case(length)
    advantage, _ = gae(reward, value, mask, gamma=gamma, lam=lam)
    expected = by_loop(definition_of_row, reward, value, mask, gamma, lam)
    torch.testing.assert_close(advantage, expected, rtol=0, atol=TIGHT)


@pytest.mark.parametrize("length", [1, 31, 127, 128, 129, 256, 257])
@pytest.mark.parametrize("holes", [True, False])
def test_gae_equals_the_recursion(length, holes):
    reward, value, mask = random_case(length, holes=holes)
    advantage, _ = gae(reward, value, mask, gamma=0.99, lam=0.95)
    expected = by_loop(recursion_of_row, reward, value, mask, 0.99, 0.95)
    torch.testing.assert_close(advantage, expected, rtol=0, atol=TIGHT)


@pytest.mark.parametrize("length", [1, 5, 16, 257])
def test_gae_with_gamma_and_lambda_one_is_the_sum_of_coming_rewards_minus_value(length):
    reward, value, mask = random_case(length)
    reward, value = reward * mask, value * mask
    to_come = reward.flip(1).cumsum(1).flip(1)
    advantage, _ = gae(reward, value, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantage, (to_come - value) * mask, rtol=0, atol=TIGHT)


def test_gae_with_lambda_zero_is_delta():
    reward, value, mask = random_case(9, holes=False)
    next_value = torch.cat([value[:, 1:], torch.zeros(3, 1)], 1)
    advantage, _ = gae(reward, value, mask, gamma=0.9, lam=0.0)
    torch.testing.assert_close(advantage, reward + 0.9 * next_value - value, rtol=0, atol=TIGHT)


def test_gae_of_a_perfect_value_is_zero():
    # With gamma 1 the value of a token is the sum of the rewards still to come.
    reward = random_case(7, holes=False)[0]
    advantage, _ = gae(reward, reward.flip(1).cumsum(1).flip(1), torch.ones(3, 7))
    torch.testing.assert_close(advantage, torch.zeros_like(reward), rtol=0, atol=TIGHT)


@pytest.mark.parametrize("seed", range(3))
def test_return_is_advantage_plus_value_inside_the_mask(seed):
    reward, value, mask = random_case(11, seed)
    advantage, return_ = gae(reward, value, mask)
    torch.testing.assert_close(return_, (advantage + value) * mask, rtol=0, atol=TIGHT)


def test_a_row_with_holes_equals_the_compacted_row():
    # Regression for verl #2337: tool turns took part in the recursion.
    reward, value, _ = random_case(10, rows=1)
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1, 1, 0]]).bool()
    compact, _ = gae(reward[mask][None], value[mask][None], torch.ones(1, 5))
    torch.testing.assert_close(gae(reward, value, mask)[0][mask], compact[0], rtol=0, atol=TIGHT)


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (2, 7), (120, 9)])
def test_padding_on_either_side_changes_nothing(left, right):
    reward, value, mask = random_case(9)
    padded = [torch.nn.functional.pad(x, (left, right), value=5.0) for x in (reward, value)]
    padded_mask = torch.nn.functional.pad(mask, (left, right), value=False)
    inside = slice(left, left + 9)
    for wide, narrow in zip(gae(*padded, padded_mask), gae(reward, value, mask), strict=True):
        torch.testing.assert_close(wide[:, inside], narrow, rtol=0, atol=TIGHT)


def test_the_value_past_the_last_valid_token_counts_as_zero():
    # Regression for verl #50: values were not masked before GAE.
    advantage, _ = gae(torch.zeros(1, 2), torch.tensor([[1.0, 100.0]]), torch.tensor([[1, 0]]))
    assert advantage.tolist() == [[-1.0, 0.0]]


def test_rows_do_not_see_each_other():
    reward, value, mask = random_case(12)
    alone = torch.cat([gae(reward[b : b + 1], value[b : b + 1], mask[b : b + 1])[0] for b in range(3)])
    assert torch.equal(gae(reward, value, mask)[0], alone)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("output", [0, 1], ids=["advantage", "return"])
def test_what_stands_outside_the_mask_is_not_read(poison, output):
    reward, value, mask = random_case(12)
    poisoned = gae(reward.masked_fill(~mask, poison), value.masked_fill(~mask, poison), mask)
    assert torch.equal(poisoned[output], gae(reward, value, mask)[output])


@pytest.mark.parametrize("output", [0, 1], ids=["advantage", "return"])
def test_result_is_zero_outside_the_mask(output):
    reward, value, mask = random_case(12)
    assert (gae(reward, value, mask)[output][~mask] == 0).all()


@pytest.mark.parametrize("output", [0, 1], ids=["advantage", "return"])
def test_an_empty_mask_gives_zeros(output):
    reward, value, _ = random_case(4)
    assert torch.equal(gae(reward, value, torch.zeros(3, 4))[output], torch.zeros_like(reward))


@pytest.mark.parametrize("output", [0, 1], ids=["advantage", "return"])
def test_no_gradient_flows_through_gae(output):
    reward, value, mask = random_case(4)
    assert not gae(reward.requires_grad_(), value.requires_grad_(), mask)[output].requires_grad


def test_gae_leaves_its_inputs_as_they_were():
    reward, value, mask = random_case(6)
    before = reward.clone(), value.clone(), mask.clone()
    gae(reward, value, mask)
    assert all(torch.equal(a, b) for a, b in zip(before, (reward, value, mask), strict=True))


@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
    ],
)
@pytest.mark.parametrize("output", [0, 1], ids=["advantage", "return"])
def test_result_is_float64_for_float64_and_float32_for_the_rest(given, returned, output):
    x = torch.ones(2, 3, dtype=given)
    assert gae(x, x, torch.ones(2, 3))[output].dtype == returned


def test_float32_loses_no_more_than_its_own_rounding_over_257_tokens():
    reward, value, mask = random_case(257)
    advantage, _ = gae(reward.float(), value.float(), mask, gamma=1.0, lam=1.0)
    # 257 additions of order-1 terms, each to 6e-8 of a sum of order 16.
    torch.testing.assert_close(advantage.double(), gae(reward, value, mask, lam=1.0)[0], rtol=0, atol=257 * 6e-8 * 16)


def test_gae_under_autocast_is_the_float32_result():
    reward, value, mask = (x.float() for x in random_case(9))
    with torch.autocast("cpu", torch.bfloat16):
        advantage, _ = gae(reward, value, mask)
    assert torch.equal(advantage, gae(reward, value, mask)[0])


@pytest.mark.parametrize("wrong", [0, 1, 2], ids=["reward", "value", "mask"])
def test_different_shapes_are_refused(wrong):
    # Regression for verl #1758 and #1960: values one token longer than the mask.
    tensors = [torch.zeros(2, 4 if i == wrong else 3) for i in range(3)]
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        gae(*tensors)


@pytest.mark.parametrize("name", ["gamma", "lam"])
@pytest.mark.parametrize("number", [-0.1, 1.1, math.nan])
def test_gamma_and_lambda_outside_zero_to_one_are_refused(name, number):
    with pytest.raises(ValueError, match=name):
        gae(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), **{name: number})


WITHIN_GROUPS = {
    "group": group_advantage,
    "group mean": lambda score, group: group_advantage(score, group, scale_by_std=False),
    "leave one out": leave_one_out_advantage,
}
each_within = pytest.mark.parametrize("name", WITHIN_GROUPS)
# Ids that are no range, out of order, groups of 3, 2, 4 and 1.
GROUP = torch.tensor([7, -2, 7, 40, -2, 40, 7, 40, 5, 40])


def scores(seed=0):
    return torch.randn(len(GROUP), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def within_groups_by_loop(name, score, group):
    advantage = []
    for i, mine in enumerate(score):
        others = [score[j] for j in range(len(score)) if group[j] == group[i] and j != i]
        if not others:
            advantage.append(0.0)
        elif name == "leave one out":
            advantage.append(mine - math.fsum(others) / len(others))
        else:
            mean = math.fsum([mine, *others]) / (len(others) + 1)
            std = math.sqrt(math.fsum((x - mean) ** 2 for x in [mine, *others]) / len(others))
            advantage.append((mine - mean) / (std + 1e-4) if name == "group" else mine - mean)
    return torch.tensor(advantage, dtype=torch.float64)


@each_within
@pytest.mark.parametrize("seed", range(3))
def test_advantages_within_ragged_groups_equal_a_loop(name, seed):
    expected = within_groups_by_loop(name, scores(seed).tolist(), GROUP.tolist())
    torch.testing.assert_close(WITHIN_GROUPS[name](scores(seed), GROUP), expected, rtol=0, atol=TIGHT)


@pytest.mark.parametrize(
    ("name", "expected"),
    # Scores 1, 2, 6: mean 3, unbiased variance (4 + 1 + 9) / 2 = 7; the others' means are 4, 3.5 and 1.5.
    [
        ("group", [x / (math.sqrt(7) + 1e-4) for x in (-2.0, -1.0, 3.0)]),
        ("group mean", [-2.0, -1.0, 3.0]),
        ("leave one out", [-3.0, -1.5, 4.5]),
    ],
)
def test_advantages_within_a_group_of_three_by_hand(name, expected):
    advantage = WITHIN_GROUPS[name](torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64), torch.zeros(3).long())
    assert advantage.tolist() == pytest.approx(expected, abs=TIGHT)


@each_within
def test_advantages_of_every_group_add_up_to_zero(name):
    sums = torch.zeros(41, dtype=torch.float64).index_add_(0, GROUP.clamp(min=0), WITHIN_GROUPS[name](scores(), GROUP))
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=TIGHT)


@each_within
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_equal_scores_have_no_advantage_whatever_their_rounding(name, size):
    # 0.1 in float32: a mean that is one rounding off, divided by a spread of as little, would be an advantage of 1.
    advantage = WITHIN_GROUPS[name](torch.full((size,), 0.1), torch.zeros(size).long())
    assert (advantage == 0).all()


@each_within
def test_the_order_of_the_rows_changes_no_advantage_within_groups(name):
    order = torch.randperm(len(GROUP), generator=torch.Generator().manual_seed(0))
    whole = WITHIN_GROUPS[name](scores(), GROUP)
    torch.testing.assert_close(WITHIN_GROUPS[name](scores()[order], GROUP[order]), whole[order], rtol=0, atol=TIGHT)


@each_within
def test_groups_do_not_see_each_other(name):
    score = scores()
    poisoned = WITHIN_GROUPS[name](score.masked_fill(GROUP == 40, math.nan), GROUP)
    assert torch.equal(poisoned[GROUP != 40], WITHIN_GROUPS[name](score, GROUP)[GROUP != 40])


@each_within
@pytest.mark.parametrize(
    ("given", "returned"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_advantages_within_groups_are_float64_for_float64_and_float32_for_the_rest(name, given, returned):
    assert WITHIN_GROUPS[name](scores().to(given), GROUP).dtype == returned


@each_within
def test_no_gradient_flows_through_advantages_within_groups(name):
    assert not WITHIN_GROUPS[name](scores().requires_grad_(), GROUP).requires_grad


@each_within
def test_a_group_for_every_score_is_demanded(name):
    with pytest.raises(ValueError, match=r"group \(3,\)"):
        WITHIN_GROUPS[name](torch.zeros(4), torch.zeros(3).long())


@pytest.mark.parametrize("seed", range(4))
def test_the_varied_groups_are_those_with_two_scores_that_differ(seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 2, (14,), generator=generator).float()
    group = torch.randint(0, 6, (14,), generator=generator)
    found = varied_groups(score, group).tolist()
    for row in range(14):
        scores = {score[other].item() for other in range(14) if group[other] == group[row]}
        assert found[row] == (len(scores) > 1)
