"""Learned metrics of translation, which run under another Python: their packages cannot share our environment."""

import math
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hybrid.core import InputError
from hybrid.rewards import learned_metric_functions
from hybrid.rewards.base import Reward, register_reward
from hybrid.rewards.worker import Worker

__all__ = ["Bleurt", "Comet", "LearnedMetric"]

HAS_MODULE = "import importlib.util, sys; sys.exit(0 if importlib.util.find_spec(sys.argv[1]) else 3)"


@dataclass
class LearnedMetric(Reward):
    """A batch function of `learned_metric_functions`, called in a process of the Python `interpreter`."""

    reads = ("response", "target", "prompt")
    needs_target = True

    package: ClassVar[str]  # what pip installs
    module: ClassVar[str]  # what Python imports
    function: ClassVar[str]

    model: str
    interpreter: str | None = None  # a Python that has the package, such as "comet-env/bin/python"
    timeout: float = 1800.0  # seconds for a batch; the first one loads the model

    def __post_init__(self) -> None:
        if not 0 < self.timeout < math.inf:
            raise InputError(f"timeout must be a positive number of seconds, got {self.timeout}")
        self._check_interpreter()
        script = Path(learned_metric_functions.__file__).resolve()
        self._call = Worker(f"{script}:{self.function}", timeout=self.timeout, interpreter=self.interpreter)

    def _check_interpreter(self) -> None:
        way_out = (
            f"reward {self.component_name!r} needs another Python that has {self.package}: "
            f"python -m venv env && env/bin/pip install {self.package}, then give interpreter 'env/bin/python'"
        )
        if self.interpreter is None:
            raise InputError(f"interpreter is missing; {way_out}")
        try:
            found = subprocess.run([self.interpreter, "-c", HAS_MODULE, self.module], capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(f"interpreter {self.interpreter!r} cannot be run: {error}; {way_out}") from error
        if found.returncode:
            raise InputError(f"interpreter {self.interpreter!r} has no module {self.module!r}; {way_out}")

    def _score(self, responses: list[str], targets: list[str], prompts: list[str], items: list[Any]) -> Any:
        return self._call(responses, targets, prompts, [self.model] * len(responses))


@register_reward("comet")
@dataclass
class Comet(LearnedMetric):
    """COMET: quality of a translation (the response) of the prompt, given the target; about 0 to 1.

    model: a name on the Hugging Face hub or a checkpoint's path. Only the talk with the other Python is tested
    here: unbabel-comet itself was not tried. Source: Rei et al. 2020, arXiv:2009.09025.
    """

    package, module, function = "unbabel-comet", "comet", "comet"

    model: str = "Unbabel/wmt22-comet-da"


@register_reward("bleurt")
@dataclass
class Bleurt(LearnedMetric):
    """BLEURT: how much the response says what the target says; about 0 to 1.

    model: a name on the Hugging Face hub or a folder. bleurt-pytorch itself was not tried here.
    Source: Sellam et al. 2020, arXiv:2004.04696.
    """

    package, module, function = "git+https://github.com/lucadiliello/bleurt-pytorch.git", "bleurt_pytorch", "bleurt"

    model: str = "lucadiliello/BLEURT-20"
