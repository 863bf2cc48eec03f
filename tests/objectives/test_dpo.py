"""Objective dpo: its log-probs against plain transformers', its reference, and what it leaves alone."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from preference_trainer import PAIRS, summed, trainer_on
from tiny import tiny_model

from hybrid import DataConfig, HybridConfig, InputError
from hybrid.core import Pairs
from hybrid.models import LoraConfig, add_lora


def moved(tokenizer, **settings):
    """A trainer whose policy is no more its reference."""
    trainer = trainer_on(tokenizer, objectives={"dpo": settings})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.policy.backbone.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return trainer


def loss_and_metrics(trainer, pairs, name="dpo"):
    term = trainer.objectives[name].term(pairs)
    loss, metrics = term.loss_of(term.rows)
    return float(loss.detach()), {key: float(x) for key, x in metrics.items()}


def test_a_policy_that_is_its_reference_has_loss_log_2_and_accuracy_one_half(tokenizer):
    metrics = trainer_on(tokenizer).preference_step(PAIRS)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["accuracy"] == 0.5
    assert metrics["margin_mean"] == 0.0


@pytest.mark.parametrize(
    ("settings", "mean"), [({}, False), ({"kind": "ipo"}, True), ({"kind": "hinge", "beta": 0.3}, False)]
)
def test_the_loss_is_that_of_plain_transformers_log_probs(tokenizer, settings, mean):
    trainer = moved(tokenizer, **settings)
    pairs = trainer.pairs(PAIRS)
    models = trainer.policy.backbone.model, trainer.references[0].backbone.model
    beta, kind = settings.get("beta", 0.1), settings.get("kind", "sigmoid")
    losses = []
    for e in pairs.examples:
        a, b = (summed(models[0], side, mean=mean) - summed(models[1], side, mean=mean) for side in (e, e.rejected))
        d = a - b
        of_kind = {
            "sigmoid": math.log1p(math.exp(-beta * d)),
            "ipo": (d - 0.5 / beta) ** 2,
            "hinge": max(0, 1 - beta * d),
        }
        losses.append(of_kind[kind])
    loss, _ = loss_and_metrics(trainer, pairs)
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_simpo_takes_means_and_no_reference(tokenizer):
    trainer = trainer_on(tokenizer, objectives={"dpo": {"kind": "simpo", "beta": 2.0, "margin": 0.5}}, references=())
    pairs = trainer.pairs(PAIRS)
    model = trainer.policy.backbone.model
    d = [2 * (summed(model, e, mean=True) - summed(model, e.rejected, mean=True)) - 0.5 for e in pairs.examples]
    loss, _ = loss_and_metrics(trainer, pairs)
    assert loss == pytest.approx(sum(math.log1p(math.exp(-x)) for x in d) / len(d), rel=1e-5)


def test_without_a_reference_a_kind_that_needs_one_is_refused(tokenizer):
    with pytest.raises(InputError, match="reference must be the number of one of the 0 references, got 0"):
        trainer_on(tokenizer, references=()).preference_step(PAIRS)


def test_padding_changes_nothing(tokenizer):
    trainer = moved(tokenizer)
    pairs = trainer.pairs(PAIRS[:3])
    sides = pairs.sides
    wide = [
        torch.nn.functional.pad(x, (0, 7), value=v)
        for x, v in ((sides.input_ids, 5), (sides.attention_mask, False), (sides.labels, -100))
    ]
    padded = replace(pairs, sides=replace(sides, input_ids=wide[0], attention_mask=wide[1], labels=wide[2]))
    assert loss_and_metrics(trainer, padded) == loss_and_metrics(trainer, pairs)


def test_swapping_the_sides_turns_the_margin_round(tokenizer):
    trainer = moved(tokenizer)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    _, one = loss_and_metrics(trainer, trainer.pairs(PAIRS))
    _, other = loss_and_metrics(trainer, trainer.pairs(swapped))
    assert one["margin_mean"] == pytest.approx(-other["margin_mean"], rel=1e-5)
    assert one["accuracy"] == pytest.approx(1 - other["accuracy"])


def test_the_reference_of_a_lora_policy_is_the_adapter_off(tokenizer, needs_peft):
    trainer, adapted = trainer_on(tokenizer), trainer_on(tokenizer, model=_adapted())
    for _ in range(2):
        adapted.preference_step(PAIRS)
    assert loss_and_metrics(adapted, adapted.pairs(PAIRS))[0] < math.log(2)
    found, expected = (each.objectives["dpo"].term(each.pairs(PAIRS)).rows.ref_logprob for each in (adapted, trainer))
    assert torch.allclose(found, expected, atol=1e-5)


def _adapted():
    model = tiny_model(seed=1)
    add_lora(model, LoraConfig(rank=4))
    return model


def test_weights_of_pairs_weigh_their_losses(tokenizer):
    trainer = moved(tokenizer)
    pairs = trainer.pairs(PAIRS[:2])
    alone = [loss_and_metrics(trainer, trainer.pairs([row]))[0] for row in PAIRS[:2]]
    weighted = replace(pairs, weight=torch.tensor([3.0, 1.0]))
    assert loss_and_metrics(trainer, weighted)[0] == pytest.approx((3 * alone[0] + alone[1]) / 4, rel=1e-5)


def test_a_step_teaches_to_prefer_and_leaves_the_value_head_alone(tokenizer):
    trainer = trainer_on(tokenizer)
    head = copy.deepcopy(trainer.policy.value_head.state_dict())
    first = trainer.preference_step(PAIRS)
    for _ in range(10):
        last = trainer.preference_step(PAIRS)
    assert last["loss"] < first["loss"] and last["accuracy"] == 1.0
    assert all(torch.equal(x, head[name]) for name, x in trainer.policy.value_head.state_dict().items())


def test_what_was_computed_once_is_what_is_computed_at_every_step(tokenizer):
    rows = [loader_rows(trainer_on(tokenizer, cache=cache)) for cache in (False, True)]
    assert torch.allclose(rows[0].ref_logprob, rows[1].ref_logprob, atol=1e-5)
    assert rows[1].ref_logprob.abs().min() > 1


def loader_rows(trainer) -> Pairs:
    objective = trainer.objectives["dpo"]
    return objective.term(trainer.objectives.next_rows(["dpo"])["dpo"]).rows


def test_what_is_kept_in_the_runs_folder_is_computed_once_for_model_and_data(tokenizer, tmp_path, monkeypatch):
    def run(rows=PAIRS, seed=1):
        trainer = trainer_on(tokenizer, rows, model=tiny_model(seed=seed), cache=True)
        trainer.folder = tmp_path
        calls = []
        reference = trainer.references[0]
        hidden = reference.hidden
        monkeypatch.setattr(reference, "hidden", lambda *args: (calls.append(1), hidden(*args))[1])
        rows = loader_rows(trainer)
        return len(calls), rows.ref_logprob

    calls, first = run()
    assert calls > 0
    assert run()[0] == 0
    assert torch.equal(run()[1], first)
    assert run(PAIRS[:5])[0] > 0, "other data"
    assert run(seed=2)[0] > 0, "another model"


def test_a_kept_file_that_is_broken_is_refused_by_name(tokenizer, tmp_path):
    trainer = trainer_on(tokenizer, cache=True)
    trainer.folder = tmp_path
    loader_rows(trainer)
    (file,) = (tmp_path / "reference_logprob").iterdir()
    file.write_bytes(b"x")
    again = trainer_on(tokenizer, cache=True)
    again.folder = tmp_path
    with pytest.raises(InputError, match=f"{file.name}.*remove it"):
        loader_rows(again)


def test_held_out_pairs_are_measured(tokenizer):
    trainer = moved(tokenizer)
    pairs = trainer.pairs(PAIRS)
    loss, metrics = loss_and_metrics(trainer, pairs)
    found = trainer.objectives["dpo"].evaluate(pairs.examples, 4)
    for name, value in {"loss": loss, **metrics}.items():
        assert found.metrics[name] == pytest.approx(value, abs=1e-6)
    assert [row["chosen"] for row in found.rows] == [row["chosen"] for row in PAIRS]
    assert found.rows[0]["chosen_reward"] != found.rows[0]["rejected_reward"]


def test_sft_beside_it_imitates_the_chosen_side_alone(tokenizer):
    trainer = trainer_on(tokenizer)
    batch = trainer.batch(PAIRS)
    assert [e.target for e in batch.examples] == [row["chosen"] for row in PAIRS]
    metrics = trainer.batch_step({"dpo": 1.0, "sft": 0.1})
    assert {"dpo_loss", "sft_loss"} <= metrics.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sigmoidal"}, "objectives.dpo.kind"),
        ({"beta": 0.0}, "beta must be > 0"),
        ({"beta": "large"}, "objectives.dpo.beta must be float"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "has no label_smoothing"),
        ({"gamma": 1.0}, "unknown setting"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(settings, message):
    with pytest.raises(InputError, match=message):
        HybridConfig.from_dict({"objectives": {"dpo": settings}})


def test_a_loss_for_an_objectives_name_is_told_where_it_belongs(tokenizer):
    with pytest.raises(InputError, match=r"objectives\.dpo\.kind=ipo"):
        trainer_on(tokenizer).preference_step(PAIRS, kind="ipo")


def test_data_without_pairs_are_refused(tokenizer):
    rows = [{"prompt": "the w1", "target": "was good"}]
    trainer = trainer_on(tokenizer, rows, mixing={"strategy": "objective", "objective": "dpo", "steps": 1})
    with pytest.raises(InputError, match=r"the 1 examples of data\.train hold none"):
        trainer.train()
    with pytest.raises(InputError, match="1 of 1 rows are no pairs"):
        trainer.preference_step(rows)


def test_rows_by_hand_are_read_as_the_preferences_own_data_are(tokenizer):
    own = DataConfig(template="good {prompt} bad", prompt="asked", chosen="better", rejected="worse")
    rows = [{"asked": row["prompt"], "better": row["chosen"], "worse": row["rejected"]} for row in PAIRS]
    trainer = trainer_on(tokenizer, [{"text": "it is a w1"}], preference_data=own, given={"preference_data": rows})
    by_hand, (first, *_) = trainer.pairs(rows), trainer.corpus.pairs
    assert first in by_hand.examples and len(by_hand) == len(rows)
    assert tokenizer.decode(first.prompt_ids).startswith("good the")
    answers = trainer.answers(rows)
    assert {e.prompt_ids for e, _ in answers.examples} == {e.prompt_ids for e in by_hand.examples}


def test_without_other_data_a_prompt_is_one_of_the_preferences(tokenizer):
    own = DataConfig(template="good {prompt} bad")
    trainer = trainer_on(tokenizer, None, preference_data=own, given={"preference_data": PAIRS})
    assert trainer.corpus.prompt("the w1").prompt_ids == tuple(tokenizer.encode("good the w1 bad"))
    assert trainer.config.data.template == own.template
    beside = trainer_on(tokenizer, PAIRS, preference_data=own, given={"preference_data": PAIRS})
    assert beside.corpus.prompt("the w1").prompt_ids == tuple(tokenizer.encode("the w1"))


@pytest.mark.parametrize("name", ["dpo", "kto", "reward_model"])
def test_a_batch_of_the_loader_is_taken_for_the_pairs_in_it(tokenizer, name):
    found = []
    for given in (lambda made: made.batch(PAIRS), lambda made: PAIRS):
        trainer = trainer_on(tokenizer, objectives={"reward_model": {}})
        found.append(trainer.preference_step(given(trainer), name)["loss"])
    assert found[0] == found[1]


@pytest.mark.parametrize(("name", "other"), [("dpo", "answers"), ("reward_model", "answers"), ("kto", "pairs")])
def test_rows_of_another_kind_are_refused(tokenizer, name, other):
    trainer = trainer_on(tokenizer, objectives={"reward_model": {}})
    with pytest.raises(InputError, match="expected a list of prompts or rows, got"):
        trainer.preference_step(getattr(trainer, other)(PAIRS), name)


def test_held_out_preferences_without_their_training_data_are_refused(tokenizer):
    with pytest.raises(InputError, match=r"preference_data\.eval without preference_data\.train"):
        trainer_on(tokenizer, preference_data=DataConfig(eval="pairs.jsonl"))


def test_an_evaluation_takes_every_pair_through_the_policy_once(tokenizer, monkeypatch):
    trainer = trainer_on(tokenizer)
    seen, forward = [], trainer.policy.batch_logprob
    monkeypatch.setattr(
        trainer.policy, "batch_logprob", lambda batch, **given: seen.append(len(batch)) or forward(batch, **given)
    )
    trainer.objectives["dpo"].evaluate(trainer.corpus.pairs, 4)
    assert sum(seen) == 2 * len(trainer.corpus.pairs)
