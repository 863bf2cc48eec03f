"""Rollouts drawn ahead by an actor: from which weights, whatever the clock says, and how such a run goes on."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from tiny import tiny_model
from whole_run import crash, logged_rows, weights

from hybrid import HybridConfig, HybridTrainer, InputError, Policy
from hybrid.ahead import Ahead
from hybrid.core import RunStopped
from hybrid.models import response_stats
from hybrid.rollout import RolloutConfig
from hybrid.run import read_jsonl

pytestmark = pytest.mark.slow  # a process takes seconds to start


@pytest.fixture
def config(tmp_path, tokenizer):
    """A function that gives a run of 6 rollouts, with an SFT step before each second one."""
    Policy(tiny_model(std=0.05)).save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    rows = [{"prompt": f"w{i} is", "target": f"good w{i}"} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(name, staleness, **sections):
        values = {
            "model": {"name": str(tmp_path / "model")},
            "data": {"train": str(tmp_path / "data.jsonl"), "eval_fraction": 0.25},
            "reward": {"type": "sentiment_lexicon"},
            "sampling": {"max_new_tokens": 6},
            "rollout": {"staleness": staleness},
            "mixing": {"cycles": 3, "sft_steps_per_cycle": 1, "ppo_steps_per_cycle": 2},
            "optimizer": {"lr": 1e-2},
            "sft": {"batch_size": 2},
            "ppo": {"batch_size": 4, "minibatch_size": 4, "epochs": 1},
            "eval": {"num_prompts": 3},
            "checkpoint": {"every": 2},
            "run": {"output": str(tmp_path / name)},
        }
        return HybridConfig.from_dict(values | sections)

    return made


def rollouts(trainer):
    """Train, and keep of each rollout the weights at its begin, and it."""
    kept, rollout = [], trainer.rollout

    def keeping(*arguments, **options):
        before = {name: x.detach().clone() for name, x in trainer.policy.state_dict().items()}
        kept.append((before, rollout(*arguments, **options)))
        return kept[-1][1]

    trainer.rollout = keeping
    trainer.train()
    return kept


def timeless(folder):
    return [{k: v for k, v in row.items() if not k.endswith("_idle")} for row in logged_rows(folder)]


@pytest.mark.parametrize("staleness", [1, 3])
def test_a_rollout_is_drawn_from_the_weights_of_so_many_rollouts_before(config, tmp_path, staleness):
    kept = rollouts(HybridTrainer(config=config("run", staleness)))
    policy = Policy(tiny_model())
    for number, (_, rollout) in enumerate(kept):
        gaps = []
        for before, _ in kept:
            policy.load_state_dict(before)
            with torch.no_grad():
                hidden = policy.eval().backbone(rollout.input_ids, rollout.attention_mask)
                stats = response_stats(policy.backbone, hidden, rollout.input_ids, rollout.mask)
            gaps.append(float((stats.logprob - rollout.sampling_logprob).abs().max()))
        assert min(range(len(gaps)), key=gaps.__getitem__) == max(0, number - staleness)
        assert min(gaps) < 1e-5
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "ppo"]
    assert [row["staleness"] for row in rows] == [min(n, staleness) for n in range(6)]
    assert rows[0]["sampling_gap"] < 1e-5 < 1e-3 < rows[2]["sampling_gap"]
    assert all(0 <= row["actor_idle"] <= 1 and 0 <= row["learner_idle"] <= 1 for row in rows[1:])


def test_what_is_drawn_depends_on_no_clock(config, tmp_path, monkeypatch):
    HybridTrainer(config=config("one", 2)).train()
    # Every rollout is waited for before anything else is done.
    ask = Ahead._ask

    def asking(self, *arguments):
        ask(self, *arguments)
        self._held += [self._answer() for _ in range(len(self._asked))]

    monkeypatch.setattr(Ahead, "_ask", asking)
    HybridTrainer(config=config("other", 2)).train()
    assert timeless(tmp_path / "one") == timeless(tmp_path / "other")


@pytest.mark.parametrize("fatal_step", [5, 8])
def test_a_run_that_died_and_goes_on_equals_the_uninterrupted_one(config, tmp_path, fatal_step):
    whole = HybridTrainer(config=config("whole", 2))
    whole.train()
    crash(HybridTrainer(config=config("part", 2)), fatal_step)
    resumed = HybridTrainer.resume(tmp_path / "part")
    resumed.train()
    assert torch.equal(weights(whole), weights(resumed))
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "part")


def test_without_staleness_no_process_is_started(config, monkeypatch):
    monkeypatch.setattr(Ahead, "_sampler", None)
    trainer = HybridTrainer(config=config("run", 0))
    trainer.train()
    assert trainer.num_steps == 9


def test_an_actor_that_fails_stops_the_run_with_its_traceback(config, monkeypatch):
    sampler = Ahead._sampler
    monkeypatch.setattr(Ahead, "_sampler", lambda self: replace(sampler(self), samples_per_prompt=None))
    with pytest.raises(RunStopped, match=r"(?s)actor of rollout.staleness failed:\nTraceback.*TypeError"):
        HybridTrainer(config=config("run", 1)).train()


def test_an_actor_that_is_killed_stops_the_run(config, monkeypatch):
    trainer = HybridTrainer(config=config("run", 1))
    ask = Ahead._ask

    def asking(self, *arguments):
        ask(self, *arguments)
        if trainer.num_steps > 3:
            os.kill(self._actor._process.pid, signal.SIGKILL)

    monkeypatch.setattr(Ahead, "_ask", asking)
    with pytest.raises(RunStopped, match="ended with exit code -9") as raised:
        trainer.train()
    assert "step-4" in "".join(raised.value.__notes__)


def test_what_cannot_be_drawn_ahead_is_refused(config):
    with pytest.raises(InputError, match=r"rollout.staleness must be >= 0, got -1"):
        RolloutConfig(staleness=-1)
    with pytest.raises(InputError, match="does not go with memory"):
        config("run", 1, memory={"type": "experience"})
    with pytest.raises(InputError, match="decoder 'best_of_n' has not"):
        config("run", 1, sampling={"decoder": {"type": "best_of_n"}})
    assert config("other", 1).ppo.importance == "token"
