"""What can go wrong around a run - kills, disks, damaged and hostile files, a second run - ends well, end to end."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
from forks import Forks
from test_resume import assert_equal_runs, config, rows_of

from hybrid import HybridConfig, HybridTrainer
from hybrid.cli import main
from hybrid.core import InputError
from hybrid.resume import resumable
from hybrid.run import CHECKPOINTS, Checkpoints

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

# All thirty of the issue take three minutes: HYBRID_KILLS=30 pytest tests/test_faults.py -k kill
KILLS = int(os.environ.get("HYBRID_KILLS", "5"))
MIXTURES = {
    "joint": {"strategy": "joint", "steps": 9, "mu": 1.0, "schedule": "linear", "final_mu": 0.0},
    "turns": {"cycles": 3, "sft_steps_per_cycle": 2, "ppo_steps_per_cycle": 1, "curriculum": "reward", "target_reward": 2.0},
}


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("forks")) as server:
        yield server


@pytest.fixture
def folder(forks):
    """A new folder where the forks' file operations count."""
    folder = forks.folder / str(len(list(forks.folder.iterdir())))
    folder.mkdir()
    return folder


def written(stories, folder, name, **sections):
    """The config file of a run of nine steps that saves after each."""
    settings = {"optimizer": {"name": "adamw_8bit", "lr": 1e-3}, "checkpoint": {"every": 1}, "eval": {"num_prompts": 3, "every": 4}}
    file = folder / f"{name}.json"
    file.write_text(json.dumps(config(stories, folder, name, **settings | sections)))
    return file


def folders(folder):
    """Every folder that a run has left, hidden ones too."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


# Kills


@pytest.mark.slow
def test_a_run_killed_at_random_moments_equals_the_uninterrupted_one(stories, forks, folder):
    draw, kills, resumes = random.Random(0), 0, 0
    for number in range(2 * KILLS):
        mixture = list(MIXTURES)[number % 2]
        whole = folder / mixture
        if number < 2:
            file = written(stories, folder, mixture, mixing=MIXTURES[mixture])
            status, said = forks.run("train", file)
            assert status == 0, said
        name = f"{mixture}-{number}"
        start = command = ("train", written(stories, folder, name, mixing=MIXTURES[mixture]))
