"""`hybrid export`: a plain transformers folder and its model card."""

import json
import re
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from run.pages import preference_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hybrid.loop
from hybrid import HybridConfig, HybridTrainer, InputError, Policy
from hybrid.cli import main
from hybrid.export import export, model_card
from hybrid.run import CHECKPOINTS, EXPORT, read_jsonl

pytestmark = pytest.mark.slow


def values(stories, folder, **model):
    data = folder / "data.jsonl"
    rows = [{"prompt": f"Tell me about day {i}.", "target": f"It was a good day, number {i}."} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"name": stories, **model},
        "data": {"train": str(data), "eval_fraction": 0.25},
        "reward": {"type": "length_window", "min": 2, "max": 6},
        "sampling": {"max_new_tokens": 6},
        "mixing": {"cycles": 2, "sft_steps_per_cycle": 1, "ppo_steps_per_cycle": 1},
        "optimizer": {"lr": 1e-3},
        "sft": {"batch_size": 2},
        "ppo": {"batch_size": 2, "minibatch_size": 2, "epochs": 1},
        "eval": {"num_prompts": 2, "every": 2},
        "checkpoint": {"every": 2, "export_every": 3},
        "run": {"output": str(folder / "run")},
    }


@pytest.fixture(scope="module")
def run(stories, needs_peft, tmp_path_factory):
    """The folder of a LoRA run of four steps."""
    folder = tmp_path_factory.mktemp("export")
    HybridTrainer(config=HybridConfig.from_dict(values(stories, folder, lora={"rank": 4}))).train()
    return folder / "run"


@pytest.fixture
def tokens():
    return torch.randint(3, 500, (2, 6), generator=torch.Generator().manual_seed(1))


def test_the_command_writes_a_folder_that_transformers_and_we_load(run, tokens, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert f"hf upload NAME {tmp_path / 'out'}" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Hello").input_ids
    assert torch.equal(model(tokens).logits, Policy.from_pretrained(run / EXPORT).eval().backbone.model(tokens).logits)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (run / EXPORT).iterdir()}


@pytest.mark.parametrize("name", ["newest", "best", "step-2"])
def test_a_checkpoint_is_exported_with_its_adapter_merged(run, tokens, tmp_path, name):
    export(run, tmp_path / "out", checkpoint=name)
    steps = {"newest": 4, "step-2": 2}
    losses = {row["step"]: row["sft_loss"] for row in read_jsonl(run / "metrics.jsonl") if row["phase"] == "eval"}
    step = steps.get(name) or min((2, 4), key=losses.__getitem__)
    saved = Policy.from_pretrained(run / CHECKPOINTS / f"step-{step}" / "model").eval().backbone.model(tokens).logits
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(tokens).logits
    torch.testing.assert_close(logits, saved, rtol=1e-4, atol=1e-4)  # float32 rounding of the merge


def test_a_checkpoint_of_a_run_without_adapters_is_exported_with_its_bits(stories, tmp_path):
    HybridTrainer(config=HybridConfig.from_dict(values(stories, tmp_path))).train()
    export(tmp_path / "run", tmp_path / "out", checkpoint="step-2")
    saved = load_file(tmp_path / "run" / CHECKPOINTS / "step-2" / "model" / "model.safetensors")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == out.keys() and all(torch.equal(saved[name], out[name]) for name in saved)


def test_the_model_is_exported_on_the_way_and_at_the_end(stories, tmp_path, monkeypatch):
    exported = []
    monkeypatch.setattr(hybrid.loop, "export_run", lambda trainer: exported.append(trainer.num_steps))
    HybridTrainer(config=HybridConfig.from_dict(values(stories, tmp_path))).train()
    assert exported == [3, 4]


# The card


