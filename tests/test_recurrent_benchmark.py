"""The study of the recurrent models: its rows, its measure, and a round of three updates."""

import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.recurrent import ARMS, KEYS, SYMBOLS, TASKS, THEN, VALUES, draw, made, measured, run, table, train
from benchmarks.recurrent import Arm as ArmOf
from hybrid.core import IGNORE

ROOT = Path(__file__).resolve().parents[1]


def test_the_copied_half_is_the_first_and_is_trained():
    row = TASKS["copy"].row(5, random.Random(0))
    middle = row.input_ids.index(THEN)
    assert row.input_ids[1:middle] == row.input_ids[middle + 1 :] and middle == 6
    assert set(row.input_ids[1:middle]) <= set(SYMBOLS)
    assert row.labels == (IGNORE,) * 7 + row.input_ids[7:]


def test_told_pairs_are_asked_for_and_their_values_are_trained():
    row = TASKS["recall"].row(6, random.Random(1))
    middle = row.input_ids.index(THEN)
    told, asked = row.input_ids[1:middle], row.input_ids[middle + 1 :]
    pairs = [dict(zip(half[::2], half[1::2], strict=True)) for half in (told, asked)]
    assert len(told) == len(asked) == 12 and pairs[1].items() <= pairs[0].items() and told != asked
    assert set(pairs[0]) <= set(KEYS) and set(pairs[0].values()) <= set(VALUES)
    trained = [token for token in row.labels if token != IGNORE]
    assert trained == list(asked[1::2]) and row.labels[-1] == row.input_ids[-1]


def test_the_measure_of_a_model_that_knows_is_one_and_of_one_that_guesses_is_not():
    task = TASKS["copy"]
    policy = made(task, ArmOf("lstm", 8, 1e-3, 0), 0)
    guessed = measured(policy, task, 8, 20)
    assert guessed["token"] < 0.5 and guessed["row"] == 0.0

    class Knows:
        """Its hidden state is what comes next; of the first row's last two tokens it knows only one."""

        def __call__(self, ids, mask):
            following = torch.cat([ids[:, 1:], ids[:, :1]], 1)
            following[0, -2] = 0
            return torch.nn.functional.one_hot(following, 27).float()

        def logits(self, hidden):
            return hidden

    found = measured(SimpleNamespace(backbone=Knows()), task, 8, 20)
    assert found["row"] == pytest.approx(19 / 20) and found["token"] == pytest.approx(1 - 1 / 160)


def test_training_lowers_the_loss_and_depends_on_the_seed_alone():
    task, arm = TASKS["copy"], ArmOf("lstm", 16, 1e-2, 12)
    losses = [train(made(task, arm, seed), task, arm, seed) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    first = train(made(task, arm, 0), task, ArmOf("lstm", 16, 1e-2, 1), 0)
    assert losses[0] < first


def test_the_table_and_the_picture_have_every_arm(tmp_path):
    runs = [
        {"task": name, "arm": arm.name, "seed": seed, "parameters": 1000, "seconds": 1.0,
         "tested": {str(n): {"token": 1 - seed / 2, "row": 0.0} for n in TASKS[name].tested}}
        for name in TASKS for arm in ARMS[name] for seed in (0, 1)
    ]  # fmt: skip
    lines = table(runs).splitlines()
    assert len(lines) == 4 and all("0.750 (0.500)" in line for line in lines)
    draw(runs, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_run_with_slots_is_measured_at_every_length():
    task = TASKS["recall"]
    found = run(task, ArmOf("slots", 8, 1e-3, 1, True, {"memory_width": 4}), 0, rows=2)
    assert list(found["tested"]) == [str(n) for n in task.tested]


@pytest.mark.slow
def test_the_quick_study_prints_a_table():
    command = [sys.executable, "benchmarks/recurrent.py", "--quick", "--seeds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.split("\n\n")[1].splitlines()) == 4
