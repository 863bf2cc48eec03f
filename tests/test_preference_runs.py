"""Whole runs on preferences: over adapters and 4-bit weights, resumed, and what they leave behind."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from whole_run import crash, logged_rows

from hybrid import HybridConfig, HybridTrainer, RewardModel, make_reward
from hybrid.cli import main
from hybrid.run import read_jsonl

pytestmark = pytest.mark.slow
WORDS = ("dog", "cat", "bird", "girl", "boy", "fox", "cake", "tree", "day", "park", "car", "sun")
MODELS = {"plain": {}, "lora": {"lora": {"rank": 4}}, "4 bit": {"lora": {"rank": 4}, "load_in_4bit": True}}


def config_of(stories, folder, objective, model="plain", **settings):
    """Six steps of one objective, evaluated and saved on the way."""
    rows = [{"prompt": f"The {w} was", "chosen": f" a good {w}.", "rejected": f" a very bad {w}."} for w in WORDS]
    folder.mkdir(exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return HybridConfig.from_dict(
        {
            "model": {"name": stories, **MODELS[model]},
            "data": {"train": str(folder / "pairs.jsonl"), "eval_fraction": 0.25, "template": "none"},
            "mixing": {"strategy": "objective", "objective": objective, "steps": 6},
            "objectives": {objective: settings},
            "optimizer": {"lr": 1e-3},
            "preferences": {"batch_size": 4},
            "eval": {"every": 3},
            "checkpoint": {"every": 2},
            "run": {"output": str(folder / "run")},
        }
    )


@pytest.mark.parametrize("model", ["lora", "4 bit"])
@pytest.mark.parametrize("objective", ["dpo", "kto", "reward_model"])
def test_a_run_on_adapters_learns_and_goes_on_as_the_uninterrupted_one(objective, model, stories, tmp_path, needs_peft):
    if model == "4 bit":
        pytest.importorskip("bitsandbytes")
    config = config_of(stories, tmp_path / "a", objective, model)
    HybridTrainer(config=config).train()
    rows = [row for row in logged_rows(tmp_path / "a" / "run") if row["phase"] == objective]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    output = str(tmp_path / "a" / "part")
    crash(HybridTrainer(config=replace(config, run=replace(config.run, output=output))), 5)
    HybridTrainer.resume(output).train()
    one, other = (load_file(tmp_path / "a" / run / "export" / "model.safetensors") for run in ("run", "part"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert logged_rows(tmp_path / "a" / "part") == logged_rows(tmp_path / "a" / "run")


@pytest.mark.parametrize("model", ["plain", "lora"])
def test_a_reward_model_that_was_trained_is_a_reward_with_the_same_scores(model, stories, tmp_path, request):
    if model == "lora":
        request.getfixturevalue("needs_peft")
    trainer = HybridTrainer(config=config_of(stories, tmp_path / "a", "reward_model", model, center_coef=0.01))
    trainer.train()
    folder = tmp_path / "a" / "run" / "reward_model"
    pairs = trainer.pairs([e.item for e in trainer.corpus.eval])
    with torch.no_grad():
        expected, _ = pairs.split(trainer.policy.eval().scores(pairs.sides.input_ids, pairs.sides.attention_mask))
    prompts, texts = [e.prompt for e in pairs.examples], [e.target for e in pairs.examples]
    ours = RewardModel.from_pretrained(folder).score(texts, prompts)
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)
    spec = {"type": "reward_model", "path": str(folder)}
    assert list(make_reward(spec).score(texts, prompts=prompts)) == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-5)
    assert plain_scores(folder, prompts, texts) == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-5)
    normalized = list(make_reward({**spec, "normalized": True}).score(texts, prompts=prompts))
    found = trainer.evaluate()
    mean, std = (found[f"reward_model/{name}"] for name in ("score_mean", "score_std"))
    assert normalized == pytest.approx([(score - mean) / std for score in expected.tolist()], abs=1e-4)


def plain_scores(folder, prompts, texts):
    """What transformers alone makes of the folder, in one padded batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    turns = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    whole = [tokenizer.apply_chat_template(dialogue, tokenize=False) for dialogue in turns]
    inputs = tokenizer(whole, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        return model(**inputs).logits[:, 0].tolist()


def test_a_checkpoint_of_a_reward_model_is_exported_with_it(stories, tmp_path):
    HybridTrainer(config=config_of(stories, tmp_path / "a", "reward_model")).train()
    run, out = tmp_path / "a" / "run", tmp_path / "out"
    assert main(["export", str(run), str(out), "--checkpoint", "step-6"]) == 0
    text = [" a good dog."], ["The dog was"]
    scores = [RewardModel.from_pretrained(folder / "reward_model").score(*text) for folder in (run, out)]
    assert torch.equal(*scores)
    raw, normalized = (
        make_reward({"type": "reward_model", "path": str(out / "reward_model"), "normalized": of}).score(*text[:1])
        for of in (False, True)
    )
    assert raw != normalized, "the run's evaluation of that step says how scores are distributed"
    assert main(["export", str(run), str(tmp_path / "again")]) == 0
    assert torch.equal(RewardModel.from_pretrained(tmp_path / "again" / "reward_model").score(*text), scores[0])


def test_the_code_on_a_reward_models_card_scores_answers(stories, tmp_path, monkeypatch, capsys):
    HybridTrainer(config=config_of(stories, tmp_path, "reward_model")).train()
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "run")
    capsys.readouterr()
    exec(re.search(r"```python\n(.*?\n)```", card, re.DOTALL)[1], {})
    assert re.fullmatch(r"tensor\(\[.*, .*\]\)\n", capsys.readouterr().out)