def test_the_card_has_metadata_and_the_last_evaluation(run):
    card = ModelCard.load(run / EXPORT / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["hybrid-trainer", "sft", "ppo", "lora"]
    assert card.data.license is None
    evals = [row for row in read_jsonl(run / "metrics.jsonl") if row["phase"] == "eval"]
    line = f"| Validation SFT loss, nats per token | {evals[0]['sft_loss']:.3f} | {evals[-1]['sft_loss']:.3f} |"
    assert line in card.text
    assert "Steps: 2 sft, 2 ppo; seed 0." in card.text
    assert "type: length_window" in card.text


def test_the_card_of_an_earlier_checkpoint_knows_nothing_of_what_came_later(run, tmp_path):
    export(run, tmp_path / "out", checkpoint="step-2")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| step 0 | step 2 | change |" in card
    assert "Steps: 1 sft, 1 ppo; seed 0." in card


def test_the_code_on_the_card_answers_a_prompt(run, monkeypatch, capsys):
    card = (run / EXPORT / "README.md").read_text()
    monkeypatch.chdir(run / EXPORT)
    code = re.search(r"```python\n(.*?\n)```\n\n`value_head", card, re.DOTALL)
    exec(code[1], {})
    assert "Your prompt" in capsys.readouterr().out


def test_the_card_has_no_path_of_this_machine(run):
    assert not re.search(r"(?<![\w.])/\w+/", (run / EXPORT / "README.md").read_text())


def test_the_card_names_the_base_model_and_the_data_where_they_are_on_the_hub(run):
    config = HybridConfig.from_file(run / "config.yaml")
    config = replace(
        config,
        model=replace(config.model, name="HuggingFaceTB/SmolLM2-135M"),
        data=replace(
            config.data, train=["stanfordnlp/imdb:train", "reviews.jsonl"], template="chat", system="Be kind."
        ),
    )
    card = ModelCard(model_card(run, config, step=4))
    assert card.data.base_model == ["HuggingFaceTB/SmolLM2-135M"]
    assert card.data.datasets == ["stanfordnlp/imdb"]
    assert "apply_chat_template([{'role': 'system', 'content': 'Be kind.'}" in card.text


@pytest.mark.parametrize(
    ("mixing", "said", "judges", "writes"),
    [
        ({"strategy": "objective", "objective": "dpo"}, "DPO", False, True),
        ({"strategy": "objective", "objective": "reward_model"}, "reward modelling", True, False),
        (
            {"strategy": "blend", "coefs": {"reward_model": 1.0, "dpo": 1.0, "sft": 0.1}},
            "supervised fine-tuning, DPO and reward modelling in one loop with one optimizer",
            True,
            True,
        ),
        ({"ppo_steps_per_cycle": 1}, "supervised fine-tuning and PPO in one loop with one optimizer", False, True),
    ],
)
def test_the_card_says_what_was_trained_and_for_what_the_model_is(tmp_path, mixing, said, judges, writes):
    config = HybridConfig.from_dict(
        {
            "model": {"name": "HuggingFaceTB/SmolLM2-135M"},
            "mixing": mixing,
            "preference_data": {"train": "Anthropic/hh-rlhf"},
            "objectives": {"dpo": {"beta": 0.3}},
        }
    )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows("dpo")))
    card = ModelCard(model_card(tmp_path, config, step=4))
    assert f"trained with HybridTrainer: {said}. Steps: 4 dpo; seed 0." in card.text
    assert ("RewardModel.from_pretrained" in card.text) == judges
    assert ("model.generate" in card.text) == writes
    assert card.data.pipeline_tag == ("text-generation" if writes else None)
    assert ("reward_model" in card.data.tags) == judges and "dpo" in card.data.tags
    assert card.data.datasets == ["Anthropic/hh-rlhf"]
    assert "| Pairwise accuracy, ± standard error | 50.0% ±\u00a05.0% | 87.5% ±\u00a05.0% | +37.5 points |" in card.text
    assert "16 held-out pairs." in card.text
    assert "beta: 0.3" in card.text


# What is refused


def test_a_folder_that_holds_something_else_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(["export", str(run), str(tmp_path)]) == 2
    assert "it holds something else; name a new folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_older_export_is_replaced(run, tmp_path):
    export(run, tmp_path / "out", checkpoint="step-2")
    export(run, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == (run / EXPORT / "README.md").read_text()


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(run, tmp_path):
    with pytest.raises(InputError, match="no checkpoint 'step-3'; known: best, newest, step-2, step-4"):
        export(run, tmp_path / "out", checkpoint="step-3")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no run: it has no config\.yaml"):
        export(tmp_path, tmp_path / "out")


def test_a_run_that_exported_nothing_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    with pytest.raises(InputError, match="exported nothing yet; export a checkpoint with --checkpoint newest"):
        export(tmp_path / "run", tmp_path / "out")


def test_an_export_without_weights_is_refused(tmp_path):
    (tmp_path / "run" / EXPORT).mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("{}")
    with pytest.raises(InputError, match="has no weights"):
        export(tmp_path / "run", tmp_path / "out")
