"""The inner products of policy gradients, against gradients taken one by one."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_examples, tiny_policy

from hybrid.data import collate
from hybrid.models import recompute_activations
from hybrid.objectives import PPOConfig, SFTConfig, policy_gram, ppo_batch_loss, sft_batch_loss
from hybrid.rollout import assemble, from_lists


@pytest.fixture
def policy():
    return tiny_policy()


@pytest.fixture
def rollout(policy):
    queries, responses = [[5, 6, 7], [8, 9], [10]], [[11, 12], [13, 14, 15, 16], [17, 2]]
    given = from_lists(queries, responses, [0.0, 0.0, 0.0], eos_ids=[2], logprobs=None, device=policy.device)
    return assemble(policy, [], *given, temperature=0.7)


def gradient(policy, loss):
    policy.zero_grad()
    loss.backward()
    found = torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in policy.backbone.parameters()]
    )
    policy.zero_grad()
    return found.double()


def test_it_is_the_gradient_of_ppos_surrogate_at_ratio_1(policy, rollout):
    """ppo_batch_loss is another way to the same gradient, but for its sign."""
    sides = [torch.tensor([1.0, -0.5, 0.2]), torch.tensor([-1.0, 1.0, 0.3])]
    config = PPOConfig(advantage="reinforce++", epochs=1)
    expected = [
        gradient(
            policy,
            ppo_batch_loss(
                policy, replace(rollout, advantage=a[:, None].expand_as(rollout.mask) * rollout.mask), config
            )[0],
        )
        for a in sides
    ]
    gram = policy_gram(policy, [(rollout, a) for a in sides])
    by_hand = torch.stack([torch.stack([x @ y for y in expected]) for x in expected])
    assert gram.dtype == torch.float64
    torch.testing.assert_close(gram, by_hand, rtol=1e-5, atol=1e-9)
    assert gram[0, 1] < 0, "they pull apart"


def test_of_a_batch_it_is_the_direction_in_which_the_loss_falls(policy, rollout):
    batch = collate(tiny_examples(6, 9, 4), pad_id=0)
    policy.eval()
    down = -gradient(policy, sft_batch_loss(policy, batch, SFTConfig())[0])
    advantage = torch.tensor([1.0, -0.5, 0.2])
    gram = policy_gram(policy, [(rollout, advantage), (batch, torch.ones(3))])
    assert gram[1, 1] == pytest.approx(float(down @ down), rel=1e-5)
    alone = policy_gram(policy, [(batch, torch.ones(3))])
    assert alone[0, 0] == pytest.approx(float(gram[1, 1]), rel=1e-12)


def test_activations_that_are_computed_again_give_the_same(policy, rollout):
    sides = [(rollout, torch.tensor([1.0, -0.5, 0.2])), (rollout, torch.tensor([0.0, 1.0, -1.0]))]
    expected = policy_gram(policy, sides)
    recompute_activations(policy.backbone.trunk)
    torch.testing.assert_close(policy_gram(policy, sides), expected, rtol=1e-9, atol=0)


def test_it_leaves_gradients_mode_and_random_numbers_alone(policy, rollout):
    for p in policy.parameters():
        p.grad = torch.full_like(p, 3.0)
    policy.train()
    before, bits = torch.get_rng_state(), [p.detach().clone() for p in policy.parameters()]
    policy_gram(policy, [(rollout, torch.ones(3)), (rollout, torch.tensor([1.0, 0.0, 0.0]))])
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.training and policy.backbone.training
    assert all((p.grad == 3.0).all() for p in policy.parameters())
    assert all(torch.equal(p, x) for p, x in zip(policy.parameters(), bits, strict=True))


def test_frozen_weights_take_no_part(policy, rollout):
    whole = policy_gram(policy, [(rollout, torch.ones(3))])
    policy.backbone.model.get_input_embeddings().weight.requires_grad_(False)
    assert policy_gram(policy, [(rollout, torch.ones(3))])[0, 0] < whole[0, 0]


def test_no_advantage_is_no_gradient(policy, rollout):
    assert policy_gram(policy, [(rollout, torch.zeros(3))])[0, 0] == 0
