"""Dynamic sampling (DAPO): prompts whose responses all score alike are replaced by others, up to a limit."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_model
from whole_run import crash, logged_rows, weights

from hybrid import HybridConfig, HybridTrainer, InputError, Policy
from hybrid.objectives import varied_rows
from hybrid.run import read_jsonl

ROWS = [{"prompt": f"the w{i} w{i + 1}", "target": "w4"} for i in range(12)]


def odd(response, prompt):
    """0 or 1 by the response; of every other prompt always 1."""
    return 1.0 if int(prompt.split("w")[1]) % 2 else float(len(response) % 2)


def trainer_of(tokenizer, folder=None, reward=odd, resume=False, steps=2, **ppo):
    given = {
        "policy_or_name": Policy(tiny_model(seed=1)), "tokenizer": tokenizer, "train_data": ROWS, "reward": reward
    }  # fmt: skip
    if resume:
        return HybridTrainer.resume(folder, **given)
    settings = {"batch_size": 4, "samples_per_prompt": 3, "minibatch_size": 6, "epochs": 1, "advantage": "group"}
    config = HybridConfig.from_dict(
        {
            "sampling": {"max_new_tokens": 5},
            "mixing": {"strategy": "sequential", "sft_steps": 0, "ppo_steps": steps},
            "ppo": {**settings, **ppo},
            "optimizer": {"lr": 1e-2},
            "checkpoint": {"every": 1},
            "run": {"output": None if folder is None else str(folder)},
        }
    )
    return HybridTrainer(config=config, **given)


def watched(trainer, monkeypatch):
    """What each step of the run learns from: (rollout, rows)."""
    steps, take = [], trainer.take

    def taking(plan, rollout=None, batches=None, *, rows=None):
        steps.append((rollout, rows))
        return take(plan, rollout, batches, rows=rows)

    monkeypatch.setattr(trainer, "take", taking)
    return steps


def test_only_prompts_whose_responses_score_unlike_are_learnt_from(tokenizer, monkeypatch, tmp_path):
    trainer = trainer_of(tokenizer, tmp_path / "run", resample=5)
    steps = watched(trainer, monkeypatch)
    trainer.train()
    logged = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "ppo"]
    for (rollout, rows), row in zip(steps, logged, strict=True):
        chosen = set(rows.tolist())
        groups = {g: [i for i, h in enumerate(rollout.group.tolist()) if h == g] for g in rollout.group.tolist()}
        varied = [g for g, members in groups.items() if len({rollout.score[i].item() for i in members}) > 1]
        assert chosen == {i for g in varied[:4] for i in groups[g]}
        # The groups of later rollouts are prompts of their own, with their texts and examples.
        assert len(groups) == 4 * (1 + row["resampled"]) and row["varied_prompts"] == min(len(varied), 4)
        assert all(len({rollout.prompts[i] for i in members}) == 1 for members in groups.values())
        assert [e.prompt for e in rollout.examples] == list(rollout.prompts)
        assert row["reward"] == pytest.approx(rollout.score.mean().item())
    assert any(row["resampled"] for row in logged)


def test_the_limit_ends_it_and_a_step_without_any_such_prompt_changes_nothing(tokenizer, monkeypatch):
    trainer = trainer_of(tokenizer, reward=lambda response: 1.0, resample=2)
    steps, before = watched(trainer, monkeypatch), weights(trainer).clone()
    trainer.train()
    assert [(len(rollout), len(rows)) for rollout, rows in steps] == [(3 * 12, 0)] * 2
    assert torch.equal(weights(trainer), before)


def test_where_every_prompt_is_worth_it_nothing_is_drawn_again(tokenizer):
    def unlike(response):
        return float(sum(map(ord, response)) % 997)

    runs = []
    for resample in (0, 3):
        trainer = trainer_of(tokenizer, reward=unlike, resample=resample)
        trainer.train()
        runs.append(weights(trainer))
    assert torch.equal(*runs)


def test_a_run_that_died_goes_on_with_the_same_steps(tokenizer, tmp_path):
    whole = trainer_of(tokenizer, tmp_path / "whole", steps=4, resample=2)
    whole.train()
    crash(trainer_of(tokenizer, tmp_path / "part", steps=4, resample=2), 3)
    resumed = trainer_of(tokenizer, tmp_path / "part", resume=True)
    resumed.train()
    assert torch.equal(weights(resumed), weights(whole))
    assert logged_rows(tmp_path / "part") == logged_rows(tmp_path / "whole")


def test_a_response_that_the_reward_skipped_does_not_have_its_prompt_replaced(tokenizer):
    trainer = trainer_of(tokenizer)
    rollout = trainer.rollout(trainer.corpus.train[:2])
    score = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    rows, found = varied_rows(replace(rollout, score=score)[torch.tensor([0, 1, 3, 4, 5])], 2)
    assert (rows.tolist(), found) == ([0, 1, 2, 3, 4], 2)


def test_without_groups_it_is_refused_before_a_model_is_loaded(tokenizer):
    with pytest.raises(InputError, match=r"resample replaces groups .* advantage 'gae' compares none"):
        HybridConfig.from_dict({"ppo": {"samples_per_prompt": 4, "resample": 3}})
