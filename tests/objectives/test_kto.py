"""Objective kto: its loss against plain transformers' log-probs, and its KL, which is of mismatched answers."""

import math

import pytest
import torch
from preference_trainer import PAIRS, summed, trainer_on

from hybrid import InputError
from hybrid.core import IGNORE, Encoded
from hybrid.data import answers_of


def moved(tokenizer, **settings):
    trainer = trainer_on(tokenizer, objectives={"kto": settings})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.policy.backbone.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return trainer


def test_the_loss_is_that_of_plain_transformers_log_probs(tokenizer):
    trainer = moved(tokenizer, beta=0.3, undesirable_weight=0.5)
    rows = trainer.answers(PAIRS)
    models = trainer.policy.backbone.model, trainer.references[0].backbone.model
    ratios = [[summed(models[0], e) - summed(models[1], e) for e in both] for both in rows.examples]
    kl = max(0.0, sum(mismatched for _, mismatched in ratios) / len(ratios))
    losses = []
    for (ratio, _), good in zip(ratios, rows.label.tolist(), strict=True):
        gain = 0.3 * (ratio - kl) * (1 if good else -1)
        losses.append((1 if good else 0.5) * (1 - 1 / (1 + math.exp(-gain))))
    term = trainer.objectives["kto"].term(rows)
    loss, metrics = term.loss_of(term.rows)
    assert float(loss.detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert float(metrics["kl"]) == pytest.approx(kl, rel=1e-4)
    assert kl > 0, "the case is to show a KL"


def test_the_kl_is_the_whole_updates_in_every_part(tokenizer):
    trainer = moved(tokenizer)
    term = trainer.objectives["kto"].term(trainer.answers(PAIRS))
    kls = {float(term.loss_of(term.rows[i : i + 1])[1]["kl"]) for i in range(3)}
    assert len(kls) == 1


def test_a_policy_that_is_its_reference_has_loss_one_half(tokenizer):
    metrics = trainer_on(tokenizer).preference_step(PAIRS, kind="kto")
    assert metrics["loss"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["kl"] == 0.0


def test_good_answers_become_likelier_and_bad_ones_less(tokenizer):
    rows = [
        {"prompt": f"the w{i}", "completion": word, "label": word == "good"}
        for i, word in enumerate(["good", "bad"] * 3)
    ]
    trainer = trainer_on(tokenizer, rows)
    assert sum(e.has_target for e in trainer.corpus.train) == 3
    for _ in range(8):
        metrics = trainer.preference_step(rows, kind="kto")
    assert metrics["desirable_reward"] > 0 > metrics["undesirable_reward"]


def test_an_answer_is_mismatched_with_one_to_another_prompt(tokenizer):
    answers = answers_of(trainer_on(tokenizer).corpus.train)
    assert len(answers) == 2 * len(PAIRS)
    for answer in answers:
        assert answer.mismatched.prompt_ids == answer.encoded.prompt_ids
        assert answer.mismatched.input_ids != answer.encoded.input_ids
        assert len(answer.mismatched.input_ids) <= max(len(a.encoded.input_ids) for a in answers)


def test_one_prompt_alone_is_refused(tokenizer):
    rows = [{**row, "prompt": "the w1"} for row in PAIRS]
    with pytest.raises(InputError, match="all 12 answers are to the same prompt"):
        trainer_on(tokenizer, rows).preference_step(rows, kind="kto")


def test_good_answers_alone_are_refused_as_data(tokenizer):
    rows = [{"prompt": f"the w{i}", "completion": "good", "label": True} for i in range(3)]
    with pytest.raises(InputError, match="good answers and bad ones"):
        trainer_on(tokenizer, rows, mixing={"strategy": "objective", "objective": "kto", "steps": 1}).train()


@pytest.mark.parametrize("prompts", ["aab", "baa", "abab", "aaabbc", "abbbba", "cabbaac"])
def test_the_mismatched_answer_is_the_next_one_to_another_prompt(prompts):
    examples = [
        Encoded((ord(prompt), 200 + i), (IGNORE, 200 + i), (ord(prompt),), "", "", {})
        for i, prompt in enumerate(prompts)
    ]
    for i, answer in enumerate(answers_of(examples)):
        around = [(i + step) % len(prompts) for step in range(1, len(prompts))]
        other = next(j for j in around if prompts[j] != prompts[i])
        assert answer.mismatched.input_ids == (ord(prompts[i]), 200 + other)
