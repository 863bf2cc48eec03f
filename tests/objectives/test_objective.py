"""An objective of one's own: its settings, its rows, and what it refuses."""

import pytest
import torch
from test_conformance import ROWS, trainer_of
from tiny import tiny_model

from hybrid import HybridConfig, HybridTrainer, InputError, Objective, Policy
from hybrid.core import Batch
from hybrid.mixing import make_strategy
from hybrid.objectives import objective


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
