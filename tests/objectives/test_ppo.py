"""The PPO step on a real rollout: first ratios, gradients, invariance to padding and splitting."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_model, tiny_policy

from hybrid.core import Encoded, microbatches
from hybrid.functional import gae, masked_whiten
from hybrid.models import Policy, Reference
from hybrid.objectives import Divisors, PPOConfig, minibatches, ppo_batch_loss, rollout_metrics, with_advantages
from hybrid.rewards import make_reward
from hybrid.rollout import SamplingConfig, collect

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture
def policy():
    return tiny_policy()


@pytest.fixture
def rollout(policy, tokenizer):
    lengths = (3, 1, 2, 4, 2, 1)
    generator = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(3, 97, (n,), generator=generator).tolist()) for n in lengths]
    rows = [Encoded(p, (-100,) * len(p), p, "", "", {}) for p in prompts]
    reference = Reference.from_policy(Policy(tiny_model("llama", seed=1)))
    return collect(
        policy, [reference], make_reward(lambda response: float(len(response))), rows, tokenizer=tokenizer,
        sampling=SamplingConfig(max_new_tokens=24, temperature=1.3), kl_coef=0.1, minibatch_size=2,
        generator=generator,
    )  # fmt: skip


def gradients(policy, parts, config, whole):
    policy.zero_grad()
    divisors = Divisors.of(whole, config)
    for part in parts:
        ppo_batch_loss(policy, part, config, divisors=divisors)[0].backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


def test_the_first_minibatch_has_ratio_one_exactly(policy, rollout):
    config = PPOConfig(batch_size=6, minibatch_size=2)
    rollout = with_advantages(rollout, config)
    rows = next(minibatches(len(rollout), config))
    _, metrics = ppo_batch_loss(policy, rollout[rows].trimmed(), config)
    assert metrics["ratio_max"] == metrics["ratio_mean"] == 1.0
    assert metrics["approx_kl"] == 0.0
    assert metrics["policy_clip_fraction"] == 0.0


def test_every_ratio_of_the_first_epoch_is_one_before_any_update(policy, rollout):
    config = PPOConfig(batch_size=6, minibatch_size=2, epochs=1)
    rollout = with_advantages(rollout, config)
    for rows in minibatches(len(rollout), config):
        assert ppo_batch_loss(policy, rollout[rows].trimmed(), config)[1]["ratio_max"] == 1.0


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_accumulation_gives_the_gradient_of_the_whole_minibatch(policy, rollout, aggregation, size):
    config = PPOConfig(batch_size=6, minibatch_size=6, aggregation=aggregation, entropy_coef=0.01)
    rollout = with_advantages(rollout, config)
    whole = gradients(policy, [rollout], config, rollout)
    for name, gradient in gradients(policy, microbatches(rollout, size), config, rollout).items():
        torch.testing.assert_close(gradient, whole[name], **CLOSE)


def test_more_padding_on_either_side_changes_no_gradient(policy, rollout):
    config = PPOConfig(batch_size=6, minibatch_size=6)
    rollout = with_advantages(rollout, config)
    longer = padded(rollout, left=3, right=2)
    assert longer.mask.shape[1] == rollout.mask.shape[1] + 2
    whole = gradients(policy, [rollout], config, rollout)
    for name, gradient in gradients(policy, [longer], config, longer).items():
        torch.testing.assert_close(gradient, whole[name], **CLOSE)


def padded(rollout, *, left, right):
    """The same rollout with columns of junk tokens outside its masks."""
    pad = torch.nn.functional.pad
    wider = {
        name: pad(getattr(rollout, name), (0, right))
        for name in (
            "mask",
            "old_logprob",
            "old_value",
            "ref_logprob",
            "kl",
            "reward",
            "entropy",
            "advantage",
            "return_",
        )
    }
    ids = pad(rollout.input_ids, (left, right), value=11)
    return replace(rollout, input_ids=ids, attention_mask=pad(rollout.attention_mask, (left, right)), **wider)


def test_advantages_are_whitened_gae_and_returns_are_not_whitened(rollout):
    config = PPOConfig(batch_size=6, minibatch_size=2, gamma=0.9, lam=0.8)
    advantage, return_ = gae(rollout.reward, rollout.old_value, rollout.mask, gamma=0.9, lam=0.8)
    done = with_advantages(rollout, config)
    assert torch.equal(done.advantage, masked_whiten(advantage, rollout.mask))
    assert torch.equal(done.return_, return_)


def test_whitened_rewards_keep_their_mean(rollout):
    plain = with_advantages(rollout, PPOConfig(batch_size=6, minibatch_size=2, lam=1.0))
    white = with_advantages(rollout, PPOConfig(batch_size=6, minibatch_size=2, lam=1.0, whiten_reward=True))
    first = torch.arange(len(rollout)), rollout.mask.int().argmax(1)
    # With gamma = lam = 1 the first return of a row is the sum of its rewards: the scale changes, the mean stays.
    assert not torch.allclose(white.return_[first], plain.return_[first])
    reward = masked_whiten(rollout.reward, rollout.mask, False)
    torch.testing.assert_close(white.return_[first], reward.sum(1))


def test_every_row_is_seen_once_an_epoch_and_later_epochs_are_shuffled():
    config = PPOConfig(batch_size=8, minibatch_size=3, epochs=3)
    batches = list(minibatches(8, config, torch.Generator().manual_seed(0)))
    assert [len(b) for b in batches] == [3, 3, 2] * 3
    epochs = [torch.cat(batches[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert epochs[0] == list(range(8))
    assert all(sorted(epoch) == epochs[0] for epoch in epochs)
    assert epochs[1] != epochs[0]
    assert epochs[1] != epochs[2]


def test_a_kl_in_the_loss_is_weighted_by_reference(policy, rollout):
    config = PPOConfig(batch_size=6, minibatch_size=6)
    rollout = with_advantages(rollout, config)
    plain, _ = ppo_batch_loss(policy, rollout, config)
    loss, metrics = ppo_batch_loss(policy, rollout, config, kl_loss_coef=0.5, kl_kind="k3")
    torch.testing.assert_close(loss, plain + 0.5 * metrics["kl_loss"])
    doubled = replace(rollout, ref_weight=(2.0,))
    torch.testing.assert_close(
        ppo_batch_loss(policy, doubled, config, kl_loss_coef=0.5)[1]["kl_loss"], 2 * metrics["kl_loss"]
    )


def test_a_rollout_without_advantages_is_refused(policy, rollout):
    with pytest.raises(ValueError, match="with_advantages"):
        ppo_batch_loss(policy, rollout, PPOConfig())


def test_statistics_of_a_rollout_leave_the_padding_out(rollout):
    done = with_advantages(rollout, PPOConfig(batch_size=6, minibatch_size=2))
    metrics, count = rollout_metrics(done), rollout.num_tokens
    assert metrics["entropy"] == pytest.approx(sum(rollout.entropy[rollout.mask].tolist()) / count, rel=1e-5)
    assert metrics["kl"] == pytest.approx(sum(rollout.kl[rollout.mask].tolist()) / len(rollout), rel=1e-5)
    assert metrics["response_length"] == pytest.approx(count / len(rollout))
    errors = (done.return_ - rollout.old_value)[rollout.mask]
    assert metrics["value_error"] == pytest.approx((errors**2).mean().item(), rel=1e-5)
    assert metrics["explained_variance"] == pytest.approx(
        1 - (errors.var() / done.return_[rollout.mask].var()).item(), rel=1e-4
    )


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_the_kl_in_the_loss_is_averaged_as_the_policy_loss_is(policy, rollout, aggregation):
    config = PPOConfig(batch_size=6, minibatch_size=6, aggregation=aggregation)
    rollout = with_advantages(rollout, config)
    _, metrics = ppo_batch_loss(policy, rollout, config, kl_loss_coef=0.5, kl_kind="k2")
    rows = [
        [0.5 * (a - b).item() ** 2 for a, b, m in zip(*row, strict=True) if m]
        for row in zip(rollout.old_logprob.double(), rollout.ref_logprob[0].double(), rollout.mask, strict=True)
    ]
    means = [sum(row) / len(row) for row in rows]
    tokens = [x for row in rows for x in row]
    expected = sum(means) / len(means) if aggregation == "sequence_mean" else sum(tokens) / len(tokens)
    # The policy has not moved since the rollout; float32 sums of some dozen tokens.
    assert metrics["kl_loss"].item() == pytest.approx(expected, rel=1e-4)
