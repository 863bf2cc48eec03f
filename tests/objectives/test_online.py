"""Objectives online_dpo and raft: what they choose of a rollout, and what they learn of it."""

import math
from dataclasses import replace

import pytest
import torch
from preference_trainer import PAIRS, trainer_on

from hybrid import DataConfig, InputError, PPOConfig
from hybrid.config import ReferenceConfig
from hybrid.core import IGNORE
from hybrid.objectives import shares
from hybrid.objectives.online import batch_of, best_and_worst


@pytest.fixture
def trainer(tokenizer):
    return trainer_on(tokenizer, reward=lambda response: float(len(response)))


def scored(trainer, scores, group):
    rollout = trainer.rollout(trainer.corpus.train[: max(group) + 1])
    assert len(rollout) == len(scores)
    return replace(rollout, score=torch.tensor(scores), group=torch.tensor(group))


def test_the_best_stands_against_the_worst_and_ties_make_no_pair(trainer):
    rollout = scored(trainer, [1.0, 3.0, 2.0, 2.0, 5.0, 4.0], [0, 0, 1, 1, 2, 2])
    best, worst = best_and_worst(rollout)
    assert (best.tolist(), worst.tolist()) == ([1, 4], [0, 5])


def test_a_rollouts_rows_as_a_batch_train_the_responses_alone(trainer):
    rollout = trainer.rollout(trainer.corpus.train[:3])
    rows = torch.tensor([4, 0])
    batch = batch_of(rollout, rows)
    for i, row in enumerate(rows.tolist()):
        trained = batch.labels[i][batch.labels[i] != IGNORE]
        assert torch.equal(trained, rollout.input_ids[row, rollout.prompt_length :][rollout.mask[row]])
    logprob, mask = trainer.policy.batch_logprob(batch, temperature=rollout.temperature)
    assert torch.allclose(logprob[mask], rollout.old_logprob[rows][rollout.mask[rows]], atol=1e-5)


def test_the_first_online_dpo_loss_is_log_2(trainer):
    pairs = trainer.objectives["online_dpo"].learnt(scored(trainer, [1.0, 3.0, 2.0, 1.0], [0, 0, 1, 1]))
    term = trainer.objectives["online_dpo"].term(pairs)
    loss, metrics = term.loss_of(term.rows)
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-5)
    assert abs(float(metrics["margin_mean"])) < 1e-5


def test_online_dpo_raises_the_best_above_the_worst(trainer):
    rollout = scored(trainer, [1.0, 3.0, 2.0, 1.0, 1.0, 2.0], [0, 0, 1, 1, 2, 2])
    for _ in range(6):
        metrics = trainer.rollout_step(rollout, {"online_dpo": 1.0})
    assert metrics["accuracy"] == 1.0


def test_a_rollout_without_a_pair_is_no_update(trainer):
    rollout = scored(trainer, [1.0, 1.0, 2.0, 2.0], [0, 0, 1, 1])
    before = [p.clone() for p in trainer.policy.parameters()]
    metrics = trainer.rollout_step(rollout, {"online_dpo": 1.0})
    assert "loss" not in metrics and metrics["reward"] == 1.5
    assert all(map(torch.equal, trainer.policy.parameters(), before))


def test_spin_sets_the_target_against_the_policys_own_response(trainer):
    rollout = trainer.rollout(trainer.corpus.train[:3])
    objective = trainer.objectives["spin"]
    pairs = objective.learnt(rollout)
    assert len(pairs) == len(rollout)
    for i, example in enumerate(rollout.examples):
        assert pairs.sides.input_ids[i][pairs.sides.attention_mask[i]].tolist() == list(example.input_ids)
        said = pairs.sides.labels[len(pairs) + i]
        assert torch.equal(said[said != IGNORE], rollout.input_ids[i, rollout.prompt_length :][rollout.mask[i]])
    _, rejected = pairs.split(pairs.ref_logprob)
    assert torch.allclose(rejected, rollout.old_logprob.sum(1), atol=1e-4), "the opponent is the policy that answered"
    loss, _ = objective.term(pairs).loss_of(pairs)
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6)


def test_spin_draws_the_policy_to_the_targets_without_a_reward(tokenizer):
    trainer = trainer_on(tokenizer, mixing={"strategy": "objective", "objective": "spin", "steps": 12})
    trainer.train()
    found = []
    for each in (trainer_on(tokenizer), trainer):
        batch = each.batch(PAIRS)
        found.append(float(each.objectives["sft"].loss_of(batch)(batch)[0].detach()))
    assert found[1] < found[0]


@pytest.mark.parametrize("references", [(), (ReferenceConfig(),)])
def test_spin_measures_held_out_pairs_where_there_is_a_reference(references, tokenizer):
    trainer = trainer_on(tokenizer, references=references)
    metrics, rows = trainer.objectives["spin"].evaluate(trainer.corpus.train, 4)
    assert (len(rows), "accuracy" in metrics) == ((len(PAIRS), True) if references else (0, False))


def test_spin_runs_beside_held_out_pairs(tokenizer):
    trainer = trainer_on(
        tokenizer, mixing={"strategy": "objective", "objective": "spin", "steps": 1}, given={"eval_data": PAIRS[:2]}
    )
    assert "sft_loss" in trainer.train()
    assert "spin/accuracy" in trainer.evaluate()


