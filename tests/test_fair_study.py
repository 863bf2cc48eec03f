"""The study of benchmarks/fair.py: its tasks are what they say, its arms are tuned alike, its page is of its result."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from studied import studied

from benchmarks import fair
from benchmarks.fair import CELLS, SEEDS, TUNING_SEED, Job, Size, made
from benchmarks.fair_report import measure, page, retention, table, task_result
from benchmarks.fair_run import ARMS, NUM_TRIALS, config_of, lengths_of, run, settings_of, trials
from benchmarks.fair_tasks import (
    ABILITIES,
    PARTS,
    QUESTIONS,
    answer,
    held_out,
    pretraining,
    solved,
    strings,
    training,
)
from benchmarks.mixing_tasks import Work
from hybrid.demo import demo_model, demo_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "fair-cpu-1-thread.json"


def demonstrated(task):
    return [row for row in training(QUESTIONS[task]) if row["target"]]


def test_answers_by_hand():
    assert [answer(f"{letter}4190>") for letter in "crix"] == ["4190", "0914", "5201", "1025"]
    assert solved("x4190>", "1025") == solved("x4190>", "bacf") == 1.0
    assert solved("x4190>", "0914") == 0.0


def test_no_string_is_in_two_parts():
    assert [len(strings()[part]) for part in PARTS] == list(PARTS.values())
    assert len({digits for part in strings().values() for digits in part}) == sum(PARTS.values())


def test_no_ability_answers_a_prompt_of_the_task():
    prompts = [row["prompt"] for row in (*held_out("test"), *training(QUESTIONS["plenty"])) if row["prompt"][0] == "x"]
    assert not any(answer(letter + prompt[1:]) == answer(prompt) for prompt in prompts for letter in ABILITIES)


def test_the_bases_have_seen_none_and_40_of_the_task():
    seen = {base: sum(row["prompt"][0] == "x" for row in pretraining(base)) for base in ("without", "with_some")}
    assert seen == {"without": 0, "with_some": 40}


@pytest.mark.parametrize("task, num", [("scarce_32", 32), ("scarce_256", 256)])
def test_scarce_demonstrations_are_so_many_of_512_prompts(task, num):
    assert len(training(QUESTIONS[task])) == 512
    assert [solved(row["prompt"], row["target"]) for row in demonstrated(task)] == [1.0] * num


def test_exactly_30_of_100_noisy_demonstrations_are_wrong():
    right = [solved(row["prompt"], row["target"]) for row in demonstrated("noisy")]
    assert len(right) == 512 and right.count(0.0) == round(0.3 * 512) == 154


def test_the_other_style_is_right_and_has_no_digit():
    rows = demonstrated("style")
    assert all(solved(row["prompt"], row["target"]) for row in rows)
    assert set("".join(row["target"] for row in rows)) == set("abcdefghij")


def test_plenty_is_4000_right_demonstrations():
    assert [solved(row["prompt"], row["target"]) for row in demonstrated("plenty")] == [1.0] * 4000


def test_the_configurations_are_one_in_each_quarter_of_each_dimension():
    drawn = trials(4)
    for name in ("coef", "schedule"):
        assert sorted(int(4 * getattr(trial, name)) for trial in drawn) == [0, 1, 2, 3]
    rates = sorted(math.log(trial.rl_lr / 1e-4) / math.log(10) for trial in drawn)
    assert [int(4 * rate) for rate in rates] == [0, 1, 2, 3]
    assert trials(4) == drawn


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_config_with_as_many_responses_in_a_rollout(arm, tmp_path):
    work = Work(tmp_path, {part: str(tmp_path / f"{part}.jsonl") for part in ("train", "validation", "test")})
    for trial in trials():
        own = ARMS[arm](lengths_of("noisy", 40_000), trial)
        config = config_of(settings_of(own, trial), work, part="test", seed=1)
        assert config.ppo.num_responses == 64
        assert config.optimizer["lr"] * config.sft.lr_factor == pytest.approx(trial.sft_lr)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Of the task with few demonstrations, from a model that knows nothing."""
    folder = tmp_path_factory.mktemp("fair")
    tokenizer = demo_tokenizer(["x0123456789>"], vocab_size=259)
    demo_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = {"train": training(QUESTIONS["scarce_32"]), **{p: held_out(p)[::20] for p in ("test", "validation")}}
    for part in rows:
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[part]))
    return Work(folder, {part: str(folder / f"{part}.jsonl") for part in rows})


def test_a_run_ends_when_both_budgets_are_spent_and_is_measured_at_both(work):
    trial = trials()[0]
    settings = settings_of(ARMS["sft_only"](lengths_of("scarce_32", 900), trial), trial)
    settings["sft"]["batch_size"] = 16  # about 200 tokens
    config = config_of(settings, work, part="test", seed=0)
    found = run(config, tokens=900, seconds=0.0, points=3)
    marks = [row["tokens"] for row in found["curve"]]
    assert marks[0] == 0 and all(300 * i <= mark < 300 * i + 250 for i, mark in enumerate(marks))
    assert found["at"] == {"seconds": 0, "tokens": 3}
    longer = run(config, tokens=300, seconds=0.2, points=1)
    rows = [longer["curve"][longer["at"][end]] for end in ("tokens", "seconds")]
    # Which budget is spent last depends on the machine: the run ends with that one.
    assert rows[0]["tokens"] >= 300 and rows[1]["seconds"] >= 0.2
    assert longer["curve"][-1] in rows


