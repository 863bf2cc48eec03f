"""An objective of one's own: its settings, its rows, and what it refuses."""

import re
from typing import ClassVar

import pytest
import torch
from test_conformance import ROWS, trainer_of
from tiny import tiny_model

from hybrid import HybridConfig, HybridTrainer, InputError, Objective, Policy
from hybrid.config import RunConfig
from hybrid.core import Batch, Rollout
from hybrid.mixing import make_strategy
from hybrid.objectives import objective
from hybrid.run import read_jsonl


class Own(Objective[Batch]):
    """The mean log-prob of the targets, and what it was asked of."""

    def __init__(self, parts, strength: float = 1.0):
        super().__init__(parts)
        self.strength, self.seen = strength, []

    def rows(self):
        return self.parts.loader

    def loss_of(self, whole):
        self.seen.append(whole)

        def loss(part):
            logprob, _ = self.parts.policy.batch_logprob(part)
            return self.strength * logprob.sum() / whole.num_tokens, {}

        return loss


@pytest.fixture(autouse=True)
def own(monkeypatch):
    # For this test alone: the conformance suite tests all that are registered.
    monkeypatch.setitem(objective._objectives._factories, "own", Own)


def blended(tokenizer, coefs, *, steps=1, **sections):
    trainer = trainer_of("blend", tokenizer, **sections)
    trainer.strategy = make_strategy({"strategy": "blend", "coefs": coefs, "steps": steps})
    return trainer


class OfRollout(Objective[Rollout]):
    """Learns nothing, and keeps what it is given."""

    rolls_out = True
    seen: ClassVar[list[Rollout]] = []

    def loss_of(self, whole):
        self.seen.append(whole)
        return lambda part: (self.parts.policy.value_head.linear.bias.sum() * 0, {})


@pytest.mark.parametrize("beside", [{}, {"ppo": 1.0}])
def test_the_minibatches_of_an_objective_that_rolls_out_have_advantages(tokenizer, monkeypatch, beside):
    monkeypatch.setitem(objective._objectives._factories, "of_rollout", OfRollout)
    monkeypatch.setattr(OfRollout, "seen", [])
    blended(tokenizer, {**beside, "of_rollout": 1.0}).train()
    assert OfRollout.seen and all(rows.advantage is not None and rows.advantage.any() for rows in OfRollout.seen)


def test_rows_without_a_trained_token_are_refused_by_the_objectives_name(tokenizer):
    with pytest.raises(InputError, match="objective 'own': none of the 1 rows has a target"):
        trainer_of("blend", tokenizer).batch_step({"own": 1.0}, {"own": [{"prompt": "the w1"}]})


def test_data_without_targets_are_refused_before_the_first_step(tokenizer):
    trainer = HybridTrainer(
        Policy(tiny_model()), tokenizer, [{"prompt": row["prompt"]} for row in ROWS],
        config=HybridConfig(mixing={"strategy": "blend", "coefs": {"own": 1.0}, "steps": 1}),
    )  # fmt: skip
    with pytest.raises(InputError, match="targets, and none of the 8 examples of objective 'own' has one"):
        trainer.train()
    assert trainer.num_steps == 0


