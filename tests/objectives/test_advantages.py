"""The advantages, surrogates and importance weights of a PPO step, on real rollouts."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_model, tiny_policy

from hybrid import HybridConfig, HybridTrainer, PPOConfig, SamplingConfig
from hybrid.core import Encoded, InputError
from hybrid.functional import masked_whiten
from hybrid.models import Policy, Reference
from hybrid.objectives import check_groups, minibatches, ppo_batch_loss, rollout_metrics, with_advantages
from hybrid.rewards import make_reward
from hybrid.rollout import collect

GROUPED = ["group", "group_mean", "leave_one_out"]
CRITIC_FREE = [*GROUPED, "reinforce++"]
SIZES = {"batch_size": 3, "samples_per_prompt": 4, "minibatch_size": 12}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # float32


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


def rolled(policy, tokenizer, **sampling):
    """Three prompts with four responses each, the KL in the reward."""
    prompts = [(5, 6, 7), (8,), (9, 10)]
    rows = [Encoded(p, (-100,) * len(p), p, "", "", {}) for p in prompts]
    return collect(
        policy, [Reference.from_policy(Policy(tiny_model("llama", seed=1)))],
        make_reward(lambda response: float(len(response))), rows, tokenizer=tokenizer,
        sampling=SamplingConfig(**{"max_new_tokens": 24, "temperature": 1.3, **sampling}), kl_coef=0.1,
        samples_per_prompt=4, microbatch_size=4, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def rollout(policy, tokenizer):
    return rolled(policy, tokenizer)


def by_loop(kind, rewards):
    """The advantages of one group, from its rows' rewards."""
    x = torch.tensor(rewards, dtype=torch.float64)
    if kind == "leave_one_out":
        return torch.stack([x[i] - torch.cat([x[:i], x[i + 1 :]]).mean() for i in range(len(x))])
    return (x - x.mean()) / (x.std() + 1e-4) if kind == "group" else x - x.mean()


@pytest.mark.parametrize("advantage", GROUPED)
def test_every_token_has_its_rows_reward_against_the_group(rollout, advantage):
    done = with_advantages(rollout, PPOConfig(advantage=advantage, **SIZES))
    rewards = [r[m].double().sum().item() for r, m in zip(rollout.reward, rollout.mask, strict=True)]
    expected = torch.cat([by_loop(advantage, rewards[i : i + 4]) for i in (0, 4, 8)]).float()
    assert len(set(rewards)) == 12, "the KL must tell the rows apart"
    torch.testing.assert_close(done.advantage, expected.unsqueeze(1) * rollout.mask, **CLOSE)


def test_reinforce_plus_plus_whitens_the_discounted_rewards_to_come(rollout):
    done = with_advantages(rollout, PPOConfig(advantage="reinforce++", gamma=0.9, **SIZES))
    to_come = torch.zeros(rollout.reward.shape, dtype=torch.float64)
    for b, length in enumerate(rollout.mask.sum(1).tolist()):
        after = 0.0
        for t in reversed(range(length)):
            to_come[b, t] = after = rollout.reward[b, t].item() + 0.9 * after
    valid = to_come[rollout.mask]
    torch.testing.assert_close(done.advantage[rollout.mask].double(), (valid - valid.mean()) / valid.std(), **CLOSE)


@pytest.mark.parametrize("advantage", GROUPED)
def test_advantages_within_groups_are_whitened_only_where_asked(rollout, advantage):
    plain, off, on = (
        with_advantages(rollout, PPOConfig(advantage=advantage, whiten_advantage=whiten, **SIZES)).advantage
        for whiten in (None, False, True)
    )
    assert torch.equal(plain, off)
    assert torch.equal(on, masked_whiten(off, rollout.mask))


def test_a_rollout_of_single_responses_has_nothing_to_compare(rollout):
    config = PPOConfig(advantage="group", **SIZES)
    for alone in (replace(rollout, group=None), replace(rollout, group=torch.arange(12))):
        with pytest.raises(InputError, match=r"'group' compares .* no two of the 12"):
            check_groups(alone, config)


