"""Objective reward_model: its score at an answer's last token, its loss, and the head that it trains."""

import math
from dataclasses import replace

import pytest
import torch
from preference_trainer import PAIRS, trainer_on

from hybrid import InputError
from hybrid.objectives import expected_calibration_error

HEAD = {"objectives": {"reward_model": {}}}


def plain_scores(trainer, examples):
    """Of each answer alone, from the hidden state of its last token."""
    policy = trainer.policy.eval()
    trunk, weight = policy.backbone.trunk, policy.reward_head.linear.weight
    with torch.no_grad():
        return [float(trunk(torch.tensor([e.input_ids])).last_hidden_state[0, -1] @ weight[0]) for e in examples]


def test_the_loss_is_bradley_terrys_of_the_scores_at_the_last_tokens(tokenizer):
    trainer = trainer_on(tokenizer, objectives={"reward_model": {"center_coef": 0.1, "use_margin": True}})
    pairs = replace(trainer.pairs(PAIRS), margin=torch.arange(6.0) / 10)
    chosen = plain_scores(trainer, pairs.examples)
    rejected = plain_scores(trainer, [e.rejected for e in pairs.examples])
    losses = [
        math.log1p(math.exp(-(c - r - i / 10))) + 0.1 * (c + r) ** 2
        for i, (c, r) in enumerate(zip(chosen, rejected, strict=True))
    ]
    term = trainer.objectives["reward_model"].term(pairs)
    loss, metrics = term.loss_of(pairs)
    assert float(loss.detach()) == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert float(metrics["chosen_reward"]) == pytest.approx(sum(chosen) / 6, rel=1e-5)


def test_it_learns_the_preferences_and_leaves_the_value_head_alone(tokenizer):
    trainer = trainer_on(tokenizer, **HEAD, optimizer={"lr": 1e-3})
    before = trainer.policy.value_head.linear.weight.clone()
    for _ in range(12):
        metrics = trainer.preference_step(PAIRS, kind="reward_model")
    assert metrics["accuracy"] == 1.0 and metrics["loss"] < 0.5
    assert torch.equal(trainer.policy.value_head.linear.weight, before)


def test_other_objectives_leave_the_reward_head_bit_identical(tokenizer):
    trainer = trainer_on(tokenizer, **HEAD)
    before = trainer.policy.reward_head.linear.weight.clone()
    trainer.preference_step(PAIRS)
    trainer.sft_step(PAIRS)
    assert torch.equal(trainer.policy.reward_head.linear.weight, before)


def test_a_policy_without_a_reward_head_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"objectives\.reward_model={}"):
        trainer_on(tokenizer).preference_step(PAIRS, kind="reward_model")


def test_a_policy_and_its_judge_learn_on_one_trunk(tokenizer):
    trainer = trainer_on(tokenizer, **HEAD, reward=lambda response: len(response))
    rollout = trainer.rollout(next(trainer.prompts))
    metrics = trainer.rollout_step(rollout, {"ppo": 1.0, "reward_model": 1.0})
    assert {"ppo_loss", "reward_model_loss", "accuracy"} <= metrics.keys()


def test_held_out_pairs_are_measured(tokenizer):
    trainer = trainer_on(tokenizer, **HEAD)
    pairs = trainer.pairs(PAIRS)
    metrics, rows = trainer.objectives["reward_model"].evaluate(pairs.examples, 4)
    chosen = plain_scores(trainer, pairs.examples)
    rejected = plain_scores(trainer, [e.rejected for e in pairs.examples])
    assert [row["chosen_reward"] for row in rows] == pytest.approx(chosen, rel=1e-5)
    right = [c > r for c, r in zip(chosen, rejected, strict=True)]
    assert metrics["accuracy"] == pytest.approx(sum(right) / 6)
    assert metrics["accuracy_sem"] == pytest.approx(math.sqrt(metrics["accuracy"] * (1 - metrics["accuracy"]) / 6))
    every = torch.tensor(chosen + rejected, dtype=torch.float64)
    assert metrics["score_mean"] == pytest.approx(float(every.mean()), abs=1e-5)
    assert metrics["score_std"] == pytest.approx(float(every.std()), rel=1e-5)


def test_calibration_error_of_a_case_by_hand():
    # Two choices at confidence 0.75, of which one is right; two at 0.95, both right.
    low, high = math.log(3), math.log(19)
    assert expected_calibration_error(torch.tensor([low, -low, high, high])) == pytest.approx(
        (abs(1 - 1.5) + abs(2 - 1.9)) / 4
    )


def test_a_choice_without_confidence_is_half_right():
    assert expected_calibration_error(torch.zeros(5)) == 0.0