def test_every_objective_takes_its_learning_rate_and_its_microbatches_from_the_config(tokenizer):
    settings = {"own": {"lr_factor": 0.5, "microbatch_size": 2, "strength": 3.0}, "ptx": {"lr_factor": 0.25}}
    trainer = trainer_of("blend", tokenizer, objectives=settings)
    term = trainer.objectives["own"].term(next(trainer.loader))
    assert (term.lr_factor, term.microbatch_size, trainer.objectives["own"].strength) == (0.5, 2, 3.0)
    assert trainer.batch_step({"own": 1.0})["lr"] == 0.5e-2
    assert trainer.objectives["ptx"].lr_factor == 0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"own": {"lr_factor": -1.0}}, r"objectives\.own\.lr_factor must be >= 0 and finite, got -1\.0"),
        ({"own": {"lr_factor": "fast"}}, r"objectives\.own\.lr_factor must be float, got 'fast'"),
        ({"own": {"microbatch_size": 0}}, r"objectives\.own\.microbatch_size must be >= 1, got 0"),
        ({"own": {"strenght": 1}}, r"objectives\.own\. 'strenght'; did you mean 'strength'"),
        ({"own": {"x": 1}}, r"'x'; known: lr_factor, microbatch_size, strength"),
        ({"sft": {"lr_factor": 0.5}}, r"objective 'sft' has its settings in the section 'sft', not in objectives\.sft"),
    ],
)
def test_settings_that_an_objective_cannot_take_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        HybridConfig(objectives=settings)


def test_where_the_memory_runs_out_the_advice_is_a_key_of_the_config(tokenizer, monkeypatch):
    trainer = trainer_of("blend", tokenizer)
    batch_logprob = trainer.policy.batch_logprob

    def small(batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch_logprob(batch)

    monkeypatch.setattr(trainer.policy, "batch_logprob", small)
    for name, key in (("own", "objectives.own.microbatch_size=1"), ("sft", "sft.microbatch_size=1")):
        with pytest.warns(UserWarning, match=rf"To start with that: {key}$"):
            trainer.batch_step({name: 1.0})


def test_objectives_that_draw_from_the_same_data_share_one_batch_an_update(tokenizer):
    trainer = blended(tokenizer, {"sft": 1.0, "own": 0.1})
    sft_rows = []
    sft_loss = trainer.objectives["sft"].loss_of
    trainer.objectives["sft"].loss_of = lambda whole: (sft_rows.append(whole), sft_loss(whole))[1]
    trainer.train(epochs=1)
    assert trainer.loader.position == 9  # three batches of three examples, of eight
    assert len(sft_rows) == 3
    assert all(map(torch.equal, (x.labels for x in sft_rows), (x.labels for x in trainer.objectives["own"].seen)))


def test_they_share_it_beside_a_rollout_too(tokenizer):
    trainer = blended(tokenizer, {"ppo": 1.0, "sft": 0.5, "own": 0.1, "ptx": 0.1})
    trainer.train()
    num_updates = trainer.config.ppo.num_updates
    assert len(trainer.objectives["own"].seen) == num_updates
    assert trainer.loader.position == trainer.ptx_loader.position == 3 * num_updates


def test_rows_that_come_to_an_end_are_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(Own, "rows", lambda self: iter([next(self.parts.loader)]))
    trainer = trainer_of("blend", tokenizer)
    trainer.batch_step({"own": 1.0})
    with pytest.raises(InputError, match="objective 'own': its rows have come to an end"):
        trainer.batch_step({"own": 1.0})


@pytest.mark.parametrize(
    ("coefs", "line"),
    [
        ({"own": 1.0}, r"^own  step 1/1  eta 0:00  own_loss -\d"),
        ({"sft": 1.0, "own": 0.1}, r"^joint step 1/1  eta 0:00  sft_loss \d\S+  own_loss -\d"),
        ({"ppo": 1.0, "own": 0.1}, r"^joint step 1/1  eta 0:00  reward \S+  kl \S+  own_loss -\d"),
    ],
)
def test_the_console_shows_the_loss_of_every_objective(tokenizer, capsys, coefs, line):
    blended(tokenizer, coefs).train()
    assert re.search(line, capsys.readouterr().out, re.MULTILINE)


def test_what_two_that_are_called_the_same_count_is_logged_apart(tokenizer, tmp_path):
    trainer = blended(tokenizer, {"sft": 0.75, "ptx": 0.25}, run=RunConfig(output=str(tmp_path / "run")))
    trainer.train()
    row = read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]
    assert (row["sft_coef"], row["ptx_coef"]) == (0.75, 0.25)