def test_the_report_and_the_console_of_a_run_show_its_pairs(stories, tmp_path, capsys):
    config = config_of(stories, tmp_path, "reward_model")
    HybridTrainer(config=replace(config, eval=replace(config.eval, metric="reward_model/accuracy"))).train()
    out = capsys.readouterr().out
    assert re.search(r"reward_model step 6/6  eta 0:00  reward_model_loss \S+  accuracy \S+\n", out)
    assert re.search(r"eval step 6/6 .* reward_model/loss \S+  reward_model/accuracy \S+  reward_model/ece \S+\n", out)
    html = (tmp_path / "run" / "report.html").read_text("utf-8")
    captions = re.findall(r"<figcaption>(.*?) <small>", html)
    assert {"Reward model loss", "Pairwise accuracy", "Rewards", "Margin", "Calibration", "Margins"} <= set(captions)
    assert html.count('<h3 class="pair">') == 3
    assert "on 3 held-out pairs" in html


def test_responses_that_nobody_judged_have_no_reward_in_the_log(stories, tmp_path):
    config = config_of(stories, tmp_path, "distill")
    HybridTrainer(config=replace(config, mixing={**config.mixing, "steps": 1})).train()
    (row,) = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "distill"]
    assert {"loss", "kl", "response_length"} <= row.keys()
    assert [name for name in row if "reward" in name] == []
    samples = [row for row in read_jsonl(tmp_path / "run" / "samples.jsonl") if row["phase"] == "distill"]
    assert samples and all(row["reward"] is None and row["components"] == {} for row in samples)


def test_ppo_learns_from_a_reward_model_that_was_trained_here(stories, tmp_path):
    HybridTrainer(config=config_of(stories, tmp_path / "a", "reward_model")).train()
    config = config_of(stories, tmp_path / "b", "dpo")
    path = str(tmp_path / "a" / "run" / "reward_model")
    config = replace(
        config, reward={"type": "reward_model", "path": path},
        mixing={"strategy": "blend", "coefs": {"ppo": 1.0, "dpo": 0.5}, "steps": 2},
    )  # fmt: skip
    HybridTrainer(config=config).train()
    rows = [row for row in read_jsonl(tmp_path / "b" / "run" / "metrics.jsonl") if row["phase"] == "joint"]
    assert len(rows) == 2 and all("dpo_loss" in row and "reward" in row for row in rows)


def test_what_pairs_were_rated_is_kept_at_every_evaluation(stories, tmp_path):
    HybridTrainer(config=config_of(stories, tmp_path / "a", "dpo")).train()
    rows = [row for row in read_jsonl(tmp_path / "a" / "run" / "samples.jsonl") if row["phase"] == "pairs"]
    assert sorted({row["step"] for row in rows}) == [0, 3, 6]
    assert {"prompt", "chosen", "rejected", "chosen_reward", "rejected_reward", "objective"} <= rows[0].keys()
    before, after = ([row for row in rows if row["step"] == step] for step in (0, 6))
    assert all(abs(row["chosen_reward"]) < 1e-4 for row in before)
    assert sum(row["chosen_reward"] > row["rejected_reward"] for row in after) > len(after) / 2


def test_metrics_that_two_objectives_have_are_told_apart(stories, tmp_path):
    mixing = {"strategy": "blend", "coefs": {"dpo": 1.0, "reward_model": 0.5}, "steps": 2}
    HybridTrainer(config=replace(config_of(stories, tmp_path / "a", "dpo"), mixing=mixing)).train()
    rows = [row for row in logged_rows(tmp_path / "a" / "run") if row["phase"] == "joint"]
    assert all("accuracy" not in row for row in rows)
    # Of the policy that is still its reference: what was computed once differs by rounding from what is trained.
    assert abs(rows[0]["dpo/margin_mean"]) < 1e-5 < abs(rows[0]["reward_model/margin_mean"])


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_held_out_pairs_of_both_methods_have_one_reward(objective, stories, tmp_path):
    trainer = HybridTrainer(config=config_of(stories, tmp_path / "a", objective))
    trainer.train()
    found = trainer.evaluate()
    assert found[f"{objective}/accuracy"] > 0.5
    assert found[f"{objective}/chosen_reward"] > found[f"{objective}/rejected_reward"]