@pytest.mark.parametrize("advantage", GROUPED)
def test_a_response_whose_group_was_skipped_has_no_advantage_and_stops_nothing(rollout, advantage):
    alone = replace(rollout, group=torch.arange(12))
    assert not with_advantages(alone, PPOConfig(advantage=advantage, **SIZES)).advantage.any()


@pytest.mark.parametrize("advantage", CRITIC_FREE)
def test_without_a_critic_the_value_head_gets_no_gradient_and_is_not_logged(policy, rollout, advantage):
    config = PPOConfig(advantage=advantage, **SIZES)
    done = with_advantages(rollout, config)
    policy.zero_grad()
    loss, metrics = ppo_batch_loss(policy, done, config)
    loss.backward()
    assert all(p.grad is None for p in policy.value_head.parameters())
    assert all(p.grad is not None for p in policy.backbone.parameters())
    assert not [name for name in {**metrics, **rollout_metrics(done)} if "value" in name or "return" in name]


def test_advantages_of_a_critic_free_step_do_for_no_critic(policy, rollout):
    done = with_advantages(rollout, PPOConfig(advantage="group", **SIZES))
    with pytest.raises(ValueError, match="with_advantages"):
        ppo_batch_loss(policy, done, PPOConfig(**SIZES))


@pytest.mark.parametrize("options", [{}, {"surrogate": "cispo"}, {"ratio": "sequence"}], ids=str)
@pytest.mark.parametrize("advantage", ["gae", *CRITIC_FREE])
def test_the_first_minibatch_has_ratio_one_exactly_whatever_the_advantage(policy, rollout, advantage, options):
    config = PPOConfig(batch_size=3, samples_per_prompt=4, minibatch_size=4, advantage=advantage, **options)
    done = with_advantages(rollout, config)
    _, metrics = ppo_batch_loss(policy, done[next(minibatches(len(done), config))], config)
    assert metrics["ratio_max"] == metrics["ratio_mean"] == 1.0
    assert metrics["approx_kl"] == metrics["policy_clip_fraction"] == 0.0


def gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in policy.backbone.parameters()]


