"""Every example runs as its docstring says, on a real model."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hybrid import HybridConfig
from hybrid.run import read_jsonl

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments):
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_custom_loop_prints_a_line_for_each_cycle(stories):
    lines = run("examples/custom_loop.py", stories)
    assert len(lines) == 2
    assert all("SFT loss" in line and "reward" in line for line in lines)


def test_the_custom_loop_has_at_most_40_lines():
    assert (ROOT / "examples" / "custom_loop.py").read_text().count("\n") <= 40


@pytest.mark.slow
def test_the_custom_strategy_trains(stories):
    lines = run("examples/custom_strategy.py", stories)
    assert next(line.split()[0] for line in lines if "step" in line) == "ppo"
    assert "step 6/6" in lines[-1]


@pytest.mark.slow
def test_the_custom_objective_trains_beside_ppo(stories):
    lines = run("examples/custom_objective.py", stories)
    assert "joint step 4/4" in lines[-1].replace("joint  ", "joint ")


def test_the_custom_objective_has_at_most_40_lines():
    assert (ROOT / "examples" / "custom_objective.py").read_text().count("\n") <= 40


@pytest.mark.slow
def test_an_old_trl_loop_runs_on_us(stories):
    assert len(run("examples/trl_migration.py", stories)) == 2


@pytest.mark.slow
def test_the_smoke_test_shows_two_batches(shared, stories):
    sentences = [shared / "rotten_tomatoes" / f"rt-polarity.{end}" for end in ("pos", "neg")]
    lines = run(
        "examples/smoke.py", "examples/reviews.yaml", f"model.name={stories}", f"data.train={[*map(str, sentences)]}",
        "data.limit=200", "sft.batch_size=8", "sampling.max_new_tokens=12", "data.max_length=128",
    )  # fmt: skip
    for name in ("loss", "response", "target", "reward"):
        assert sum(name in line for line in lines) >= 2, lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "logged"),
    [
        ("self_play.yaml", {"reward/sentiment_lexicon/win_rate", "reward/sentiment_lexicon/opponent_age"}),
        ("mixture.yaml", {"reward/sentiment_lexicon/weight", "reward/length_window/gain"}),
    ],
)
def test_a_config_whose_reward_asks_the_run_trains(shared, stories, tmp_path, config, logged):
    sentences = [shared / "rotten_tomatoes" / f"rt-polarity.{end}" for end in ("pos", "neg")]
    run(
        "-m", "hybrid", "train", f"examples/{config}", f"model.name={stories}",
        f"data.train={[*map(str, sentences)]}", "data.limit=200", "data.max_length=128", "sft.batch_size=8",
        "sampling.max_new_tokens=8", "ppo.batch_size=8", "ppo.minibatch_size=4", "eval.num_prompts=8",
        "eval.num_examples=8", "mixing.cycles=2", f"run.output={tmp_path / 'run'}",
    )  # fmt: skip
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "ppo"]
    assert len(rows) == 2
    assert all(logged <= row.keys() for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "logged"),
    [
        ("experience", {"memory/medium", "memory/success", "replay_loss", "importance_mean"}),
        ("markov", {"memory/level", "memory/pairs"}),
    ],
)
def test_a_config_with_a_memory_trains(shared, stories, tmp_path, config, logged):
    sentences = [shared / "rotten_tomatoes" / f"rt-polarity.{end}" for end in ("pos", "neg")]
    run(
        "-m", "hybrid", "train", f"examples/{config}.yaml", f"model.name={stories}",
        f"data.train={[*map(str, sentences)]}", "data.limit=40", "data.max_length=128", "sft.batch_size=8",
        "sampling.max_new_tokens=8", "ppo.batch_size=8", "ppo.minibatch_size=8", "eval.num_prompts=4",
        "eval.num_examples=8", *(["mixing.cycles=3"] if config == "markov" else ["mixing.steps=3"]),
        f"run.output={tmp_path / config}",
    )  # fmt: skip
    rows = [row for row in read_jsonl(tmp_path / config / "metrics.jsonl") if "kl" in row and row["phase"] != "eval"]
    assert len(rows) == 3 and logged <= {name for row in rows for name in row}
    tables = "\n".join(run("-m", "hybrid", "memory", tmp_path / config))
    assert ("The hardest prompts" if config == "experience" else "States by their mean reward") in tables
    assert "<h2>Memory</h2>" in (tmp_path / config / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_datastore_of_reviews_lowers_the_perplexity_of_others(shared, stories, tmp_path):
    folder, reviews = tmp_path / "store", shared / "rotten_tomatoes" / "rt-polarity.pos"
    made = run("-m", "hybrid", "datastore", stories, reviews, folder, "data.format=text", "data.limit=300")
    assert "numbers each" in made[-1]
    decoder = f"eval.decoder={{type: knn, datastore: {folder}}}"
    lines = run("-m", "hybrid", "eval", "examples/datastore.yaml", f"model.name={stories}", "data.limit=40", decoder)
    found = {name: float(value) for name, value in (line.split() for line in lines if "perplexity" in line)}
    assert found["decoder/perplexity"] < 0.6 * found["perplexity"]


def test_the_custom_reward_shows_scores_and_a_log():
    lines = run("examples/custom_reward.py")
    assert lines[:3] == ["1.00  Paris is the capital.", "0.00  Perhaps Paris, maybe Rome.", "0.00  Paris"]
    assert lines[3] == "reward/hedging/raw_mean = 0.67"


def test_the_readmes_scores_of_the_example_spec_are_what_the_command_prints(monkeypatch):
    pytest.importorskip("spellchecker")
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("-m", "hybrid", "reward", "examples/reward.json", "examples/responses.jsonl")
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    # The last column holds seconds.
    rows = [line.rstrip().rsplit(" ", 1)[0].rstrip() for line in lines if "±" in line or "…" in line]
    assert len(rows) == 8
    assert set(rows) <= {line.rsplit(" ", 1)[0].rstrip() for line in readme}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_example_config_is_valid(path):
    if path.name == "vllm.yaml" and find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: make vllm-test installs it")
    HybridConfig.from_file(path)


@pytest.mark.slow
def test_dpo_by_hand_begins_at_log_2_and_learns(stories):
    lines = run("examples/preferences.py", stories)
    losses = [float(line.split()[2]) for line in lines]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4) and losses[-1] < 0.5


def test_the_loop_of_preferences_has_at_most_40_lines():
    assert (ROOT / "examples" / "preferences.py").read_text().count("\n") <= 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("dpo", ["mixing.steps=2", "data.limit=16"]),
        ("reward_model", ["mixing.steps=2", "data.limit=16"]),
        ("online_dpo", ["mixing.steps=2", "data.limit=40", "ppo.batch_size=4", "ppo.minibatch_size=8"]),
        ("decoding", ["mixing.steps=2", "data.limit=40", "ppo.batch_size=4", "ppo.minibatch_size=4"]),
        ("distill", ["mixing.steps=2", "data.limit=40", "ppo.batch_size=4", "ppo.minibatch_size=4"]),
    ],
)
def test_every_config_of_preferences_trains(name, overrides, shared, stories, tmp_path):
    pairs = shared / "hh_rlhf" / "harmless_test_600.jsonl"
    sentences = [str(shared / "rotten_tomatoes" / f"rt-polarity.{end}") for end in ("pos", "neg")]
    train = str(pairs) if name in ("dpo", "reward_model") else sentences
    teacher = [f"references=[{{model: {stories}}}]"] if name == "distill" else []
    lines = run(
        "-m", "hybrid", "train", f"examples/{name}.yaml", f"model.name={stories}", f"data.train={train}",
        f"run.output={tmp_path / name}", "data.max_length=512", "eval.num_prompts=4", "eval.num_examples=8",
        "sampling.max_new_tokens=8", *overrides, *teacher,
    )  # fmt: skip
    assert any("step 2/2" in line for line in lines)
    assert (tmp_path / name / "report.html").is_file()
    if name == "reward_model":
        from hybrid import RewardModel

        scores = RewardModel.from_pretrained(tmp_path / name / "reward_model").score([" No.", " Yes, of course."])
        assert scores.isfinite().all() and scores[0] != scores[1]


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_recurrent_model_learns_a_text_and_goes_on_with_ppo(cell, shared, tmp_path):
    from transformers import AutoModelForCausalLM

    text = tmp_path / "text.txt"
    text.write_text((shared / "tinyshakespeare" / "input.txt").read_text("utf-8")[:60_000], "utf-8")
    lines = run("examples/recurrent.py", text, tmp_path / "models", cell, 51, 2)
    first, last = (float(line.split()[-1]) for line in lines if line.startswith("update"))
    assert last < 0.5 * first
    assert sum(line.startswith("PPO") for line in lines) == 2
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "cheerful")
    assert made.config.cell == cell


@pytest.mark.slow
def test_a_config_of_many_processes_trains_on_two(shared, stories, tmp_path):
    lines = run(
        "-m", "hybrid", "train", "examples/scale/fsdp2.yaml", f"model.name={stories}",
        f"data.train={shared / 'rotten_tomatoes' / 'rt-polarity.pos'}", f"run.output={tmp_path / 'run'}", "--nproc", 2,
    )  # fmt: skip
    assert any("2 processes by fsdp2" in line for line in lines)
    assert any("step 4/4" in line for line in lines)
