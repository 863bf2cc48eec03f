"""Any Python function as a reward."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid.core import InputError, load_object
from hybrid.rewards.base import Reward, register_reward
from hybrid.rewards.user_function import BadFunction, bound
from hybrid.rewards.worker import Worker

__all__ = ["PythonFunction"]

DEFAULT_TIMEOUT = 10.0


@register_reward("python")
@dataclass
class PythonFunction(Reward):
    """Any function, f(response, target, *, prompt, item) or f(responses, targets, prompts, items).

    It takes what it names of these, in any order; `**kwargs` gets the rest; the names say which form it is.
    Where none of them is named, the first parameter is the response. A target of several references comes as a list.

    With `isolate` it runs in a process of its own, by its name: a call that takes over `timeout` seconds is killed,
    and a crash is an error of that sample. Items reach it as JSON makes them; what it prints goes to stderr. That
    guards the run against functions that hang or crash; it is no sandbox (see `worker`).
    """

    takes_references = True

    function: str | Callable[..., Any]  # "package.module:name", or the function itself
    batch: bool | None = None  # whether it takes lists; None = by its parameters' names
    isolate: bool = False
    timeout: float | None = None  # with isolate: seconds for a call, of one sample or a batch; 10 unless given
    interpreter: str | None = None  # with isolate: another Python to run it, such as "other-env/bin/python"

    def __post_init__(self) -> None:
        if self.isolate:
            self.needs_batch, self._call = self._isolated()
            return
        for name in ("timeout", "interpreter"):
            if (value := getattr(self, name)) is not None:
                raise InputError(f"{name} can be had only with isolate true, got {value!r}")
        function = load_object(self.function, what="function") if isinstance(self.function, str) else self.function
        try:
            self.needs_batch, self.reads, self._call = bound(function, self.batch)
        except BadFunction as error:
            raise InputError(str(error)) from error

    def _isolated(self) -> tuple[bool, Callable[..., Any]]:
        if not isinstance(self.function, str):
            raise InputError(
                f"function must be given by name, as 'package.module:name', to be isolated; got {self.function!r}"
            )
        if self.timeout is None:
            self.timeout = DEFAULT_TIMEOUT
        if not 0 < self.timeout < math.inf:
            raise InputError(f"timeout must be a positive number of seconds, got {self.timeout}")
        worker = Worker(self.function, batch=self.batch, timeout=self.timeout, interpreter=self.interpreter)
        return worker.takes_lists(), worker

    def _score(self, responses: list[str], targets: list[Any], prompts: list[str], items: list[Any]) -> Sequence[Any]:
        score = self._call if self.needs_batch else super()._score
        return score(responses, targets, prompts, items)

    def _score_one(self, response: str, target: Any, prompt: str, item: Any) -> float:
        return self._call(response, target, prompt, item)