@pytest.mark.parametrize("options", [{"clip": None}, {"clip": 0.2}, {"surrogate": "cispo"}], ids=str)
def test_one_epoch_and_one_minibatch_is_a2c(policy, rollout, options):
    config = PPOConfig(epochs=1, value_coef=0.0, **SIZES, **options)
    done = with_advantages(rollout, config)
    (rows,) = minibatches(len(done), config)
    found = gradients(policy, ppo_batch_loss(policy, done[rows], config)[0])
    # The policy gradient from the model's own logits: sum of -A log pi over the tokens, row by row, no hybrid code.
    loss = torch.zeros(())
    for ids, seen, mask, advantage in zip(
        rollout.input_ids, rollout.attention_mask, rollout.mask, done.advantage, strict=True
    ):
        length = int(mask.sum())
        logits = policy.backbone.model(ids[seen].unsqueeze(0)).logits[0, -length - 1 : -1] / 1.3
        chosen = logits.log_softmax(-1).gather(1, ids[seen][-length:].unsqueeze(1)).squeeze(1)
        loss = loss - (advantage[mask] * chosen).sum() / int(rollout.mask.sum())
    for one, two in zip(found, gradients(policy, loss), strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


def test_importance_weights_of_plain_sampling_are_one(policy, rollout):
    plain, config = PPOConfig(**SIZES), PPOConfig(importance="token", **SIZES)
    done = with_advantages(rollout, config)
    metrics, expected = (ppo_batch_loss(policy, done, c)[1] for c in (config, plain))
    torch.testing.assert_close(metrics["policy_loss"], expected["policy_loss"], **CLOSE)
    assert metrics["importance_mean"].item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_of_top_k_sampling_scale_the_advantages(policy, tokenizer, level):
    config = PPOConfig(importance=level, **SIZES)
    done = with_advantages(rolled(policy, tokenizer, top_k=60), config)
    _, metrics = ppo_batch_loss(policy, done, config)
    total = 0.0
    for b, length in enumerate(done.mask.sum(1).tolist()):
        logs = [(done.old_logprob - done.sampling_logprob)[b, t].item() for t in range(length)]
        for t in range(length):
            weight = math.exp(logs[t] if level == "token" else math.fsum(logs))
            total -= weight * done.advantage[b, t].item()  # the ratio is 1
    assert metrics["policy_loss"].item() == pytest.approx(total / done.num_tokens, rel=1e-4)
    assert metrics["importance_max"] < 1


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_do_not_depend_on_the_minibatches(policy, tokenizer, level):
    config = PPOConfig(importance=level, **SIZES)
    done = with_advantages(rolled(policy, tokenizer, top_k=60), config)
    whole = ppo_batch_loss(policy, done, config)[1]["policy_loss"]
    parts = [done[i : i + 3] for i in range(0, 12, 3)]
    losses = [ppo_batch_loss(policy, part, config)[1]["policy_loss"] * part.num_tokens for part in parts]
    torch.testing.assert_close(sum(losses) / done.num_tokens, whole, **CLOSE)


def test_importance_without_sampling_log_probs_is_refused_with_the_way_out(policy, rollout):
    config = PPOConfig(importance="token", **SIZES)
    done = with_advantages(replace(rollout, sampling_logprob=None), config)
    with pytest.raises(InputError, match=r"no sampling_logprob; give step\(logprobs=...\)"):
        ppo_batch_loss(policy, done, config)


ROWS = [{"prompt": f"Tell me about {who}.", "target": "Yes."} for who in ("a dog", "the cat", "Lily", "the sun")]


def trainer_of(stories, **ppo):
    sizes = {"batch_size": 2, "samples_per_prompt": 4, "minibatch_size": 4, "epochs": 2}
    config = HybridConfig(
        sampling=SamplingConfig(max_new_tokens=8), ppo=PPOConfig(**{**sizes, **ppo}), optimizer={"lr": 1e-3}
    )
    return HybridTrainer(stories, train_data=ROWS, reward=lambda response: float(response.count("e")), config=config)


@pytest.mark.parametrize("advantage", CRITIC_FREE)
def test_a_critic_free_step_trains_a_real_model_and_leaves_its_value_head(stories, advantage):
    trainer = trainer_of(stories, advantage=advantage)
    torch.nn.init.normal_(trainer.policy.value_head.linear.weight)
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    rollout = trainer.rollout(next(trainer.prompts))
    metrics = trainer.ppo_step(rollout)
    assert rollout.group.tolist() == [0] * 4 + [1] * 4
    assert metrics["skipped_updates"] == 0
    for name, p in trainer.policy.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("value_head"), name


def test_grpo_raises_the_reward_of_a_real_model(stories):
    trainer = trainer_of(stories, advantage="group", batch_size=4, samples_per_prompt=8, minibatch_size=16)
    rewards = [trainer.ppo_step(trainer.rollout(next(trainer.prompts)))["reward"] for _ in range(12)]
    assert sum(rewards[-3:]) > 1.5 * sum(rewards[:3])


def test_step_compares_the_responses_to_one_query_and_corrects_for_their_log_probs(stories):
    trainer = trainer_of(stories, advantage="leave_one_out", minibatch_size=2, importance="token")
    query, responses = [5, 6, 7], [[8, 9], [10], [11, 12, 13], [14]]
    drawn = [[-1.0] * len(response) for response in responses]
    metrics = trainer.step([query] * 4, responses, [1.0, 0.0, 0.0, 1.0], logprobs=drawn)
    assert metrics["policy_loss"] != 0
    assert metrics["importance_mean"] > 0
