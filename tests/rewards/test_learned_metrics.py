import sys

import pytest

from hybrid.core import InputError
from hybrid.rewards import make_reward
from hybrid.rewards.base import RewardError

# As much of the package as is called, with a score that can be computed by hand. The real one is not here.
COMET = """
from types import SimpleNamespace

def download_model(name):
    print("downloading", name)
    return "/models/" + name

def load_from_checkpoint(path):
    return Model(path)

class Model:
    def __init__(self, path):
        self.path = path
    def eval(self):
        return self
    def predict(self, samples, batch_size, gpus, progress_bar):
        if any(sample["mt"] == "fails" for sample in samples):
            raise RuntimeError("no memory")
        scores = [len(s["src"]) + 10 * len(s["mt"]) + 100 * len(s["ref"]) + 1000 * len(self.path) for s in samples]
        return SimpleNamespace(scores=scores)
"""
TORCH = "from types import SimpleNamespace\ncuda = SimpleNamespace(device_count=lambda: 0)\n"


@pytest.fixture
def other_python(tmp_path):
    """An interpreter that has `comet` and a `torch` of its own, as one of another virtual environment would."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "comet.py").write_text(COMET)
    (tmp_path / "packages" / "torch.py").write_text(TORCH)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "packages"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_comet_gets_source_translation_reference_and_model_in_the_other_python(other_python):
    reward = make_reward({"type": "comet", "model": "m", "interpreter": other_python})
    path = 1000 * len("/models/m")
    assert reward.score(["a", "bb"], ["ccc", ""], ["", "dddd"]) == [path + 310, path + 24]
    assert "comet" not in sys.modules


def test_its_failure_is_an_error_of_the_sample(other_python):
    reward = make_reward({"type": "comet", "interpreter": other_python})
    with pytest.raises(RewardError, match="'comet' failed on response 'fails': RuntimeError: no memory"):
        reward("fails")
    assert reward("a") > 0


@pytest.mark.parametrize("kind", ["comet", "bleurt"])
def test_without_an_interpreter_the_error_says_how_to_make_one(kind):
    with pytest.raises(InputError, match=rf"^REWARD.interpreter is missing; reward '{kind}' needs .* -m venv env && "):
        make_reward({"type": kind})


def test_an_interpreter_without_the_package_is_refused(other_python):
    with pytest.raises(InputError, match=r"^REWARD.interpreter '.*' has no module 'bleurt_pytorch'; .*pip install"):
        make_reward({"type": "bleurt", "interpreter": other_python})


def test_an_interpreter_that_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^REWARD.interpreter '.*' cannot be run: .*No such file"):
        make_reward({"type": "comet", "interpreter": str(tmp_path / "none")})


def test_a_bad_timeout_is_refused(other_python):
    with pytest.raises(InputError, match=r"^REWARD.timeout must be a positive number of seconds, got 0"):
        make_reward({"type": "comet", "interpreter": other_python, "timeout": 0})