def test_spin_trains_no_token_of_a_prompt_of_plain_text(tokenizer):
    text = [{"text": f"the w{i} w{i + 1} was good w{i + 2}"} for i in range(4)]
    trainer = trainer_on(tokenizer, text, data=DataConfig(prompt_tokens=2))
    pairs = trainer.objectives["spin"].learnt(trainer.rollout(trainer.corpus.train[:3], scored=False))
    assert len(pairs) and all((pairs.sides.labels[:, :2] == IGNORE).all(1))
    assert ((pairs.sides.labels != IGNORE).sum(1) > 0).all()


def test_spin_makes_no_pair_where_no_prompt_of_a_rollout_has_a_target(tokenizer):
    rows = [{**PAIRS[0], "completion": "w9", "label": False}, {**PAIRS[1], "completion": "w8", "label": True}]
    rows = [{name: row[name] for name in ("prompt", "completion", "label")} for row in rows]
    trainer = trainer_on(tokenizer, rows)
    before = [p.clone() for p in trainer.policy.parameters()]
    metrics = trainer.rollout_step(trainer.rollout(trainer.corpus.train[:1], scored=False), {"spin": 1.0})
    assert "loss" not in metrics
    assert all(map(torch.equal, trainer.policy.parameters(), before))
    alone = trainer_on(tokenizer, rows[:1], mixing={"strategy": "objective", "objective": "spin", "steps": 1})
    with pytest.raises(InputError, match="no training example has one"):
        alone.train()


def test_a_target_that_the_policy_says_itself_makes_no_pair(trainer):
    rollout = trainer.rollout(trainer.corpus.train[:3])
    first = rollout.examples[0]
    answer = rollout.input_ids[0, rollout.prompt_length :][rollout.mask[0]].tolist()
    same = replace(first, input_ids=(*first.prompt_ids, *answer))
    pairs = trainer.objectives["spin"].learnt(replace(rollout, examples=(same, *rollout.examples[1:])))
    assert len(pairs) == len(rollout) - 1


def test_raft_imitates_the_best(trainer):
    rollout = scored(trainer, [1.0, 3.0, 2.0, 2.5], [0, 0, 1, 1])
    chosen = trainer.objectives["raft"].learnt(rollout)
    assert torch.equal(chosen.input_ids, rollout.input_ids[[1, 3]])
    term = trainer.objectives["raft"].term(chosen)
    loss, _ = term.loss_of(chosen)
    expected = -rollout.old_logprob[[1, 3]].sum() / rollout.mask[[1, 3]].sum()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_rest_imitates_what_is_good_enough(tokenizer):
    trainer = trainer_on(
        tokenizer, reward=lambda response: float(len(response)), objectives={"raft": {"best": 2, "above": 2.0}}
    )
    chosen = trainer.objectives["raft"].learnt(scored(trainer, [1.0, 3.0, 2.0, 2.5], [0, 0, 1, 1]))
    assert sorted(chosen.score.tolist()) == [2.0, 2.5, 3.0]


@pytest.mark.parametrize("name", ["online_dpo", "raft"])
def test_one_response_to_a_prompt_is_refused(name, tokenizer):
    trainer = trainer_on(
        tokenizer, reward=lambda response: 0.0, ppo=PPOConfig(batch_size=3, minibatch_size=3),
        mixing={"strategy": "objective", "objective": name, "steps": 1},
    )  # fmt: skip
    with pytest.raises(InputError, match=r"ppo\.samples_per_prompt"):
        trainer.train()


def test_objectives_of_one_rollout_share_its_minibatches():
    config = PPOConfig(batch_size=6, minibatch_size=2, epochs=2)
    found = list(shares({"ppo": 6, "other": 6, "pairs": 4}, 6, config, torch.Generator().manual_seed(0)))
    assert len(found) == 6
    for epoch in (found[:3], found[3:]):
        assert sorted(torch.cat([part["pairs"] for part in epoch]).tolist()) == [0, 1, 2, 3]
        assert all(torch.equal(part["ppo"], part["other"]) for part in epoch)
    assert torch.cat([part["pairs"] for part in found[:3]]).tolist() == [0, 1, 2, 3], "the first epoch keeps the order"


def test_data_and_responses_learn_together(trainer):
    metrics = trainer.rollout_step(
        trainer.rollout(trainer.corpus.train[:3]), {"online_dpo": 1.0, "dpo": 0.5, "sft": 0.1}
    )
    assert {"online_dpo_loss", "dpo_loss", "sft_loss"} <= metrics.keys()


def test_pairs_as_data_train_by_both_names(tokenizer):
    assert trainer_on(tokenizer, PAIRS).preference_step(PAIRS)["num_tokens"] > 0


@pytest.mark.parametrize("name", ["online_dpo", "raft"])
def test_a_missing_reward_is_said_by_the_objectives_name(name, tokenizer):
    with pytest.raises(InputError, match=f"reward is missing, which {name} needs"):
        trainer_on(tokenizer, mixing={"strategy": "objective", "objective": name, "steps": 1}).train()
