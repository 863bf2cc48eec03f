"""The study of benchmarks/mixing.py: its tokens are counted, its budget ends a run, its table pairs the seeds."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.mixing_report import interval, sweep_table, table
from benchmarks.mixing_run import ARMS, Lengths, Metered, arm_config, run
from benchmarks.mixing_tasks import TASKS, Work
from hybrid import HybridConfig

ROOT = Path(__file__).resolve().parents[1]
ROWS = [{"prompt": "Once upon a time", "target": " there was a cat."}, {"prompt": "One day", "target": " a dog ran."}]


@pytest.fixture
def config(stories, tmp_path):
    """Of the real 260K model with two examples."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return HybridConfig.from_dict(
        {
            "model": {"name": stories},
            "data": {"template": "none", "train": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "rows.jsonl")},
            "reward": {"type": "exact_match"},
            "sampling": {"max_new_tokens": 5},
            "sft": {"batch_size": 2},
            "ppo": {"batch_size": 4, "minibatch_size": 2, "epochs": 3},
            "mixing": {"strategy": "sequential", "sft_steps": 1000, "ppo_steps": 0},
        }
    )


@pytest.fixture
def metered(config):
    return Metered(config=config)


def test_a_supervised_step_costs_the_tokens_of_its_batch(metered):
    batch = next(metered.loader)
    metered.sft_step(batch)
    assert metered.spent == metered.trained == int(batch.attention_mask.sum())
    assert metered.trained_ppo == 0


def test_a_ppo_step_costs_its_rollouts_tokens_in_every_epoch_and_what_was_generated(metered):
    rollout = metered.rollout(next(metered.prompts))
    metered.ppo_step(rollout)
    assert metered.trained == metered.trained_ppo == 3 * int(rollout.attention_mask.sum())
    assert metered.spent == metered.trained + int(rollout.mask.sum())


def test_an_evaluation_costs_no_tokens(metered):
    metered.evaluation()
    assert metered.spent == 0


def test_ppo_is_held_to_the_policy_that_it_begins_with_and_measured_against_the_base(metered):
    metered.sft_step(next(metered.loader))
    began, later = (metered.rollout(next(metered.prompts)).kl.abs().max() for _ in range(2))
    assert began == later == 0
    assert metered.evaluation()[0]["kl"] != 0


def test_a_run_ends_with_the_step_that_spends_its_budget(config, metered):
    cost = int(next(metered.loader).attention_mask.sum())
    result = run(replace(TASKS["films"], budget=3 * cost + 1), config)
    assert result["steps"] == 4
    assert result["tokens"] == {"sft": 4 * cost, "ppo": 0, "generated": 0}


def test_the_reward_of_the_hard_prompts_is_measured_apart(config):
    task = replace(TASKS["films"], budget=1, is_hard=lambda prompt: prompt == "One day")
    assert run(task, config)["metrics"]["reward_hard"] == 0.0
    with pytest.raises(KeyError):
        run(replace(task, is_hard=None), config)["metrics"]["reward_hard"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_of_every_task_is_a_config_of_the_trainer(task, arm, tmp_path):
    files = {part: str(tmp_path / f"{part}.jsonl") for part in ("train", "validation", "test")}
    made = arm_config(TASKS[task], Work(tmp_path, files), arm, Lengths(sft=320.0, ppo=40.0, joint_batch=32), seed=1)
    assert made.optimizer["lr"] * made.sft.lr_factor == pytest.approx(TASKS[task].sft_lr)
    # The same number of responses for each rollout, whatever the arm.
    assert made.ppo.num_responses == 64


def test_the_interval_of_1_2_3_is_that_of_students_t_with_2_degrees_of_freedom():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5), rel=1e-4)


def result(arm, seed, reward, *, kl=0.0, lr=None):
    metrics = {"reward": reward, "sft_loss": 1.0 - reward, "kl": kl}
    return {"task": "t", "arm": arm, "seed": seed, "lr": lr, "metrics": metrics, "config": {"kl": {"coef": 0.05}}}


def test_the_table_compares_runs_of_the_same_seed():
    rewards = {"sequential": (0.1, 0.5), "joint": (0.2, 0.6)}
    runs = [result(arm, seed, reward) for arm in rewards for seed, reward in enumerate(rewards[arm])]
    # The seeds differ much, and the arms by exactly 0.1 in each.
    assert "| **+0.100 ± 0.000** | **-0.100 ± 0.000** |" in table(runs).splitlines()[-1]


def test_the_sweep_picks_the_lowest_loss_of_sft_and_the_highest_penalised_reward_of_rl():
    numbers = {1e-4: (0.5, 1.0), 1e-3: (0.9, 20.0)}  # reward and KL
    runs = [
        result(arm, 0, reward, lr=lr, kl=kl)
        for arm in ("sft_only", "rl_only_kl")
        for lr, (reward, kl) in numbers.items()
    ]
    bold = [line.split(" | ")[1:3] for line in sweep_table(runs, {"t": "sft_loss"}).splitlines() if "**" in line]
    # result's SFT loss is 1 - reward; 0.9 - 0.05 * 20 is less than 0.5 - 0.05 * 1.
    assert bold == [["sft_only", "**0.001**"], ["rl_only_kl", "**0.0001**"]]


@pytest.mark.slow
def test_the_study_runs_and_takes_finished_runs_as_they_are(tmp_path):
    command = [sys.executable, "benchmarks/mixing.py", "--quick", "--tasks", "digits", "--seeds", "2",
               "--arms", "sft_only", "sequential", "--work", str(tmp_path)]  # fmt: skip

    def table_of_a_run():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return [line for line in done.stdout.splitlines() if line.startswith("|")]

    first = table_of_a_run()
    assert [line.split(" | ")[0] for line in first] == [
        "| digits", "| ---", "| base", "| sft_only", "| sequential",
    ]  # fmt: skip
    # The table shows seconds, which no second run would repeat.
    assert table_of_a_run() == first
