"""Whole runs on adapters, over float32 and over 4-bit weights: what they train, and how they go on."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from whole_run import crash

from hybrid import HybridConfig, HybridTrainer
from hybrid.cli import main
from hybrid.run import CHECKPOINTS, read_jsonl

pytestmark = pytest.mark.usefixtures("needs_peft")
MODELS = {"lora": {"lora": {"rank": 4}}, "4 bit": {"lora": {"rank": 4}, "load_in_4bit": True}}


@pytest.fixture(params=sorted(MODELS))
def config(request, stories, tmp_path):
    """A run of 6 steps, SFT and PPO, that evaluates after the third and saves after every second."""
    if request.param == "4 bit":
        pytest.importorskip("bitsandbytes")
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Tell me about day {i}.", "target": f"It was a good day, number {i}."} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return HybridConfig.from_dict(
        {
            "model": {"name": stories, **MODELS[request.param]},
            "data": {"train": str(data), "eval_fraction": 0.25},
            "reward": {"type": "length_window", "min": 2, "max": 6},
            "sampling": {"max_new_tokens": 8},
            "mixing": {"cycles": 2, "sft_steps_per_cycle": 2, "ppo_steps_per_cycle": 1},
            "optimizer": {"lr": 1e-3},
            "sft": {"batch_size": 4},
            "ppo": {"batch_size": 4, "minibatch_size": 2, "epochs": 2},
            "eval": {"num_prompts": 3, "every": 3},
            "checkpoint": {"every": 2},
            "run": {"output": str(tmp_path / "run")},
        }
    )


def base_bits(policy):
    """The weights that are not to train."""
    return {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}


@pytest.mark.slow
def test_a_hybrid_run_trains_the_adapter_and_leaves_the_model_under_it_alone(config, tmp_path):
    trainer = HybridTrainer(config=config)
    before = base_bits(trainer.policy)
    trainer.train()
    first, *_, last = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "eval"]
    assert last["sft_loss"] < 0.8 * first["sft_loss"]
    assert first["kl"] == 0.0, "a new adapter is exactly the reference"
    assert last["kl"] > 0.1
    after = base_bits(trainer.policy)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], x) for name, x in before.items())


@pytest.mark.slow
def test_a_run_on_adapters_that_died_goes_on_as_the_uninterrupted_one(config, tmp_path):
    HybridTrainer(config=config).train()
    part = HybridTrainer(config=replace(config, run=replace(config.run, output=str(tmp_path / "part"))))
    crash(part, 5)
    checkpoint = tmp_path / "part" / CHECKPOINTS / "step-4" / "model"
    assert not list(checkpoint.glob("model*")), "the frozen weights are not saved again"
    HybridTrainer.resume(tmp_path / "part").train()
    for name in ("model.safetensors", "value_head.safetensors"):
        one, other = (load_file(tmp_path / run / "export" / name) for run in ("run", "part"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_checkpoint_and_export_of_a_run_on_adapters_measure_what_the_run_did(config, tmp_path, capsys):
    HybridTrainer(config=config).train()
    evals = {row["step"]: row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "eval"}
    for folder, step in ((tmp_path / "run" / CHECKPOINTS / "step-6", 6), (tmp_path / "run", 6)):
        capsys.readouterr()
        assert main(["eval", str(folder)]) == 0
        measures = dict(line.split() for line in capsys.readouterr().out.splitlines())
        for name in ("sft_loss", "kl"):
            # The export's merged weights are rounded; the reference is in 4 bits where it was.
            assert float(measures[name]) == pytest.approx(evals[step][name], abs=2e-3), (folder, name)
        assert main(["generate", str(folder), "Tell me"]) == 0


@pytest.mark.slow
def test_a_model_in_memory_gets_the_adapter_of_the_config(config, stories):
    from transformers import AutoModelForCausalLM

    if config.model.load_in_4bit:
        with pytest.raises(ValueError, match="load_in_4bit is for a model that is loaded by name"):
            HybridTrainer(AutoModelForCausalLM.from_pretrained(stories), config=config)
        return
    trainer = HybridTrainer(AutoModelForCausalLM.from_pretrained(stories), config=config)
    assert sum(p.requires_grad for p in trainer.policy.backbone.parameters()) == 2 * 7 * 5  # A and B, layers, blocks
