"""Whole runs on recurrent models: nothing in the loop knows that they have no attention."""

import pytest
import torch
from test_conformance import PAIRS, ROWS, score
from tiny import CELLS, tiny_model
from whole_run import crash, logged_rows, weights

from hybrid import DataConfig, HybridConfig, HybridTrainer, InputError, Policy, PPOConfig, SamplingConfig, SFTConfig
from hybrid.config import ModelConfig, RunConfig
from hybrid.evaluate import EvalConfig
from hybrid.export import export
from hybrid.models import LoraConfig, add_lora, check_packing, new_recurrent
from hybrid.objectives import PreferencesConfig
from hybrid.run import CheckpointConfig, read_jsonl

every_cell = pytest.mark.parametrize("cell", CELLS)


def trainer_of(cell, tokenizer, folder=None, *, resume=False, model=None, settings=None, given=(), **sections):
    defaults = {
        "data": DataConfig(template="none"),
        "sampling": SamplingConfig(max_new_tokens=6),
        "model": settings or ModelConfig(),
        "sft": SFTConfig(batch_size=3),
        "ppo": PPOConfig(batch_size=4, minibatch_size=2, epochs=2, samples_per_prompt=2),
        "optimizer": {"lr": 1e-2},
        "mixing": {"strategy": "alternate", "cycles": 2, "sft_steps_per_cycle": 2, "ppo_steps_per_cycle": 1},
        "eval": EvalConfig(num_prompts=2),
        "checkpoint": CheckpointConfig(every=1),
        "run": RunConfig(output=None if folder is None else str(folder)),
    }
    given = {"policy_or_name": Policy(tiny_model(cell, seed=1)) if model is None else model, "tokenizer": tokenizer,
             "train_data": ROWS, "reward": score, **dict(given)}  # fmt: skip
    if resume:
        return HybridTrainer.resume(folder, **given)
    return HybridTrainer(config=HybridConfig(**defaults | sections), **given)


@every_cell
def test_a_run_of_both_trains_exports_and_is_read_by_transformers(cell, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    data = DataConfig(template="none", eval_fraction=0.25)
    trainer = trainer_of(cell, tokenizer, tmp_path / "run", data=data)
    before = weights(trainer).clone()
    trainer.train()
    assert torch.isfinite(weights(trainer)).all() and not torch.equal(weights(trainer), before)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert {row["phase"] for row in rows} == {"eval", "sft", "ppo"}
    gaps = [abs(row["sampling_gap"]) for row in rows if "sampling_gap" in row]
    assert gaps and max(gaps) < 1e-5  # float32
    folder = export(tmp_path / "run", tmp_path / "exported")
    ids = torch.arange(3, 9).unsqueeze(0)
    ours = trainer.policy.backbone.model.eval()
    for model in (AutoModelForCausalLM.from_pretrained(folder), Policy.from_pretrained(folder).backbone.model):
        torch.testing.assert_close(model.eval()(ids).logits, ours(ids).logits)


@every_cell
def test_a_run_that_died_goes_on_with_the_same_bits(cell, tokenizer, tmp_path):
    whole = trainer_of(cell, tokenizer, tmp_path / "whole")
    whole.train()
    crash(trainer_of(cell, tokenizer, tmp_path / "part"), 4)
    resumed = trainer_of(cell, tokenizer, tmp_path / "part", resume=True)
    resumed.train()
    assert torch.equal(weights(resumed), weights(whole))
    assert logged_rows(tmp_path / "part") == logged_rows(tmp_path / "whole")


@every_cell
@pytest.mark.parametrize("objective", ["dpo", "kto", "reward_model"])
def test_preferences_are_learnt(cell, objective, tokenizer):
    mixing = {"strategy": "objective", "objective": objective, "steps": 4}
    given = {"preference_data": PAIRS, "reward": None}
    trainer = trainer_of(cell, tokenizer, mixing=mixing, preferences=PreferencesConfig(batch_size=8), given=given)
    losses = [trainer.batch_step({objective: 1.0})["loss"] for _ in range(6)]
    assert losses[-1] < 0.95 * losses[0]


@every_cell
def test_packed_rows_train_as_those_of_one_example(cell, tokenizer):
    trainers = [trainer_of(cell, tokenizer, sft=SFTConfig(batch_size=3, packing=packing)) for packing in (False, True)]
    check_packing(trainers[1].policy.backbone, 64)
    batches = [next(trainer.loader) for trainer in trainers]
    assert len(batches[1]) < len(batches[0])
    losses = [trainer.sft_step(batch)["loss"] for trainer, batch in zip(trainers, batches, strict=True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@every_cell
def test_gradients_that_are_computed_again_are_the_same(cell, tokenizer):
    runs = []
    for again in (False, True):
        settings = ModelConfig(gradient_checkpointing=again)
        trainer = trainer_of(cell, tokenizer, settings=settings, optimizer={"name": "sgd", "lr": 1e-2})
        trainer.train()
        runs.append(weights(trainer))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


@every_cell
def test_under_bfloat16_the_sampler_is_the_policy(cell, tokenizer, tmp_path):
    trainer = trainer_of(cell, tokenizer, tmp_path / "run", settings=ModelConfig(precision="bfloat16"))
    trainer.train()
    assert torch.isfinite(weights(trainer)).all()
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    gaps = [abs(row["sampling_gap"]) for row in rows if "sampling_gap" in row]
    assert gaps and max(gaps) < 1e-4  # the state is not rounded from token to token
    with trainer.autocast():
        ids = torch.arange(3, 9).unsqueeze(0)
        assert trainer.policy(ids, torch.ones_like(ids)).hidden.dtype == torch.float32


@every_cell
@pytest.mark.usefixtures("needs_peft")
def test_adapters_are_refused(cell):
    with pytest.raises(InputError, match="the cells of RecurrentForCausalLM are no linear layers"):
        add_lora(tiny_model(cell), LoraConfig(rank=2))


def test_a_run_from_the_folder_of_a_new_model(tokenizer, tmp_path):
    folder = new_recurrent(tmp_path / "model", tokenizer, cell="gru", hidden_size=16)
    trainer = trainer_of("gru", tokenizer, tmp_path / "run", model=str(folder))
    trainer.train()
    again = HybridTrainer.resume(tmp_path / "run", train_data=ROWS, reward=score)
    assert torch.equal(weights(again), weights(trainer))
    assert len(trainer.generate(["the w1"])) == 1