def test_measuring_a_joint_run_takes_no_time_of_it(work):
    # This strategy says its objectives by its plans, which are asked for in the midst of an evaluation too.
    trial = trials()[0]
    settings = settings_of(ARMS["joint"](lengths_of("scarce_32", 900), trial), trial)
    curve = run(config_of(settings, work, part="test", seed=0), tokens=900, seconds=0.05, points=1)["curve"]
    for before, after in pairwise(curve):
        assert before["tokens"] < after["tokens"] and before["seconds"] < after["seconds"]


def test_an_outside_strategy_is_an_arm_by_one_line(work, tmp_path, monkeypatch):
    line = {"import": "examples.custom_strategy", "mixing": {"strategy": "rescue", "steps": 100}}
    job = Job("scarce_32", "mine", 0, 0, "test", tmp_path, tmp_path, Size(600, 0.0), json.dumps(line))
    monkeypatch.setattr("benchmarks.fair.prepare", lambda task, folder: work)
    found = made(job)
    assert found["settings"]["mixing"] == {"strategy": "rescue", "steps": 100}
    assert found["curve"][found["at"]["tokens"]]["tokens"] >= 600
    # Kept: a second look makes nothing.
    monkeypatch.setattr("benchmarks.fair.run", None)
    assert made(job) == found


def row(tokens, reward, kept=1.0):
    return {"tokens": tokens, "seconds": tokens / 10, "reward": reward, **dict.fromkeys(ABILITIES, kept), "kl": 0.0}


def runs(task, reward_of, kept=1.0):
    """Of every arm, five seeds that differ a little."""
    return [
        {"task": task, "arm": arm, "seed": seed, "trial": 0, "drawn": {}, "settings": {}, "commit": "c", "tokens": 100,
         "at": {"tokens": 1, "seconds": 1}, "curve": [row(0, 0.0), row(100, reward_of(arm) + seed / 100, kept)]}
        for arm in ARMS for seed in SEEDS
    ]  # fmt: skip


def test_retention_is_of_the_starts_abilities_and_at_most_1():
    assert retention(row(1, 0.5, 0.45), row(0, 0.0, 0.9)) == pytest.approx(0.5)
    assert retention(row(1, 0.5, 1.0), row(0, 0.0, 0.9)) == 1.0
    assert measure("forgetting", row(1, 0.5, 0.45), row(0, 0.0, 0.9)) == pytest.approx(0.25)
    assert measure("plenty", row(1, 0.5, 0.45), row(0, 0.0, 0.9)) == 0.5


def test_an_arm_that_is_far_better_is_named_and_one_that_is_alike_is_not():
    made_of = runs("noisy", lambda arm: 0.8 if arm == "luffy" else 0.4)
    found = task_result("noisy", made_of, made_of)
    about = {"missing": {"noisy": 0, "plenty": 90}, "tokens": 1, "seconds": 1.0, "trials": 4}
    text = page({**about, "tasks": {"noisy": found}})
    assert "Mix: `luffy`." in text and "+0.400" in text
    assert "4,000 right demonstrations (90 runs to go)" in text and "1 of 6 tasks" in text
    lines = {line.split(" | ")[0][2:]: line for line in table(found).splitlines()}
    assert "**+0.400" in lines["luffy"] and "**" not in lines["hpt"]


def test_where_all_arms_are_alike_the_page_says_so():
    made_of = runs("noisy", lambda arm: 0.4)
    text = page(
        {
            "missing": {},
            "tokens": 1,
            "seconds": 1.0,
            "trials": 4,
            "tasks": {"noisy": task_result("noisy", made_of, made_of)},
        }
    )
    assert "No mixture is shown to be better" in text and "Mix:" not in text


@pytest.mark.skipif(not RESULT.is_file(), reason="no result of the study is committed")
def test_the_page_is_of_the_committed_result():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "does-mixing-help.md").read_text(encoding="utf-8") == page(result)
    for task, found in result["tasks"].items():
        assert {len(scores) for scores in found["tuning"].values()} == {NUM_TRIALS}
        assert {tuple(arm["seeds"]) for arm in found["arms"].values()} == {SEEDS} or all(
            arm["seeds"] == list(SEEDS) for arm in found["arms"].values()
        )
        if QUESTIONS[task].base == "without":
            assert found["base"]["reward"] < 0.01


def test_the_kept_runs_are_of_the_settings_that_the_study_has():
    files = sorted(CELLS.glob("*/*.json"))
    for file in files:
        held = json.loads(file.read_text(encoding="utf-8"))
        job = Job(held["task"], held["arm"], held["trial"], held["seed"], held["part"], CELLS, ROOT)
        assert job.file == file and {name: held[name] for name in job.about()} == job.about()
        assert held["part"] == ("validation" if held["seed"] == TUNING_SEED else "test")


@pytest.mark.slow
def test_the_study_runs_and_takes_finished_runs_as_they_are(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fair, "prepare", lambda task, folder: work)
    arguments = ("--quick", "--tasks", "scarce_32", "--arms", "sft_only", "sequential", "--work", str(tmp_path))
    first, second = (studied(fair, *arguments, monkeypatch=monkeypatch, capsys=capsys) for _ in range(2))
    assert first[0] == second[0] and "| sft_only |" in first[0]
    assert "seed 0" in first[1] and "seed 0" not in second[1]
