"""The study of benchmarks/memory.py: what its table says of a run, and that each arm is a config."""

import pytest
from studied import studied

from benchmarks import memory
from benchmarks.memory import ARMS, PPO_LR, config_of, measures, table
from benchmarks.mixing_tasks import Work


def result(arm, seed, *rewards, budget=400):
    """A run with an evaluation every 100 tokens; prompts of 3 and 8 digits, the short ones .2 above the others."""
    curve = [
        {"tokens": 100 * i, "reward": x, "3": round(x + 0.2, 6), "8": round(x - 0.2, 6)} for i, x in enumerate(rewards)
    ]
    return {"arm": arm, "seed": seed, "budget": budget, "curve": curve, "chosen": {"3": 0.75, "8": 0.25}}


def test_a_run_is_measured_by_its_last_three_evaluations():
    found = measures(result("uniform", 0, 0.2, 0.6, 0.3, 0.5, 0.4))
    assert found["reward"] == pytest.approx(0.4)
    assert found["hard"] == pytest.approx(0.2)
    # .8 at its best, .6 at the end.
    assert found["forgetting"] == pytest.approx(0.2)
    assert found["tokens"] == 100


def test_a_goal_that_is_never_reached_takes_the_whole_budget():
    assert measures(result("uniform", 0, 0.2, 0.25, 0.29))["tokens"] == 400


def test_the_table_compares_runs_of_the_same_seed():
    # The seeds differ much, and the arms by .1 in each.
    arms = {"uniform": 0.0, "fsrs": 0.1}
    runs = [result(arm, seed, *[arms[arm] + base] * 3) for arm in arms for seed, base in ((0, 0.1), (1, 0.5))]
    lines = table(runs).splitlines()
    assert lines[2].startswith("| uniform | 2 | 0.300 ±") and "| +0.100 ± 0.000 |" in lines[3]
    assert lines[3].endswith("| 25% |") and "(2 never)" in lines[3]


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_config_with_as_many_responses_a_step(arm, tmp_path):
    if arm == "fsrs":
        pytest.importorskip("fsrs")
    files = {part: str(tmp_path / f"{part}.jsonl") for part in ("train", "test")}
    made = config_of(arm, 1, tmp_path, Work(tmp_path, files), PPO_LR)
    assert made.ppo.num_responses == 64 and bool(made.memory) == (arm != "uniform")


@pytest.mark.slow
def test_the_study_runs_and_takes_finished_runs_as_they_are(tmp_path, monkeypatch, capsys):
    arguments = ("--quick", "--seeds", "1", "--arms", "uniform", "leitner", "--work", str(tmp_path))
    first, second = (studied(memory, *arguments, monkeypatch=monkeypatch, capsys=capsys) for _ in range(2))
    assert first[0] == second[0] and "| leitner | 1 |" in first[0]
    assert "leitner seed 0" in first[1] and "seed 0" not in second[1]
